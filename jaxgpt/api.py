"""The library: train, load, evaluate and sample language models from Python. The commands call the same functions.

The names of this module are `jaxgpt`'s: `import jaxgpt; model = jaxgpt.load("runs/shakespeare")`.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from jaxgpt.config import SamplingConfig, TrainConfig
from jaxgpt.errors import UserError
from jaxgpt.progress import ProgressDisplay

# What imports jax is imported in the functions: missing data is reported without waiting for it.
if TYPE_CHECKING:
    import jax

    from jaxgpt.data.tokenizer import Tokenizer
    from jaxgpt.model.gpt import Params
    from jaxgpt.parallel import Executor
    from jaxgpt.runs.run_dir import RunDir
    from jaxgpt.tasks.language_modeling import SplitLoss
    from jaxgpt.tasks.text_generation import Continuation, TextModel

Checkpoint = Literal["result", "last", "best"]
Target = Literal["huggingface", "nanogpt", "safetensors"]


@dataclass(frozen=True)
class LanguageModel:
    """A trained language model, as `load` gives it."""

    config: TrainConfig
    """What it was trained by, as far as that is known; `config.model` is its shape."""
    tokenizer: "Tokenizer"
    step: int
    """Updates done."""
    executor: "Executor"
    """What computes its loss on the devices of this machine."""
    placed_params: "Params"
    """The parameters as the executor has them on its devices."""
    run: "RunDir | None" = None
    """The run that it comes from; None of another's model."""

    @cached_property
    def params(self) -> "Params":
        """The parameters by dotted name, on one device, in float32 (of a float64 run, float64); a Linear's kernel is
        [inputs, outputs]."""
        from jaxgpt.parallel import on_one_device

        return on_one_device(self.placed_params)

    @cached_property
    def text_model(self) -> "TextModel":
        """What `tasks.text_generation` takes."""
        from jaxgpt.objective import LanguageModelingObjective
        from jaxgpt.tasks.text_generation import TextModel

        objective = self.executor.objective
        assert isinstance(objective, LanguageModelingObjective)
        return TextModel(objective.exact_model, self.params, self.config.model, self.tokenizer)


def train(
    config: TrainConfig,
    out_dir: str | Path | None = None,
    data_dir: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    init_from: str | None = None,
) -> Path:
    """Trains a language model to the end, or resumes the run of the same configuration in `out_dir`.

    Call it in the main thread: it handles signals. Ctrl-C saves the state first.

    Args:
        config: from `configure`.
        out_dir: the run folder; by default a new one under runs/.
        data_dir: a folder to look for datasets in first.
        overwrite: start again if `out_dir` holds a run.
        quiet: print nothing.
        init_from: a run or another's model to start from, as `jaxgpt train --init-from` takes it.

    Returns:
        The run folder, for `load`.

    Raises:
        UserError: the data, the folder or the memory does not do.
        LossNotFinite: a loss or a gradient is not finite.
        SystemExit: a signal stopped it; what is done is saved, and the same call goes on.
    """
    out, data = (None if folder is None else Path(folder) for folder in (out_dir, data_dir))
    path, code = train_or_resume(config, out, data, overwrite, ProgressDisplay(not quiet), init_from=init_from)
    if code:
        raise SystemExit(code)
    return path


