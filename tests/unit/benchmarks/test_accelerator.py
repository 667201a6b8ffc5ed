"""`make accelerator`: its stages in processes, what it keeps, and its part of docs/benchmarks.md."""

import math
import sys
import time
from xml.etree import ElementTree

import pytest

from benchmarks import accelerator
from benchmarks.accelerator import AIMS, NO_ACCELERATOR, PROBE, STAGES, Failed, NotMeasured, Stage
from jaxgpt.analysis.targets import Target
from jaxgpt.parity.harness import Row

GPU = {"platform": "gpu", "device": "NVIDIA H100 80GB HBM3", "count": 1, "versions": {"jax": "1", "torch": "2"}}
CPU = {"platform": "cpu", "device": "cpu", "count": 1, "versions": {"jax": "1"}}
# A stage's process gets a folder as its last argument.
WRITES = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[-1])
found = {"passed": 2, "skipped": 0, "on": json.loads((folder / "machine.json").read_text()).get("device")}
(folder / "outcome.json").write_text(json.dumps({"status": "measured", "why": "", "found": found}))
"""
FAILS = "raise SystemExit('no such card')"
STARTS_ANOTHER_AND_SLEEPS = """
import pathlib, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5); open({!r}, 'w')"])
time.sleep(60)
"""


def stage(program: str, name: str = "tests", limit_s: float = 60, needs_accelerator: bool = True) -> Stage:
    return Stage(name, limit_s, needs_accelerator, (sys.executable, "-c", program))


def measured(found: dict, **fields) -> dict:
    of_now = {"commit": "abc", "versions": GPU["versions"]}
    return {"status": "measured", "why": "", "found": found, "seconds": 3, **of_now, **fields}


def speed(preset: str = "gpt2-124m", graphs: float = 1.3, compiled: float = 1.2) -> dict:
    """What `run_speed` finds, with the ratios of PyTorch's implementations."""
    row = {"ms_min": 9.0, "ms_max": 11.0, "tokens_s": 5e5, "first_step_s": 4.0, "loss_gap": 1e-3}
    ours = row | {"side": "ours", "name": "jaxgpt", "ms_per_step": 10.0, "memory_mib": 4000.0}
    others = [
        row | {"side": side, "name": f"PyTorch, {side}", "ratio": r, "ms_per_step": 10 * r, "memory_mib": 10_000.0}
        for side, r in (("eager", 1.1), ("compile", compiled), ("graphs", graphs))
    ]
    machine = {"device": GPU["device"], "dtype": "bfloat16"}
    return {"preset": preset, "machine": machine, "flop_per_token": {"F12": 1e9}, "rows": [ours, *others]}


PLAN = {
    "target": "H100:1",
    "bytes_per_device": {"peak": 4 * 10**9},
    "estimated": {"step_s": 0.008, "mfu": 0.6},
}
RESULTS = {
    "tests": measured({"passed": 2, "skipped": 1}),
    "speed nanogpt-char": measured(speed("nanogpt-char", graphs=1.4)),
    "speed gpt2-124m": measured(speed()),
    "plan gpt2-124m": measured(PLAN),
    "plan nanogpt-char": measured({}) | {"status": "not measured", "why": "its compiler is missing"},
}


def test_the_limits_of_all_stages_are_ten_minutes():
    assert PROBE.limit_s + sum(s.limit_s for s in STAGES) <= 600


def test_a_stage_computes_in_a_process_of_its_own():
    found = accelerator.run_stage(stage(WRITES), GPU)
    assert (found["status"], found["found"]["passed"], found["found"]["on"]) == ("measured", 2, GPU["device"])


def test_of_a_process_that_fails_the_last_line_is_told():
    found = accelerator.run_stage(stage(FAILS), GPU)
    assert (found["status"], found["found"]) == ("failed", None)
    assert found["why"] == "its process ends with exit code 1: no such card"


