"""The table of bad inputs, for all commands, and how to try them.

Most of the table is generated: every flag of every command, read from the commands' own dataclasses, with each kind of
bad value for its type. By hand come the flags whose values are names, contradictory and unknown flags, positional
arguments, and files of other formats.

A command refuses a bad input if it exits with code 2, prints one line "error: ..." to standard error that names the
flag or the file, and writes nothing.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import shutil
import signal
import stat
import struct
import types
import typing
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxgpt.cli.args import TrainFlags
from jaxgpt.cli.classify import ClassifyFlags
from jaxgpt.cli.compare import CompareFlags
from jaxgpt.cli.convert import ExportFlags, ImportFlags
from jaxgpt.cli.evaluate import EvaluateFlags
from jaxgpt.cli.finetune import FinetuneFlags
from jaxgpt.cli.generate import GenerateFlags
from jaxgpt.cli.inspect import InspectFlags
from jaxgpt.cli.parity import ParityFlags
from jaxgpt.cli.plan import PlanFlags
from jaxgpt.config import FinetuneConfig, ModelConfig, to_json
from jaxgpt.errors import flag

RUN_WITHOUT_TEXT = Path(__file__).resolve().parents[1] / "data" / "run_before_rooms" / "run"
HANG_SECONDS = 20  # no refusal takes as long

Outcome = Literal["told", "unclear", "silent", "traceback", "hang"]


@dataclass(frozen=True)
class BadInput:
    """A command line that has to be refused.

    Args:
        args: the command line without the word `jaxgpt`.
        names: what the message has to contain: the flag, the file or the offending word.
        stdin: the bytes of standard input.
        slow: the command loads PyTorch, or starts a process, before it can refuse.
    """

    args: tuple[str, ...]
    names: tuple[str, ...]
    stdin: bytes = b""
    slow: bool = False

    @property
    def command(self) -> str:
        words = 2 if self.args[:1] == ("convert",) else 1
        return " ".join(self.args[:words])

    def __str__(self) -> str:
        known = WORKS.get(self.command, [])
        words = [self.command, *self.args[len(known) :]] if list(self.args[: len(known)]) == known else self.args
        line = " ".join(word if 0 < len(word) < 60 else f"{word[:20]!r}" for word in words)
        return (line + (f" < {self.stdin[:20]!r}" if self.stdin else "")).encode("unicode_escape").decode()


# --------------------------------------------------------------------------------------------------------- the commands

# Each line is refused for nothing: the bad input added to it is the one reason of a refusal. The model is so small that
# a command that accepts the input by mistake ends soon.
TINY = [
    *("--model.n-layer=1", "--model.n-head=1", "--model.n-embd=4", "--model.block-size=8", "--batch-size=2"),
    *("--steps=1", "--eval-batches=1", "--sample-tokens=2"),
]
WORKS: dict[str, list[str]] = {
    "train": ["train", "--dataset=file:good.txt", *TINY],
    "compare": ["compare", "--dataset=file:good.txt", *TINY, "--lr=0.1,0.2"],
    "convert import": [
        "convert",
        "import",
        "--dataset=file:good.txt",
        *TINY,
        "--weights=weights.safetensors",
        "--out=new",
    ],
    "convert export": ["convert", "export", "run", "--out=new.safetensors"],
    "generate": ["generate", "run", "--prompt=la", "--max-new-tokens=2"],
    "evaluate": ["evaluate", "run"],
    "finetune": ["finetune", "run", "--dataset=file:labeled.csv", "--max-tokens=4", "--epochs=1"],
    "classify": ["classify", "classifier", "a text"],
    "inspect": ["inspect", "run"],
    "parity": ["parity"],
    "bench": ["bench"],
    "plan": ["plan", "--target=v5e:1", *TINY],
}
FLAGS_OF: dict[str, type] = {
    "train": TrainFlags,
    "compare": CompareFlags,
    "convert import": ImportFlags,
    "convert export": ExportFlags,
    "generate": GenerateFlags,
    "evaluate": EvaluateFlags,
    "finetune": FinetuneFlags,
    "classify": ClassifyFlags,
    "inspect": InspectFlags,
    "parity": ParityFlags,
    "plan": PlanFlags,
}
POSITIONAL = {"run", "texts", "path"}
DERIVED = {("finetune", "steps"), ("finetune", "model")}  # fields that are no flags
# The default tests try every so-manieth case of a command: numbers that divide no list of values, so that every kind of
# value has its turn.
SHARE = {
    **{"train": 9, "compare": 23, "convert import": 23, "finetune": 9, "inspect": 4, "plan": 37},
    **{"evaluate": 3, "generate": 3, "bench": 3, "convert export": 3},
}

# ---------------------------------------------------------------------------------------------- bad values of each type

HUGE = "9" * 30  # beyond every integer of 64 bits
NUL, SURROGATE, LONG = "a\0b", os.fsdecode(b"a\xffb"), "x" * 300  # bytes that are not UTF-8 are surrogates in argv
MISSING = None  # the flag is the last word

INTEGERS = [MISSING, "", "many", "1.5", "-1", HUGE, "٣", "nan", "1e3", "0x10", "--", "1;5"]
FLOATS = [MISSING, "", "fast", "nan", "inf", "-1", "1e999", "٠.٥", "0x1p3", "-0.1", "1;5"]
CHOICES = [MISSING, "", "none-of-these", "Auto", NUL]
SWITCHES = ["maybe", "1"]
POSITIVE = {  # 0 is refused
    *("batch_size", "checkpoint_every", "keep_checkpoints", "steps", "sample_tokens", "lr", "eps", "eval_every"),
    *("max_new_tokens", "samples", "max_tokens", "stride", "top_p", "model.n_layer", "model.n_head", "model.n_embd"),
    "repetition_penalty",
    *("model.block_size", "tokens", "model.layer_norm_eps"),
}
# 1 is refused
BELOW_ONE = {"beta1", "beta2", "momentum", "model.dropout", "model.attention_dropout", "model.layer_norm_eps"}

INPUT_FILES = [MISSING, "nothing", "folder", "pipe", "dangling", "loop", "good.txt/x", LONG, NUL, SURROGATE, "a\nb", ""]
DATA_DIRS = [MISSING, "nothing", "good.txt", "pipe", "loop", "dangling", "good.txt/x", LONG, NUL, SURROGATE]
NEW_FOLDERS = [
    MISSING,
    "good.txt",
    "good.txt/x",
    "/proc/x",
    "loop",
    "foreign",
    "pipe",
    "dangling",
    LONG,
    NUL,
    SURROGATE,
]
NEW_FILES = [MISSING, "nowhere/x", "good.txt/x", "/proc/x", "folder", "pipe", "loop", "dangling", LONG, NUL]
DATASETS = [
    *(MISSING, "", ",", "tinyshakespear", "FILE:good.txt", "file:", "file:nothing", "file:folder", "file:pipe"),
    *("file:dangling", "file:loop", "file:good.txt/x", "file:~nobody-here/x", f"file:{LONG}", f"file:{NUL}"),
    *(f"file:{SURROGATE}", "file:a\nb", "bin:", "bin:nothing", "bin:good.txt", "bin:folder", f"bin:{NUL}", "good.txt"),
    *("http://localhost/x", "nothing,file:good.txt", "file:nothing,bin:nothing", "file:/dev/zero", "file:."),
]
# Of the flags whose values are names or paths.
NAMES: dict[str, list[str | None]] = {
    "dataset": DATASETS,
    "test_dataset": [value for value in DATASETS if value],
    "text_column": [MISSING, "text", "labels", NUL],  # good.txt has no columns, and labeled.csv no such ones
    "label_column": [MISSING, "class", "Label", "text,label"],
    "tokenizer": [MISSING, "", "Char", "gpt3", "bpe", "bpe:", "bpe:-1", "bpe:256", "bpe:1000001", "bpe:٣٠٠", "bpe:1e3"],
    "prompt": [MISSING, "", "\0", SURROGATE],
    "prompts_file": INPUT_FILES[:-1],
    "stop": [MISSING, ""],
    "preset": [MISSING, "", "minigtp", "MINIGPT", NUL],
    "attention": [MISSING, "", SURROGATE],
    "surprise": [MISSING, "", "l", SURROGATE],
    "mutant": [MISSING, "none-of-these"],
    "end_to_end": [MISSING, "minigtp", "Minigpt", NUL],
    "pair": [MISSING, "", "folder", "good.txt", "good.txt:pair", NUL],
    "html": NEW_FILES,
    "out_dir": NEW_FOLDERS,
    "data_dir": DATA_DIRS,
    "weights": INPUT_FILES,
    "optimizer_state": INPUT_FILES,
    "out": NEW_FOLDERS,
    "file": INPUT_FILES,
    "run": INPUT_FILES,
    "init_from": INPUT_FILES,
    "graph": [MISSING, "graph", "graph.pdf", "nowhere/g.svg", "folder", "good.txt/g.svg", f"{LONG}.svg", f"{NUL}.svg"],
    "json": NEW_FILES,
    "target": [MISSING, "", "v5", "v5e:", "v5e:0x1", "v5e:8", "v5e:2x2x1", "v5p:2x2", "h100", "H100:0", "H100:9", NUL],
    "coordinator": [MISSING, "host", ":1", "host:", "host:0", "host:65536", "host:x", "host:1.5", NUL],
    "mesh": [MISSING, "4", "data", "data=0", "data=1,data=1", "data=3", "fsdp=3", "model=1", "data=1,", NUL],
}
NAMES_OF_COMMAND: dict[tuple[str, str], list[str | None]] = {
    ("convert export", "out"): [*NEW_FILES, "good.txt", "run/x"],
    ("convert export", "optimizer_state"): [*NEW_FILES, "good.txt", "run/x", "new.safetensors"],
    ("inspect", "out"): [
        MISSING,
        "x.svg",
        "x",
        "nowhere/x.png",
        "folder.png",
        "/proc/x.png",
        f"{LONG}.png",
        f"{NUL}.png",
    ],
    ("finetune", "dataset"): [*DATASETS, "file:good.txt", "tinyshakespeare"],
    ("finetune", "text_column"): [MISSING, "texts", "text,texts", ","],
    ("generate", "prompt"): [MISSING, "", SURROGATE],
    **{("plan", name): [MISSING] for name in ("dataset", "text_column", "prompt")},  # a plan reads no text
}
# What a flag needs beside it, so that its value is the reason of the refusal.
BESIDE: dict[tuple[str, str], list[str]] = {
    **{("*", name): ["--schedule=warmup-cosine"] for name in ("warmup_steps", "decay_steps", "min_lr")},
    ("*", "momentum"): ["--optimizer=sgd"],
    ("*", "min_delta"): ["--patience=1"],
    ("train", "epochs"): ["--packing=chunks"],
    ("compare", "epochs"): ["--packing=chunks"],
    ("convert import", "epochs"): ["--packing=chunks"],
    ("plan", "epochs"): ["--packing=chunks"],
    ("train", "coordinator"): ["--distributed", "--num-processes=2", "--process-id=0"],
    ("train", "num_processes"): ["--distributed", "--coordinator=host:1", "--process-id=0"],
    ("train", "process_id"): ["--distributed", "--coordinator=host:1", "--num-processes=2"],
    ("inspect", "out"): ["--gradients"],
    ("inspect", "data_dir"): ["--gradients"],
    ("inspect", "checkpoint"): ["--gradients"],
    ("inspect", "level"): ["--graph=graph.svg"],
    ("evaluate", "file"): ["--benchmark=wikitext-2"],
    ("parity", "checkpoint"): ["--run=run"],
    ("parity", "data_dir"): ["--run=run"],
    ("parity", "seeds"): ["--end-to-end=minigpt"],
    ("parity", "html"): ["--pair=pair.py"],
}
# Messages that name the file and its columns.
NAMED = {
    ("finetune", "text_column"): "--dataset file:labeled.csv",
    ("finetune", "label_column"): "--dataset file:labeled.csv",
}
# Refused by a process that the command starts, or after PyTorch is loaded.
LATE = {("compare", "out_dir"), ("parity", "run"), ("parity", "mutant"), ("parity", "data_dir")}

# argparse gives no types: the flags of `jaxgpt bench` by kind.
BENCH_FLAGS: dict[str, list[str | None]] = {
    **{name: [*INTEGERS, "0"] for name in ("loop", "rounds", "batch_size")},
    "turn_seconds": [*FLOATS, "0"],
    "preset": [MISSING, "minigtp", "minigpt,minigtp", ",", "MINIGPT", NUL],
    "sides": [MISSING, "", "eager", "ours,none-of-these", ",", "Ours"],
    "dtype": [MISSING, "", "float16", "Float32"],
    "torch_python": INPUT_FILES[:-1],
    "json": [MISSING, "x", "x.txt", "nowhere/x.json", "good.txt/x.json", "folder", f"{NUL}.json", f"{LONG}.json"],
    "picture": [MISSING, "x", "x.svg", "nowhere/x.png", "good.txt/x.png", "folder", f"{NUL}.png", f"{LONG}.png"],
}


def generated() -> Iterator[BadInput]:
    """Every flag of every command with each kind of bad value."""
    for command, flags in FLAGS_OF.items():
        for name, kind in fields_of(flags):
            if name not in POSITIONAL and (command, name.partition(".")[0]) not in DERIVED:
                late = (command, name) in LATE
                for value in _bad_values(command, name, kind):
                    yield _with_flag(command, name, value, kind, late)
    for name, values in BENCH_FLAGS.items():
        for value in values:
            yield _with_flag("bench", name, value, None, False)
    for name in ("growth", "tune_cpu", "docs"):
        yield BadInput(("bench", f"{flag(name)}=maybe"), (flag(name),))


def _with_flag(command: str, name: str, value: str | None, kind: Any, late: bool) -> BadInput:
    beside = BESIDE.get((command, name), BESIDE.get(("*", name), []))
    if kind is bool:
        given, named = [f"{flag(name)}={value}"], value or ""
    elif value is MISSING:
        given, named = [flag(name)], flag(name)
    else:
        given, named = (
            [flag(name), value] if value != "-1" and value != "-0.1" else [f"{flag(name)}={value}"],
            flag(name),
        )
    if value is not MISSING:
        named = NAMED.get((command, name), named)
    return BadInput((*WORKS[command], *beside, *given), (named,), slow=late)


def fields_of(flags: type) -> Iterator[tuple[str, Any]]:
    """The flags of a dataclass and their types, those of a nested dataclass by their dotted names."""
    hints = typing.get_type_hints(flags)
    for f in dataclasses.fields(flags):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from ((f"{f.name}.{inner}", kind) for inner, kind in fields_of(hints[f.name]))
        else:
            yield f.name, _without_none(hints[f.name])


def _without_none(kind: Any) -> Any:
    """`int` of `int | None`."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = [each for each in typing.get_args(kind) if each is not type(None)]
    return kind


