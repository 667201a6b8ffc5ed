"""Train the same model several ways and compare: jaxgpt compare --optimizer sgd,adamw --preset minigpt

Takes the flags of `jaxgpt train`, one or more of them with several values, separated by commas (--lr 1e-4,3e-4,1e-3;
--model.tied-head false,true), and trains each combination with the same seed and batches. All but --dataset,
--text-column and --prompt, whose values may themselves hold commas, can be compared.
"""

import dataclasses
import itertools
import math
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt.cli.args import TrainFlags, config_of, parse_train_flags
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.errors import UserError, flag
from jaxgpt.signals import (
    STOP_SIGNALS,
    WARNING_SIGNALS,
    exit_code,
    handle_stop_signals,
    handle_warning_signals,
    warning_signals_held,
)

MAX_RUNS = 64
WITH_COMMAS = ("dataset", "text_column", "prompt")  # a comma there is part of one value
FIELDS = [
    *(f.name for f in dataclasses.fields(TrainConfig) if f.name not in ("model", *WITH_COMMAS)),
    *(f"model.{f.name}" for f in dataclasses.fields(ModelConfig)),
]
FIELD_OF_FLAG = {flag(name): name for name in FIELDS}

TRAIN_COMMAND = [sys.executable, "-m", "jaxgpt", "train"]
REFUSED, DIVERGED, BROKEN_PIPE = 2, 3, 141  # exit codes of `jaxgpt train`
STOPPED = {*(128 + number for number in STOP_SIGNALS), BROKEN_PIPE}


@dataclass(frozen=True)
class CompareFlags(TrainFlags):
    """The flags of `jaxgpt train`, for all runs."""

    out_dir: Path | None = None
    """Folder of the comparison, a run folder for each combination in it (default: runs/compare-<preset>-<time>). The
    same command resumes: finished runs stay, an interrupted one goes on."""
    overwrite: bool = False
    """Start the runs again that --out-dir holds."""


@dataclass(frozen=True)
class Variant:
    """One combination of the compared values."""

    label: str  # also the name of the run folder: "lr=1e-4,optimizer=sgd"
    args: list[str]  # the arguments of `jaxgpt train`
    flags: CompareFlags
    fields: list[str]  # the compared fields' dotted names

    @property
    def config(self) -> TrainConfig:
        """The configuration that the run is trained with."""
        return config_of(self.flags)

    @property
    def values(self) -> dict[str, Any]:
        """The compared fields' values by dotted name."""
        return {name: _value(self.config, name) for name in self.fields}


def main(args: list[str]) -> int:
    """Trains all combinations, one after the other; leaves a table, JSON and curves beside the run folders.

    Each run is a process of its own: float64 and the devices' memory are settings of a whole process, and a run that
    crashes or exhausts the memory must not end the others.

    Returns:
        The exit code: 0 if at least one run finished and none failed, or a warning signal stopped the command; 3 if all
        diverged, 128 + the stop signal, else the exit code of the first run that failed.

    Raises:
        UserError: before anything is written; or the first run is refused, because then most of them are.
    """
    assert __doc__
    variants = parse(args, __doc__)
    flags = variants[0].flags
    _require_comparison_folder(flags.out_dir, variants)
    # Imported here, because it imports jax: after everything that can be refused without it.
    from jaxgpt.analysis.comparison import ComparedRun, Comparison
    from jaxgpt.runs.run_dir import default_run_dir
    from jaxgpt.runs.status import run_status

    dataset = _resolve_dataset(flags, variants)
    out = flags.out_dir or default_run_dir("compare", flags.preset)
    runs = [ComparedRun(v.label, out / v.label, v.values, v.config.tokenizer) for v in variants]
    comparison = Comparison(out, variants[0].fields, dataset, flags.preset, runs)
    failures = []  # exit codes
    with TrainingProcess() as process:
        for number, (variant, run) in enumerate(zip(variants, runs, strict=True), 1):
            print(f"=== {number} of {len(variants)}: {variant.label}", flush=True)
            command = [*TRAIN_COMMAND, *variant.args, "--dataset", dataset, "--out-dir", str(run.path)]
            code, error = process.run(command)
            stops = [n for n in process.signals if n not in WARNING_SIGNALS or flags.on_warning_signal == "stop"]
            stopped_by_warning = code == 0 and run_status(run.path).state != "finished"
            if code in STOPPED or stops and code or stopped_by_warning:
                return _report_stop(comparison, flags.overwrite, code)
            if code == REFUSED and number == 1:
                raise UserError(error or "jaxgpt train was refused; its lines say why")
            if code == 0:
                run.status = "finished"
            elif code == DIVERGED:
                run.status = "diverged"
                run.step, run.error = step_and_cause(error)
                print(f"{run.label}: {run.outcome}: {run.error}", flush=True)
            else:
                run.status, run.error = "failed", error or f"ended with exit code {code}"
                print(f"error: {run.label}: {run.error}", file=sys.stderr, flush=True)
                failures.append(code)
            comparison.record()
            if stops and number < len(variants):
                return _report_stop(comparison, flags.overwrite, exit_code(stops))
    print(f"\n{comparison.report()}\nall in {out}", flush=True)
    if failures:
        return failures[0]
    return 0 if any(run.status == "finished" for run in runs) else DIVERGED


