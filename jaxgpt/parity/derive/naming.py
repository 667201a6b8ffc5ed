"""What the names of weights have in common: PyTorch's, Flax's, Equinox's, and a user's own.

A path is read as a set of words. Words that the field uses for the same thing (`q`, `query`, `q_proj`, `wq`)
become one.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher

# The kinds of tensor within a module, by the words for each. One that says "weight" may be any kernel, table or scale.
KINDS = {
    "kernel": "kernel",
    "embedding": "embedding",
    "scale": "scale",
    "gamma": "scale",
    "bias": "bias",
    "beta": "bias",
    "offset": "bias",
    "mean": "mean",
    "var": "var",
    "running_mean": "mean",
    "running_var": "var",
    "weight": "weight",
    "weights": "weight",
    "w": "weight",
    "b": "bias",
    "g": "scale",
}
# Rules over a whole path in lower case, words joined by "_", components by ".": what a module is by where it is.
_RULES = [
    (r"\b(input_layer_?norm|layer_?norm_before|attn_norm|attention_norm|pre_attn_norm|norm_attn|ln_attn)\b", "norm.1"),
    (
        r"\b(post_attention_layer_?norm|layer_?norm_after|ffn?_norm|mlp_norm|norm_ffn?|norm_mlp|ln_mlp|ln_ff)\b",
        "norm.2",
    ),
    (r"attention\.output\.dense", "attn.out"),
    (r"attention\.output\.layer_?norm", "norm.1"),
    (r"\boutput\.layer_?norm", "norm.2"),
    (r"\bintermediate(\.dense)?\b", "mlp.up"),
    (r"(?<=\.)output\.dense", "mlp.down"),
    (r"attention\.self\b|self_attn|self_attention|selfattention", "attn"),
    (r"(attn|attention)(\w*)\.(c_proj|proj|dense|to_out(\.0)?|out_proj|o_proj|output_proj)\b", "attn.out"),
    (r"(mlp|ff|ffn|feed_forward|feedforward)\.(c_proj|proj|fc_out|w_?o|output)\b", "mlp.down"),
    (r"(mlp|ff|ffn|feed_forward|feedforward)\.(w_?i|fc_in|inner)\b", "mlp.up"),
    (r"\b(linear_?1|fc_?1|c_fc|up_proj|dense_h_to_4h|w_?up|up|fc_in|lin_?1|in_dense)\b", "mlp.up"),
    (r"\b(linear_?2|fc_?2|down_proj|dense_4h_to_h|w_?down|down|fc_out|lin_?2|out_dense)\b", "mlp.down"),
    (r"\b(gate_proj|w_?gate|gate)\b", "mlp.gate"),
    (r"\bb_?(up|down|gate)\b", r"mlp.\1.bias"),
    (r"\bgate_up_proj\b", "mlp.gateup"),
    (r"\b(c_attn|in_proj|query_key_value|qkv_proj|to_qkv|w_?qkv|wqkv|attn_in|qkv)\b", "qkv"),
    (
        r"\b(word_embeddings?|embed_tokens|token_embeddings?|tok_embeddings?|token_embed|token_emb|tok_emb|wte)\b",
        "tokenembed",
    ),
    (r"\b(tok_embed|embed_tok|embed_token|embed_in|shared|vocab_embed\w*)\b", "tokenembed"),
    (
        r"\b(position_embeddings?|positional_embeddings?|pos_embeddings?|pos_embed|pos_emb|embed_positions|wpe)\b",
        "posembed",
    ),
    (r"\b(embed_pos|pe|positional_encoding|pos_encoding|pos_enc|pos)\b", "posembed"),
    (r"\b(token_type_embeddings?|type_embeddings?|segment_embeddings?|type_emb|seg_emb)\b", "typeembed"),
    (r"\b(lm_head|classifier|score|output_projection|unembed|logits|to_logits|lm_projection)\b", "head"),
    (
        r"\b(final_layer_?norm|ln_?f|norm_?f|final_norm|final_ln|ln_final|out_norm|ln_out|post_layer_?norm)\b",
        "norm.final",
    ),
    (r"\b(patch_embeddings?|patch_embed|patch_emb|conv_proj|patchify)\b", "patchembed"),
    (
        r"\b(downsample\.0|shortcut\.0|proj_conv|conv_proj|skip_conv|down_conv|downsample_conv|shortcut_conv)\b",
        "shortcut.conv",
    ),
    (
        r"\b(downsample\.1|shortcut\.1|proj_bn|norm_proj|skip_bn|down_bn|downsample_bn|shortcut_bn|down_norm)\b",
        "shortcut.norm",
    ),
]
_WORDS = {
    **dict.fromkeys(["q", "query", "wq", "q_proj", "query_proj", "w_q", "to_q", "q_lin"], "q"),
    **dict.fromkeys(["k", "key", "wk", "k_proj", "key_proj", "w_k", "to_k", "k_lin"], "k"),
    **dict.fromkeys(["v", "value", "wv", "v_proj", "value_proj", "w_v", "to_v", "v_lin"], "v"),
    **dict.fromkeys(
        ["o", "out", "wo", "o_proj", "out_proj", "w_o", "to_out", "output_proj", "out_lin", "output"], "out"
    ),
    **dict.fromkeys(["attn", "attention", "mha", "sa"], "attn"),
    **dict.fromkeys(["mlp", "ff", "ffn", "feedforward", "feed_forward", "dense_relu_dense"], "mlp"),
    **dict.fromkeys(
        ["ln", "norm", "layer_norm", "layernorm", "rms_norm", "rmsnorm", "bn", "batch_norm", "batchnorm"], "norm"
    ),
    **dict.fromkeys(["group_norm", "groupnorm", "gn"], "norm"),
    **dict.fromkeys(["emb", "embed", "embedding", "embeddings", "embedder"], "embed"),
    **dict.fromkeys(["h", "layer", "layers", "block", "blocks", "encoder_layer", "transformer_block"], "layer"),
    **dict.fromkeys(["fc", "linear", "dense", "lin"], "dense"),
    **dict.fromkeys(["enc", "encoder"], "encoder"),
    **dict.fromkeys(["dec", "decoder"], "decoder"),
    **dict.fromkeys(
        ["cross", "crossattention", "cross_attn", "cross_attention", "encoder_attn", "multihead_attn"], "cross"
    ),
    **dict.fromkeys(["multi_head_attention", "multihead_attention", "multi_head_dot_product_attention"], "attn"),
}
_KIND_WORD = re.compile(rf"_({'|'.join(KINDS)})$|^({'|'.join(KINDS)})_")
_NOISE = {"params", "batch_stats", "transformer", "model", "module", "net", "value", "raw_value", "weight_tied", "proj"}


def components(name: str) -> tuple[str | int, ...]:
    """A dotted torch name as a path, whole numbers as integers."""
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def kind(path: Sequence[str | int]) -> tuple[str, bool]:
    """The kind of tensor that a path ends with, one of the values of `KINDS` or "", and whether its word is sure.

    A single letter (`w`, `b1`, `bq`) is a sign and no proof.
    """
    last = _snake(str(path[-1])) if path else ""
    if last in KINDS:
        return KINDS[last], len(last) > 1
    words = last.split("_")
    for word in (words[-1], words[0]):
        if word in KINDS:
            return KINDS[word], len(word) > 1
    if re.fullmatch(r"[wb](\d+|q|k|v|o|qkv|kv|i|in|out|ih|hh|x|h)?", last):
        return ("weight" if last[0] == "w" else "bias"), False
    return "", False


@functools.lru_cache(maxsize=100_000)
def words(path: tuple[str | int, ...]) -> tuple[str, ...]:
    """The words of a path, synonyms as one, without those for the kind of tensor; numbers are words too."""
    parts = [_snake(str(part)) for part in path]
    if parts and parts[-1] not in KINDS:
        parts[-1] = _KIND_WORD.sub("", parts[-1]) or parts[-1]  # qkv_bias, ln1_g, w_up
    text = ".".join(parts)
    text = re.sub(r"\bb_?(q|k|v|o|qkv|\d)\b", r"w\1", text)  # bq: the bias of what wq is
    for pattern, replacement in _RULES:
        text = re.sub(pattern, replacement, text)
    out: list[str] = []
    parts = text.split(".")
    for place, part in enumerate(parts):
        if place == len(parts) - 1 and part in KINDS and len(parts) > 1:
            continue
        if part in _WORDS:
            out.append(_WORDS[part])
            continue
        pieces = [p for p in re.split(r"_|(\d+)", part) if p]
        stem = "_".join(p for p in pieces if not p.isdigit())
        if stem in _WORDS:
            out += [_WORDS[stem], *(p for p in pieces if p.isdigit())]
        else:
            out += [_WORDS.get(p, p) for p in pieces]
    return tuple(word for word in out if word not in _NOISE and word != "*")


def similarity(a: Sequence[str], b: Sequence[str], weights: Mapping[str, float]) -> float:
    """How far two lists of words agree: twice the weight that they share over the weight of both, from 0 to 1.

    A word that the other list has in part (`embed` and `embedder`) counts by the part.
    """
    total = sum(weights.get(word, 1.0) for word in (*a, *b))
    if not total:
        return 0.0
    left, right = Counter(a), Counter(b)
    shared = sum((2 * weights.get(word, 1.0)) * n for word, n in (left & right).items())
    for word in (left - right).elements():
        near = max((_alike(word, other) for other in (right - left)), default=0.0)
        shared += weights.get(word, 1.0) * near
    return shared / total


def word_weights(paths: Iterable[Sequence[str]]) -> dict[str, float]:
    """A weight of each word: little where most paths have it."""
    paths = list(paths)
    counts = Counter(word for path in paths for word in set(path))
    weights = {word: 1.0 - 0.8 * n / max(len(paths), 1) for word, n in counts.items()}
    return {word: weight * (0.5 if word.isdigit() else 1.0) for word, weight in weights.items()}


@functools.lru_cache(maxsize=100_000)
def _alike(a: str, b: str) -> float:
    if a.isdigit() or b.isdigit() or min(len(a), len(b)) < 3:
        return 0.0
    if a.startswith(b) or b.startswith(a):
        return 0.7
    ratio = SequenceMatcher(None, a, b).ratio()
    return ratio - 0.3 if ratio > 0.7 else 0.0


@functools.lru_cache(maxsize=100_000)
def _snake(text: str) -> str:
    """`MultiHeadAttention_0` as `multi_head_attention_0`."""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", text)
    return re.sub(r"[^a-z0-9*]+", "_", text.lower()).strip("_")
