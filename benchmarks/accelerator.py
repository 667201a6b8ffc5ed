"""What there is to measure on an accelerator, in at most ten minutes: `make accelerator`.

    python -m benchmarks.accelerator           # measures what this machine has no result of
    python -m benchmarks.accelerator --page    # only writes the page anew

Each stage is a process of its own with a limit of time, so one that fails does not end the others. Its result is kept
in docs/accelerator_results.json, of which a part of docs/benchmarks.md is made. What has been measured on the same
device at the same commit with the same versions is not measured again.
"""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from benchmarks import page
from benchmarks.alternating import torch_version, worker_environment
from jaxgpt import strict_json
from jaxgpt.analysis.targets import chip_of, compile_without_accelerators, parse_target
from jaxgpt.cli.args import exit_code
from jaxgpt.errors import UserError
from jaxgpt.memory import size_text
from jaxgpt.presets import BENCHMARKS

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "docs" / "accelerator_results.json", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- accelerator: written by python -m benchmarks.accelerator -->", "<!-- end of the accelerator -->"
CODE = ("jaxgpt", "benchmarks", "parity_tests", "torch_ref", "tests", "pyproject.toml")  # what a result depends on
NO_ACCELERATOR = "no accelerator"
# What `jaxgpt bench` knows, as far as ten minutes allow; one that cannot start is left out.
SIDES = {"nanogpt-char": ("ours", "eager", "compile", "graphs"), "gpt2-124m": ("ours", "compile", "graphs")}
COMPILED = ("compile", "graphs")
ROUNDS = 5

Machine = Mapping[str, Any]  # platform, device, count, versions
Result = dict[str, Any]  # status, why, found, seconds, commit, versions


class NotMeasured(Exception):
    """Raised by a stage that has nothing to measure here; the message says why."""


class Failed(Exception):
    """Raised by a stage whose comparison has failed; the message says which."""


# ------------------------------------------------------------------------------------ the stages, each in its process


def probe(machine: Machine) -> Machine:
    """The devices and versions of this machine."""
    import jax

    devices = jax.devices()
    versions = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    kind = devices[0].device_kind
    return {"platform": devices[0].platform, "device": kind, "count": len(devices), "versions": versions}


def run_tests(machine: Machine) -> dict[str, Any]:
    """How many of the tests marked gpu pass."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        flags = ["-m", "gpu", "-n", "0", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *flags, "tests"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            raise Failed(f"pytest ends with exit code {done.returncode}: {done.stderr.strip()[-200:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    return read_tests(cases)


def read_tests(cases: list[ElementTree.Element]) -> dict[str, Any]:
    """The number of tests that passed. Raises `Failed` or `NotMeasured`, with a test's own words."""
    wrong = [(case, m) for case in cases for m in (*case.findall("failure"), *case.findall("error"))]
    failed = [f"{case.get('name')}: {m.get('message', '')}" for case, m in wrong]
    if failed:
        raise Failed(f"{len(failed)} of {len(cases)}: {failed[0].splitlines()[0][:200]}")
    skipped = [m.get("message", "") for c in cases for m in c.findall("skipped")]
    if len(skipped) == len(cases):
        raise NotMeasured(skipped[0] if skipped else "there are no such tests")
    return {"passed": len(cases) - len(skipped), "skipped": len(skipped)}


def run_parity(machine: Machine) -> dict[str, Any]:
    """The parity suite's level for accelerators, in float32 and bfloat16."""
    from jaxgpt.parity.suite import run_check
    from parity_tests.suite import SUITE, prepare_process

    prepare_process(os.cpu_count() or 1)
    return read_parity(run_check("accelerator", SUITE.checks["accelerator"]).rows)


def read_parity(rows: Sequence[Any]) -> dict[str, Any]:
    """The rows of the suite as JSON. Raises `Failed` or `NotMeasured` with the first that failed or did not run."""
    if all(row.not_run for row in rows):
        raise NotMeasured(rows[0].note)
    if failed := [row for row in rows if row.status == "FAILED"]:
        first = failed[0]
        why = first.note or f"{first.value:.3g}, tolerance {first.tolerance:g}"
        raise Failed(f"{len(failed)} of {len(rows)}: {first.check}, {first.precision}: {why}")
    return {"rows": [row.to_json() for row in rows]}


