"""Several processes train together over gloo on the loopback: the same numbers, one ending for all."""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tests.conftest import ROOT, SMALL, read_state, recorded

HEARTBEAT_SECONDS = 10
FLAGS = [*SMALL, "--dtype=float64", "--model.dropout=0.1"]


@pytest.fixture
def processes(user_env, text_file):
    """Starts the processes of one training, each with its own flags; ends those that are left."""
    started: list[subprocess.Popen] = []

    def start(flags: list[list[object]], n_devices: int = 1, **env: str) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        layout = f"--distributed --coordinator={coordinator} --num-processes={len(flags)} --join-timeout=120"
        layout += f" --heartbeat-timeout={HEARTBEAT_SECONDS}"
        line = [sys.executable, str(ROOT / "scripts" / "train.py"), "--dataset", f"file:{text_file}", *layout.split()]
        env = {**user_env, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(n_devices), **env}
        for i, own in enumerate(flags):
            words = [*line, f"--process-id={i}", *map(str, own)]
            kwargs = dict(env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            started.append(subprocess.Popen(words, **kwargs))
        return started[-len(flags) :]

    yield start
    for process in started:
        process.kill()
        process.wait()


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """The exit code, standard output and standard error of each, without what gloo prints."""
    results = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        results.append((process.returncode, re.sub(r"\[Gloo\].*\n", "", out), err))
    return results


def by_one_process(command, text_file, out: Path, *flags: object, n_devices: int = 1) -> Path:
    env = {"JAX_NUM_CPU_DEVICES": str(n_devices)}
    done = command("train.py", "--dataset", f"file:{text_file}", "--out-dir", out, *FLAGS, *flags, **env)
    assert done.returncode == 0, done.stderr
    return out


def wait_for(path: Path, process: subprocess.Popen) -> None:
    begun = time.monotonic()
    while not path.exists():
        assert process.poll() is None and time.monotonic() - begun < 200, process.communicate()
        time.sleep(0.05)


def losses(out: Path) -> np.ndarray:
    return np.loadtxt(out / "steps.csv", delimiter=",", skiprows=1)[:, 1]


def same_to_the_last_bit(a: Path, b: Path, step: int) -> None:
    assert recorded(a) == recorded(b)
    for at in (read_state(a, step), read_state(b, step)):
        assert int(at["step"]) == step
    for name, values in read_state(a, step)["params"].items():
        np.testing.assert_array_equal(values, read_state(b, step)["params"][name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a text", "a corpus in shards", "weights of a run"])
def test_two_processes_train_what_one_does(processes, command, text, text_file, trained, tmp_path, kind):
    """A sum of two is the same in both orders, so all is equal to the last bit; one process speaks and writes."""
    more = ["--steps=21", "--sample-every=20"]
    if kind == "weights of a run":
        more += [f"--init-from={trained}"]
    if kind == "a corpus in shards":
        (tmp_path / "corpus").mkdir()
        for number in range(3):
            rows = pyarrow.table({"text": text.split()[number::3]})
            parquet.write_table(rows, tmp_path / "corpus" / f"train-{number:05}-of-00003.parquet", row_group_size=500)
        more += [f"--dataset=hf:{tmp_path / 'corpus'}", "--streaming=always", "--tokenizer=byte", "--packing=chunks"]
    flags = [*FLAGS, *more, "--out-dir", tmp_path / "two"]
    (code, out, err), (other_code, other_out, other_err) = ended(processes([flags, flags]))
    assert (code, other_code) == (0, 0), err + other_err
    assert "on 2 x CPU" in out and "whole validation split" in out and other_out == other_err == ""
    one = by_one_process(command, text_file, tmp_path / "one", *more, n_devices=2)
    same_to_the_last_bit(tmp_path / "two", one, 21)
    written = {path.name for path in (tmp_path / "two").iterdir()}
    assert written == {path.name for path in one.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "n_processes, n_devices, flags",
    [(4, 1, []), (2, 2, ["--mesh=data=2,fsdp=2"]), (4, 1, ["--mesh=fsdp=4", "--grad-accum=2"])],
    ids=["4", "2 with fsdp within each", "4 with fsdp across them"],
)
def test_any_layout_gives_the_losses_of_one_process(
    n_processes, n_devices, flags, processes, command, text_file, tmp_path
):
    flags = [*flags, "--diagnose-every=20", "--attention-every=20", "--sample-every=20"]
    given = [*FLAGS, *flags, "--steps=40", "--out-dir", tmp_path / "many"]
    results = ended(processes([given] * n_processes, n_devices))
    assert [code for code, _, _ in results] == [0] * n_processes, results
    one = by_one_process(command, text_file, tmp_path / "one", "--steps=40")
    # Sums of four in another order, in float64: units in the last place of a loss near 2.
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(one), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_other_numbers_of_processes_go_on(processes, command, text_file, tmp_path):
    """Stopped by a signal to the second of two, gone on with by four sharded ones until a SIGINT, ended by one."""
    run, rest = tmp_path / "run", ["--steps=600", "--eval-every=200"]
    done = 0
    for number, to, n_processes, mesh in ((signal.SIGTERM, 1, 2, []), (signal.SIGINT, 0, 4, ["--mesh=fsdp=4"])):
        running = processes([[*FLAGS, *rest, *mesh, "--out-dir", run]] * n_processes)
        wait_for(run / "checkpoints" / str(done // 10 * 10 + 21), running[0])
        running[to].send_signal(number)
        results = ended(running)
        assert [code for code, _, _ in results] == [128 + number] * n_processes, results
        stopped = re.search(r"stopped after (\d+) of 600 steps, all saved", results[0][1])
        assert stopped and len(losses(run)) == int(stopped[1]) > done, results
        done = int(stopped[1])
        assert (run / "checkpoints" / str(done)).is_dir()
    by_one_process(command, text_file, run, *rest)
    whole = by_one_process(command, text_file, tmp_path / "whole", *rest)
    np.testing.assert_allclose(losses(run), losses(whole), rtol=0, atol=1e-12)  # sums in another order, in float64


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_other_ends_and_the_run_goes_on_exactly(killed, processes, command, text_file, tmp_path):
    flags = [*FLAGS, "--steps=600", "--eval-every=200"]
    given = [*flags, "--out-dir", tmp_path / "run"]
    running = processes([given, given])
    wait_for(tmp_path / "run" / "checkpoints" / "21", running[0])
    running[killed].kill()
    at = time.monotonic()
    code, _, err = ended([running[1 - killed]])[0]
    assert code != 0 and time.monotonic() - at < HEARTBEAT_SECONDS + 20
    # Process 0 runs JAX's service: without it JAX aborts the others, with a message of its own.
    assert "a collective has failed" in err or "another task died" in err, err
    results = ended(processes([given, given]))
    assert [code for code, _, _ in results] == [0, 0] and "resuming after" in results[0][1], results
    by_one_process(command, text_file, tmp_path / "one", *flags[len(FLAGS) :], n_devices=2)
    same_to_the_last_bit(tmp_path / "run", tmp_path / "one", 600)


@pytest.mark.slow
def test_processes_that_do_not_fit_together_are_told(processes, tmp_path):
    flags = [*FLAGS, "--steps=10", "--out-dir", tmp_path / "run"]
    missing = processes([flags])[0]
    missing.kill()
    for layout, words in (
        ([[*flags, "--num-processes=2", "--join-timeout=5"]], "--num-processes 2: not all processes have joined"),
        ([flags, [*flags, "--lr=0.5"]], "--lr 0.01 there, 0.5 here"),
        ([flags, [*flags, "--loader=device"]], "--loader device: process 0 has auto"),
        ([[*flags, "--batch-size=9"]] * 2, "--batch-size 9: not divisible by the 2 devices"),
        ([[*flags, "--parallel=pmap"]] * 2, "--parallel pmap: takes the devices of one process"),
    ):
        results = ended(processes(layout))
        assert all(code == 2 for code, _, _ in results), results
        assert any(words in err for _, _, err in results), results
        assert not any("Traceback" in err for _, _, err in results), results
