"""jaxgpt compare: flags, the outcomes of the training processes, signals. The training command is a stand-in."""

import json
import signal
import sys

import pytest

from jaxgpt.cli import compare
from jaxgpt.cli.compare import TrainingProcess, parse, step_and_cause
from jaxgpt.config import TrainConfig


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--lr=1e-3,0"], "lr=0: --lr 0.0: give a positive number"),
        (["--lr=0,1e-3"], "--lr 0.0: give a positive number"),
        (["--lr", "1e-3,many"], "--lr"),
        (["--lr", "1e-3,"], "--lr 1e-3,: a value is missing"),
        (["--lr", "1e-3,0.001"], "--lr 1e-3,0.001: lr=1e-3 and lr=0.001 are the same"),
        (["--lr=1,2", "--lr=3,4"], "--lr: given twice"),
        (["--lr=1e-3"], "jaxgpt train"),
        (["--dataset=pydoc,tinyshakespeare"], "--dataset, --text-column, --prompt are never"),
        (["--lrs=1e-3,1e-4"], "--lrs"),
        (["--loader=device,host", "--seed=1,2"], "--loader"),
        (["--seed=" + ",".join(map(str, range(13))), "--steps=1,2,3,4,5"], "65 combinations; give lists that make at"),
        (["--optimizer=sgd,adamw", "--momentum=0.9"], "optimizer=adamw: --momentum 0.9"),
        (["--model.tied-head=yes,no"], "--model.tied-head yes: to compare, give true,false"),
        (["--preset=tinygpt,wikitext2"], "give all the same --dataset"),
        (["--preset=minigtp,tinygpt"], "did you mean minigpt?"),
        (["--seed=1,2", "--dataset=file:nothing.txt"], "--dataset file:nothing.txt"),
        (["--seed=1,2", "--out-dir", "held"], "--out-dir held: holds files that are no comparison"),
    ],
)
def test_refuses(cli, tmp_path, flags, part):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "thesis.tex").write_text("precious")
    done = cli("compare", *flags, cwd=tmp_path)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert {path.name for path in tmp_path.rglob("*")} == {"held", "thesis.tex"}


def test_combinations_of_any_fields():
    line = "--preset tinygpt,minigpt --model.n_layer=1,2 --model.tied-head false,true --weight-decay None,0.5 --clip 2"
    found = parse([*line.split(), "--prompt", "To be, or not"], "")
    assert len(found) == 16 and len({variant.label for variant in found}) == 16
    last = found[-1]
    assert last.label == "preset=minigpt,model.n-layer=2,model.tied-head=true,weight-decay=0.5"
    values = {"preset": "minigpt", "model.n_layer": 2, "model.tied_head": True, "weight_decay": 0.5}
    assert last.values == values and last.config.clip == 2 and last.config.prompt == "To be, or not"
    assert {(v.config.steps, v.config.model.block_size) for v in found} == {(500, 64), (5000, 128)}
    assert found[0].config.weight_decay is None and not found[0].config.model.tied_head
    assert isinstance(last.config, TrainConfig)


def test_the_step_and_the_cause_of_a_divergence():
    message = "step 12: loss nan, gradient norm inf; no checkpoint yet; try a lower --lr or --clip 1"
    assert step_and_cause(message) == (12, "loss nan, gradient norm inf")


def python(code):
    return [sys.executable, "-c", code]


def test_a_process_s_error_is_returned_and_the_rest_passed_through(capfd):
    with TrainingProcess() as process:
        code = "import sys; print('a warning', file=sys.stderr); sys.exit('error: --lr 0: too low')"
        assert process.run(python(code)) == (1, "--lr 0: too low")
    assert capfd.readouterr().err == "a warning\n"


def test_a_process_that_a_signal_ended():
    with TrainingProcess() as process:
        assert process.run(python("import os; os.kill(os.getpid(), 9)")) == (128 + 9, "")


def test_a_signal_is_forwarded_and_its_handler_restored():
    handler = signal.getsignal(signal.SIGTERM)
    wait = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    with TrainingProcess() as process:
        assert process.run(python(wait)) == (128 + signal.SIGTERM, "")
        assert process.signals == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.fixture
