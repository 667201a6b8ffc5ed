"""Import of a pretrained model as a run, and export of a run's model to other programs."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt import parallel, strict_json
from jaxgpt.config import TrainConfig
from jaxgpt.data.corpora import Corpus
from jaxgpt.data.files import atomic_folder
from jaxgpt.data.tokenizer import make_tokenizer, sample_prompt
from jaxgpt.errors import UserError
from jaxgpt.interop import huggingface, huggingface_tokenizer, model_card, nanogpt, safetensors, torch_names
from jaxgpt.interop.pretrained import OF_TRAINING, RECORD, Pretrained, all_given, cropped, with_model
from jaxgpt.interop.torch_model import errors_prefixed
from jaxgpt.runs import run_dir
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.runs.restore import RestoredRun, restore_any, restore_language_model
from jaxgpt.runtime import build_executor, build_language_modeling
from jaxgpt.train_step import TrainState

NO_CORPUS = Corpus("", "", "", {})  # of a run that holds a model alone


def imported_config(flags: TrainConfig, path: str, pretrained: Pretrained, given: Collection[str] = ()) -> TrainConfig:
    """The configuration of a run that holds a pretrained model: its model, and its recipe as far as it is known.

    Args:
        flags: what the command's flags say.
        path: of the model, for messages.
        given: the fields whose flags were given, as `all_given` takes them; they count before the recipe.

    Raises:
        UserError: a flag asks for another model, or the recipe is none that can be trained here.
    """
    given = all_given(flags, given)
    if "schedule" in given:  # the rest of the recipe's own belongs to it
        given |= {"warmup_steps", "decay_steps", "min_lr"}
    recipe = {name: value for name, value in pretrained.recipe.items() if name not in given}
    if flags.dtype == "auto" and any(p.dtype == np.float64 for p in pretrained.params.values()):
        recipe["dtype"] = "float64"
    # The rates of dropout are those of its training where no flag gives them.
    own = {name: getattr(pretrained.model, name) for name in OF_TRAINING if f"model.{name}" not in given}
    flags = dataclasses.replace(flags, model=dataclasses.replace(flags.model, **own), **recipe)
    return with_model(flags, path, pretrained.model, pretrained.tokenizer, given)


def require_new_run(out: Path, overwrite: bool, sources: Mapping[str, str | Path | None]) -> None:
    """Checks the folder of a run to make, before what goes into it is read.

    Args:
        sources: the paths that it is made from, by flag; None if the flag was not given.

    Raises:
        UserError: it holds a run, or a path that it is made from.
    """
    if os.path.exists(out / "config.json") and not overwrite:
        raise UserError(f"--out {out}: holds a run already; choose another folder, or --overwrite to replace it")
    for flag, path in sources.items():
        if path and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
            raise UserError(f"{flag} {path}: lies in --out {out}, which is replaced; move the file out of there")


def import_run(
    config: TrainConfig,
    corpus: Corpus | None,
    pretrained: Pretrained,
    flag_and_path: str,
    out: Path,
    overwrite: bool,
    say: Callable[[str], None],
    data_dir: Path | None = None,
) -> tuple[TrainConfig, int]:
    """Makes a run folder whose only checkpoint holds a pretrained model, with its optimizer's state if it has one.

    Args:
        config: as `imported_config` gives it.
        corpus: the text that the run will train on; None for a run that holds the model alone.
        flag_and_path: what gave the model, for messages.
        out: the folder of the run, as `require_new_run` has found it.
        say: takes lines about the progress.
        data_dir: a folder to look for GPT-2's vocabulary in first.

    Returns:
        The run's configuration, and the number of updates done.

    Raises:
        UserError: `out` holds other files, or the model does not fit the text. Nothing has been written then.
    """
    if corpus is None:
        tokenizer = pretrained.tokenizer
        if tokenizer is None and config.tokenizer in ("byte", "gpt2"):  # which need no text
            tokenizer = make_tokenizer(config.tokenizer, NO_CORPUS, data_dir, say)
        if tokenizer is None:
            raise UserError(
                f"{flag_and_path}: names no tokenizer for its vocabulary of {pretrained.vocab_size:,}; give --dataset "
                "and --tokenizer as it was trained with"
            )
        executor = build_executor(config, tokenizer, devices=parallel.one_device)
    else:
        known = pretrained.tokenizer
        data, executor = build_language_modeling(
            config, corpus, data_dir, say, known, devices=parallel.one_device, trains=False
        )
        tokenizer = data.tokenizer
        sample_prompt(config.prompt, tokenizer, corpus)  # a run whose prompt cannot be encoded could not be trained
    config = executor.config
    pretrained.require_vocabulary(tokenizer.vocab_size, flag_and_path, f"--tokenizer {config.tokenizer}")
    with errors_prefixed(flag_and_path):
        state = _state(executor, pretrained)
    done = int(state.step)
    if done > config.steps:
        raise UserError(
            f"{flag_and_path}: {done} updates done, more than --steps {config.steps}; raise --steps, or give another "
            "file"
        )
    with _out_dir_flag_replaced("--out"):
        begun = run_dir.create(out, config, tokenizer, corpus or NO_CORPUS, overwrite, complete=False)
    with contextlib.closing(begun) as run:
        try:
            with contextlib.closing(Checkpoints(run, config.keep_checkpoints)) as checkpoints:
                checkpoints.save(executor.put(state))
                checkpoints.wait()
            run.complete()  # only now is the folder a run: an interrupted import leaves none
        except BaseException:
            run.discard()
            raise
    n_params = sum(p.size for p in state.params.values())
    say(f"{n_params:,} parameters of {pretrained.source}, {done} of {config.steps} updates done: {out}")
    return config, done


def _state(executor: parallel.Executor, pretrained: Pretrained) -> TrainState:
    """The state of a run that holds the model: at its step if its optimizer's state is there, else before the first."""
    like = executor.abstract_state()
    dtype = executor.objective.numerics.param_dtype
    for name, p in pretrained.params.items():
        if not np.can_cast(p.dtype, dtype, "safe"):
            raise UserError(f"{name}: {p.dtype} in the file, {np.dtype(dtype)} in the model; give --dtype {p.dtype}")
    block_size = executor.config.model.block_size
    params = cropped(pretrained.params, block_size)
    params = {name: p.astype(dtype) for name, p in params.items()}
    if pretrained.optimizer_state is None:
        step, opt_state = 0, executor.objective.optimizer.init(jax.tree.map(jax.numpy.asarray, params))
    else:
        tensors = pretrained.optimizer_state
        tensors = {n: p[:block_size] if n.endswith(".pos_emb.weight") else p for n, p in tensors.items()}
        opt_state = torch_names.optimizer_from_torch(tensors, like.opt_state)
        step = int(np.asarray(pretrained.optimizer_state["step"]).item())
    return TrainState(jax.numpy.int32(step), params, opt_state)