def _bad_values(command: str, name: str, kind: Any) -> Sequence[str | None]:
    if (command, name) in NAMES_OF_COMMAND:
        return NAMES_OF_COMMAND[command, name]
    if name in NAMES and kind is not bool:
        return NAMES[name]
    if kind is bool:
        return SWITCHES
    if kind in (int, float):
        values = INTEGERS if kind is int else FLOATS
        return [*values, *["0"] * (name in POSITIVE), *["1"] * (name in BELOW_ONE)]
    if typing.get_origin(kind) is Literal:
        return CHOICES
    raise AssertionError(f"jaxgpt {command} {flag(name)}: no bad values for {kind} in the table")


# ------------------------------------------------------------------------------------------------------- cases by hand


def _line(command: str, words: str, *names: str) -> BadInput:
    """A case from a line of words, added to the command that works."""
    return BadInput((*WORKS[command], *words.split()), names)


def contradictory() -> Iterator[BadInput]:
    """Flags that exclude each other, or have no effect beside the others."""
    for command in ("train", "compare", "convert import"):
        yield _line(command, "--model.n-embd=9 --model.n-head=2", "--model.n-embd 9", "--model.n-head 2")
        yield _line(command, "--warmup-steps=5", "--warmup-steps 5", "--schedule")
        yield _line(command, "--decay-steps=5", "--decay-steps 5", "--schedule")
        yield _line(command, "--min-lr=0.001", "--min-lr 0.001", "--schedule")
        yield _line(command, "--momentum=0.9", "--momentum 0.9", "--optimizer sgd")
        yield _line(command, "--min-delta=1", "--min-delta 1.0", "--patience")
        yield _line(command, "--epochs=1", "--epochs 1", "--packing")
        yield _line(command, "--eval-every=0", "--eval-every 0", "--packing")
        yield _line(command, "--packing=documents", "--packing documents", "--tokenizer")
        yield _line(command, "--max-val-tokens=8", "--max-val-tokens 8", "window")
        yield _line(command, "--schedule=warmup-cosine --warmup-steps=1", "--warmup-steps 1")
        yield _line(command, "--schedule=cosine --min-lr=1", "--min-lr 1.0", "--lr")
        yield _line(command, "--schedule=cosine --steps=10000001", "--steps 10000001")
        yield _line(command, "--model.block-size=1000001", "--model.block-size 1000001", "at most")
        yield _line(command, "--eval-batches=10001", "--eval-batches 10001", "at most")
        yield _line(command, "--sample-tokens=1000001", "--sample-tokens 1000001", "at most")
        yield _line(command, "--seed=2147483648", "--seed 2147483648")
    for name in ("min-chars", "max-train-texts", "max-val-texts"):
        yield _line("train", f"--{name}=3", f"--{name} 3")
    yield _line("train", "--text-column=text", "--text-column text")
    yield _line("train", "--model.block-size=100000", "too short", "--model.block-size")
    yield _line("train", "--packing=chunks --batch-size=999999", "--batch-size 999999")
    yield _line("finetune", "--max-tokens=9", "--max-tokens 9")
    yield _line("finetune", "--train-samples=10000", "--train-samples 10000")
    yield _line("finetune", "--dataset=ag_news --text-column=text", "--text-column text")
    yield _line("finetune", "--dataset=ag_news --label-column=label", "--label-column label")
    yield _line("finetune", "--schedule=cosine --min-lr=1", "--min-lr 1.0", "--lr")
    yield _line("generate", "--samples=1001", "--samples 1001", "at most")
    yield _line("generate", "--samples=2 --seed=2147483647", "--samples 2", "--seed")
    yield _line("generate", "--top-p=1.5", "--top-p 1.5")
    yield _line("generate", "--min-p=1.5", "--min-p 1.5")
    yield _line("generate", "--interactive", "--interactive")
    for path in ("nothing", "folder", "pipe", "/dev/zero", "loop"):
        yield BadInput(("generate", "run", f"--prompts-file={path}"), (f"--prompts-file {path}",))
    yield _line("evaluate", "--stride=9", "--stride 9", "block of 8")
    yield _line("evaluate", "--benchmark=lambada --dataset=pydoc", "--benchmark and --dataset")
    yield _line("evaluate", "--benchmark=lambada --split=train", "--split train")
    yield _line("evaluate", "--benchmark=lambada --stride=3", "--stride 3", "lambada")
    yield _line("evaluate", "--benchmark=hellaswag --file=good.txt", "--file good.txt", "line 1")
    yield _line("evaluate", "--benchmark=wikitext-103 --file=labeled.csv --stride=9", "--stride 9", "block of 8")
    yield _line("evaluate", "--file=good.txt", "--file good.txt", "--benchmark")
    yield _line("evaluate", "--split=test", "--split test", "--dataset")
    yield _line("evaluate", "--split=test --dataset=file:good.txt", "--split test", "file:good.txt")
    yield _line("inspect", "", "RUN", "--gradients")
    yield _line("inspect", "--gradients --attention=la", "--gradients and --attention")
    yield _line("inspect", "--surprise=la --graph=x.svg", "--surprise and --graph")
    yield _line("inspect", "--gradients --level=op", "--level op", "--graph")
    yield _line("inspect", "--attention=la --data-dir=folder", "--data-dir folder", "--gradients")
    yield _line("inspect", "--graph=x.svg --out=x.png", "--out x.png", "--graph")
    yield _line("inspect", "--graph=x.svg --checkpoint=best", "--checkpoint best")
    yield _line("convert export", "--optimizer-state=./new.safetensors", "--optimizer-state", "the same file as --out")
    yield _line("convert import", "--out=run", "--out run", "--overwrite")
    yield BadInput(("convert", "import", "--out=new"), ("PATH",))
    yield BadInput(("convert", "import", "run", "--out=run", "--overwrite"), ("PATH run", "--out run"))
    yield BadInput(("convert", "import", "weights.safetensors", "--out=new"), ("--model.n-head", "--model.gelu"))
    for to in ("huggingface", "nanogpt"):
        yield _line("convert export", f"--to={to} --optimizer-state=o.safetensors", "--optimizer-state o.safetensors")
    yield _line("convert export", "--to=huggingface --out=good.txt", "--out good.txt")
    yield _line("convert export", "--to=huggingface --out=foreign --overwrite", "--out foreign", "thesis.doc")
    yield _line("convert export", "--to=huggingface --out=run/x", "--out run/x")
    yield _line("convert import", "--weights=run/weights.safetensors --out=run --overwrite", "--weights", "--out run")
    for first, second in (
        *(("--run=run", "--mutants"), ("--mutants", "--end-to-end=minigpt"), ("--run=run", "--end-to-end=minigpt")),
        *(("--run=run", "--quick"), ("--mutants", "--locate"), ("--end-to-end=minigpt", "--mutant=x")),
        *(("--docs", "--quick"), ("--docs", "--run=run"), ("--seeds=3", "--quick"), ("--data-dir=folder", "--quick")),
        *(("--checkpoint=best", "--quick"), ("--json=x.png", "--quick"), ("--seeds=0", "--end-to-end=minigpt")),
        *(("--html=x.html", "--quick"), ("--pair=x.py", "--mutants"), ("--docs", "--pair=x.py")),
    ):
        yield _line("parity", f"{first} {second}", first.partition("=")[0])
    for words, named in (
        *(("--tune-cpu --growth", "--growth"), ("--tune-cpu --loop=3", "--loop"), ("--tune-cpu --docs", "--docs")),
        *(("--tune-cpu --sides=ours", "--sides"), ("--tune-cpu --picture=x.png", "--picture")),
        *(("--loop=3 --growth", "--growth"), ("--loop=3 --rounds=2", "--rounds"), ("--loop=3 --sides=ours", "--sides")),
        *(("--docs --batch-size=3", "--docs"), ("--docs --dtype=float32", "--docs"), ("--loop=0", "--loop 0")),
    ):
        yield _line("bench", words, named)
    for words, named in (
        *(("--lr=1,2 --lr=3,4", "--lr"), ("--lr 0.1, 0.2", "--lr"), ("--beta1=0.1,", "--beta1")),
        *(("--beta1=0.1,0.1", "--beta1"), ("--beta1=0.10,0.1", "--beta1"), ("--beta1=0.1,7", "--beta1")),
        *(("--model.tied-head=true,maybe", "--model.tied-head"), ("--seed=0,1,x", "--seed")),
        *((f"--seed={','.join(map(str, range(65)))}", "--seed"), ("--preset=minigpt,wikitext2", "--preset")),
        *(("--lr=0.1", "no flag has several values"), ("--batch-size=2,3,0", "--batch-size")),
    ):
        works = [word for word in WORKS["compare"] if not word.startswith("--lr")]
        works = [word for word in works if "--preset" not in words or not word.startswith("--dataset")]
        yield BadInput((*works, *words.split()), (named,))


