"""Hugging Face's GPT-2 in PyTorch against jaxgpt's GPT.

    jaxgpt parity --pair examples/pairs/gpt2.py

Its converter is the one that reads GPT-2's weights for `jaxgpt generate` and `jaxgpt train`. The weights are random:
nothing is downloaded. All sizes differ, so that no swapped axis goes unseen.

Axes: B batch, T time, C n_embd, V vocabulary.
"""

import functools

import jax
import optax
import torch
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup

from jaxgpt.config import ModelConfig
from jaxgpt.interop.torch_names import from_torch, tutorial_names
from jaxgpt.model.gpt import Numerics, bind, init_params
from jaxgpt.model.loss import cross_entropy
from jaxgpt.parity import Pair

BATCH, TIME, N_VOCAB = 6, 11, 37
config = ModelConfig(
    n_layer=2, n_head=5, n_embd=40, block_size=17, dropout=0.0, tied_head=True, gelu="tanh", init="gpt2"
)


def torch_model():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=N_VOCAB,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.15,  # the default is 0.02, with which attention is flat and its gradients are near zero
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    with torch.no_grad():  # norms and biases away from ones and zeros, which would hide those that are wrong
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


# ------------------------------------------------------------------------------------------------------- the JAX model


def logits(params, batch):
    """Logits [B, T, V] in the parameters' dtype, in which the model computes as well."""
    dtype = params["ln_f.scale"].dtype
    model = bind(config, N_VOCAB, Numerics(param_dtype=dtype, compute_dtype=dtype))(params)
    return model(batch["input_ids"])


def loss(params, batch):
    """The mean over tokens of the cross-entropy of the next one."""
    logits_NV = logits(params, batch)[:, :-1].reshape(-1, N_VOCAB)
    loss_sum, n_tokens = cross_entropy(logits_NV, batch["labels"][:, 1:].reshape(-1))
    return loss_sum / n_tokens


# ------------------------------------------------------------------------------------------------------- the converter


def to_params(state_dict):
    """jaxgpt's flat parameters, "blocks.0.attn.Wq.kernel" -> array, from the names and layouts of Hugging Face."""
    tensors = tutorial_names(state_dict)
    return from_torch(tensors, param_shapes(config, tensors["token_emb.weight"].dtype))


@functools.cache
def param_shapes(config, dtype):
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config, N_VOCAB, Numerics(param_dtype=dtype)))


# ------------------------------------------------------------------------------------------------------------ the pair


def batch(rng):
    idx_BT = rng.integers(0, N_VOCAB, (BATCH, TIME))
    return {"input_ids": idx_BT, "labels": idx_BT}


def torch_optimizer(model):
    matrices, others = ([p for p in model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)


def is_matrix(params):
    """True for what decays. Norms and biases have one axis."""
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
