"""Hugging Face's Llama in PyTorch against a Llama of one page in JAX: plain functions over a plain pytree.

    jaxgpt parity --pair examples/pairs/llama.py

Grouped-query attention, rotary position embeddings, RMSNorm, SwiGLU, an untied head. The weights are random: nothing is
downloaded. All sizes differ, so that no swapped axis goes unseen.

Axes: B batch, T time (queries), S time (keys), C n_embd, H heads, K key and value heads, G query heads for each of
those (H = K*G), D head size, F intermediate size, V vocabulary.
"""

import jax
import jax.numpy as jnp
import optax
import torch
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from jaxgpt.parity import Pair

BATCH, TIME = 5, 11
config = LlamaConfig(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=16,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    initializer_range=0.2,  # ten times the default, with which attention is flat and its gradients are near zero
    tie_word_embeddings=False,
)


def torch_model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # norms away from ones, which would hide a scale that is wrong
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


# ------------------------------------------------------------------------------------------------------- the JAX model


def rms_norm(x, scale_C, epsilon=config.rms_norm_eps):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis (https://arxiv.org/abs/1910.07467)."""
    return scale_C * (x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon))


def rotary(x_BTHD, base=10000.0):
    """Turns the pair (d, d + D/2) of each head by the angle position * base^(-2d/D) (https://arxiv.org/abs/2104.09864)."""
    n_time, head_size = x_BTHD.shape[1], x_BTHD.shape[-1]
    frequency_E = 1 / base ** (jnp.arange(0, head_size, 2) / head_size)  # E = D/2
    angle_TE = jnp.arange(n_time)[:, None] * frequency_E
    cos_T1E, sin_T1E = (f(angle_TE)[:, None].astype(x_BTHD.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x_BTHD, 2, axis=-1)
    return jnp.concatenate([first * cos_T1E - second * sin_T1E, second * cos_T1E + first * sin_T1E], axis=-1)


def repeat_heads(x_BSKD, n_head):
    """Each key or value head as often as there are query heads for it: 0 0 0 1 1 1."""
    return jnp.repeat(x_BSKD, n_head // x_BSKD.shape[2], axis=2)


def causal_mask(n_time):
    """Which keys S a query T sees, bool [T, S]."""
    return jnp.tril(jnp.ones((n_time, n_time), bool))


def scaled_scores(q_BTHD, k_BSHD):
    """The scores [B, H, T, S] before the mask."""
    return jnp.einsum("BTHD,BSHD->BHTS", q_BTHD, k_BSHD) * q_BTHD.shape[-1] ** -0.5


def softmax(score_BHTS):
    return jax.nn.softmax(score_BHTS, axis=-1)


def attention(p, x_BTC):
    q_BTHD = rotary(jnp.einsum("BTC,CHD->BTHD", x_BTC, p["q"]))
    k_BSKD = rotary(jnp.einsum("BSC,CKD->BSKD", x_BTC, p["k"]))
    v_BSKD = jnp.einsum("BSC,CKD->BSKD", x_BTC, p["v"])
    k_BSHD, v_BSHD = (repeat_heads(x_BSKD, q_BTHD.shape[2]) for x_BSKD in (k_BSKD, v_BSKD))
    score_BHTS = jnp.where(causal_mask(x_BTC.shape[1]), scaled_scores(q_BTHD, k_BSHD), -jnp.inf)
    out_BTHD = jnp.einsum("BHTS,BSHD->BTHD", softmax(score_BHTS), v_BSHD)
    return jnp.einsum("BTHD,HDC->BTC", out_BTHD, p["o"])


def activation(x):
    return jax.nn.silu(x)


def mlp(p, x_BTC):
    return (activation(x_BTC @ p["gate"]) * (x_BTC @ p["up"])) @ p["down"]


def block(p, x_BTC):
    x_BTC = x_BTC + attention(p, rms_norm(x_BTC, p["norm1"]))
    return x_BTC + mlp(p, rms_norm(x_BTC, p["norm2"]))


def logits(params, batch):
    x_BTC = params["embed"][batch["input_ids"]]
    for p in params["layers"]:
        x_BTC = block(p, x_BTC)
    return rms_norm(x_BTC, params["norm"]) @ params["head"]


def loss(params, batch):
    """The mean over tokens of the cross-entropy of the next one."""
    logits_BTV, target_BT = logits(params, batch)[:, :-1], batch["labels"][:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, target_BT).mean()


# ------------------------------------------------------------------------------------------------------- the converter


def to_params(state_dict):
    """The pytree of a Hugging Face state dict: kernels [in, out], those of attention with an axis for the heads."""
    n_embd, head_size = config.hidden_size, config.head_dim

    def kernel(name):
        return state_dict[f"{name}.weight"].T

    def layer(prefix):
        return {
            "norm1": state_dict[f"{prefix}.input_layernorm.weight"],
            "q": kernel(f"{prefix}.self_attn.q_proj").reshape(n_embd, -1, head_size),
            "k": kernel(f"{prefix}.self_attn.k_proj").reshape(n_embd, -1, head_size),
            "v": kernel(f"{prefix}.self_attn.v_proj").reshape(n_embd, -1, head_size),
            "o": kernel(f"{prefix}.self_attn.o_proj").reshape(-1, head_size, n_embd),
            "norm2": state_dict[f"{prefix}.post_attention_layernorm.weight"],
            "gate": kernel(f"{prefix}.mlp.gate_proj"),
            "up": kernel(f"{prefix}.mlp.up_proj"),
            "down": kernel(f"{prefix}.mlp.down_proj"),
        }

    return {
        "embed": state_dict["model.embed_tokens.weight"],
        "layers": [layer(f"model.layers.{i}") for i in range(config.num_hidden_layers)],
        "norm": state_dict["model.norm.weight"],
        "head": kernel("lm_head"),
    }


# ------------------------------------------------------------------------------------------------------------ the pair


def batch(rng):
    idx_BT = rng.integers(0, config.vocab_size, (BATCH, TIME))
    return {"input_ids": idx_BT, "labels": idx_BT}


def torch_optimizer(model):
    matrices, norms = ([p for p in model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)


def is_matrix(params):
    """True for what decays. Norms have one axis."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


schedule = optax.warmup_cosine_decay_schedule(0.0, peak_value=1e-2, warmup_steps=2, decay_steps=8)

pair = Pair(
    torch_model=torch_model,
    torch_loss=lambda model, batch: model(**batch).loss,
    torch_logits=lambda model, batch: model(**batch).logits,
    jax_loss=loss,
    jax_logits=logits,
    batch=batch,
    to_params=to_params,
    torch_optimizer=torch_optimizer,
    torch_schedule=lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 2, 8),
    optax_optimizer=optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=is_matrix),
    ),
    clip=1.0,
)
