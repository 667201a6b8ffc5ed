"""Hugging Face's BERT (masked language modeling) in PyTorch against one in Flax NNX.

    jaxgpt parity --pair examples/pairs/bert.py

Post-norm blocks, learned positions, token types, a padding mask, a tied head with a transform, ignored
labels. The weights are random: nothing is downloaded. All sizes differ, so that no swapped axis goes unseen.

Axes: B batch, T time (queries), S time (keys), C n_embd, H heads, D head size (C = H*D), F intermediate size,
V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from transformers import BertConfig, BertForMaskedLM, get_linear_schedule_with_warmup

from jaxgpt.parity import Pair

BATCH, TIME = 5, 11
IGNORED = -100  # the label of a token that does not count
config = BertConfig(
    vocab_size=37,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=28,
    max_position_embeddings=13,
    type_vocab_size=3,
    layer_norm_eps=1e-12,
    initializer_range=0.2,  # ten times the default, with which attention is flat and its gradients are near zero
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def torch_model():
    torch.manual_seed(0)
    model = BertForMaskedLM(config)
    with torch.no_grad():  # norms and biases away from ones and zeros, which would hide those that are wrong
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


# ------------------------------------------------------------------------------------------------------- the JAX model


def layer_norm(n_features, rngs):
    """PyTorch's LayerNorm: the variance in two passes, where Flax's default is E[x^2] - E[x]^2."""
    return nnx.LayerNorm(n_features, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)


def gelu(x):
    return jax.nn.gelu(x, approximate=False)


def padding_mask(attention_mask_BS):
    """Which keys a query sees, bool [B, 1, 1, S]."""
    return attention_mask_BS[:, None, None, :] == 1


def softmax(score_BHTS):
    return jax.nn.softmax(score_BHTS, axis=-1)


def attention(q_BTHD, k_BSHD, v_BSHD, mask):
    score_BHTS = jnp.einsum("BTHD,BSHD->BHTS", q_BTHD, k_BSHD) * q_BTHD.shape[-1] ** -0.5
    return jnp.einsum("BHTS,BSHD->BTHD", softmax(jnp.where(mask, score_BHTS, -jnp.inf)), v_BSHD)


class Attention(nnx.Module):
    def __init__(self, n_embd, n_head, rngs):
        self.n_head = n_head
        self.query, self.key, self.value, self.out = (nnx.Linear(n_embd, n_embd, rngs=rngs) for _ in range(4))

    def __call__(self, x_BTC, mask):
        heads = (*x_BTC.shape[:2], self.n_head, -1)
        q_BTHD, k_BSHD, v_BSHD = (f(x_BTC).reshape(heads) for f in (self.query, self.key, self.value))
        return self.out(attention(q_BTHD, k_BSHD, v_BSHD, mask).reshape(x_BTC.shape))


class Block(nnx.Module):
    """Post-norm: x = norm(x + attention(x)); x = norm(x + mlp(x))."""

    def __init__(self, n_embd, n_head, n_intermediate, rngs):
        self.attention = Attention(n_embd, n_head, rngs)
        self.norm1 = layer_norm(n_embd, rngs)
        self.up = nnx.Linear(n_embd, n_intermediate, rngs=rngs)
        self.down = nnx.Linear(n_intermediate, n_embd, rngs=rngs)
        self.norm2 = layer_norm(n_embd, rngs)

    def __call__(self, x_BTC, mask):
        x_BTC = self.norm1(x_BTC + self.attention(x_BTC, mask))
        return self.norm2(x_BTC + self.down(gelu(self.up(x_BTC))))


def embed(n_rows, n_features, rngs):
    table = nnx.Embed(n_rows, n_features, rngs=rngs)
    table.dtype = None  # it would compute in the dtype that it was built with, whatever its parameters become
    return table


class Bert(nnx.Module):
    def __init__(self, config, rngs):
        n_embd = config.hidden_size
        self.tokens = embed(config.vocab_size, n_embd, rngs)
        self.positions = embed(config.max_position_embeddings, n_embd, rngs)
        self.token_types = embed(config.type_vocab_size, n_embd, rngs)
        self.norm = layer_norm(n_embd, rngs)
        sizes = n_embd, config.num_attention_heads, config.intermediate_size
        self.blocks = nnx.List([Block(*sizes, rngs) for _ in range(config.num_hidden_layers)])
        self.transform = nnx.Linear(n_embd, n_embd, rngs=rngs)
        self.transform_norm = layer_norm(n_embd, rngs)
        self.head_bias = nnx.Param(jnp.zeros(config.vocab_size))

    def embedded(self, input_ids_BT, token_type_ids_BT):
        position_T = jnp.arange(input_ids_BT.shape[1])
        return self.tokens(input_ids_BT) + self.token_types(token_type_ids_BT) + self.positions(position_T)

    def head(self, x_BTC):
        """The head is tied: its kernel is the transpose of the token embedding."""
        return self.tokens.attend(x_BTC) + self.head_bias[...]

    def __call__(self, input_ids_BT, token_type_ids_BT, attention_mask_BT):
        """Logits [B, T, V]."""
        x_BTC = self.norm(self.embedded(input_ids_BT, token_type_ids_BT))
        for block in self.blocks:
            x_BTC = block(x_BTC, padding_mask(attention_mask_BT))
        return self.head(self.transform_norm(gelu(self.transform(x_BTC))))


def logits(model, batch):
    return model(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])


def loss(model, batch):
    """The mean cross-entropy over the tokens whose label counts."""
    counts_BT = batch["labels"] != IGNORED
    label_BT = jnp.where(counts_BT, batch["labels"], 0)
    loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits(model, batch), label_BT)
    return jnp.sum(loss_BT * counts_BT) / jnp.sum(counts_BT)


# ------------------------------------------------------------------------------------------------------- the converter

MODULES = {  # of a block
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}


def to_params(state_dict):
    """The NNX model of a Hugging Face state dict. Kernels are [in, out]; the head's other copies are left out."""
    flat = {
        "tokens.embedding": state_dict["bert.embeddings.word_embeddings.weight"],
        "positions.embedding": state_dict["bert.embeddings.position_embeddings.weight"],
        "token_types.embedding": state_dict["bert.embeddings.token_type_embeddings.weight"],
        "head_bias": state_dict["cls.predictions.bias"],
    }
    modules = {"norm": "bert.embeddings.LayerNorm"}
    for i in range(config.num_hidden_layers):
        modules |= {f"blocks.{i}.{ours}": f"bert.encoder.layer.{i}.{theirs}" for ours, theirs in MODULES.items()}
    modules["transform"] = "cls.predictions.transform.dense"
    modules["transform_norm"] = "cls.predictions.transform.LayerNorm"
    for ours, theirs in modules.items():
        weight = state_dict[f"{theirs}.weight"]
        flat |= {f"{ours}.scale": weight} if "norm" in ours else {f"{ours}.kernel": weight.T}
        flat[f"{ours}.bias"] = state_dict[f"{theirs}.bias"]
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Bert(config, nnx.Rngs(0))))
    return nnx.merge(graphdef, nnx.map_state(lambda path, p: p.replace(flat[".".join(map(str, path))]), state))


