"""Pretrained models of any origin, by their path: the one door to weights that were trained before.

A path is a run's folder, a folder or repository of Hugging Face, nanoGPT's ckpt.pt or the folder that holds it, llm.c's
.bin, or a safetensors file. Which it is, its content tells.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt import strict_json
from jaxgpt.config import ModelConfig, TrainConfig, differences
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.files import NotAvailable, open_regular
from jaxgpt.data.tokenizer import Gpt2Tokenizer, Tokenizer, choice, gpt2_folder
from jaxgpt.errors import UserError
from jaxgpt.errors import flag as flag_of
from jaxgpt.interop import huggingface, llmc, nanogpt, safetensors, torch_files, torch_names
from jaxgpt.interop.torch_model import (
    GPT2_VOCABULARY,
    PADDED_VOCABULARY,
    TorchModel,
    count_blocks,
    errors_prefixed,
    model_config,
)
from jaxgpt.presets import PRESETS
from jaxgpt.runs.restore import restore_language_model

RECORD = "jaxgpt"  # in the metadata of a safetensors file that was exported here: model and tokenizer
TOLD = ("n_head", "gelu", "layer_norm_eps")  # fields of a model that no tensor's shape shows
OF_TRAINING = ("dropout", "attention_dropout", "init")  # fields of a model that its weights do not have
REPOSITORY = re.compile(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?(@[\w./-]{1,95})?")


@dataclass(frozen=True)
class Pretrained:
    """A pretrained language model.

    Args:
        kind: where it comes from: "run", "Hugging Face", "nanoGPT", "llm.c", "safetensors".
        source: the absolute path, or the repository's name.
        model: the shape, with the dropout of its training.
        params: on the host, by Flax name and in Flax's layout.
        tokenizer: None if nothing says which.
        vocab_size: the number of its tokens.
        step: the updates that it was trained for.
        optimizer_state: under the names that `torch_names.optimizer_from_torch` takes; None if there is none.
        recipe: fields of a `TrainConfig` that its training is known to have had.
        notes: what was assumed or left out, as sentences without a full stop.
    """

    kind: str
    source: str
    model: ModelConfig
    params: dict[str, np.ndarray]
    tokenizer: Tokenizer | None
    vocab_size: int
    step: int = 0
    optimizer_state: Mapping[str, np.ndarray] | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def require_vocabulary(self, vocab_size: int, flag_and_path: str, tokenizer: str) -> None:
        """Raises `UserError` if a vocabulary is not the model's.

        Args:
            flag_and_path: what gave the model, for messages.
            tokenizer: what has the vocabulary, for messages.
        """
        if vocab_size != self.vocab_size:
            raise UserError(
                f"{flag_and_path}: has a vocabulary of {self.vocab_size:,}, and {tokenizer} one of {vocab_size:,}; "
                "give the --dataset and the --tokenizer that it was trained with"
            )


def load_pretrained(
    path: str,
    flag: str = "--init-from",
    checkpoint: str = "result",
    data_dir: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    told: Mapping[str, Any] | None = None,
) -> Pretrained:
    """The model at a path.

    Args:
        path: as in this module's docstring.
        flag: the flag that gave the path, for messages.
        checkpoint: of a run, which: "last", "best" or "result".
        data_dir: a folder to look for GPT-2's vocabulary in first.
        say: takes lines about what is read, assumed and left out.
        told: fields of a `ModelConfig` that a safetensors file without a configuration does not tell: n_head and gelu,
            and layer_norm_eps, which is 1e-5 if it is not told.

    Raises:
        UserError: there is no model, it is of another architecture, or a file is damaged.
    """
    place = Path(path)
    if is_run(place):
        return _of_run(place, checkpoint)
    if checkpoint != "result":
        raise UserError(f"--checkpoint {checkpoint}: {path} is no run, so it has one state only; leave the flag out")
    source = os.path.abspath(place)
    if not os.path.lexists(place) and REPOSITORY.fullmatch(path):
        source, place = path, huggingface.download(path, flag, say)
    with _one_line(f"{flag} {path}"):
        found = _read(place, flag, data_dir, told or {})
        found = _with_tokenizer(found, data_dir)
        params = found.flax_params()
    shape = f"{found.model.n_layer} layers, {found.model.n_head} heads, width {found.model.n_embd}"
    n_params = sum(p.size for p in params.values())
    say(f"{path}: {found.kind}, {shape}, a vocabulary of {found.vocab_size:,}, {n_params:,} parameters")
    for note in found.notes:
        say(f"{path}: {note}")
    more = (found.tokenizer, found.vocab_size, found.step, found.optimizer_state, found.recipe, found.notes)
    return Pretrained(found.kind, source, found.model, params, *more)


def all_given(config: TrainConfig, given: Collection[str]) -> set[str]:
    """The fields that a user has chosen: those whose flags were given, and those that differ from the preset's.

    Args:
        given: names as "model.n_layer", whatever their values.
    """
    return {*given, *(name for name, _, _ in differences(PRESETS[config.preset], config))}


def with_model(
    config: TrainConfig, path: str, model: ModelConfig, tokenizer: Tokenizer | None, given: Collection[str] = ()
) -> TrainConfig:
    """A configuration with the model and the tokenizer of some weights.

    A flag that was given must fit them. What belongs to a training alone, as dropout, comes from the flags.

    Args:
        path: of the weights, for messages.
        given: the fields whose flags were given, as `all_given` takes them.

    Raises:
        UserError: a flag asks for another model or tokenizer.
    """
    given = all_given(config, given)
    fields: dict[str, Any] = {name: getattr(config.model, name) for name in OF_TRAINING}
    for name in (f.name for f in dataclasses.fields(ModelConfig)):
        value, theirs = getattr(config.model, name), getattr(model, name)
        if f"model.{name}" not in given or name in OF_TRAINING or value == theirs:
            continue
        if name != "block_size" or value > theirs:
            raise UserError(
                f"{flag_of('model.' + name)} {value}: {path} has {theirs}; leave it out: the model is the weights' own"
            )
        fields[name] = value
    changes: dict[str, Any] = {"model": dataclasses.replace(model, **fields)}
    if tokenizer is not None:
        theirs = choice(tokenizer)
        if "tokenizer" in given and config.tokenizer != theirs:
            raise UserError(f"--tokenizer {config.tokenizer}: {path} has {theirs}; leave it out")
        changes["tokenizer"] = theirs
    return dataclasses.replace(config, **changes)


def cropped(params: Mapping[str, np.ndarray], block_size: int) -> dict[str, np.ndarray]:
    """The parameters with the embeddings of the first `block_size` positions."""
    positions = "pos_emb.embedding"
    return {**params, positions: params[positions][:block_size]}


def load_weights(path: Path, flag: str, model: ModelConfig) -> Pretrained:
    """The weights of a safetensors file, of a model that is known.

    Raises:
        UserError: the file cannot be read, or its tensors are not those of the model.
    """
    tensors = safetensors.read(path, flag)
    with errors_prefixed(f"{flag} {path}"):
        tensors = torch_names.tutorial_names(tensors)
        table = tensors.get("token_emb.weight")
        vocab_size = len(table) if table is not None and table.ndim else 1
        params = TorchModel("safetensors", model, tensors, vocab_size).fitted(torch_names.HINT)
    return Pretrained("safetensors", os.path.abspath(path), model, params, None, vocab_size)


def is_run(path: Path) -> bool:
    """Whether a path is the folder of a run, or of what is left of one."""
    # Unlike Path.is_file, os.path has no error for a name too long.
    return os.path.isfile(path / "data.json") or os.path.isdir(path / "checkpoints")


def _of_run(folder: Path, checkpoint: str) -> Pretrained:
    run, executor, state = restore_language_model(folder, checkpoint)
    params = {name: np.asarray(p) for name, p in jax.device_get(state.params).items()}
    source, tokenizer, step = os.path.abspath(folder), run.tokenizer, int(state.step)
    return Pretrained("run", source, run.config.model, params, tokenizer, tokenizer.vocab_size, step)


@contextlib.contextmanager
def _one_line(flag_and_path: str) -> Iterator[None]:
    """Reports what reading a foreign file raises as one `UserError` with its path."""
    try:
        with errors_prefixed(flag_and_path):
            yield
    except FileNotFoundError:
        raise UserError(f"{flag_and_path}: no such file, folder or run; check the path") from None
    except (OSError, ValueError) as e:  # ValueError: the path holds a NUL
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise UserError(f"{flag_and_path}: cannot be read ({reason}); give a readable file or folder") from None


def _read(path: Path, flag: str, data_dir: Path | None, told: Mapping[str, Any]) -> TorchModel:
    if path.is_dir():
        if huggingface.read_config(path) is not None:
            return huggingface.read(path, flag, data_dir)
        if (path / nanogpt.FILE).is_file():
            return nanogpt.read(path / nanogpt.FILE, flag)
        raise UserError(
            f"holds no model: neither a run, nor config.json of transformers, nor {nanogpt.FILE}; give another folder"
        )
    with open_regular(path) as f:
        start = f.read(8)
    if start.startswith(torch_files.MAGIC):
        return nanogpt.read(path, flag)
    if llmc.is_llmc(start):
        return llmc.read(path)
    if start.startswith(b"\x80\x02"):
        raise UserError("is a pickle, as torch.save wrote before version 1.6; save it again with a newer torch")
    return _read_safetensors(path, flag, data_dir, told)


def _read_safetensors(path: Path, flag: str, data_dir: Path | None, told: Mapping[str, Any]) -> TorchModel:
    """The model of a file without a configuration: what its shapes say, and what it was exported with or is told."""
    tensors = torch_names.tutorial_names(safetensors.read(path, flag))
    tables = [tensors.get(name) for name in ("token_emb.weight", "pos_emb.weight")]
    if any(p is None or p.ndim != 2 for p in tables):
        raise UserError("holds no token and position embeddings of a GPT-2; give a file with all weights of one")
    (vocab_size, width), (block_size, _) = (p.shape for p in tables if p is not None)
    record = safetensors.metadata(path, flag).get(RECORD)
    if record is not None:
        try:
            values = strict_json.loads(record)
            tokenizer = tokenizers.from_json({"folder": str(data_dir or Path()), **values["tokenizer"]})
            return TorchModel("safetensors", model_config(**values["model"]), tensors, vocab_size, tokenizer)
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"its metadata cannot be read ({type(e).__name__}: {e}); export it again") from None
    if unknown := [name for name in ("n_head", "gelu") if name not in told]:
        flags = " and ".join(
            {"n_head": "--model.n-head N (attention heads)", "gelu": "--model.gelu erf or tanh"}[name]
            for name in unknown
        )
        raise UserError(f"says nothing of some parts of its model; give {flags} to jaxgpt convert import")
    model = model_config(
        n_layer=count_blocks(tensors),
        n_embd=width,
        block_size=block_size,
        tied_head="lm_head.weight" not in tensors,
        bias="ln_f.bias" in tensors,
        init="gpt2",
        **{name: told[name] for name in TOLD if name in told},
    )
    notes = () if "layer_norm_eps" in told else ("LayerNorm's epsilon is taken as 1e-5: no file of weights says it",)
    return TorchModel("safetensors", model, tensors, vocab_size, notes=notes)


def _with_tokenizer(found: TorchModel, data_dir: Path | None) -> TorchModel:
    """The model with GPT-2's tokenizer, if it names none and has GPT-2's vocabulary, padded or not."""
    known = found.tokenizer is not None or found.has_unknown_tokenizer
    if known or found.vocab_size not in (GPT2_VOCABULARY, PADDED_VOCABULARY):
        return found
    try:
        tokenizer = Gpt2Tokenizer(gpt2_folder(data_dir, lambda line: None))
        note = "it names no tokenizer; GPT-2's is taken, by the size of its vocabulary"
    except NotAvailable as e:
        tokenizer, note = None, f"it names no tokenizer, and GPT-2's cannot be had: {e}"
    found = replace(found, tokenizer=tokenizer, notes=(*found.notes, note))
    return found.without_padding(GPT2_VOCABULARY)
