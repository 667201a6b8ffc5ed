"""Conversion of weights and optimizer state between PyTorch's names and layouts and Flax's, in numpy.

A state dict of weights has the tutorials' names: `blocks.0.attn.Wq.weight`, ... One of optimizer state has `step`, the
number of updates, and, for AdamW and Adam, `exp_avg.<weight>` and `exp_avg_sq.<weight>`; for SGD with momentum,
`momentum_buffer.<weight>`. Every name on either side is used exactly once, or an error names it.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.tree_util import DictKey, GetAttrKey

from jaxgpt.errors import UserError
from jaxgpt.optimizer import SkipState

Tensors = Mapping[str, np.ndarray]

# Flax name -> torch name. A kernel is [in, out] in Flax and [out, in] in torch.
_LAST = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
_MLP = {"mlp.fc": "ff.0", "mlp.proj": "ff.2"}
# optax name -> torch name.
_MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq", "trace": "momentum_buffer"}
# GPT-2's module names, as patterns -> the tutorials' names.
_GPT2 = {
    "wte": "token_emb",
    "wpe": "pos_emb",
    r"h\.(\d+)\.ln_1": r"blocks.\1.ln1",
    r"h\.(\d+)\.ln_2": r"blocks.\1.ln2",
    r"h\.(\d+)\.attn\.c_attn": r"blocks.\1.attn.QKV",
    r"h\.(\d+)\.attn\.c_proj": r"blocks.\1.attn.Wo",
    r"h\.(\d+)\.mlp\.c_fc": r"blocks.\1.ff.0",
    r"h\.(\d+)\.mlp\.c_proj": r"blocks.\1.ff.2",
    "ln_f": "ln_f",
    "lm_head": "lm_head",
}
# The tutorials' module names, as patterns -> GPT-2's names, in the order in which GPT-2's modules have them.
_TO_GPT2 = {
    "token_emb": "transformer.wte",
    "pos_emb": "transformer.wpe",
    r"blocks\.(\d+)\.ln1": r"transformer.h.\1.ln_1",
    r"blocks\.(\d+)\.attn\.Wq": r"transformer.h.\1.attn.c_attn",
    r"blocks\.(\d+)\.attn\.Wo": r"transformer.h.\1.attn.c_proj",
    r"blocks\.(\d+)\.ln2": r"transformer.h.\1.ln_2",
    r"blocks\.(\d+)\.ff\.0": r"transformer.h.\1.mlp.c_fc",
    r"blocks\.(\d+)\.ff\.2": r"transformer.h.\1.mlp.c_proj",
    "ln_f": "transformer.ln_f",
    "lm_head": "lm_head",
}
HINT = "give the --preset and --model flags of its training, and a file with all of its state"


def torch_name(name: str) -> str:
    """The torch name of a Flax parameter: blocks.0.mlp.fc.kernel -> blocks.0.ff.0.weight."""
    stem, last = name.rsplit(".", 1)
    return f"{re.sub('|'.join(_MLP), lambda m: _MLP[m[0]], stem)}.{_LAST[last]}"


def to_torch(params: Tensors) -> dict[str, np.ndarray]:
    """The state dict of `torch_ref.model.GPT`: torch names and layouts, the dtypes of `params`."""
    return {torch_name(name): _transposed(name, np.asarray(p)) for name, p in params.items()}


def from_torch(state_dict: Tensors, like: Mapping[str, Any], hint: str = HINT) -> dict[str, np.ndarray]:
    """The Flax parameters.

    Args:
        like: arrays, or `jax.ShapeDtypeStruct`s, with the names, shapes and dtypes of the result.
        hint: what a message says to do about weights of another model.

    Raises:
        UserError: a name is missing or left over, a shape differs, a dtype is wider than the model's, or a value is
            not finite.
    """
    wanted = {torch_name(name): name for name in like}
    head = state_dict.get("lm_head.weight")
    embedding = state_dict.get("token_emb.weight", np.empty(0))
    if "lm_head.weight" not in wanted and head is not None and np.array_equal(head, embedding):
        # A tied head, saved under both names.
        state_dict = {name: p for name, p in state_dict.items() if name != "lm_head.weight"}
    _require_same_names(set(wanted), set(state_dict), "the weights do not match the model", hint)
    return {name: _fitted(torch, state_dict[torch], like[name], name) for torch, name in wanted.items()}


def optimizer_to_torch(opt_state: Any) -> dict[str, np.ndarray]:
    """The optimizer state under torch names, and `step`, the updates applied, as an int64 scalar."""
    if isinstance(opt_state, SkipState):  # its counts and running mean have no place in PyTorch's state
        opt_state = opt_state.optimizer
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        torch, name = _state_name(path)
        leaf = _transposed(name, np.asarray(leaf)) if name else np.asarray(leaf, np.int64)
        # optax keeps two counts: one for the moments, one for the schedule.
        assert torch not in tensors or (torch == "step" and leaf == tensors[torch]), f"{torch} twice in {path}"
        tensors[torch] = leaf
    return tensors


def optimizer_from_torch(tensors: Tensors, like: Any) -> Any:
    """The optimizer state as an optax state.

    Args:
        like: an optax state of arrays or `jax.ShapeDtypeStruct`s: the structure, shapes and dtypes of the result.

    Raises:
        UserError: a name is missing or left over, a shape differs, a dtype is wider than the model's, or a value is
            not finite.
    """
    if isinstance(like, SkipState):
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        return state._replace(optimizer=optimizer_from_torch(tensors, like.optimizer))
    paths, tree = jax.tree_util.tree_flatten_with_path(like)
    names = [_state_name(path) for path, _ in paths]
    what = "the optimizer state does not match the optimizer"
    _require_same_names({torch for torch, _ in names}, set(tensors), what, HINT)
    step = np.asarray(tensors["step"])
    if (
        step.dtype.kind not in "iuf"
        or step.size != 1
        or not 0 <= step.item() < 2**31
        or step.item() != int(step.item())
    ):
        raise UserError(f"step: {step.tolist()} in the optimizer state; one whole number of updates is needed")
    leaves = []
    for (_, leaf), (torch, name) in zip(paths, names, strict=True):
        leaves.append(_fitted(torch, tensors[torch], leaf, name) if name else np.asarray(step.item(), leaf.dtype))
    return jax.tree.unflatten(tree, leaves)


def tutorial_names(state_dict: Tensors) -> dict[str, np.ndarray]:
    """The state dict under the tutorials' names, from GPT-2's names as Hugging Face or nanoGPT write them.

    Both fuse query, key and value into `c_attn`. Hugging Face's matrices are [in, out] ("Conv1D"), nanoGPT's [out, in]
    (`torch.nn.Linear`). A head that equals the token embedding is tied, and left out. Weights under any other names are
    returned under the same names.

    Raises:
        UserError: two names stand for the same weight.
    """
    stripped: dict[str, np.ndarray] = {}
    for name, p in state_dict.items():
        short = re.sub(
            r"^(_orig_mod\.|module\.|transformer\.)+", "", name
        )  # torch.compile, DistributedDataParallel, the model
        if short in stripped:
            raise UserError(f"{name}: stands for {short}, as another name does; leave one of them out")
        stripped[short] = p
    if "wte.weight" not in stripped:
        return stripped
    stripped = {
        n: p for n, p in stripped.items() if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", n)
    }  # causal mask
    fused = stripped.get("h.0.attn.c_attn.weight")
    is_conv1d = fused is not None and fused.ndim == 2 and fused.shape[1] == 3 * fused.shape[0]
    tensors: dict[str, np.ndarray] = {}
    for name, p in stripped.items():
        stem, _, last = name.rpartition(".")
        for pattern, replacement in _GPT2.items():
            if re.fullmatch(pattern, stem):
                stem = re.sub(pattern, replacement, stem)
                break
        if is_conv1d and p.ndim == 2 and re.search(r"attn|ff", stem):
            p = p.T
        if stem.endswith("QKV") and p.ndim and len(p) % 3 == 0:
            renamed = {f"{stem[:-3]}{W}.{last}": q for W, q in zip(("Wq", "Wk", "Wv"), np.split(p, 3), strict=True)}
        else:
            renamed = {f"{stem}.{last}" if stem else last: p}
        if twice := set(renamed) & set(tensors):
            raise UserError(
                f"{name}: stands for {min(twice)}, which another name stands for too; leave one of them out"
            )
        tensors |= renamed
    head = tensors.get("lm_head.weight")
    if head is not None and np.array_equal(head, tensors["token_emb.weight"]):
        del tensors["lm_head.weight"]
    return tensors


def gpt2_names(tensors: Tensors, conv1d: bool) -> dict[str, np.ndarray]:
    """The inverse of `tutorial_names`: a state dict under GPT-2's names, in the order of GPT-2's modules.

    Args:
        tensors: weights, or a moment of each, under the tutorials' names and in PyTorch's layout.
        conv1d: matrices are [in, out], as Hugging Face has them; else [out, in], as nanoGPT has them.
    """
    patterns = list(_TO_GPT2)

    def place(name: str) -> tuple[int, ...]:
        """Where GPT-2's modules have it: embeddings, blocks in order, the rest; in a module, the weight first."""
        stem, _, last = name.rpartition(".")
        rank = next(i for i, pattern in enumerate(patterns) if re.fullmatch(pattern, stem))
        block = re.search(r"blocks\.(\d+)", stem)
        part = 0 if rank < 2 else 1 if block else 2
        return part, int(block[1]) if block else 0, rank, last != "weight"

    named = {}
    for name in sorted((name for name in tensors if not re.search(r"\.W[kv]\.", name)), key=place):
        stem, _, last = name.rpartition(".")
        p, pattern = tensors[name], patterns[place(name)[2]]
        if stem.endswith("Wq"):
            p = np.concatenate([tensors[f"{stem[:-1]}{part}.{last}"] for part in "qkv"])
        if conv1d and stem.startswith("blocks") and p.ndim == 2:
            p = p.T
        named[re.sub(pattern, _TO_GPT2[pattern], stem) + f".{last}"] = p
    return named