def unknown() -> Iterator[BadInput]:
    """Words that are no flag or no command, most of them close to one."""
    for words in ("trian", "Train", "tra", "--train", "-x", "run", "train.py", "٣", "convertimport"):
        yield BadInput((words,), (f"jaxgpt {words}",))
    for words in ("", "exprot", "Import", "--out", "run"):
        yield BadInput(("convert", *words.split()), ("jaxgpt convert", "import or export"))
    near = {
        "train": ("--stepz 5 --steps", "--batchsize 2 --batch-size", "--model.nlayer 1 --model.n-layer", "--dat x"),
        "compare": ("--optimiser sgd,adamw --optimizer", "--seeed 3 --seed"),
        "convert import": ("--weigths x --weights", "--overwirte --overwrite"),
        "convert export": ("--optimiser-state x --optimizer-state",),
        "generate": ("--temprature 1 --temperature", "--topk 3 --top-k", "--sample 2 --samples"),
        "evaluate": ("--strid 3 --stride", "--jsn --json", "--benchmrk x --benchmark"),
        "finetune": ("--epoch 3 --epochs", "--pol mean", "--model.n-layer 2", "--steps 3"),
        "classify": ("--jason --json",),
        "inspect": ("--gradient --gradients", "--surprisal la"),
        "parity": ("--quik --quick", "--mutantz --mutants"),
    }
    for command, lines in near.items():
        for line in lines:
            words = line.split()
            meant = words[-1:] if len(words) > 1 and words[-1].startswith("--") else []
            yield BadInput((*WORKS[command], *words[: len(words) - len(meant)]), (words[0], *meant))
    for command in WORKS:
        yield _line(command, "--no-such-flag", "--no-such-flag")
        yield _line(command, "-q", "-q")
    for command in (
        "train",
        "compare",
        "convert import",
        "parity",
        "bench",
        "generate",
        "evaluate",
        "finetune",
        "inspect",
        "plan",
    ):
        yield _line(command, "superfluous", "superfluous")
    for words in ("--round=3", "--turn=1", "--jsn=x.json"):
        yield _line("bench", words, words.partition("=")[0])