def run_speed(machine: Machine, preset: str, rounds: int = ROUNDS, turn_seconds: float = 1.0) -> dict[str, Any]:
    """A training step's time and memory beside PyTorch's, as `jaxgpt bench` measures them."""
    from benchmarks import steps
    from jaxgpt.cli import bench

    flags = bench.parse_flags(["--preset", preset, "--rounds", str(rounds), "--turn-seconds", str(turn_seconds)])
    flags.torch_python = Path(sys.executable)
    flags.torch = torch_version(flags.torch_python)
    flags.known = {side: bench.IMPLEMENTATIONS[side] for side in SIDES.get(preset, ("ours", "eager"))}
    return steps.measure(preset, flags)


def run_plan(machine: Machine, preset: str) -> dict[str, Any]:
    """What `jaxgpt plan` expects of the configuration that `run_speed` measures."""
    chip = chip_of(machine["device"])
    if chip is None:
        raise NotMeasured(f"jaxgpt plan knows no {machine['device']}")
    if chip.cores > 1:
        raise NotMeasured(f"a plan is of a whole {chip.name}, {chip.cores} devices; the speed is measured on one")
    target = parse_target(f"{chip.name}:1")
    if not target.compiler_is_installed:
        raise NotMeasured(f"its compiler is in the extra {target.extra}")
    compile_without_accelerators()
    from jaxgpt.analysis.plan import make_plan  # jax begins here

    config, vocab_size = BENCHMARKS[preset]
    plan = make_plan(config, vocab_size, target, n_tokens=1e9)
    return {name: plan[name] for name in ("target", "versions", "fits", "bytes_per_device", "estimated")}


class Stage(NamedTuple):
    """A stage, with the command of its process without the folder that it reads machine.json from and writes to."""

    name: str
    limit_s: int
    needs_accelerator: bool
    command: tuple[str, ...]

    @classmethod
    def named(cls, name: str, limit_s: int, needs_accelerator: bool = True) -> "Stage":
        return cls(name, limit_s, needs_accelerator, (sys.executable, "-m", "benchmarks.accelerator", "--stage", name))


FUNCTIONS: dict[str, Callable[..., Any]] = {  # by the first word of a stage's name; the others are arguments
    "devices": probe,
    "tests": run_tests,
    "parity": run_parity,
    "speed": run_speed,
    "plan": run_plan,
}
PROBE = Stage.named("devices", 40, needs_accelerator=False)
STAGES = (
    Stage.named("tests", 70, needs_accelerator=False),  # these two tell themselves what they need
    Stage.named("parity", 60, needs_accelerator=False),
    Stage.named("speed nanogpt-char", 120),
    Stage.named("speed gpt2-124m", 210),
    Stage.named("plan nanogpt-char", 30),
    Stage.named("plan gpt2-124m", 70),
)


def compute_stage(name: str, folder: Path) -> None:
    """Computes a stage in this process, and writes its outcome into the folder."""
    word, *arguments = name.split()
    machine = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    outcome = {"status": "measured", "why": "", "found": None}
    try:
        outcome["found"] = FUNCTIONS[word](machine, *arguments)
    except (NotMeasured, Failed) as e:
        outcome |= {"status": "failed" if isinstance(e, Failed) else "not measured", "why": str(e)}
    (folder / "outcome.json").write_text(strict_json.dumps(outcome), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- running them


def run_stage(stage: Stage, machine: Machine) -> Result:
    """A stage's outcome and the seconds that it took. Its process, and those that it starts, end at the limit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "machine.json").write_text(strict_json.dumps(machine), encoding="utf-8")
        begun = time.perf_counter()
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [*stage.command, name],
                cwd=ROOT,
                env=worker_environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                process.wait(stage.limit_s)
                why = f"its process ends with exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                why = f"not done after its {stage.limit_s} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = round(time.perf_counter() - begun)
        written = folder / "outcome.json"
        if written.exists():
            return json.loads(written.read_text(encoding="utf-8")) | {"seconds": seconds}
        lines = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = f": {lines[-1].strip()[:200]}" if lines else ""
        return {"status": "failed", "why": why + last, "found": None, "seconds": seconds}


def run_stages(stages: tuple[Stage, ...], machine: Machine, commit: str, kept: Mapping[str, Result]) -> Iterator[tuple]:
    """(stage, result, whether it is new) of each stage as it comes; of `kept` those that are still valid."""
    of_now = {"commit": commit, "versions": dict(machine["versions"])}
    for stage in stages:
        before = kept.get(stage.name, {})
        if before.get("status") == "measured" and before.items() >= of_now.items() and not commit.endswith("+"):
            yield stage, before, False
        elif stage.needs_accelerator and machine["platform"] == "cpu":
            why = "JAX finds no GPU or TPU here"
            yield stage, {"status": "not measured", "why": why, "found": None, "seconds": 0, **of_now}, True
        else:
            yield stage, run_stage(stage, machine) | of_now, True


def measure_all() -> int:
    """Measures what has no result, a line for each; returns the exit code, 1 if a stage has failed."""
    probed = run_stage(PROBE, {})
    if probed["status"] != "measured":
        raise UserError(f"JAX_PLATFORMS: JAX finds no device, {probed['why']}; set it to cpu to go on without")
    machine, commit = probed["found"], code_commit()
    title = title_of(machine)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{title}; {versions}; commit {commit}", flush=True)
    results = dict(read_record().get(title, {}))
    for stage, result, is_new in run_stages(STAGES, machine, commit, results):
        results[stage.name] = result
        if is_new:
            keep(title, results)
        took = f"{result['seconds']} s" if is_new else "as before"
        print(f"{stage.name:<20} {line(stage.name, results)} ({took})", flush=True)
    for aim in AIMS:
        print(f"{aim.what}: {aim.verdict(results)}")
    return 1 if any(result["status"] == "failed" for result in results.values()) else 0


def title_of(machine: Machine) -> str:
    if machine["platform"] == "cpu":
        return NO_ACCELERATOR
    return f"{machine['count']} x {machine['device']}" if machine["count"] > 1 else machine["device"]


def code_commit() -> str:
    """The last commit that changed the code; "+" follows where there are changes since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words, "--", *CODE], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    return git("log", "-1", "--format=%h") + ("+" if git("status", "--porcelain") else "")