def test_at_its_limit_a_stage_ends_with_the_processes_that_it_has_started(tmp_path):
    begun = time.perf_counter()
    found = accelerator.run_stage(stage(STARTS_ANOTHER_AND_SLEEPS.format(str(tmp_path / "alive")), limit_s=1), GPU)
    assert (found["status"], found["why"]) == ("failed", "not done after its 1 s")
    assert time.perf_counter() - begun < 10
    time.sleep(1)
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize(
    "before, commit, is_new",
    [
        (measured({}), "abc", False),
        (measured({}), "abd", True),
        (measured({}, versions={"jax": "2"}), "abc", True),
        (measured({}, status="failed"), "abc", True),
        (measured({}, status="not measured"), "abc", True),
        (measured({}, commit="abc+"), "abc+", True),  # the code has changes, perhaps others than then
        ({}, "abc", True),
    ],
)
def test_only_what_was_measured_with_the_same_code_and_versions_is_not_measured_again(before, commit, is_new):
    kept = {"tests": before}
    ((_, result, new),) = accelerator.run_stages((stage(WRITES),), GPU, commit, kept)
    assert new == is_new
    assert result["status"] == "measured" and (result["commit"], result["versions"]) == (commit, GPU["versions"])


def test_without_an_accelerator_nothing_that_needs_one_is_started():
    stages = stage(FAILS), stage(WRITES, needs_accelerator=False)
    first, second = (result for _, result, _ in accelerator.run_stages(stages, CPU, "abc", {}))
    assert (first["status"], first["why"]) == ("not measured", "JAX finds no GPU or TPU here")
    assert second["status"] == "measured"


