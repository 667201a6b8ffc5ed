import json
import os
import signal
from types import SimpleNamespace

from benchmarks import profiled_train


def test_each_part_has_its_own_time_and_the_first_evaluation_counts_as_once(tmp_path, monkeypatch):
    clock, stops = [0.0], []

    def stop(pid, number):
        assert (pid, number) == (os.getpid(), signal.SIGSTOP)
        stops.append(clock[0])
        clock[0] += 100.0  # stopped for as long, which does not count

    def takes(seconds):
        def function(*args):
            clock[0] += seconds

        return function

    monkeypatch.setattr(profiled_train.os, "kill", stop)
    monkeypatch.setattr(profiled_train.time, "perf_counter", lambda: clock[0])
    owner = SimpleNamespace(step=takes(1.0), evaluate=takes(4.0))
    profiler = profiled_train.LoopProfiler(tmp_path / "p.json", 1.5)
    profiler.instrument(owner, "step", lambda: "steps")
    profiler.instrument(owner, "evaluate", lambda: "evaluation")
    owner.evaluate()  # before the first step: no part of the loop
    owner.step()
    profiler.on_dispatch(2)  # the very first ends an interval
    owner.step()
    owner.evaluate()
    profiler.on_dispatch(2)
    owner.evaluate()
    clock[0] += 0.25  # the loop's own
    profiler.on_train_end()
    assert json.loads((tmp_path / "p.json").read_text()) == [
        {"steps": 2, "seconds": 1.0, "parts": {"steps": 1.0}},
        {"steps": 2, "seconds": 5.0, "parts": {"steps": 1.0, "once": 4.0}},
        {"steps": 0, "seconds": 4.25, "parts": {"evaluation": 4.0}},
    ]
    assert len(stops) == 3
