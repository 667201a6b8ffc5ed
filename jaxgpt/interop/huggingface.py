"""GPT-2 in Hugging Face's folders, in and out: config.json, model.safetensors, tokenizer.json.

The library's names and layouts (`c_attn`, matrices [in, out]) are `torch_names`' part; the tokenizer's files are
`huggingface_tokenizer`'s.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import strict_json
from jaxgpt.config import ModelConfig
from jaxgpt.data.files import read_small, unreachable_reason
from jaxgpt.data.readers import hub_endpoint
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError, first_line
from jaxgpt.interop import huggingface_tokenizer, safetensors, torch_names
from jaxgpt.interop.torch_model import TorchModel, model_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 2**24
GELU_OF = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
# The files of a repository that are downloaded; no code, and no pickles.
DOWNLOADED = [
    "config.json",
    "model*.safetensors",
    INDEX,
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
]
# Options of its configuration that change what the model computes, and the only value that is known here.
FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "quantization_config": None,
}


def read_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of a folder; None if it is not one of `transformers`.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    path = folder / "config.json"
    try:
        values = strict_json.loads(read_small(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f"config.json cannot be read ({e}); bring the file back") from None
    return values if isinstance(values, dict) and "model_type" in values else None


def read(folder: Path, flag: str, data_dir: Path | None = None) -> TorchModel:
    """The model in a folder of `GPT2LMHeadModel` or `GPT2Model`.

    Args:
        flag: the flag that gave the folder, for messages.
        data_dir: a folder to look for GPT-2's vocabulary in first.

    Raises:
        UserError: it is of another architecture, has an option that is not known here, or a file is missing or damaged.
    """
    values = read_config(folder)
    assert values is not None
    if values["model_type"] != "gpt2":
        raise UserError(f"is a model of type {values['model_type']!r:.40}; only gpt2 is known here; give one")
    for name, known in FIXED.items():
        if values.get(name, known) != known:
            raise UserError(
                f"its config.json has {name} {values[name]!r:.40}, which changes the model and is not known here; give "
                f"one with {known!r}"
            )
    activation = values.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in GELU_OF:
        raise UserError(f"its activation_function {activation!r:.40} is not known here; only {', '.join(GELU_OF)} are")
    width, inner = values.get("n_embd", 768), values.get("n_inner")
    if inner is not None and inner != 4 * _number(width):
        raise UserError(f"its n_inner is {inner!r:.40}, not 4 times the n_embd {width}; give one that is")
    tied, has_bias = values.get("tie_word_embeddings", True), values.get("bias", True)
    residual, embedded = values.get("resid_pdrop", 0.1), values.get("embd_pdrop", 0.1)
    model = model_config(
        n_layer=values.get("n_layer", 12),
        n_head=values.get("n_head", 12),
        n_embd=width,
        block_size=values.get("n_positions", 1024),
        dropout=residual,
        attention_dropout=values.get("attn_pdrop", 0.1),
        tied_head=tied,
        gelu=GELU_OF[activation],
        init="gpt2",
        bias=has_bias,
        layer_norm_eps=values.get("layer_norm_epsilon", 1e-5),
    )
    notes = []
    if embedded != residual:
        notes.append(
            f"its embd_pdrop {embedded} is taken as its resid_pdrop {residual}, as there is one --model.dropout"
        )
    vocab_size = values.get("vocab_size", 50257)
    if type(vocab_size) is not int:
        raise UserError(f"its vocab_size is {vocab_size!r:.40}; give a file whose vocab_size is a number")
    own = {name: p for name, p in _tensors(folder, flag).items() if p.dtype.kind == "f"}  # masks are no weights
    tensors = torch_names.tutorial_names(own)
    if "score.weight" in tensors:
        raise UserError("is a classifier (it has score.weight); only language models are read; give one")
    if not tied and "lm_head.weight" not in tensors:
        if "lm_head.weight" not in own:
            raise UserError("has no lm_head.weight, though its head is not tied; give all of its weights")
        tensors["lm_head.weight"] = own["lm_head.weight"]  # equal to the token embedding, but not tied to it
    if not has_bias:
        biases = {name for name in tensors if name.endswith(".bias")}
        if any(tensors[name].any() for name in biases):
            raise UserError('its config.json says "bias": false, but it has biases that are not 0; leave that out')
        tensors = {name: p for name, p in tensors.items() if name not in biases}
    try:
        tokenizer = huggingface_tokenizer.read(folder, data_dir)
    except (OSError, ValueError) as e:
        raise UserError(
            f"its tokenizer cannot be read ({' '.join(str(e).split())[:160]}); bring the file back"
        ) from None
    unknown = tokenizer is None and huggingface_tokenizer.has_tokenizer(folder)
    if unknown:
        notes.append("its tokenizer is of a kind that is not known here, or has tokens of its own, and is left out")
    found = TorchModel(
        "Hugging Face",
        model,
        tensors,
        vocab_size,
        tokenizer,
        notes=tuple(notes),
        has_unknown_tokenizer=unknown,
    )
    if tokenizer is None:
        return found
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"its tokenizer has {tokenizer.vocab_size} tokens, more than the model's {vocab_size}; give files that "
            "belong together"
        )
    return found.without_padding(tokenizer.vocab_size)


def _number(value: Any) -> int:
    return value if type(value) is int else 0


def _tensors(folder: Path, flag: str) -> dict[str, np.ndarray]:
    """The tensors of the model's one file, or of all that its index lists."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            pickled = (
                "; pytorch_model.bin is a pickle, which is not read" if (folder / "pytorch_model.bin").exists() else ""
            )
            raise UserError(f"has no {WEIGHTS}{pickled}; write it with save_pretrained of transformers")
        return safetensors.read(folder / WEIGHTS, flag)
    try:
        index = strict_json.loads(read_small(folder / INDEX, MAX_JSON_BYTES))
        file_of = index["weight_map"]
        names = sorted(set(file_of.values()))
        plain = all(name == os.path.basename(name) and name.endswith(".safetensors") for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"its {INDEX} cannot be read ({type(e).__name__}: {str(e)[:100]}); bring it back") from None
    if not plain:
        raise UserError(f"its {INDEX} names files of other folders; give a folder with all of its weights")
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors |= safetensors.read(folder / name, flag)
    if different := set(file_of) ^ set(tensors):
        raise UserError(f"its files and its {INDEX} differ in {min(different)}; bring all of its files back")
    return tensors


