"""Weights and optimiser state between torch names and the Flax tree: numpy in and out, no torch import.

A file of weights holds `blocks.0.attn.Wq.weight`, ... as the write-ups name them; one of optimiser state holds, for
AdamW, `exp_avg.<weight>` and `exp_avg_sq.<weight>`, for SGD with momentum `momentum_buffer.<weight>`, and `step`, the
number of updates done. Every name on either side is used exactly once, or an error names it.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.tree_util import DictKey, GetAttrKey

from jaxgpt.errors import UserError

Tensors = Mapping[str, np.ndarray]

# Flax names on the left; a kernel is [in, out] in Flax and [out, in] in torch.
_LAST = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
_MLP = {"mlp.fc": "ff.0", "mlp.proj": "ff.2"}
# optax names on the left.
_MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq", "trace": "momentum_buffer"}
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


def torch_name(name: str) -> str:
    """The torch name of a Flax parameter: blocks.0.mlp.fc.kernel -> blocks.0.ff.0.weight."""
    stem, last = name.rsplit(".", 1)
    return f"{re.sub('|'.join(_MLP), lambda m: _MLP[m[0]], stem)}.{_LAST[last]}"


def to_torch(params: Tensors) -> dict[str, np.ndarray]:
    """The state dict of `torch_ref.model.GPT`."""
    return {torch_name(name): _turned(name, np.asarray(p)) for name, p in params.items()}


def from_torch(state_dict: Tensors, like: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The Flax parameters, with the names, shapes and dtypes of `like` (arrays, or their shapes alone).

    Raises:
        UserError: a name is missing or left over; a shape differs; a value would lose digits, or is not finite.
    """
    wanted = {torch_name(name): name for name in like}
    head = state_dict.get("lm_head.weight")
    if "lm_head.weight" not in wanted and head is not None and np.array_equal(head, state_dict.get("token_emb.weight")):
        # A tied head, written twice.
        state_dict = {name: p for name, p in state_dict.items() if name != "lm_head.weight"}
    _require_same_names(set(wanted), set(state_dict), "the weights do not match the model")
    return {name: _fitted(torch, state_dict[torch], like[name], name) for torch, name in wanted.items()}


def optimizer_to_torch(opt_state: Any) -> dict[str, np.ndarray]:
    """The optimiser's state by torch names."""
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        torch, name = _state_name(path)
        leaf = _turned(name, np.asarray(leaf)) if name else np.asarray(leaf, np.int64)
        # optax counts once for the moments and once for the schedule
        assert torch not in tensors or (torch == "step" and leaf == tensors[torch]), f"{torch} twice in {path}"
        tensors[torch] = leaf
    return tensors


def optimizer_from_torch(tensors: Tensors, like: Any) -> Any:
    """The optimiser's state of the form of `like`, an optax state of arrays or of their shapes alone.

    Raises:
        UserError: a name is missing or left over; a shape differs; a value would lose digits, or is not finite.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(like)
    names = [_state_name(path) for path, _ in paths]
    _require_same_names({torch for torch, _ in names}, set(tensors), "the optimiser state does not match the optimiser")
    step = np.asarray(tensors["step"])
    if (
        step.dtype.kind not in "iuf"
        or step.size != 1
        or not 0 <= step.item() < 2**31
        or step.item() != int(step.item())
    ):
        raise UserError(f"step: {step.tolist()} in the optimiser state; one whole number of updates is needed")
    leaves = []
    for (_, leaf), (torch, name) in zip(paths, names, strict=True):
        leaves.append(_fitted(torch, tensors[torch], leaf, name) if name else np.asarray(step.item(), leaf.dtype))
    return jax.tree.unflatten(tree, leaves)


def writeup_names(state_dict: Tensors) -> dict[str, np.ndarray]:
    """Weights under Hugging Face's or nanoGPT's GPT-2 names come back under the write-ups'; any others as they are.

    Both fuse query, key and value into `c_attn`; Hugging Face's matrices are [in, out] ("Conv1D"), nanoGPT's are torch
    Linears, [out, in]. A head that equals the token embedding is left out: it is tied.
    """
    stripped: dict[str, np.ndarray] = {}
    for name, p in state_dict.items():
        short = re.sub(r"^(_orig_mod\.|module\.|transformer\.)+", "", name)  # of torch.compile, of DDP, of the model
        if short in stripped:
            raise UserError(f"{name}: stands for {short}, as another name does; leave one of them out")
        stripped[short] = p
    if "wte.weight" not in stripped:
        return stripped
    stripped = {n: p for n, p in stripped.items() if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", n)}  # the mask
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
                f"{name}: stands for {min(twice)}, which is there under another name; leave one of them out"
            )
        tensors |= renamed
    head = tensors.get("lm_head.weight")
    if head is not None and np.array_equal(head, tensors["token_emb.weight"]):
        del tensors["lm_head.weight"]
    return tensors


def _state_name(path: tuple[Any, ...]) -> tuple[str, str | None]:
    """The torch name of an optax leaf, and the Flax name of its parameter (None for a count)."""
    match path:
        case (*_, GetAttrKey(name="count")):
            return "step", None
        case (*_, GetAttrKey(name=moment), DictKey(key=name)) if moment in _MOMENTS:
            return f"{_MOMENTS[moment]}.{torch_name(name)}", name
    raise AssertionError(f"the optimiser state {jax.tree_util.keystr(path)} has no torch name")


def _require_same_names(wanted: set[str], given: set[str], what: str) -> None:
    missing, left_over = sorted(wanted - given), sorted(given - wanted)
    if not missing and not left_over:
        return
    parts = [f"missing {_some(missing)}"] if missing else []
    parts += [f"left over {_some(left_over)}"] if left_over else []
    hint = "give the --preset and --model flags of its training, and a file with all of its state"
    if missing + left_over == ["lm_head.weight"]:
        hint = f"{'add' if missing else 'leave out'} --model.tied-head, with which the head is the token embedding"
    raise UserError(f"{what}: {'; '.join(parts)}; {hint}")


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _fitted(torch: str, value: np.ndarray, like: Any, name: str) -> np.ndarray:
    """A torch tensor as the Flax array `name`, checked against `like`."""
    p = _turned(name, np.asarray(value))
    if p.dtype.kind in "biuc":
        raise UserError(f"{torch}: {p.dtype} in the file; floating-point numbers are needed")
    if torch in ("token_emb.weight", "lm_head.weight") and p.ndim == 2:
        given, wanted = np.shape(value)[0], _turned(name, np.empty(like.shape)).shape[0]
        if given != wanted:
            raise UserError(
                f"{torch}: a vocabulary of {given} in the file, of {wanted} here; give the --dataset and the "
                "--tokenizer that the weights were trained with"
            )
    if p.shape != like.shape:
        raise UserError(
            f"{torch}: shape {list(np.shape(value))} in the file, {list(_turned(name, np.empty(like.shape)).shape)} in "
            "the model; give the --preset and --model flags that the weights were trained with"
        )
    if not np.can_cast(p.dtype, like.dtype, "safe"):
        raise UserError(f"{torch}: {p.dtype} in the file, {like.dtype} in the model; give --dtype {p.dtype}")
    p = p.astype(like.dtype)
    if not np.isfinite(p).all() or (torch.startswith("exp_avg_sq.") and (p < 0).any()):
        raise UserError(f"{torch}: holds values that are not finite, or squares below 0; they cannot be trained on")
    return p


def _turned(name: str, p: np.ndarray) -> np.ndarray:
    return p.T if name.endswith(".kernel") else p