def without_padding(tensors: Tensors, vocab_size: int) -> dict[str, np.ndarray]:
    """The tensors with the first `vocab_size` rows of the token embedding and the head, under the tutorials' names."""
    tables = ("token_emb.weight", "lm_head.weight")
    return {name: p[:vocab_size] if name.endswith(tables) else p for name, p in tensors.items()}


def _state_name(path: tuple[Any, ...]) -> tuple[str, str | None]:
    """The torch name of an optax leaf, and the Flax name of its parameter (None for a count)."""
    match path:
        case (*_, GetAttrKey(name="count")):
            return "step", None
        case (*_, GetAttrKey(name=moment), DictKey(key=name)) if moment in _MOMENTS:
            return f"{_MOMENTS[moment]}.{torch_name(name)}", name
    raise AssertionError(f"the optimiser state {jax.tree_util.keystr(path)} has no torch name")


def _require_same_names(wanted: set[str], given: set[str], what: str, hint: str) -> None:
    missing, left_over = sorted(wanted - given), sorted(given - wanted)
    if not missing and not left_over:
        return
    parts = [f"missing {_some(missing)}"] if missing else []
    parts += [f"left over {_some(left_over)}"] if left_over else []
    if hint == HINT and missing + left_over == ["lm_head.weight"]:
        hint = f"{'add' if missing else 'leave out'} --model.tied-head, with which the head is the token embedding"
    raise UserError(f"{what}: {'; '.join(parts)}; {hint}")


