"""Faults of what a user gives: bad inputs, damaged files from elsewhere, and random configurations.

test_bad_inputs.py, test_fuzz.py and test_configurations.py try them one by one. Here each kind is tried in one process,
for the table in docs/reliability.md:

    python -m tests.faults.inputs KIND      a line of JSON, a list of [name, outcome, what, count]
"""

import json
import os
import random
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.faults.engine import Case, Fault, Finding, Harness, Outcome
from tests.faults.processes import ROOT, run_line

N_DAMAGED = 300  # files for each reader
N_CONFIGURATIONS = {"train": 150, "finetune": 60}
TIMEOUT = 3600.0  # seconds

Answer = tuple[str, str, str, int]  # the case, its outcome, what there is to say about a bad one, and how often


def bad_inputs() -> Iterator[Answer]:
    """Tries the whole table."""
    from tests.faults import bad_inputs
    from tests.in_process import cli_runner

    outcomes = {"told": Outcome.TOLD, "unclear": Outcome.SILENT, "silent": Outcome.SILENT}
    outcomes |= {"traceback": Outcome.TRACEBACK, "hang": Outcome.HANG}
    told: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for case, outcome, what in bad_inputs.answers(cli_runner(dict(os.environ)), Path(folder)):
            if outcome == "told":
                told[case.command if case.command in bad_inputs.WORKS else "jaxgpt"] += 1
            else:
                yield str(case), outcomes[outcome], what, 1
    for command, count in told.items():
        yield command, Outcome.TOLD, "", count


def damaged_files() -> Iterator[Answer]:
    """Fuzzes every reader."""
    from tests.faults import fuzzing
    from tests.faults.bad_inputs import Hang

    for reader in fuzzing.READERS:
        try:
            answers = fuzzing.fuzz(reader, N_DAMAGED)
        except Hang as e:
            yield reader.name, Outcome.HANG, str(e), 1
        except AssertionError as e:
            yield reader.name, Outcome.SILENT, str(e), 1
        except Exception as e:
            yield reader.name, Outcome.TRACEBACK, f"{type(e).__name__}: {e}", 1
        else:
            yield f"{reader.name}: refused", Outcome.TOLD, "", answers["told"]
            yield f"{reader.name}: read", Outcome.NO_EFFECT, "", answers["read"]


def configurations() -> Iterator[Answer]:
    """Trains by random configurations."""
    from tests.faults import configurations
    from tests.faults.bad_inputs import Hang
    from tests.in_process import cli_runner

    run = cli_runner(dict(os.environ))
    with tempfile.TemporaryDirectory() as place:
        folder = configurations.make_folder(Path(place) / "given")
        for command, n_examples in N_CONFIGURATIONS.items():
            codes: Counter[int] = Counter()
            try:
                configurations.train_by_each(run, folder, command, n_examples, codes)
            except Hang as e:
                yield command, Outcome.HANG, str(e), 1
            except AssertionError as e:
                yield command, Outcome.SILENT, str(e), 1
            except Exception as e:
                yield command, Outcome.TRACEBACK, f"{type(e).__name__}: {e}", 1
            else:
                yield f"{command}: trained", Outcome.NO_EFFECT, "", codes.pop(0)
                yield f"{command}: refused", Outcome.TOLD, "", codes.total()


def _cases(kind: str, _draw: random.Random, harness: Harness) -> list[Case]:
    """Tries a kind in a process of its own; the cases are its answers."""
    line = [sys.executable, "-m", "tests.faults.inputs", kind]
    done = run_line(line, harness.env, timeout=TIMEOUT)
    if done.code != 0:
        raise RuntimeError(f"{' '.join(line)} ended with {done.code}: {done.message}")
    answers = json.loads(done.out.splitlines()[-1])
    return [
        Case(name, partial(_finding, outcome, name, what), count) for name, outcome, what, count in answers if count
    ]


def _finding(outcome: str, name: str, what: str, _harness: Harness, _folder: Path) -> Finding:
    return Finding(Outcome(outcome), name, what)


def _from_tests(draw: random.Random, harness: Harness, name: str) -> list[Case]:
    return [Case(name, partial(_check_tests, name=name))]


def _check_tests(harness: Harness, folder: Path, name: str) -> list[Finding]:
    """Runs tests, each of which is a try."""
    report = folder / "report.xml"
    line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", f"tests/faults/{name}"]
    run_line(line, _env(harness), timeout=TIMEOUT)
    findings = []
    for case in ElementTree.parse(report).iter("testcase"):
        failure = case.find("failure") if case.find("failure") is not None else case.find("error")
        if failure is not None:
            findings.append(Finding(Outcome.SILENT, case.get("name", ""), (failure.get("message") or "")[:200]))
        elif case.find("skipped") is None:
            findings.append(Finding(Outcome.NO_EFFECT))
    return findings


def _env(harness: Harness) -> dict[str, str]:
    return {**harness.env, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


FAULTS = [
    Fault(
        "bad inputs",
        "every flag of every command with each kind of bad value for its type (missing, empty, another type, negative, "
        "huge, not finite, other digits, unknown, a folder, a pipe, a link, names of 300 characters), contradictory "
        "and unknown flags, and files of other formats",
        "nothing: exit code 2, one line that names the flag or the file, and nothing written",
        partial(_cases, "bad_inputs"),
        sample=100,
    ),
    Fault(
        "damaged files from elsewhere",
        "bytes and JSON values of texts, tables, token files, weights, caches, standard input and the small files of a "
        "run changed at random, within limits of time and memory",
        "the reader of the file: it refuses the file, or reads what is there (with a digest: what was written)",
        partial(_cases, "damaged_files"),
        sample=100,
    ),
    Fault(
        "random configurations",
        "up to twelve flags of train and finetune drawn at random, with valid and a few invalid values",
        "nothing: the command trains to its end, or refuses before it has written anything",
        partial(_cases, "configurations"),
        sample=100,
    ),
    Fault(
        "no network",
        "an empty network namespace, and every attempt to connect recorded (`test_network.py`)",
        "every command on local data; no attempt is made",
        partial(_from_tests, name="test_network.py"),
        0,
    ),
]

if __name__ == "__main__":
    print(json.dumps(list(globals()[sys.argv[1]]())))
