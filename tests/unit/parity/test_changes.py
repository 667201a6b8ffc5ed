"""The changes of the PyTorch side: what a model calls must not matter to what a change does."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jaxgpt.parity import Pair
from jaxgpt.parity.changes.attention import Variant, attentions
from jaxgpt.parity.changes.base import after, merged
from jaxgpt.parity.changes.catalogue import all_changes
from jaxgpt.parity.changes.norms import norms
from jaxgpt.parity.changes.optimizers import decayed_on_one_side
from jaxgpt.parity.changes.recurrent import FORMULAS, Formula, _written_out
from jaxgpt.parity.torch_side import TorchSide, Trajectory

T, C, H = 5, 12, 3


class SelfAttention(nn.Module):
    """Causal attention in one of four ways to write it."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x_BTC):
        q, k, v = (a.unflatten(-1, (H, C // H)).transpose(1, 2) for a in self.qkv(x_BTC).chunk(3, -1))
        masked = torch.ones(T, T, dtype=torch.bool).triu(1)
        if self.way == "function":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.way == "masked_fill":
            score = (q @ k.transpose(-2, -1)) / math.sqrt(C // H)
            y = F.dropout(F.softmax(score.masked_fill(masked, -torch.inf), dim=-1), 0.1, self.training) @ v
        elif self.way == "mask added":
            mask = torch.zeros(T, T, dtype=q.dtype).masked_fill(masked, torch.finfo(q.dtype).min)
            score = torch.matmul(q * (C // H) ** -0.5, k.transpose(2, 3)) + mask
            y = torch.matmul(nn.functional.softmax(score, dim=-1, dtype=torch.float32).to(q.dtype), v)
        else:
            q, k, v = (a.flatten(0, 1) for a in (q, k, v))
            score = torch.baddbmm(torch.where(masked, -torch.inf, 0.0).to(q.dtype), q, k.mT * (C // H) ** -0.5)
            y = torch.bmm(score.softmax(-1), v).unflatten(0, (-1, H))
        return self.out(y.transpose(1, 2).flatten(-2))


class Model(nn.Module):
    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, x_BTC):
        return self.attention(x_BTC)


def side_of(model) -> tuple[TorchSide, dict[str, np.ndarray]]:
    def build():
        torch.manual_seed(0)
        return model()

    pair = Pair(
        torch_model=build,
        torch_loss=lambda model, batch: (model(batch["x"]) * batch["y"]).sum(),
        jax_loss=lambda params, batch: 0.0,
        to_params=lambda state: state,
        batch=lambda rng: {name: rng.standard_normal((2, T, C)) for name in "xy"},
    )
    return TorchSide(pair), pair.batch(np.random.default_rng(0))


def losses_of(side, batch, causes=()) -> dict[str, float]:
    """The loss with each change of some causes, by the change's name."""
    changes = all_changes(side.recorded(batch))
    return {
        change.name: side.results(batch, "float64", change.edits, grads=False).loss
        for change in changes
        if change.cause in causes
    }


ATTENTION = (
    "attention scale", "causal mask missing", "mask off by one", "rounded to bfloat16", "heads interleaved",
    "heads swapped",
)  # fmt: skip


@pytest.mark.parametrize("way", ["masked_fill", "mask added", "batched"])
def test_attention_written_out_is_changed_as_the_function_is(way):
    fused, batch = side_of(lambda: Model(SelfAttention("function")))
    written, _ = side_of(lambda: Model(SelfAttention(way)))
    (site,) = attentions(written.recorded(batch))
    (other,) = attentions(fused.recorded(batch))
    assert site.n_head == H and site.is_causal and not site.has_padding
    assert site.scale == pytest.approx(other.scale)
    loss = written.results(batch, "float64").loss
    assert written.results(batch, "float64", site.edits(Variant())).loss == pytest.approx(loss, rel=1e-12)
    expected, found = losses_of(fused, batch, ATTENTION), losses_of(written, batch, ATTENTION)
    # A written-out model has operations of its own to round, so it has more names than the function's.
    of_attention = {name for name in expected if "the output of" not in name}
    assert len(of_attention) >= 12
    for name in of_attention:
        assert found[name] == pytest.approx(expected[name], rel=1e-9), name
        assert found[name] != pytest.approx(loss, rel=1e-6), name


@pytest.mark.parametrize("need_weights", [False, True])
def test_torchs_own_multi_head_attention_is_looked_into(need_weights):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(C, H, batch_first=True)

        def forward(self, x_BTC):
            mask = torch.ones(T, T, dtype=torch.bool).triu(1)
            return self.mha(x_BTC, x_BTC, x_BTC, attn_mask=mask, need_weights=need_weights)[0]

    side, batch = side_of(lambda: Model(Own()))
    (site,) = attentions(side.recorded(batch))
    assert site.n_head == H and site.is_causal and site.scale == pytest.approx((C // H) ** -0.5)
    loss = side.results(batch, "float64").loss
    found = losses_of(side, batch, (*ATTENTION, "weights swapped", "bias missing"))
    assert {name.partition(":")[0] for name in found} == {*ATTENTION, "weights swapped", "bias missing"}
    assert sum(value == pytest.approx(loss, rel=1e-9) for value in found.values()) == 0


def test_a_padding_mask_and_a_causal_mask_are_told_apart():
    class Padded(SelfAttention):
        def forward(self, x_BTC):
            q, k, v = (a.unflatten(-1, (H, C // H)).transpose(1, 2) for a in self.qkv(x_BTC).chunk(3, -1))
            seen = torch.ones(T, T, dtype=torch.bool).tril() & (torch.arange(T) != 3)
            return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(-2))

    side, batch = side_of(lambda: Model(Padded("padded")))
    (site,) = attentions(side.recorded(batch))
    assert site.is_causal and site.has_padding
    causes = ("causal mask missing", "padding mask missing", "mask missing")
    losses = losses_of(side, batch, causes)
    assert len(set(losses.values()) | {side.results(batch, "float64").loss}) == 4


class WrittenNorm(nn.Module):
    """A LayerNorm, or an RMSNorm, in the words of common write-ups."""

    def __init__(self, way: str):
        super().__init__()
        self.way, self.weight, self.bias = way, nn.Parameter(torch.randn(C)), nn.Parameter(torch.randn(C))

    def forward(self, x):
        if self.way == "rms":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        variance = x.var(-1, keepdim=True, unbiased=self.way == "unbiased")
        return self.weight * (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-6) + self.bias


class Normed(nn.Module):
    def __init__(self, way: str):
        super().__init__()
        self.first, self.norm = nn.Linear(C, C), nn.LayerNorm(C, eps=1e-6) if way == "function" else WrittenNorm(way)
        if way == "function":
            nn.init.normal_(self.norm.weight), nn.init.normal_(self.norm.bias)

    def forward(self, x):
        return self.norm(self.first(x))


def test_a_norm_written_out_is_changed_as_the_function_is():
    written, batch = side_of(lambda: Normed("layer"))
    fused, _ = side_of(lambda: Normed("function"))
    causes = ("epsilon", "mean not subtracted", "variance unbiased", "scale plus one", "norm missing", "bias missing")
    expected, found = losses_of(fused, batch, causes), losses_of(written, batch, causes)
    assert set(expected) <= set(found)
    for name, loss in expected.items():
        assert found[name] == pytest.approx(loss, rel=1e-9), name


def test_the_kind_of_a_written_norm_is_known():
    for way, causes in (("rms", {"mean subtracted"}), ("unbiased", {"mean not subtracted", "variance biased"})):
        side, batch = side_of(lambda way=way: Normed(way))
        (norm,) = norms(side.recorded(batch))
        assert norm.kind == ("rms" if way == "rms" else "layer")
        assert causes <= {change.cause for change in all_changes(side.recorded(batch))}


class Recurrent(nn.Module):
    """A GRU whose states are averaged over time."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(C, C, 2, batch_first=True)

    def forward(self, x_BTC):
        return self.gru(x_BTC)[0].mean(1)[:, None]


def test_a_gru_written_out_is_torchs_own_until_its_formula_changes():
    side, batch = side_of(Recurrent)
    record = side.recorded(batch)
    (op,) = (op for op in record.operations if op.name == "gru")
    edit_of = _written_out(op)
    loss = side.results(batch, "float64").loss

    def loss_with(formula):
        return side.results(batch, "float64", {op.index: edit_of(formula)}, grads=False).loss

    assert loss_with(Formula()) == pytest.approx(loss, rel=1e-12)
    others = [loss_with(formula) for formula in FORMULAS.values()]
    assert len({round(value, 9) for value in [loss, *others]}) == 1 + len(FORMULAS)


def test_two_changes_of_one_operation_are_both_made():
    side, batch = side_of(Recurrent)
    (op,) = (op for op in side.recorded(batch).operations if op.name == "gru")
    doubled, one_more = after(lambda out: (2 * out[0], out[1])), after(lambda out: (out[0] + 1, out[1]))
    both = merged({op.index: doubled}, {op.index: one_more})
    states = (2 * op.output[0] + 1).mean(1)[:, None]
    expected = (states * torch.tensor(batch["y"])).sum().item()
    assert side.results(batch, "float64", both, grads=False).loss == pytest.approx(expected, rel=1e-12)


def test_of_a_grus_two_outputs_each_use_names_its_own():
    side, batch = side_of(Recurrent)
    values = side.recorded(batch).values()
    states, last_state = (value for value in values if value.operation == "gru")
    (mean,) = (value for value in values if value.operation == "mean")
    assert mean.inputs == (states.index,) and states.array.shape != last_state.array.shape


class Pooled(nn.Module):
    """A class token before the others, of which the first position is taken; a picture made larger."""

    def __init__(self):
        super().__init__()
        self.token, self.inner = nn.Parameter(torch.randn(1, 1, C)), nn.Linear(C, C)
        self.up = nn.ConvTranspose2d(2, 2, 2, 2)

    def forward(self, x_BTC):
        joined = self.inner(torch.cat([self.token.expand(len(x_BTC), -1, -1), x_BTC], 1))
        pixels = F.interpolate(self.up(joined[:, :4].unflatten(1, (2, 2))), scale_factor=2)
        return joined[:, 0][:, None] + pixels.mean((1, 2, 3))[:, None, None]


def test_what_is_joined_pooled_and_resized_is_changed():
    side, batch = side_of(Pooled)
    loss = side.results(batch, "float64").loss
    found = losses_of(side, batch, ("operands swapped", "pooling", "interpolation", "kernel transposed"))
    expected = {
        "operands swapped: the second before the first in cat in the model",
        "pooling: the mean position for the first in the model",
        "pooling: the last position for the first in the model",
        "interpolation: bilinear for nearest, corners aligned in the model",
        "kernel transposed: flipped, and inputs for outputs in up",
    }
    assert expected <= set(found)
    for name in expected:
        assert found[name] != pytest.approx(loss, rel=1e-6), name


def test_a_decay_of_some_tensors_is_seen_in_the_first_updates_that_differ():
    rng = np.random.default_rng(0)
    start = {name: rng.standard_normal((3, 4)) for name in ("decayed", "same", "other")}
    theirs = [{name: p + 0.1 for name, p in start.items()} for _ in range(2)]
    ours = [dict(theirs[0]), {**theirs[1], "decayed": theirs[1]["decayed"] - 0.01 * start["decayed"]}]
    ours[1]["other"] = theirs[1]["other"] + 1e-3 * rng.standard_normal((3, 4))
    both = (Trajectory([], params, {}) for params in (ours, theirs))
    assert decayed_on_one_side(*both, start) == ["decayed"]
