"""Random configurations of `jaxgpt train` and `jaxgpt finetune`: flags drawn freely over valid and invalid values.

The flags and their types come from the commands' own dataclasses, so that a new flag is drawn without further ado.
"""

import json
import random
import typing
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt.errors import flag
from jaxgpt.runs.status import run_status
from tests.faults.bad_inputs import DERIVED, FLAGS_OF, TINY, fields_of, time_limit

SECONDS = 120  # for a training of a few steps, on a machine that does other things as well

# Each works alone, and makes everything small.
BASE = {
    "train": {
        "dataset": "file:words.txt", "steps": 1, "batch_size": 2, "eval_batches": 1, "sample_tokens": 2,
        "model.n_layer": 1, "model.n_head": 1, "model.n_embd": 4, "model.block_size": 8,
    },
    "finetune": {"dataset": "file:rows.csv", "max_tokens": 4, "epochs": 1, "train_samples": 4},
}  # fmt: skip
# Other processes would be waited for.
PROCESSES = {"distributed", "coordinator", "num_processes", "process_id"}
NOT_DRAWN = {"run", "init_from", "texts", "out_dir", "data_dir", "overwrite", *PROCESSES}
# Of the numbers and names whose valid values are others than those of their type in general.
VALID: dict[str, list[Any]] = {
    "dataset": ["file:words.txt", "file:rows.csv", "file:rows.jsonl", "nothing,file:words.txt"],
    "test_dataset": ["file:rows.csv", "file:rows.jsonl"],
    "text_column": ["text"],
    "token_dtype": ["auto"],
    "label_column": ["label"],
    "tokenizer": ["char", "byte", "bpe:257", "bpe:300"],
    "preset": ["tinygpt", "minigpt", "nanogpt-char", "nanogpt-cpu"],
    "prompt": ["la", "la ti mo", "\U0001f600"],
    "steps": [1, 2],
    "batch_size": [1, 2, 3, 4, 6],
    "batch_tokens": [0, 2, 14, 16, 32],
    "mesh": ["", "data=1", "data=2", "fsdp=1", "fsdp=2"],
    "join_timeout": [1, 300],
    "heartbeat_timeout": [10, 86400],
    "checkpoint_every": [1, 2, 250],
    "keep_checkpoints": [1, 3, 2**31 - 1],
    "seed": [0, 1, 2**31 - 1],
    "max_val_tokens": [0, 20, 10**6],
    "eval_batches": [0, 1, 3],
    "sample_tokens": [1, 3, 20],
    "max_tokens": [1, 2, 8],
    "train_samples": [0, 3, 10],
    "epochs": [0, 1, 2],
    "lr": [1e-30, 1e-8, 1e-3, 0.1, 10.0],
    "eps": [1e-30, 1e-8, 1.0],
    "clip": [0.0, 1e-9, 1.0, 1e9],
    "min_lr": [0.0, 1e-30, 1e-5],
    "model.n_layer": [1, 2, 3],
    "model.n_head": [1, 2, 3, 4],
    "model.n_embd": [1, 2, 4, 6, 12],
    "model.block_size": [1, 2, 7, 16],
    "model.layer_norm_eps": [1e-12, 1e-5, 0.5],
}
INTEGERS, FLOATS = [0, 1, 2, 3], [0.0, 0.1, 0.5, 0.999]
INVALID = ["", "-1", "nan", "inf", "1e3", "many", "9" * 30, "-0.5", "2147483648", "None", "0"]


@st.composite
def flags(draw: st.DrawFn, command: Literal["train", "finetune"], one_invalid_of: int) -> list[str]:
    """Up to twelve flags of a command, after those that make everything small.

    Args:
        one_invalid_of: about how many valid values are drawn for an invalid one.
    """
    kinds = {name: kind for name, kind in fields_of(FLAGS_OF[command]) if _is_drawn(command, name)}
    names = draw(st.lists(st.sampled_from(sorted(kinds)), unique=True, max_size=12))
    given: Mapping[str, Any] = {**BASE[command]}
    for name in names:
        if kinds[name] is not bool and draw(st.integers(1, one_invalid_of)) == one_invalid_of:
            value: Any = draw(st.sampled_from(INVALID))
        else:
            value = draw(st.sampled_from(_valid_values(name, kinds[name])))
        given = {**given, name: value}
    return [_word(name, value) for name, value in given.items()]


def _is_drawn(command: str, name: str) -> bool:
    return name not in NOT_DRAWN and (command, name.partition(".")[0]) not in DERIVED


def _valid_values(name: str, kind: Any) -> list[Any]:
    if name in VALID:
        return VALID[name]
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    return {int: INTEGERS, float: FLOATS, bool: [False, True]}[kind]


def _word(name: str, value: Any) -> str:
    if isinstance(value, bool):
        path, _, last = name.rpartition(".")
        return flag((f"{path}." if path else "") + ("" if value else "no-") + last)
    return f"{flag(name)}={value}"


def check_each(strategy: st.SearchStrategy[list[str]], n_examples: int, check: Callable[[list[str]], object]) -> None:
    """Calls `check` with drawn flags, the same ones each time."""
    fixed = settings(
        max_examples=n_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    fixed(given(strategy)(check))()


def make_folder(folder: Path) -> Path:
    """Fills a folder with a text and labeled rows."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["la", "ti", "mo", "né", "ru", "\U0001f600"], k=12)) for _ in range(60)]
    rows = [{"text": text, "label": draw.choice(["north", "south"])} for text in texts]
    (folder / "words.txt").write_text("\n".join(texts), encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{row['text']},{row['label']}\n" for row in rows]
    (folder / "rows.csv").write_text("".join(["text,label\n", *lines]), encoding="utf-8")
    return folder


def train_by_each(
    run: Callable[..., Any], folder: Path, command: Literal["train", "finetune"], n_examples: int, codes: Counter[int]
) -> None:
    """Trains by random configurations, and counts the exit codes.

    Args:
        run: runs a command line, as the fixture `cli` does.
        folder: made by `make_folder`.

    Raises:
        AssertionError: a command neither trained to its end nor was refused in one line.
    """

    def train(words: list[str]) -> None:
        out = folder / f"{command}-{codes.total()}"
        line = [command, *(["base"] if command == "finetune" else []), *words]
        with time_limit(SECONDS):
            done = run(*line, "--out-dir", out, cwd=folder)
        codes[done.returncode] += 1
        _check_end(" ".join(line), done, out)

    if command == "finetune":  # a classifier starts from a language model
        done = run("train", "--dataset=file:words.txt", *TINY, "--out-dir=base", cwd=folder)
        assert done.returncode == 0, done.stderr
    check_each(flags(command, 50), n_examples, train)


def _check_end(line: str, done: Any, out: Path) -> None:
    """Checks that a command trained to its end, or said in one line why not; 3: the loss was not finite."""
    if done.returncode == 0:
        assert run_status(out).state == "finished", line
        return
    assert done.returncode in (2, 3), f"{line}: exit code {done.returncode}, {done.stderr}"
    errors = [each for each in done.stderr.splitlines() if not each.startswith("warning: ")]
    assert len(errors) == 1 and errors[0].startswith("error: "), f"{line}: {done.stderr}"
    if done.returncode == 2:
        assert "--" in errors[0], f"{line}: {errors[0]}"
        assert not out.exists() or {path.name for path in out.iterdir()} <= {".lock"}, f"{line}: left {out}"