def with_optimizer_state(pretrained: Pretrained, path: Path, flag: str) -> Pretrained:
    """The model with the optimizer's state of a safetensors file, as `export_run` writes it."""
    return dataclasses.replace(pretrained, optimizer_state=safetensors.read(path, flag))


# --------------------------------------------------------------------------------------------------------------- export


def export_safetensors(path: Path, which: str, out: Path, optimizer_state: Path | None, overwrite: bool) -> int:
    """Writes the weights of a checkpoint to a safetensors file, under the tutorials' names.

    Args:
        which: "last", "best", or "result": the best if the run stopped early, else the last.
        out: the file for the weights.
        optimizer_state: the file for the optimizer state, if it is to be written.

    Returns:
        The checkpoint's number of updates.

    Raises:
        UserError: there is no run or checkpoint, or a file exists or cannot be written.
    """
    safetensors.require_new({"--out": out, "--optimizer-state": optimizer_state}, overwrite, keep_out_of=path)
    run, _, state = restore_language_model(path, which)
    params, opt_state = jax.device_get((state.params, state.opt_state))
    files = [("--out", out, torch_names.to_torch(params))]
    if optimizer_state:
        files.append(("--optimizer-state", optimizer_state, torch_names.optimizer_to_torch(opt_state)))
    record = {"model": dataclasses.asdict(run.config.model), "tokenizer": run.tokenizer.to_json()}
    record["tokenizer"].pop("folder", None)
    safetensors.write(files, {RECORD: strict_json.dumps(record)})
    return int(state.step)


def export_nanogpt(path: Path, which: str, out: Path, overwrite: bool, say: Callable[[str], None]) -> int:
    """Writes a checkpoint as nanoGPT's ckpt.pt, with the optimizer's state. The rest as of `export_safetensors`.

    Raises:
        UserError: also if nanoGPT has no such model or optimizer.
    """
    safetensors.require_new({"--out": out}, overwrite, keep_out_of=path)
    run, _, state = restore_language_model(path, which)
    params, opt_state = jax.device_get((state.params, state.opt_state))
    reports = run.read_metrics()
    val_loss = min((report["val_loss"] for report in reports), default=math.inf)
    try:
        notes = nanogpt.write(out, run.config, params, opt_state, int(state.step), run.tokenizer.vocab_size, val_loss)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written ({e.strerror}); choose a place with room") from None
    for note in notes:
        say(f"{out}: {note}")
    return int(state.step)