def positional() -> Iterator[BadInput]:
    """Folders that hold no run, or one that the command cannot use; and texts that cannot be classified."""
    for command in ("generate", "evaluate", "classify", "inspect", "convert export", "finetune"):
        words, after = WORKS[command], ["--gradients"] * (command == "inspect")
        at = words.index("classifier" if command == "classify" else "run")
        for run in (*INPUT_FILES[1:], "foreign", "no-checkpoint", "config-only"):
            named = repr(run) if run == NUL else "RUN"
            if not (command == "convert export" and not run):  # the file would lie in that run, which is told first
                yield BadInput((*words[:at], run, *words[at + 1 :], *after), (named,))
        yield BadInput((*words[:at], *(word for word in words[at + 1 :] if word.startswith("--")), *after), ("RUN",))
        other = "run" if command == "classify" else "classifier"
        yield BadInput((*words[:at], other, *words[at + 1 :], *after), ("RUN", other))
    for path in ("no-checkpoint", "classifier"):
        yield BadInput(("convert", "import", path, "--out=new"), (f"RUN {path}",))
    for path in (*INPUT_FILES[1:], "foreign", "config-only"):
        yield BadInput(("convert", "import", path, "--out=new"), (repr(path) if path == NUL else "PATH",))
    for text in ("", " ", "\n", "\t\r\n"):
        yield BadInput(("classify", "classifier", "a text", text), ("TEXT number 2",))
    for stdin in (b"\n", b"a text\n\nanother\n", b" \n"):
        yield BadInput(("classify", "classifier"), ("TEXT number",), stdin)
    for stdin in (b"", b"Gr\xfc\xdfe\n", b"\xff\xfea\0", b"a text\n\xed\xa0\x80\n"):
        yield BadInput(("classify", "classifier"), ("standard input",), stdin)


