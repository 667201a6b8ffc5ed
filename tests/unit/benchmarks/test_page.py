import json

from benchmarks import page


def test_the_page_is_what_the_command_writes():
    """The measured part of docs/benchmarks.md is made of docs/benchmarks.json."""
    kept = json.loads((page.FOLDER / "benchmarks.json").read_text(encoding="utf-8"))
    text = (page.FOLDER / "benchmarks.md").read_text(encoding="utf-8")
    assert text.split(page.BEGIN)[1].split(page.END)[0] == "\n" + page.tables(kept)


def test_the_page_keeps_what_a_run_does_not_measure(tmp_path, monkeypatch):
    machine = {"device": "a CPU", "dtype": "float32", "python": "3", "jax": "1"}
    row = {"side": "ours", "name": "jaxgpt", "ms_per_step": 2.0, "ms_min": 1.0, "ms_max": 3.0, "tokens_s": 9.0}
    size = {"what": "T", "factor": 2, "sizes": {"T": 128, "C": 64, "L": 4}, "over_preset": 1.75}
    own = size | {"what": "", "factor": 1, "over_preset": 1.0}
    loop = {"steps": 7, "overhead": 0.03, "shares": {"rest": 0.03}, "error": 0, "bare_ms": 1, "once_s": 1, "end_s": 1}
    parts = {"growth": {"batch_size": 8, "rows": [own | row, size | row]}, "loop": loop}
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    (tmp_path / "benchmarks.md").write_text(f"before {page.BEGIN}\n{page.END} after")
    for name, part in parts.items():
        page.record([{"preset": "tinygpt", "machine": machine, name: part}])
    text = (tmp_path / "benchmarks.md").read_text()
    assert text.startswith("before ") and text.endswith(" after") and text.count("## a CPU, float32") == 1
    assert "| `tinygpt`, batch 8 | 128, 64, 4 | jaxgpt |" in text
    assert "|  | **128**, 64, 4 | jaxgpt | 2.00 (1.00 to 3.00) | 9 | 1.75 |  |" in text
    assert "- `tinygpt`: 7 steps cost 3.0 % more" in text and "first step |" not in text