def export_huggingface(path: Path, which: str, out: Path, overwrite: bool) -> int:
    """Writes a checkpoint as a folder that `AutoModelForCausalLM` and `AutoTokenizer` of transformers load.

    A classifier becomes a `GPT2ForSequenceClassification`. Args, Returns and Raises as of `export_safetensors`.

    Raises:
        UserError: also if transformers has no such classifier.
    """
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(path)):
        raise UserError(f"--out {out}: lies in the run {path}; choose a place outside of it")
    if os.path.lexists(out) and not (overwrite and os.path.isdir(out) and not os.path.islink(out)):
        raise UserError(f"--out {out}: exists already; choose another name, or --overwrite to replace a folder")
    if os.path.isdir(out) and (other := [name for name in os.listdir(out) if name not in HUGGING_FACE_FILES]):
        raise UserError(f"--out {out}: holds {other[0]}, which no export writes; choose another name")
    restored = restore_any(path, which)
    run, state = restored.run, restored.state
    params = {name: np.asarray(p) for name, p in jax.device_get(state.params).items()}
    config, tensors, max_tokens = _language_model(restored, params)
    if run.labels:
        config, tensors, max_tokens = _classifier(restored, params)
    files = huggingface_tokenizer.files(run.tokenizer, max_tokens)
    end = run.tokenizer.end_of_text
    generation = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    files["config.json"] = strict_json.dumps(config, indent=2) + "\n"
    if not run.labels:
        given = {name: value for name, value in generation.items() if value is not None}
        files["generation_config.json"] = strict_json.dumps(given, indent=2) + "\n"
    files["README.md"] = model_card.text(run, int(state.step), sum(p.size for p in params.values()))
    with _new_folder(out) as folder:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
        safetensors.write([("--out", folder / huggingface.WEIGHTS, tensors)])
    return int(state.step)


HUGGING_FACE_FILES = {
    *("config.json", "generation_config.json", huggingface.WEIGHTS, "tokenizer.json", "tokenizer_config.json"),
    "README.md",
}


def _language_model(
    restored: RestoredRun, params: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray], int]:
    """The configuration, the tensors and the most tokens of a run's language model."""
    model = restored.run.config.model
    body = {name: p for name, p in params.items() if not name.startswith("classifier.")}
    if restored.run.labels:  # a classifier has no head over tokens
        model = dataclasses.replace(model, tied_head=True)
    dtype = {"dtype": str(params["token_emb.embedding"].dtype)}
    config = huggingface.config_json(model, restored.run.tokenizer, **dtype)
    return config, huggingface.weights(model, body), model.block_size


def _classifier(
    restored: RestoredRun, params: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray], int]:
    """The same of a classifier. Raises `UserError` if transformers has no such one."""
    run = restored.run
    if run.config.pool != "last_token":
        raise UserError(
            f"RUN {run.path}: its head reads --pool {run.config.pool}, and GPT2ForSequenceClassification the last "
            "token; only a classifier of --pool last_token can be exported"
        )
    config, tensors, _ = _language_model(restored, params)
    weight_KC, norm_C = huggingface.folded_classifier(params)
    tensors |= {"score.weight": weight_KC, "transformer.ln_f.bias": norm_C}
    config |= {
        "architectures": ["GPT2ForSequenceClassification"],
        "id2label": dict(enumerate(run.labels)),
        "label2id": {label: i for i, label in enumerate(run.labels)},
        "num_labels": len(run.labels),
        # Without an end of text any token may be a text's last one: none is padding, and texts come one at a time.
        "pad_token_id": run.tokenizer.end_of_text,
        "problem_type": "single_label_classification",
    }
    config.pop("bias", None)  # the final norm's is none of 0
    return config, tensors, run.config.max_tokens


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` when it is complete; others may read it, as any new folder."""
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: cannot be written (no such folder); choose a writable place with room")
    umask = os.umask(0)
    os.umask(umask)
    try:
        with atomic_folder(path) as folder:
            folder.chmod(0o777 & ~umask)
            yield folder
    except OSError as e:
        raise UserError(f"--out {path}: cannot be written ({e.strerror}); choose a writable place with room") from None


@contextlib.contextmanager
def _out_dir_flag_replaced(flag: str) -> Iterator[None]:
    """Names `flag` in the messages of `run_dir`, which name --out-dir, the flag of `jaxgpt train`."""
    try:
        yield
    except UserError as e:
        raise UserError(str(e).replace("--out-dir", flag)) from None
