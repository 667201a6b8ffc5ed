"""A language model with PyTorch's two-layer LSTM against one in Flax Linen, whose converter is derived.

    jaxgpt parity --pair examples/pairs/lstm.py

The pair gives no `to_params`: from the shapes and names of `jax_params` the converter is derived and printed. The
weights are random: nothing is downloaded. All sizes differ, so that no swapped axis goes unseen.

Axes: B batch, T time, C n_embd (the first layer's input), H hidden size, G the gates (4 H), V vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import torch

from jaxgpt.parity import Pair

BATCH, TIME, N_VOCAB, N_EMBD, N_HIDDEN, N_LAYER = 5, 11, 37, 10, 12, 2


class LanguageModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(N_VOCAB, N_EMBD)
        self.lstm = torch.nn.LSTM(N_EMBD, N_HIDDEN, N_LAYER, batch_first=True)
        self.head = torch.nn.Linear(N_HIDDEN, N_VOCAB)

    def forward(self, idx_BT):
        return self.head(self.lstm(self.embed(idx_BT))[0])


def torch_model():
    torch.manual_seed(0)
    return LanguageModel()


def torch_loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch["inputs"]).flatten(0, 1), batch["targets"].flatten())


# ------------------------------------------------------------------------------------------------------- the JAX model


def split_gates(gates_BG):
    """The input, forget, cell and output gates [B, H] each, in PyTorch's order, before their activations."""
    return jnp.split(gates_BG, 4, axis=-1)


def cell_step(cell_BH, gates_BG):
    """The new cell and hidden states, [B, H] each (torch.nn.LSTM's formulas)."""
    input_BH, forget_BH, new_BH, output_BH = split_gates(gates_BG)
    cell_BH = jax.nn.sigmoid(forget_BH) * cell_BH + jax.nn.sigmoid(input_BH) * jnp.tanh(new_BH)
    return cell_BH, jax.nn.sigmoid(output_BH) * jnp.tanh(cell_BH)


def bias_sum(bias_ih_G, bias_hh_G):
    """PyTorch has two biases, though one would do: both get gradients and updates."""
    return bias_ih_G + bias_hh_G


class LSTMLayer(nn.Module):
    n_hidden: int

    @nn.compact
    def __call__(self, x_BTC):
        """The hidden states [B, T, H] of a layer that starts from zeros."""
        n_batch, _, n_in = x_BTC.shape
        init, n_gates = nn.initializers.lecun_normal(), 4 * self.n_hidden
        weight_ih_CG = self.param("weight_ih", init, (n_in, n_gates))
        weight_hh_HG = self.param("weight_hh", init, (self.n_hidden, n_gates))
        bias_ih_G = self.param("bias_ih", nn.initializers.zeros, (n_gates,))
        bias_hh_G = self.param("bias_hh", nn.initializers.zeros, (n_gates,))
        from_input_BTG = x_BTC @ weight_ih_CG + bias_sum(bias_ih_G, bias_hh_G)

        def step(carry, from_input_BG):
            cell_BH, hidden_BH = cell_step(carry[0], from_input_BG + carry[1] @ weight_hh_HG)
            return (cell_BH, hidden_BH), hidden_BH

        zeros_BH = jnp.zeros((n_batch, self.n_hidden), x_BTC.dtype)
        _, hidden_TBH = jax.lax.scan(step, (zeros_BH, zeros_BH), from_input_BTG.swapaxes(0, 1))
        return hidden_TBH.swapaxes(0, 1)


class LinenLanguageModel(nn.Module):
    @nn.compact
    def __call__(self, idx_BT):
        embedding_VC = self.param("embed", nn.initializers.normal(), (N_VOCAB, N_EMBD))
        x_BTC = embedding_VC[idx_BT]
        for i in range(N_LAYER):
            x_BTC = LSTMLayer(N_HIDDEN, name=f"lstm_{i}")(x_BTC)
        return nn.Dense(N_VOCAB, name="head")(x_BTC)


def logits(variables, batch):
    return LinenLanguageModel().apply(variables, batch["inputs"])


def loss(variables, batch):
    """The mean over tokens of the cross-entropy of the next one."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(variables, batch), batch["targets"]).mean()


# ------------------------------------------------------------------------------------------------------------ the pair


def jax_params():
    return LinenLanguageModel().init(jax.random.key(0), jnp.zeros((BATCH, TIME), jnp.int32))


def batch(rng):
    window_BT = rng.integers(0, N_VOCAB, (BATCH, TIME + 1))
    return {"inputs": window_BT[:, :-1], "targets": window_BT[:, 1:]}


pair = Pair(
    torch_model=torch_model,
    torch_loss=torch_loss,
    torch_logits=lambda model, batch: model(batch["inputs"]),
    jax_loss=loss,
    jax_logits=logits,
    batch=batch,
    jax_params=jax_params,
    torch_optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-8),
    optax_optimizer=optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-3, b1=0.9, b2=0.99, eps=1e-8)),
    clip=0.1,
)