def parse(args: list[str], description: str) -> list[Variant]:
    """All combinations of the flags' values, each parsed as `jaxgpt train` parses it.

    Raises:
        UserError: a combination is no valid configuration, two are the same, there is but one, or too many.
    """
    alternatives, lists = _alternatives(args)
    count = math.prod(len(values) for values in lists.values())
    if count > MAX_RUNS:
        raise UserError(f"{_with_flags(lists)}: {count:,} combinations; give lists that make at most {MAX_RUNS}")
    variants: list[Variant] = []
    for combination in itertools.product(*alternatives):
        chosen = [value for value, _ in combination if value is not None]
        label = ",".join(f"{flag(name)[2:]}={value}" for name, value in zip(lists, chosen, strict=True))
        train_args = [word for _, words in combination for word in words]
        try:
            flags = parse_train_flags(train_args, description, "jaxgpt compare", CompareFlags)
        except UserError as e:
            # An error of the first variant is mostly common to all; an error of another comes from its own values.
            raise UserError(f"{label}: {e}") if variants else e from None
        variants.append(Variant(label, train_args, flags, list(lists)))
    if not lists:
        raise UserError(
            "no flag has several values to compare; give one a list, as in --lr 1e-4,3e-4, or use jaxgpt train "
            f"({', '.join(map(flag, WITH_COMMAS))} are never lists to compare)"
        )
    for a, b in itertools.combinations(variants, 2):
        if a.config == b.config:
            raise UserError(f"{_with_flags(lists)}: {a.label} and {b.label} are the same; give each value once")
        if a.config.dataset != b.config.dataset:
            datasets = f"{a.config.dataset} and {b.config.dataset}"
            raise UserError(f"--preset: losses on {datasets} cannot be compared; give all the same --dataset")
    return variants