@pytest.fixture
def record(tmp_path, monkeypatch):
    """An empty record and page."""
    monkeypatch.setattr(accelerator, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(accelerator, "PAGE", tmp_path / "page.md")
    accelerator.PAGE.write_text(f"before {accelerator.BEGIN}\n{accelerator.END} after", encoding="utf-8")
    return accelerator


def test_the_command_goes_on_after_a_failure_and_from_where_it_was(record, monkeypatch, capsys):
    probe = f"{WRITES.replace('found = ', f'found = {GPU!r} if 1 else ')}"
    monkeypatch.setattr(accelerator, "PROBE", stage(probe, "devices"))
    monkeypatch.setattr(accelerator, "code_commit", lambda: "abc")
    monkeypatch.setattr(accelerator, "STAGES", (stage(FAILS, "parity"), stage(WRITES)))
    assert accelerator.main([]) == 1
    title, parity, tests, *aims = capsys.readouterr().out.splitlines()
    assert title == "NVIDIA H100 80GB HBM3; jax 1, torch 2; commit abc"
    assert "failed: its process ends with exit code 1: no such card" in parity and "2 passed, 0 skipped" in tests
    assert len(aims) == len(AIMS) and all(line.endswith(": not measured") for line in aims)
    assert list(accelerator.read_record()[GPU["device"]]) == ["parity", "tests"]
    monkeypatch.setattr(accelerator, "STAGES", (stage(WRITES, "parity", needs_accelerator=False), stage(FAILS)))
    monkeypatch.setattr(accelerator, "line", lambda name, results: results[name]["status"])
    assert accelerator.main([]) == 0
    _, parity, tests, *_ = capsys.readouterr().out.splitlines()
    assert parity.split()[:2] == ["parity", "measured"] and tests.split() == ["tests", "measured", "(as", "before)"]


def test_the_page_is_what_the_record_gives():
    written = accelerator.PAGE.read_text(encoding="utf-8").split(accelerator.BEGIN)[1].split(accelerator.END)[0]
    assert written.strip() == accelerator.sections(accelerator.read_record()).strip()


def test_the_section_of_a_machine(record):
    record.keep(NO_ACCELERATOR, {"tests": measured({}, status="not measured", why="none")})
    record.keep("NVIDIA H100 80GB HBM3", RESULTS)
    text = record.PAGE.read_text(encoding="utf-8")
    assert text.startswith("before ") and text.endswith(" after") and "No accelerator" not in text
    for wanted in (
        "### NVIDIA H100 80GB HBM3\n\nWith jax 1, torch 2, at commit abc.",
        "| `tests` | 2 passed, 1 skipped |",
        "| `plan nanogpt-char` | not measured: its compiler is missing |",
        "| `gpt2-124m` | jaxgpt | 10.00 (9.00 to 11.00) | 500,000 |",
        "| `gpt2-124m` | 4.19 GB | 4 GB | 10.00 ms | 8.00 ms | 51% | 60% |",
    ):
        assert wanted in text, wanted


def test_the_aims_are_told_and_not_asserted():
    graphs, compiled, memory, mfu = (aim.verdict(RESULTS) for aim in AIMS)
    assert graphs == "1.40, missed" and compiled == "1.20, met"  # the smallest ratio is the fastest's
    assert memory == "0.40, met" and mfu == "51%, met"
    alone = speed()
    alone["rows"] = alone["rows"][:1]
    alone["machine"] = {"device": "another card", "dtype": "bfloat16"}
    assert {aim.verdict({"speed gpt2-124m": measured(alone)}) for aim in AIMS} == {"not measured"}


def cases(*inner: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(f'<testcase name="t">{text}</testcase>') for text in inner]


def test_what_pytest_reports():
    skipped = '<skipped message="needs a GPU"/>'
    assert accelerator.read_tests(cases("", "", skipped)) == {"passed": 2, "skipped": 1}
    with pytest.raises(NotMeasured, match="^needs a GPU$"):
        accelerator.read_tests(cases(skipped, skipped))
    with pytest.raises(NotMeasured, match="no such tests"):
        accelerator.read_tests([])
    with pytest.raises(Failed, match="^1 of 2: t: it differs$"):
        accelerator.read_tests(cases("", '<failure message="it differs&#10;more"/>'))


def test_what_the_parity_suite_finds():
    rows = [
        Row("GPU logits", "float32, GPU", "", 1.5, ratio=1.2),
        Row("GPU gradients", "float32, GPU", "", 2.0, ratio=1.9),
    ]
    found = accelerator.read_parity(rows)
    told = accelerator.line("parity", {"parity": measured(found)})
    assert told == "2 passed; the nearest to its tolerance: GPU gradients, R 1.90 of 2"
    with pytest.raises(Failed, match="^1 of 3: GPU logits, bfloat16, GPU: inf, tolerance 1.5$"):
        accelerator.read_parity([*rows, Row("GPU logits", "bfloat16, GPU", "", 1.5, ratio=math.inf)])
    with pytest.raises(NotMeasured, match="^no GPU$"):
        accelerator.read_parity([Row("GPU logits", "float32, GPU", "", 1.5, note="no GPU", not_run=True)])


def test_a_plan_needs_the_figures_and_the_compiler_of_the_device(monkeypatch):
    with pytest.raises(NotMeasured, match="knows no NVIDIA T4"):
        accelerator.run_plan(GPU | {"device": "NVIDIA T4"}, "gpt2-124m")
    with pytest.raises(NotMeasured, match="a whole v4, 2 devices"):
        accelerator.run_plan(GPU | {"device": "TPU v4"}, "gpt2-124m")
    monkeypatch.setattr(Target, "compiler_is_installed", False)
    with pytest.raises(NotMeasured, match="in the extra aot-gpu"):
        accelerator.run_plan(GPU, "gpt2-124m")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tests", "parity"])
def test_on_a_cpu_a_stage_tells_what_it_needs(name, monkeypatch):
    monkeypatch.delenv("JAXGPT_TEST_SHARE", raising=False)  # a share of the stage's own few tests may be none
    found = accelerator.run_stage(Stage.named(name, 300), CPU)
    assert found["status"] == "not measured" and "GPU" in found["why"], found


@pytest.mark.slow
def test_speed_is_measured_as_the_bench_does():
    pytest.importorskip("torch")
    found = accelerator.run_speed(CPU, "tinygpt", rounds=1, turn_seconds=0.01)
    assert [row["side"] for row in found["rows"]] == ["ours", "eager"]
    results = {"speed tinygpt": measured(found)}
    assert "times as fast as PyTorch" in accelerator.line("speed tinygpt", results)
    assert accelerator.mfu_of(found) is None  # of a CPU the peak is not known


@pytest.mark.aot
@pytest.mark.slow
def test_a_plan_of_what_is_measured():
    planned = accelerator.run_stage(Stage.named("plan nanogpt-char", 300), GPU)
    if planned["status"] == "not measured":
        pytest.skip(planned["why"])
    assert planned["status"] == "measured", planned
    assert planned["found"]["bytes_per_device"]["peak"] > 10**9 and planned["found"]["estimated"]["step_s"] > 0
