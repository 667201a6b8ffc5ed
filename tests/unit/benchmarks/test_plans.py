"""The table of docs/accelerators.md."""

from benchmarks import plans


def plan(**fields) -> dict:
    return {
        "preset": "minigpt",
        "target": "v5e:2x2",
        "batch_size": 32,
        "flags": "--mesh fsdp=4",
        "fits": True,
        "versions": {"jax": "1", "libtpu": "2"},
        "commit": "abc",
        "bytes_per_device": {"peak": 2**30, "memory": 2**34},
        "flash_attention": {"forward": 4, "backward": 4, "layers": 4, "why_not": None},
        "products": {"bf16 x bf16": 8, "f32 x bf16": 2},
        "float32_products": {"count": 2},
        "collectives": {"all-reduce": 1e8, "all-gather": 4e8},
        "flop_per_device": {"compiled": 9.0, "F12": 10.0},
        "bytes_accessed_per_device": {"device_memory": 2.5e9, "xla": None},
        "estimated": {"step_s": 0.002, "bound": "memory", "tokens_per_s": 12345.6, "mfu": 0.25, "hours": 22.5},
        **fields,
    }


def test_the_page_is_what_the_record_gives():
    written = plans.PAGE.read_text(encoding="utf-8").split(plans.BEGIN)[1].split(plans.END)[0]
    assert written.strip() == plans.table(plans.read_record())


def test_a_row():
    row = plans.table({"a": plan()}).splitlines()[2]
    assert row == (
        "| `minigpt` | v5e:2x2 | 32 | `--mesh fsdp=4` | 1.00 of 16 GiB | 4 + 4 of 4 layers | "
        "2 of 10 | 0.90 | 2.5 GB | 0.5 GB | 2 ms | memory | 12,346 | 25% | 22.5 |"
    )


def test_a_plan_that_does_not_fit_has_no_estimate():
    row = plans.table({"a": plan(fits=False, estimated=None)}).splitlines()[2]
    assert "**does not fit**: 1.00 of 16 GiB" in row and row.endswith("| 2 of 10 |  |  |  |  |  |  |  |  |")


def test_a_new_plan_takes_its_place_and_keeps_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(plans, "PAGE", tmp_path / "page.md")
    plans.PAGE.write_text(f"before {plans.BEGIN}\n{plans.END} after", encoding="utf-8")
    monkeypatch.setattr(plans, "make", lambda case: plan(target=case[1], commit="new"))
    plans.main(["minigpt", "H100"])
    plans.main(["minigpt", "v5e:1"])
    assert list(plans.read_record()) == ["minigpt v5e:1", "minigpt H100"]  # in the order of the cases
    page = plans.PAGE.read_text(encoding="utf-8")
    assert page.startswith("before ") and page.endswith(" after") and "at commit new." in page
