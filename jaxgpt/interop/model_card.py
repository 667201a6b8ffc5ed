"""The model card of an exported run: what it was trained on and how, and its loss."""

from typing import Any

from jaxgpt.config import differences, to_json
from jaxgpt.errors import flag
from jaxgpt.presets import PRESETS
from jaxgpt.runs import files
from jaxgpt.runs.files import Unreadable
from jaxgpt.runs.run_dir import RunDir


def text(run: RunDir, step: int, n_params: int) -> str:
    """The card in Markdown, with the metadata that the hub reads.

    Args:
        step: the updates of the exported state.
        n_params: its number of parameters.
    """
    config = run.config
    task = "text-classification" if run.labels else "text-generation"
    model = config.model
    data = config.dataset.partition(":")[2].rstrip("/").rpartition("/")[2] or config.dataset or "unknown"
    rows = [
        ("parameters", f"{n_params:,}"),
        ("layers, heads, width", f"{model.n_layer}, {model.n_head}, {model.n_embd}"),
        ("context", f"{model.block_size} tokens"),
        ("tokenizer", f"{run.tokenizer.kind}, {run.tokenizer.vocab_size:,} tokens"),
        ("data", f"{data}" + (f" (SHA-256 {run.data_sha256[:16]}...)" if run.data_sha256 else "")),
        ("updates", f"{step:,} of {config.steps:,}, {config.tokens_per_step:,} tokens each"),
        *_results(run),
    ]
    if run.labels:
        rows.append(("classes", ", ".join(run.labels)))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            f"pipeline_tag: {task}",
            "tags: [gpt2, jaxgpt]",
            "---",
            "",
            f"# {run.path.resolve().name}",
            "",
            "Trained with jaxgpt, a GPT trainer in JAX and Flax, and exported as a GPT-2 of transformers.",
            "",
            "| | |",
            "|---|---|",
            table,
            "",
            "Flags of its training that differ from the preset's, or else from the defaults:",
            "",
            f"    {_flags(config)}",
            "",
        ]
    )


def _results(run: RunDir) -> list[tuple[str, str]]:
    try:
        summary = files.read_json(run.path / "summary.json", dict[str, Any])
    except (FileNotFoundError, Unreadable):
        return []
    names = {
        "val_loss": "loss of the whole test split" if run.labels else "loss of the whole validation split",
        "val_ppl": "perplexity",
        "bits_per_byte": "bits per byte",
        "val_accuracy": "accuracy",
    }
    found = ((text, summary.get(name)) for name, text in names.items())
    return [(text, f"{value:.4f}") for text, value in found if isinstance(value, int | float)]


def _flags(config: Any) -> str:
    """The flags that make the configuration, those of its data and paths left out."""
    default = PRESETS[config.preset] if hasattr(config, "preset") else type(config)()
    found = [
        f"{flag(name)} {value}"
        for name, _, value in differences(default, config)
        if name not in ("dataset", "test_dataset", "preset") and value is not None
    ]
    preset = [f"--preset {to_json(config)['preset']}"] if hasattr(config, "preset") else []
    return " ".join([*preset, *found]) or "none"