def stand_in(trained, monkeypatch):
    """Makes the training command a script: it leaves a finished run at --lr 0.01, diverges at 1, fails at 2, is refused
    at 3, and at 4 sends its parent SIGTERM; at 5 and 6 SIGUSR1, which it waits for: then at 5 it stops without having
    finished, as after a checkpoint, and at 6 it finishes."""
    script = f"""
import os, shutil, signal, sys, time
lr = next(word for word in sys.argv if word.startswith("--lr=")).removeprefix("--lr=")
if lr == "1":
    print("error: step 7: loss nan, gradient norm nan; no checkpoint yet", file=sys.stderr)
    sys.exit(3)
if lr == "2":
    sys.exit(9)
if lr == "3":
    sys.exit(2)
if lr == "4":
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
if lr in "56":
    os.kill(os.getppid(), signal.SIGUSR1)
    signal.sigwait({{signal.SIGUSR1}})  # it was started with the signal held back
if lr == "5":
    sys.exit(0)
shutil.copytree({str(trained)!r}, sys.argv[-1])  # --out-dir is given last
"""
    monkeypatch.setattr(compare, "TRAIN_COMMAND", python(script))


@pytest.fixture
def compare_rates(cli, stand_in, text_file, tmp_path):
    """Runs `jaxgpt compare` with some learning rates; returns the finished command and the statuses by rate."""

    def run(*rates, more=()):
        line = ["--dataset", f"file:{text_file}", "--lr", ",".join(rates), "--out-dir", tmp_path / "c", *more]
        done = cli("compare", *line)
        path = tmp_path / "c" / "comparison.json"
        rows = json.loads(path.read_text())["variants"] if path.exists() else []
        return done, {row["label"].removeprefix("lr="): row["status"] for row in rows}

    return run


def test_outcomes_are_ranked(compare_rates):
    done, statuses = compare_rates("1", "2", "0.01")
    assert done.returncode == 9 and done.stderr == "error: lr=2: ended with exit code 9\n"
    assert list(statuses.items()) == [("0.01", "finished"), ("1", "diverged"), ("2", "failed")]
    assert "lr=1: diverged at step 7: loss nan, gradient norm nan\n" in done.stdout


def test_a_later_one_is_refused(compare_rates):
    done, statuses = compare_rates("0.01", "3")
    assert done.returncode == 2 and statuses == {"0.01": "finished", "3": "failed"}


def test_all_diverged(compare_rates, monkeypatch):
    code = "import sys; print('error: step 0: loss inf; no checkpoint yet', file=sys.stderr); sys.exit(3)"
    monkeypatch.setattr(compare, "TRAIN_COMMAND", python(code))
    done, statuses = compare_rates("1", "2")
    assert done.returncode == 3 and set(statuses.values()) == {"diverged"}


def test_the_first_is_refused(compare_rates, tmp_path):
    done, statuses = compare_rates("3", "0.01")
    assert done.returncode == 2 and done.stderr == "error: jaxgpt train was refused; its lines say why\n"
    assert not statuses and not (tmp_path / "c").exists()


@pytest.mark.parametrize("rate, status", [("5", "unfinished"), ("6", "finished")])
def test_a_warning_signal_stops_it_with_exit_code_0(compare_rates, rate, status):
    """Whether the run stops too, or has just finished."""
    done, statuses = compare_rates("0.01", rate, "1")
    assert done.returncode == 0 and not done.stderr
    assert statuses == {"0.01": "finished", rate: status, "1": "unfinished"}
    assert f"stopped after {1 + (rate == '6')} of 3 runs" in done.stdout


def test_with_on_warning_signal_continue_it_goes_on(compare_rates):
    done, statuses = compare_rates("6", "1", more=["--on-warning-signal=continue"])
    assert done.returncode == 0 and statuses == {"6": "finished", "1": "diverged"}


def test_a_stop_is_recorded(compare_rates, tmp_path):
    done, statuses = compare_rates("0.01", "4", "1")
    assert done.returncode == 128 + signal.SIGTERM and not done.stderr
    assert statuses == {"0.01": "finished", "4": "unfinished", "1": "unfinished"}
    stopped = f"comparison stopped after 1 of 3 runs; the same command with --out-dir {tmp_path / 'c'} goes on"
    assert done.stdout.splitlines()[-1] == stopped