# ----------------------------------------------------------------------------------------------- files of other formats

GOOD_TEXT = "all is good here. " * 300
NESTED = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
RANDOM_BYTES = random.Random(0).randbytes(3000)


@functools.cache
def foreign_texts() -> dict[str, bytes | Callable[[Path], object]]:
    """Files that `file:PATH` of a language model refuses: their content, or a function that makes them."""
    words = b"all is good here. " * 300
    csv = b"text\n" + b"all is good here\n" * 300
    row = b'{"text": "all is good here"}\n'
    parquet = _parquet({"text": ["all is good here"] * 300})
    return {
        "empty.txt": b"",
        "latin1.txt": words + "Grüße".encode("latin-1") + words,
        "utf16.txt": words.decode().encode("utf-16"),
        "binary.txt": RANDOM_BYTES,
        "cut.txt": words + "é".encode()[:1],
        "surrogate.txt": words + b"\xed\xa0\x80",
        "short.txt": b"short",
        "pipe.txt": os.mkfifo,
        "folder.txt": Path.mkdir,
        "empty.csv": b"",
        "header.csv": b"text\n",
        "columns.csv": csv.replace(b"text", b"words"),
        "twice.csv": b"text,text\na,b\n",
        "fields.csv": csv + b"one,two\n",
        "few.csv": b"id,text\n1,all is good\n2\n",
        "latin1.csv": csv + "Grüße\n".encode("latin-1"),
        "utf16.csv": csv.decode().encode("utf-16"),
        "binary.csv": RANDOM_BYTES,
        "single.csv": b"text\nall is good here\n",
        "folder.csv": Path.mkdir,
        "pipe.csv": os.mkfifo,
        "empty.jsonl": b"",
        "cut.jsonl": row * 9 + row[:12],
        "list.jsonl": row + b'["all is good here"]\n',
        "number.jsonl": row + b"3\n",
        "null.jsonl": row + b"null\n",
        "column.jsonl": row + b'{"words": "all is good"}\n',
        "integer.jsonl": row + b'{"text": 3}\n',
        "object.jsonl": row + b'{"text": {"text": "all"}}\n',
        "nested.jsonl": row + NESTED,
        "digits.jsonl": row + b'{"text": ' + b"9" * 5000 + b"}\n",
        "surrogate.jsonl": row + rb'{"text": "\ud800"}' + b"\n",
        "latin1.jsonl": row + b'{"text": "Gr\xfc\xdfe"}\n',
        "binary.jsonl": RANDOM_BYTES,
        "array.jsonl": b'[{"text": "all is good here"}]',
        "pipe.jsonl": os.mkfifo,
        "empty.parquet": b"",
        "text.parquet": words,
        "magic.parquet": b"PAR1PAR1",
        "cut.parquet": parquet[:-20],
        "footer.parquet": parquet[:-8] + struct.pack("<i", 2**31 - 1) + b"PAR1",
        "binary.parquet": b"PAR1" + RANDOM_BYTES + b"PAR1",
        "pages.parquet": parquet[:4] + bytes(60) + parquet[64:],
        "columns.parquet": _parquet({"words": ["all"] * 300}),
        "integers.parquet": _parquet({"text": [1, 2, 3]}),
        "lists.parquet": _parquet({"text": [["all"], ["is"]]}),
        "rows.parquet": _parquet({"text": []}),
        "folder.parquet": Path.mkdir,
        "pipe.parquet": os.mkfifo,
    }