def download(name: str, flag: str, say: Callable[[str], None]) -> Path:
    """The folder of a repository of the hub, whose files come from the library's cache or the network.

    Args:
        name: NAME or OWNER/NAME, and @REVISION if another than the newest is meant.

    Raises:
        UserError: it is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    repository, _, revision = name.partition("@")
    no_network = unreachable_reason(hub_endpoint(), any_answer=True)
    if not no_network:
        say(f"{repository}: looking for its files at {hub_endpoint()}")
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=DOWNLOADED,
            local_files_only=bool(no_network),
            endpoint=hub_endpoint(),
        )
    except Exception as e:  # the errors of the library and of its transports have no common base class
        reason = f"no network ({no_network})" if no_network else f"{type(e).__name__}: {first_line(e)}"
        raise UserError(
            f"{flag} {name}: no such file or folder, and as a repository it cannot be had from {hub_endpoint()} "
            f"({reason}); check the name or the path"
        ) from None
    return Path(folder)


# -------------------------------------------------------------------------------------------------------------- writing


def config_json(model: ModelConfig, tokenizer: Tokenizer, **more: Any) -> dict[str, Any]:
    """The config.json of a GPT-2 of this shape."""
    end = tokenizer.end_of_text
    values: dict[str, Any] = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": tokenizer.vocab_size,
        "n_positions": model.block_size,
        "n_ctx": model.block_size,
        "n_embd": model.n_embd,
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_inner": None,
        "activation_function": {"tanh": "gelu_new", "erf": "gelu"}[model.gelu],
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.attention_dropout,
        "layer_norm_epsilon": model.layer_norm_eps,
        "initializer_range": 0.02,
        "tie_word_embeddings": model.tied_head,
        "bos_token_id": end,
        "eos_token_id": end,
        "use_cache": True,
        "dtype": "float32",
        **more,
    }
    # Not of transformers, whose GPT-2 always has biases: here they are 0, and `read` leaves them out again.
    return values if model.bias else {**values, "bias": False}


def weights(model: ModelConfig, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of model.safetensors; biases of a model without any are 0."""
    torch = torch_names.to_torch(params)
    if not model.bias:
        # A Linear's or a LayerNorm's; the weight of either has as many rows as outputs.
        owners = [name for name in torch if not name.endswith(("_emb.weight", "lm_head.weight", "classifier.weight"))]
        torch |= {
            name.removesuffix("weight") + "bias": np.zeros(len(torch[name]), torch[name].dtype) for name in owners
        }
    return torch_names.gpt2_names(torch, conv1d=True)


def folded_classifier(params: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The classifier's weight [K, C], and the final norm's bias [C] that stands for the classifier's own bias as well.

    Transformers' head has none. A change d of the norm's bias changes the logits by W d: of all d with W d = b, this is
    the shortest. There is one if W has rank K, in float64 exactly but for rounding.

    Raises:
        UserError: there is none.
    """
    weight_KC = np.asarray(params["classifier.kernel"]).T
    bias_K = np.asarray(params["classifier.bias"], np.float64)
    wide_KC = weight_KC.astype(np.float64)
    shift_C = np.linalg.lstsq(wide_KC, bias_K, rcond=None)[0]
    if not np.allclose(wide_KC @ shift_C, bias_K, rtol=0, atol=1e-12 * max(1.0, float(np.abs(bias_K).max()))):
        raise UserError("--to huggingface: transformers' head has no bias, and the final norm cannot make up for it")
    own = params.get("ln_f.bias")
    norm_C = shift_C if own is None else np.asarray(own, np.float64) + shift_C
    return weight_KC, norm_C.astype(weight_KC.dtype)