def _alternatives(args: list[str]) -> tuple[list[list[tuple[str | None, list[str]]]], dict[str, list[str]]]:
    """For each argument its alternatives, (value, words) each; and the lists of values by field.

    An argument that is no list has one alternative, without a value.
    """
    alternatives: list[list[tuple[str | None, list[str]]]] = []
    lists: dict[str, list[str]] = {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        option, equals, text = word.partition("=")
        name = FIELD_OF_FLAG.get(option.replace("_", "-"))
        if name and not equals and rest and "," in rest[0] and not rest[0].startswith("--"):
            text = rest.pop(0)
        if not name or "," not in text:
            alternatives.append([(None, [word])])
            continue
        if name in lists:
            raise UserError(f"{option}: given twice; give it one list")
        lists[name] = [value.strip() for value in text.split(",")]
        if not all(lists[name]):
            raise UserError(f"{option} {text}: a value is missing; separate values by commas alone, without spaces")
        alternatives.append([(value, _words(option, name, value)) for value in lists[name]])
    return alternatives, lists


def _words(option: str, name: str, value: str) -> list[str]:
    """The flag with one value. A boolean flag takes no value, but has two names: --x and --no-x."""
    if not isinstance(_value(TrainConfig(), name), bool):
        return [f"{option}={value}"]
    if value.lower() not in ("true", "false"):
        raise UserError(f"{option} {value}: to compare, give true,false")
    return [flag(name) if value.lower() == "true" else re.sub(r"([^.-][^.]*)$", r"no-\1", flag(name))]


def _with_flags(lists: dict[str, list[str]]) -> str:
    return ", ".join(f"{flag(name)} {','.join(values)}" for name, values in lists.items())


def _value(config: TrainConfig, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _require_comparison_folder(out: Path | None, variants: list[Variant]) -> None:
    """Raises `UserError` if a folder holds anything but this comparison."""
    if out is None:
        return
    try:
        names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    except OSError as e:
        raise UserError(f"--out-dir {out}: cannot be read ({e.strerror}); choose another folder") from None
    # A comparison that was killed in its first run has no comparison.json yet.
    others = {name for name in names if not name.startswith("comparison.")} - {variant.label for variant in variants}
    if "comparison.json" not in names and others:
        raise UserError(f"--out-dir {out}: holds files that are no comparison; choose an empty or new folder")


def _resolve_dataset(flags: CompareFlags, variants: list[Variant]) -> str:
    """The name of the dataset for all runs: of a list the first that can be had, or the one the runs were begun with.

    The text is loaded before the first run, so that a text that cannot be had leaves no files behind.
    """
    from jaxgpt.data.corpora import load_corpus
    from jaxgpt.runs.run_dir import recorded_choice

    spec = flags.dataset
    if flags.out_dir:
        for variant in variants:
            spec = recorded_choice(flags.out_dir / variant.label, spec)
    return load_corpus(spec, flags.data_dir, print, flags.text_column, flags.streaming).name


def step_and_cause(message: str) -> tuple[int, str]:
    """The step and the cause in the message of a `LossNotFinite`: "step 12: loss nan; ..." gives 12 and "loss nan"."""
    step, _, rest = message.partition(": ")
    return int(step.removeprefix("step ")), rest.partition(";")[0]


def _report_stop(comparison: Any, overwrite: bool, code: int) -> int:
    """Records the results so far and says how to resume. Returns the exit code."""
    if comparison.path.is_dir():
        comparison.record()
    n_done = sum(run.status != "unfinished" for run in comparison.runs)
    without = " and without --overwrite" if overwrite else ""
    print(
        f"comparison stopped after {n_done} of {len(comparison.runs)} runs; the same command with --out-dir "
        f"{comparison.path}{without} goes on",
        flush=True,
    )
    return code


class TrainingProcess:
    """Runs training commands, one at a time; forwards stop and warning signals to the one that is running.

    Each command has a session of its own. A terminal sends Ctrl-C to its whole session, and a run that received the
    signal twice, from there and from here, would end without saving.
    """

    def __init__(self):
        self.signals: list[int] = []  # received so far
        self._process: subprocess.Popen | None = None
        self._n_forwarded = 0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "TrainingProcess":
        self._previous_handlers = handle_stop_signals(self._handle) | handle_warning_signals(self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def run(self, command: list[str]) -> tuple[int, str]:
        """Runs a command to its end, with its output passed through.

        Returns:
            The exit code, 128 + the signal if one ended it; and its line that begins with "error: ", which is not
            passed through.
        """
        error = ""
        with warning_signals_held():
            self._process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
        self._forward_signals()  # those that came while the process was started
        assert self._process.stderr
        with self._process.stderr as lines:
            for line in lines:
                if line.startswith(b"error: "):
                    error = line.decode(errors="replace").removeprefix("error: ").strip()
                else:
                    sys.stderr.buffer.write(line)
                    sys.stderr.flush()
        code = self._process.wait()
        self._process = None  # a signal from here on is for the next command
        return code if code >= 0 else 128 - code, error

    def _handle(self, number: int, _frame: Any) -> None:
        self.signals.append(number)
        self._forward_signals()

    def _forward_signals(self) -> None:
        if self._process is not None:
            while self._n_forwarded < len(self.signals):
                self._n_forwarded += 1
                self._process.send_signal(self.signals[self._n_forwarded - 1])