@functools.cache
def foreign_labels() -> dict[str, bytes]:
    """Files that `file:PATH` of a classifier refuses."""
    rows = b"text,label\n" + b"la la,a\nmo mo,b\n" * 40
    line = b'{"text": "la la", "label": 1}\n{"text": "mo mo", "label": 0}\n'
    return {
        "labeled.txt": rows,
        "one-class.csv": b"text,label\n" + b"la la,a\n" * 40,
        "no-label.csv": b"text\n" + b"la la\n" * 40,
        "empty-label.csv": rows + b"la la,\n",
        "empty-text.csv": rows + b" ,a\n",
        "two-rows.csv": b"text,label\nla la,a\nmo mo,b\n",
        "float-label.jsonl": line * 20 + b'{"text": "la la", "label": 1.5}\n',
        "list-label.jsonl": line * 20 + b'{"text": "la la", "label": [1]}\n',
        "null-label.jsonl": line * 20 + b'{"text": "la la", "label": null}\n',
        "nested-label.jsonl": line * 20 + NESTED.replace(b'"text"', b'"label"'),
        "number-text.jsonl": line * 20 + b'{"text": 3, "label": 1}\n',
        "huge-label.jsonl": line * 20 + b'{"text": "la la", "label": ' + b"9" * 5000 + b"}\n",
        "float-label.parquet": _parquet({"text": ["la", "mo"] * 20, "label": [0.5, 1.5] * 20}),
        "list-label.parquet": _parquet({"text": ["la", "mo"] * 20, "label": [[0], [1]] * 20}),
    }