# ------------------------------------------------------------------------------------------------------------ the pair


def batch(rng):
    """Texts of several lengths, padded with 0; about a third of their tokens is to be predicted."""
    shape = BATCH, TIME
    length_B = rng.integers(TIME // 2, TIME + 1, BATCH)
    is_text_BT = np.arange(TIME) < length_B[:, None]
    idx_BT = rng.integers(1, config.vocab_size, shape) * is_text_BT
    is_predicted_BT = is_text_BT & (rng.random(shape) < 1 / 3)
    is_predicted_BT[:, 0] = True
    return {
        "input_ids": idx_BT,
        "token_type_ids": rng.integers(0, config.type_vocab_size, shape),
        "attention_mask": is_text_BT.astype(np.int64),
        "labels": np.where(is_predicted_BT, idx_BT, IGNORED),
    }


def torch_optimizer(model):
    matrices, others = ([p for p in model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)


def is_matrix(params):
    """True for what decays. Norms and biases have one axis."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


N_WARMUP, N_UPDATES = 2, 8
schedule = optax.join_schedules(
    [optax.linear_schedule(0.0, 1e-3, N_WARMUP), optax.linear_schedule(1e-3, 0.0, N_UPDATES - N_WARMUP)], [N_WARMUP]
)

pair = Pair(
    torch_model=torch_model,
    torch_loss=lambda model, batch: model(**batch).loss,
    torch_logits=lambda model, batch: model(**batch).logits,
    jax_loss=loss,
    jax_logits=logits,
    batch=batch,
    to_params=to_params,
    torch_optimizer=torch_optimizer,
    torch_schedule=lambda optimizer: get_linear_schedule_with_warmup(optimizer, N_WARMUP, N_UPDATES),
    optax_optimizer=optax.adamw(schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1, mask=is_matrix),
)