def train_or_resume(
    config: TrainConfig,
    out_dir: Path | None,
    data_dir: Path | None,
    overwrite: bool,
    display: ProgressDisplay,
    started: float | None = None,
    **options: Any,
) -> tuple[Path, int]:
    """`train` with all that `jaxgpt train` takes.

    Args:
        started: `time.perf_counter()` at the start, for the time to the first step; by default now.
        options: the other arguments of `tasks.language_modeling.train`.

    Returns:
        The run folder, and the exit code: 0, or 128 + the signal that stopped the training.
    """
    from jaxgpt.data.corpora import load_corpus, streaming_of_run
    from jaxgpt.runs import run_dir

    started = time.perf_counter() if started is None else started
    spec = run_dir.recorded_choice(out_dir, config.dataset)
    recorded = None if overwrite else run_dir.recorded_dataset(out_dir)
    streaming = streaming_of_run(recorded, config.streaming) if recorded else config.streaming
    corpus = load_corpus(spec, data_dir, display.line, config.text_column, streaming)
    from jaxgpt.tasks import language_modeling

    config = dataclasses.replace(config, dataset=corpus.name)
    folder = out_dir or run_dir.default_run_dir(config.dataset, config.preset)
    code = language_modeling.train(config, corpus, folder, overwrite, display, started, data_dir, **options)
    return folder, code