@functools.cache
def foreign_weights() -> dict[str, bytes | Callable[[Path], object]]:
    """Files that `convert import` refuses as weights and as optimizer state."""
    import numpy as np
    import safetensors.numpy

    whole = safetensors.numpy.save({"weight": np.ones((4, 4), np.float32)})

    def with_header(header: bytes, data: bytes = bytes(64)) -> bytes:
        return struct.pack("<Q", len(header)) + header + data

    def tensor(dtype: str = "F32", shape: Any = (4, 4), offsets: Any = (0, 64)) -> bytes:
        entry = {"weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
        return with_header(json.dumps(entry).encode())

    executes = io.BytesIO()
    with zipfile.ZipFile(executes, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02cposix\nsystem\n(X\x0e\0\0\0touch executedtR.")
    return {
        "executes": executes.getvalue(),
        "llm.c": struct.pack("<256i", 20240326, 3, 8, 50, 10**9, 2, 16, 128, *[0] * 248),
        "llm.c-tokens": struct.pack("<256i", 20240520, 1, 200, *[0] * 253) + bytes(400),
        "empty": b"",
        "short": b"\x08\0\0",
        "cut": whole[:-10],
        "longer": whole + b"more",
        "text": b"all is good here. " * 20,
        "pickle": b"\x80\x02c__builtin__\nexit\nq\x00.",
        "zip": b"PK\x03\x04" + RANDOM_BYTES,
        "binary": RANDOM_BYTES,
        "huge-header": struct.pack("<Q", 2**63) + b"{}",
        "header-beyond": struct.pack("<Q", 2**20) + b"{}",
        "no-json": with_header(b"{weight}"),
        "list": with_header(b"[]"),
        "latin1": with_header(b'{"Gr\xfc\xdfe": 1}'),
        "nested": with_header(b"[" * 100_000 + b"]" * 100_000),
        "dtype": tensor("F7"),
        "shape": tensor(shape=(5, 5)),
        "negative": tensor(shape=(-4, -4)),
        "overflow": tensor(shape=(2**62, 2**62)),
        "offsets": tensor(offsets=(0, 2**40)),
        "reversed": tensor(offsets=(64, 0)),
        "no-tensors": with_header(b"{}", b""),
        "names": whole,
        "nan": safetensors.numpy.save({"weight": np.full((4, 4), np.nan, np.float32)}),
        "infinite": safetensors.numpy.save({"weight": np.full((4, 4), np.inf, np.float16)}),
        "folder": Path.mkdir,
        "pipe": os.mkfifo,
    }


# Folders for `bin:DIR`: the content of train.bin and of val.bin.
ASCII = [32 + i % 90 for i in range(200)]  # the bytes of a text
GOOD_TOKENS = struct.pack("<200H", *ASCII)
FOREIGN_TOKENS: dict[str, tuple[bytes | Callable[[Path], object], bytes | Callable[[Path], object] | None]] = {
    "no-val": (GOOD_TOKENS, None),
    "empty-train": (b"", GOOD_TOKENS),
    "empty-val": (GOOD_TOKENS, b""),
    "odd": (GOOD_TOKENS + b"\1", GOOD_TOKENS),
    "vocabulary": (GOOD_TOKENS + b"\xff\xff", GOOD_TOKENS),
    "short": (b"\1\0" * 8, GOOD_TOKENS),
    "uint32": (struct.pack("<200I", *range(200)), GOOD_TOKENS),
    "llm.c": (struct.pack("<256i", 20240520, 1, 200, *[0] * 253) + GOOD_TOKENS, GOOD_TOKENS),
    "folder": (GOOD_TOKENS, Path.mkdir),
    "pipe": (os.mkfifo, GOOD_TOKENS),
    "endless": (lambda path: path.symlink_to("/dev/zero"), GOOD_TOKENS),
}


def foreign_files() -> Iterator[BadInput]:
    """Every file of another format, given to the commands that read such files."""
    for name in foreign_texts():
        yield _line("train", f"--dataset=file:formats/{name}", "--dataset file:", f"formats/{name}")
    for name in [name for name in foreign_texts() if not name.endswith(".txt")] + list(foreign_labels()):
        yield _line("finetune", f"--dataset=file:formats/{name}", "--dataset file:", f"formats/{name}")
    for name in ("one-class.csv", "empty-text.csv", "columns.parquet", "cut.jsonl", "labeled.txt"):
        if name != "one-class.csv":  # to test on, one class is enough
            yield _line("finetune", f"--test-dataset=file:formats/{name}", f"--test-dataset file:formats/{name}")
    yield _line("finetune", "--test-dataset=file:other-class.csv", "--test-dataset file:other-class.csv", "'c'")
    for name in foreign_weights():
        yield _line("convert import", f"--weights=weights/{name}", f"--weights weights/{name}")
        yield _line("convert import", f"--optimizer-state=weights/{name}", f"--optimizer-state weights/{name}")
        yield BadInput(("convert", "import", f"weights/{name}", "--out=new"), (f"PATH weights/{name}",))
    for name in FOREIGN_TOKENS:
        yield _line("train", f"--tokenizer=byte --dataset=bin:tokens/{name}", "--dataset bin:")
    yield _line("train", "--dataset=bin:tokens/good", "--tokenizer char")


def _parquet(columns: dict[str, list]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------ the table


@functools.cache
def table() -> tuple[BadInput, ...]:
    """All bad inputs."""
    return (*contradictory(), *unknown(), *positional(), *foreign_files(), *generated())


def default_tests() -> set[BadInput]:
    """What the default tests try: a share of the cases of each command."""
    chosen: set[BadInput] = set()
    for command in {case.command for case in table()}:
        chosen |= set([case for case in table() if case.command == command][:: SHARE.get(command, 1)])
    return {case for case in chosen if not case.slow}


def make_sandbox(path: Path) -> Path:
    """Fills a folder with what the command lines name: a text, labeled texts, runs, and files of other formats."""

    def put(file: Path, content: bytes | Callable[[Path], object]) -> None:
        if callable(content):
            content(file)
        else:
            file.write_bytes(content)

    for name in ("home", "folder", "folder.png", "foreign", "formats", "weights", "tokens", "config-only"):
        (path / name).mkdir(parents=True)
    (path / "good.txt").write_text(GOOD_TEXT)
    (path / "foreign" / "thesis.doc").write_text("years of work")
    (path / "labeled.csv").write_text("text,label\n" + "la la,a\nmo mo,b\n" * 40)
    (path / "other-class.csv").write_text("text,label\nla la,a\nru ru,c\n")
    os.mkfifo(path / "pipe")
    (path / "dangling").symlink_to("nowhere/at/all")
    (path / "loop").symlink_to("loop")
    for name, content in {**foreign_texts(), **foreign_labels()}.items():
        put(path / "formats" / name, content)
    for name, content in foreign_weights().items():
        put(path / "weights" / name, content)
    (path / "weights.safetensors").write_bytes(_matching_weights())
    for name, (train, val) in {**FOREIGN_TOKENS, "good": (GOOD_TOKENS, GOOD_TOKENS)}.items():
        (path / "tokens" / name).mkdir()
        put(path / "tokens" / name / "train.bin", train)
        if val is not None:
            put(path / "tokens" / name / "val.bin", val)
    _make_runs(path)
    return path


@functools.cache
def _matching_weights() -> bytes:
    """A safetensors file of zeros that `convert import` accepts for the tiny model and the text of the sandbox."""
    import jax
    import numpy as np
    import safetensors.numpy

    from jaxgpt.interop.torch_names import to_torch
    from jaxgpt.model import gpt

    model, vocab_size = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=8), len(set(GOOD_TEXT))
    shapes = jax.eval_shape(lambda: gpt.init_params(jax.random.key(0), model, vocab_size, gpt.Numerics()))
    tensors = to_torch({name: np.zeros(p.shape, p.dtype) for name, p in shapes.items()})
    return safetensors.numpy.save({name: np.ascontiguousarray(p) for name, p in tensors.items()})


def _make_runs(path: Path) -> None:
    """A language model's run, one without a checkpoint, one with config.json alone, and a classifier's."""
    run = shutil.copytree(RUN_WITHOUT_TEXT, path / "run")
    draw = random.Random(7)
    words = [draw.choice(["la", "ti", "mo", "ru", "ha"]) * draw.randint(1, 2) for _ in range(1500)]
    (path / "words.txt").write_text(" ".join(words) + "\n")
    for name in ("config.json", "data.json"):  # they hold the absolute path of the text
        (run / name).write_text((run / name).read_text().replace("words.txt", str(path / "words.txt")))
    shutil.copy(path / "weights.safetensors", run)
    shutil.copytree(run, path / "no-checkpoint", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copy(run / "config.json", path / "config-only" / "config.json")
    classifier = shutil.copytree(path / "no-checkpoint", path / "classifier")
    model = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=8)
    config = FinetuneConfig(dataset=f"file:{path / 'labeled.csv'}", max_tokens=4, model=model)
    (classifier / "config.json").write_text(json.dumps(to_json(config)))
    data = {"dataset": config.dataset, "sha256": "0" * 64, "source": str(path / "labeled.csv")}
    base = {"run": str(run), "step": 21, "sha256": "0" * 64}
    (classifier / "data.json").write_text(json.dumps(data | {"labels": ["a", "b"], "base": base}))


# --------------------------------------------------------------------------------------------------------- trying them


class Hang(BaseException):
    """The command gave no answer. No Exception, so that no command handles it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `Hang` in the main thread after so many seconds."""

    def stop(_number: int, _frame: Any) -> None:
        raise Hang(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def files_below(path: Path) -> dict[str, tuple[int, int, int]]:
    """All that lies in a folder, by path: its type, and of files the size and the time of the last change.

    But for the cache of compiled programs, where JAX has one: a run that is read to be refused is compiled for.
    """
    found = {}
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if name != ".cache"]
        for name in (*folders, *files):
            status = os.lstat(os.path.join(folder, name))
            content = (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (0, 0)
            found[os.path.join(folder, name)] = (status.st_mode, *content)
    return found


def attempt(run: Callable[..., Any], case: BadInput, sandbox: Path) -> tuple[Outcome, str]:
    """Tries a bad input in this process.

    Args:
        run: runs a command line, as the fixture `cli` does.

    Returns:
        How it was answered, and what there is to say about it.
    """
    before = files_below(sandbox)
    stdin = io.TextIOWrapper(io.BytesIO(case.stdin), encoding="utf-8")
    try:
        with time_limit(HANG_SECONDS):
            done = run(*case.args, cwd=sandbox, stdin=stdin, HOME=str(sandbox / "home"), HF_HUB_OFFLINE="1")
    except Hang as e:
        return "hang", str(e)
    except Exception as e:
        return "traceback", f"{type(e).__name__}: {e}"
    after = files_below(sandbox)
    if done.returncode == 0:
        return "silent", f"accepted; {done.stdout[-200:]!r}"
    said = f"exit code {done.returncode}, {done.stderr[:600]!r}"
    if changed := sorted(name for name in {*before, *after} if before.get(name) != after.get(name)):
        return "unclear", f"{', '.join(changed)[:300]} written; {said}"
    line = done.stderr
    one_line = line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n")
    if done.returncode != 2 or not one_line:
        return "unclear", said
    if missing := [name for name in case.names if " ".join(name.split()) not in line]:
        return "unclear", f"does not name {', '.join(missing)}: {said}"
    return "told", line


def answers(run: Callable[..., Any], folder: Path) -> Iterator[tuple[BadInput, Outcome, str]]:
    """Tries the whole table: each bad input, how it was answered, and what there is to say about it.

    Args:
        run: runs a command line, as the fixture `cli` does.
        folder: an empty folder.
    """
    sandbox, made = make_sandbox(folder / "0"), 1
    for case in table():
        outcome, what = attempt(run, case, sandbox)
        yield case, outcome, what
        if outcome != "told":  # files that were written may change what comes after
            sandbox, made = make_sandbox(folder / str(made)), made + 1