def _some(names: list[str], most: int = 4) -> str:
    """The first `most` names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _fitted(torch: str, value: np.ndarray, like: Any, name: str) -> np.ndarray:
    """A torch tensor as the Flax array `name`, checked against `like`."""
    p = _transposed(name, np.asarray(value))
    shape, expected = np.shape(value), _transposed(name, np.empty(like.shape)).shape
    if p.dtype.kind in "biuc":
        raise UserError(f"{torch}: {p.dtype} in the file; floating-point numbers are needed")
    if torch in ("token_emb.weight", "lm_head.weight") and len(shape) == 2 and shape[0] != expected[0]:
        raise UserError(
            f"{torch}: a vocabulary of {shape[0]} in the file, of {expected[0]} here; give the --dataset and the "
            "--tokenizer that the weights were trained with"
        )
    if shape != expected:
        raise UserError(
            f"{torch}: shape {list(shape)} in the file, {list(expected)} in the model; give the --preset and --model "
            "flags that the weights were trained with"
        )
    if not np.can_cast(p.dtype, like.dtype, "safe"):
        raise UserError(f"{torch}: {p.dtype} in the file, {like.dtype} in the model; give --dtype {p.dtype}")
    p = p.astype(like.dtype)
    if not np.isfinite(p).all() or (torch.startswith("exp_avg_sq.") and (p < 0).any()):
        raise UserError(f"{torch}: holds values that are not finite, or squares below 0; they cannot be trained on")
    return p


def _transposed(name: str, p: np.ndarray) -> np.ndarray:
    """The array `name` in the other framework's layout: a kernel transposed, any other as it is."""
    return p.T if name.endswith(".kernel") else p