def load(
    path: str | Path,
    checkpoint: Checkpoint = "result",
    data_dir: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> LanguageModel:
    """A trained language model: a run's, or another's.

    Args:
        path: a run folder; or a folder or repository of Hugging Face's GPT-2, nanoGPT's ckpt.pt, llm.c's .bin, or a
            safetensors file that says its tokenizer.
        checkpoint: of a run: "last", "best" (the one with the lowest validation loss), or "result": the best if the run
            stopped early, else the last.
        data_dir: a folder to look for GPT-2's vocabulary in first.
        say: takes lines about what is read, assumed and left out of another's model.

    Raises:
        UserError: there is no model, or no checkpoint; it is a classifier's, or of another architecture.
        DamagedRun: a run's files are damaged.
    """
    _require_one_of("checkpoint", checkpoint, Checkpoint)
    from jaxgpt.interop.pretrained import is_run

    if is_run(Path(path)):
        return load_run(Path(path), checkpoint)
    return _load_pretrained(str(path), "load", checkpoint, None if data_dir is None else Path(data_dir), say)


def load_local(path: Path, checkpoint: Checkpoint, say: Callable[[str], None]) -> LanguageModel:
    """`load` of a command's RUN: a path that does not exist is no repository's name."""
    from jaxgpt.interop.pretrained import is_run

    if is_run(path) or not os.path.lexists(path):
        return load_run(path, checkpoint)
    return _load_pretrained(str(path), "RUN", checkpoint, None, say)


def _load_pretrained(
    path: str, flag: str, checkpoint: Checkpoint, data_dir: Path | None, say: Callable[[str], None]
) -> LanguageModel:
    """`load` of what is no run."""
    from jaxgpt import parallel
    from jaxgpt.interop.import_export import imported_config
    from jaxgpt.interop.pretrained import load_pretrained
    from jaxgpt.runtime import build_executor

    found = load_pretrained(path, flag, checkpoint, data_dir, say)
    if found.tokenizer is None or found.tokenizer.vocab_size != found.vocab_size:
        raise UserError(
            f"{flag} {path}: names no tokenizer for its vocabulary of {found.vocab_size:,}; make a run of it with "
            "jaxgpt convert import, and the --dataset and --tokenizer that it was trained with"
        )
    config = imported_config(TrainConfig(dataset=""), path, found)
    executor = build_executor(config, found.tokenizer, devices=parallel.one_device)
    dtype = executor.objective.numerics.param_dtype
    params = executor.put({name: np.asarray(p, dtype) for name, p in found.params.items()})
    return LanguageModel(config, found.tokenizer, found.step, executor, params)


def load_run(path: Path, checkpoint: Checkpoint) -> LanguageModel:
    """`load` of a run folder. Raises `UserError` and `DamagedRun` as it does."""
    from jaxgpt.runs import restore

    run, executor, state = restore.restore_language_model(path, checkpoint)
    assert isinstance(run.config, TrainConfig)
    return LanguageModel(run.config, run.tokenizer, int(state.step), executor, state.params, run)


def logits(model: LanguageModel, text: str | Sequence[int] | np.ndarray) -> np.ndarray:
    """The logits of the next token after each token of a text.

    Args:
        text: a text, or ids [T]; or ids [B, T] of several texts of one length. T is at most a block.

    Returns:
        float32 [T, V], or [B, T, V].

    Raises:
        UserError: the text is empty, longer than a block, or holds what the vocabulary has not.
    """
    try:
        ids = model.tokenizer.encode(text) if isinstance(text, str) else np.asarray(text)
    except ValueError:  # rows of different lengths
        raise UserError("logits: the texts have different lengths; give each by itself") from None
    block_size, vocab_size = model.config.model.block_size, model.tokenizer.vocab_size
    if ids.ndim not in (1, 2) or not ids.size or ids.shape[-1] > block_size:
        raise UserError(f"logits: the ids have the shape {list(ids.shape)}; give 1 to {block_size} tokens of each text")
    if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= vocab_size:
        raise UserError(f"logits: the ids must be whole numbers from 0 to {vocab_size - 1}")
    found = _logits(model.text_model.model)(model.params, np.atleast_2d(ids).astype(np.int32))
    return np.asarray(found if ids.ndim == 2 else found[0])


@lru_cache(4)
def _logits(model: "Callable[[Params], Any]") -> "Callable[[Params, np.ndarray], jax.Array]":
    """The compiled forward pass. Cached, so that texts of one length compile it once."""
    import jax

    return jax.jit(lambda params, idx_BT: model(params)(idx_BT))


def generate(
    model: LanguageModel, prompts: str | Sequence[str], sampling: SamplingConfig | None = None, **flags: Any
) -> "Iterator[Continuation]":
    """The continuations of prompts, in order; they are computed in batches while you iterate.

    Args:
        prompts: one prompt or several, of any lengths; the model reads the last block of a longer one.
        sampling: how tokens are chosen, and where a text ends.
        flags: fields of `SamplingConfig`, as `temperature=0.8`; they come before those of `sampling`.

    Raises:
        UserError: a flag is out of its range; a prompt is empty, or has what the vocabulary has not.
    """
    from jaxgpt.tasks import text_generation

    prompts = [prompts] if isinstance(prompts, str) else prompts
    return text_generation.continuations(model.text_model, prompts, _sampling(sampling, flags))


def stream(
    model: LanguageModel, prompt: str, sampling: SamplingConfig | None = None, **flags: Any
) -> "Generator[str, None, Continuation]":
    """The continuation of one prompt, piece by piece as its tokens come. Arguments and errors as of `generate`."""
    from jaxgpt.tasks import text_generation

    return text_generation.stream(model.text_model, prompt, _sampling(sampling, flags))


def _sampling(sampling: SamplingConfig | None, flags: dict[str, Any]) -> SamplingConfig:
    known = [f.name for f in dataclasses.fields(SamplingConfig)]
    for name in flags:
        if name not in known:
            raise UserError(f"generate: there is no {name}; choose of {', '.join(known)}")
    if isinstance(stop := flags.get("stop"), str | list):
        flags["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    try:
        return dataclasses.replace(sampling or SamplingConfig(), **flags)
    except TypeError as e:
        raise UserError(f"generate: a value has another type than its flag ({e}); see SamplingConfig") from None


def _require_one_of(name: str, value: str, kind: Any) -> None:
    """Raises `UserError` if a value is none of a `Literal`'s."""
    if value not in get_args(kind):
        raise UserError(f"{name} {value}: choose of {', '.join(get_args(kind))}")


def evaluate(
    model: LanguageModel,
    split: Literal["val", "train", "test"] = "val",
    stride: int | None = None,
    data_dir: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    dataset: str | None = None,
) -> "SplitLoss":
    """The loss over a whole split of the data that the model was trained on, or of another dataset.

    Args:
        split: "test" is a split of `dataset` alone.
        stride: the distance in tokens between the starts of windows, by default a block: a window counts the tokens
            that no window before it has counted.
        data_dir: a folder to look for datasets in first.
        say: takes lines about the progress.
        dataset: the name of another dataset, as `TrainConfig.dataset`, to encode with the model's tokenizer.

    Returns:
        The mean loss in nats per token, with `perplexity`, `bits_per_byte`, and how many `tokens`.

    Raises:
        UserError: the stride is out of its range; the data cannot be had, or is another.
    """
    from jaxgpt.runs import restore
    from jaxgpt.tasks import evaluation, language_modeling

    if stride is not None:
        language_modeling.require_stride(stride, model.config.model.block_size)
    folder = None if data_dir is None else Path(data_dir)
    if dataset is not None:
        folder = folder or (model.run.data_dir if model.run else None)
        tokens_N = evaluation.tokens_of_dataset(model.config, model.tokenizer, dataset, split, folder, say)
    elif model.run is None:
        raise UserError("evaluate: the model is no run's, so it has no data; name a dataset")
    elif split == "test":
        raise UserError("evaluate: the model's own data has the splits val and train; name a dataset")
    else:
        tokens_N = restore.split_of(model.run, split, folder)
    return language_modeling.whole_split_loss(
        model.executor, model.placed_params, tokens_N, model.tokenizer, stride, say
    )


def import_run(
    path: str,
    out_dir: str | Path,
    config: TrainConfig | None = None,
    data_dir: str | Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Makes a run from another's model, as `jaxgpt convert import` does.

    Args:
        path: a folder or repository of Hugging Face's GPT-2, nanoGPT's ckpt.pt, llm.c's .bin, or a safetensors file.
        out_dir: the folder of the run.
        config: from `configure`, what the run trains on and how; the model's shape comes from `path`. By default the
            run holds the model alone.
        data_dir: a folder to look for datasets in first.
        say: takes lines about what is read, assumed and left out.

    Returns:
        The run folder, for `load`.

    Raises:
        UserError: the folder holds a run, or there is no model at `path`; nothing has been written then.
    """
    from jaxgpt.data.corpora import load_corpus
    from jaxgpt.interop import import_export
    from jaxgpt.interop.pretrained import load_pretrained

    folder = None if data_dir is None else Path(data_dir)
    config, corpus = config or TrainConfig(dataset=""), None
    if config.dataset:
        corpus = load_corpus(config.dataset, folder, say, config.text_column, config.streaming)
        config = dataclasses.replace(config, dataset=corpus.name)
    import_export.require_new_run(Path(out_dir), overwrite, {"PATH": path})
    pretrained = load_pretrained(path, "PATH", data_dir=folder, say=say)
    config = import_export.imported_config(config, path, pretrained)
    import_export.import_run(config, corpus, pretrained, f"PATH {path}", Path(out_dir), overwrite, say, folder)
    return Path(out_dir)


def export_run(
    path: str | Path,
    out: str | Path,
    to: Target = "huggingface",
    checkpoint: Checkpoint = "result",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Writes a run's model for PyTorch, as `jaxgpt convert export` does.

    Args:
        path: a run folder.
        out: the file to write; with `to` "huggingface" a folder.
        to: "huggingface" for `AutoModelForCausalLM` and `AutoTokenizer`, "nanogpt" for its ckpt.pt, or "safetensors"
            for the weights alone.
        say: takes lines about what nanoGPT does otherwise.

    Returns:
        The checkpoint's number of updates.

    Raises:
        UserError: there is no run or checkpoint, or a file exists or cannot be written.
    """
    from jaxgpt.interop import import_export

    _require_one_of("to", to, Target)
    _require_one_of("checkpoint", checkpoint, Checkpoint)
    where = Path(path), checkpoint, Path(out)
    if to == "huggingface":
        return import_export.export_huggingface(*where, overwrite)
    if to == "nanogpt":
        return import_export.export_nanogpt(*where, overwrite, say)
    return import_export.export_safetensors(*where, None, overwrite)