# ------------------------------------------------------------------------------------------------ the record, the page


def read_record() -> dict[str, dict[str, Result]]:
    """Results by stage, by machine."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def keep(title: str, results: Mapping[str, Result]) -> None:
    """Keeps a machine's results, those of `NO_ACCELERATOR` as long as there are no others; writes the page anew."""
    kept = read_record() | {title: dict(results)}
    if len(kept) > 1:
        kept.pop(NO_ACCELERATOR, None)
    RECORD.write_text(strict_json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    write_page(kept)


def write_page(kept: Mapping[str, Mapping[str, Result]]) -> None:
    page.write_between(PAGE, BEGIN, END, f"\n{sections(kept)}\n")


def sections(kept: Mapping[str, Mapping[str, Result]]) -> str:
    """Markdown: of each machine a table of the stages, one of the aims, and those of speed and of the plans."""
    parts = []
    for title, results in kept.items():
        versions = sorted({", ".join(f"{n} {v}" for n, v in r["versions"].items()) for r in results.values()})
        commits = sorted({r["commit"] for r in results.values()})
        parts.append(f"### {title[0].upper()}{title[1:]}\n")
        parts.append(f"With {'; '.join(versions)}, at commit {', '.join(commits)}.\n")
        parts.append(
            page.table(["stage", "result"], [[f"`{name}`", line(name, results).replace("|", "/")] for name in results])
        )
        parts.append(page.table(["aim", "measured"], [[aim.what, aim.verdict(results)] for aim in AIMS]))
        timed = [found for _, found in _found(results, "speed")]
        if timed:
            rows = [row for found in timed for row in page.steps_rows(found["preset"], found)]
            parts.append(page.table(page.STEPS_HEAD, rows))
        planned = [cells for preset, found in _found(results, "plan") if (cells := _plan_cells(preset, found, results))]
        if planned:
            head = ["configuration", "peak memory", "by plan", "step", "estimated", "MFU", "estimated"]
            parts.append(page.table(head, planned))
    return "\n".join(parts)


def line(name: str, results: Mapping[str, Result]) -> str:
    """A stage's result in words."""
    result = results[name]
    found, (word, *_) = result["found"], name.split()
    if result["status"] != "measured":
        return f"{result['status']}: {result['why']}"
    if word == "tests":
        return f"{found['passed']} passed, {found['skipped']} skipped"
    if word == "parity":
        nearest = max(found["rows"], key=lambda row: row["ratio"] / row["tolerance"])
        ratio = f"R {nearest['ratio']:.2f} of {nearest['tolerance']:g}"
        return f"{len(found['rows'])} passed; the nearest to its tolerance: {nearest['check']}, {ratio}"
    if word == "speed":
        ours, *others = found["rows"]
        ratios = [f"{row['ratio']:.2f} times as fast as {row['name']}" for row in others]
        memory = size_text(ours["memory_mib"] * 2**20)
        return "; ".join([f"{ours['ms_per_step']:.2f} ms a step, {memory}", *ratios])
    memory, estimated = found["bytes_per_device"], found["estimated"]
    step = f", {1e3 * estimated['step_s']:.2f} ms a step" if estimated else ""
    return f"expects {size_text(memory['peak'])}{step}"


def _found(results: Mapping[str, Result], word: str) -> list[tuple[str, dict[str, Any]]]:
    """(preset, what was found) of the measured stages whose name begins with a word."""
    return [
        (name.split()[1], result["found"])
        for name, result in results.items()
        if name.split()[0] == word and result["status"] == "measured"
    ]


def _plan_cells(preset: str, plan: Mapping[str, Any], results: Mapping[str, Result]) -> list[str]:
    """What a plan expects beside what was measured; nothing where the speed was not, or the plan does not fit."""
    timed, estimated = dict(_found(results, "speed")).get(preset), plan["estimated"]
    if not timed or not estimated:
        return []
    ours, mfu = timed["rows"][0], mfu_of(timed)
    return [
        f"`{preset}`",
        size_text(ours["memory_mib"] * 2**20),
        size_text(plan["bytes_per_device"]["peak"]),
        f"{ours['ms_per_step']:.2f} ms",
        f"{1e3 * estimated['step_s']:.2f} ms",
        "" if mfu is None else f"{mfu:.0%}",
        f"{estimated['mfu']:.0%}",
    ]


def mfu_of(timed: Mapping[str, Any]) -> float | None:
    """Model FLOP utilisation by F12; None where the device's peak is not known."""
    return page.share_of_peak(timed["flop_per_token"]["F12"] * timed["rows"][0]["tokens_s"], timed["machine"])


# ------------------------------------------------------------------------------------------------------------ the aims


@dataclass(frozen=True)
class Aim:
    """A figure to reach. It is told beside what was measured, and never asserted."""

    what: str
    preset: str
    value: Callable[[Mapping[str, Any]], float | None]  # of what `run_speed` found
    bound: float
    is_lower: bool = True  # else the value should be at most the bound
    form: str = ".2f"

    def verdict(self, results: Mapping[str, Result]) -> str:
        timed = dict(_found(results, "speed")).get(self.preset)
        value = self.value(timed) if timed else None
        if value is None:
            return "not measured"
        met = value >= self.bound if self.is_lower else value <= self.bound
        return f"{value:{self.form}}, {'met' if met else 'missed'}"


def _rows(timed: Mapping[str, Any], sides: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of PyTorch's implementations, the fastest first."""
    return sorted((row for row in timed["rows"] if row["side"] in sides), key=lambda row: row["ratio"])


def over_compiled(timed: Mapping[str, Any]) -> float | None:
    """The time of the best compiled PyTorch over ours."""
    return next((row["ratio"] for row in _rows(timed, COMPILED)), None)


def over_graphs(timed: Mapping[str, Any]) -> float | None:
    """The time of compiled PyTorch with CUDA graphs over ours."""
    return next((row["ratio"] for row in _rows(timed, ("graphs",))), None)


def memory_share(timed: Mapping[str, Any]) -> float | None:
    """Our memory over that of the best compiled PyTorch."""
    ours = timed["rows"][0]
    return next((ours["memory_mib"] / row["memory_mib"] for row in _rows(timed, COMPILED)), None)


AIMS = (
    Aim("`nanogpt-char` 1.5 times as fast as PyTorch compiled with CUDA graphs", "nanogpt-char", over_graphs, 1.5),
    Aim("`gpt2-124m` 1.1 times as fast as the best compiled PyTorch", "gpt2-124m", over_compiled, 1.1),
    Aim("`gpt2-124m` in at most half of that PyTorch's memory", "gpt2-124m", memory_share, 0.5, is_lower=False),
    Aim("`gpt2-124m` at an MFU of at least 50 %", "gpt2-124m", mfu_of, 0.5, form=".0%"),
)


def main(words: list[str]) -> int:
    if words[:1] == ["--stage"]:
        compute_stage(words[1], Path(words[2]))
        return 0
    if words == ["--page"]:
        write_page(read_record())
        return 0
    if words:
        raise UserError(f"{words[0]}: unknown; give --page, or nothing")
    return measure_all()


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
