"""The model's size, initialisation, causality, cache, casts, dropout and choice of attention."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import parallel
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.memory import count_params
from jaxgpt.model import gpt as models
from jaxgpt.model.gpt import Numerics
from jaxgpt.model.sampling import empty_cache
from jaxgpt.presets import PRESETS

CONFIG = ModelConfig(n_layer=2, n_head=3, n_embd=12, block_size=10)
VOCAB = 7


@pytest.fixture(scope="module")
def params():
    return models.init_params(jax.random.key(0), CONFIG, VOCAB, Numerics())


@pytest.fixture(scope="module")
def idx_BT():
    return jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (4, 10)))


def logits(params, idx_BT, config=CONFIG, numerics=None, keys=None):
    model = models.bind(config, VOCAB, numerics or Numerics())
    return jax.jit(lambda params, *args: model(params)(*args))(params, idx_BT, keys)


@pytest.mark.parametrize(
    "preset, n_params",
    [("minigpt", 216_576), ("tinygpt", 212_480), ("nanogpt-char", 10_770_816), ("nanogpt-cpu", 809_856)],
)
def test_number_of_parameters(preset, n_params):
    shapes = jax.eval_shape(lambda: models.init_params(jax.random.key(0), PRESETS[preset].model, 65, Numerics()))
    assert sum(np.prod(p.shape) for p in shapes.values()) == n_params


@pytest.mark.parametrize(
    "preset, n_params",  # as Hugging Face and llm.c count them
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_the_shapes_of_gpt2(preset, n_params):
    config = PRESETS[preset]
    assert sum(count_params(config.model, 50_257, None)) == n_params
    assert config.tokens_per_step == 2**19 * (2 if preset == "gpt2-xl" else 1)


@pytest.mark.slow
def test_without_biases_and_with_another_epsilon():
    config = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=8)
    without = dataclasses.replace(config, bias=False)
    params = models.init_params(jax.random.key(1), config, VOCAB, Numerics())
    kept = models.init_params(jax.random.key(1), without, VOCAB, Numerics())
    assert set(kept) == {name for name in params if not name.endswith(".bias")}
    assert sum(p.size for p in kept.values()) == sum(count_params(without, VOCAB, None))
    classifier = models.init_params(jax.random.key(1), without, VOCAB, Numerics(), 3)
    assert "classifier.bias" in classifier
    assert sum(p.size for p in classifier.values()) == sum(count_params(without, VOCAB, 3))
    idx_BT = jnp.zeros((1, 8), jnp.int32)
    outputs = [
        logits(params, idx_BT, dataclasses.replace(config, layer_norm_eps=epsilon)) for epsilon in (1e-5, 1e-5, 1e-4)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])


@pytest.mark.slow
def test_attention_dropout_zeroes_and_scales_weights_in_training_alone():
    """One layer, values that are all 1: the output of attention is the sum of the weights that are kept."""
    rate, T = 0.25, 64
    keys = jax.random.split(jax.random.key(0), 8)
    weight_BHTS = jnp.full((8, 2, T, T), 1 / T)
    dropped = np.asarray(models.dropout(weight_BHTS, rate, keys, 3))
    kept = dropped != 0
    assert abs(kept.mean() - (1 - rate)) < 5 * (rate * (1 - rate) / kept.size) ** 0.5
    np.testing.assert_allclose(dropped[kept], 1 / T / (1 - rate), rtol=1e-6)
    assert (kept[:, 0] != kept[:, 1]).any() and (kept[0] != kept[1]).any()  # neither heads nor rows share a mask

    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, attention_dropout=0.5)
    params = models.init_params(jax.random.key(1), config, VOCAB, Numerics())
    idx_BT = jnp.zeros((2, 8), jnp.int32)
    evaluated = logits(params, idx_BT, config)
    plain = logits(params, idx_BT, dataclasses.replace(config, attention_dropout=0.0))
    np.testing.assert_allclose(evaluated, plain, rtol=1e-5, atol=1e-6)
    assert np.abs(logits(params, idx_BT, config, keys=keys[:2]) - evaluated).max() > 1e-4


def test_initialisation_is_as_documented():
    config = ModelConfig(n_layer=2, n_head=2, n_embd=128, block_size=64)
    params = models.init_params(jax.random.key(1), config, 65, Numerics())
    assert "lm_head.bias" not in params
    for name, p in params.items():
        p = np.asarray(p)
        if name.endswith((".kernel", ".embedding")):
            assert abs(p.std() / 0.02 - 1) < 5 / np.sqrt(2 * p.size), name  # five standard errors
            assert abs(p.mean()) < 5 * 0.02 / np.sqrt(p.size), name
        elif name.endswith(".scale"):
            assert (p == 1).all(), name
        elif ".ln" in name or name.startswith("ln"):
            assert (p == 0).all(), name
        else:  # PyTorch's default for a Linear: uniform in +-1/sqrt(fan_in)
            fan_in = params[name.replace(".bias", ".kernel")].shape[0]
            bound = fan_in**-0.5
            assert np.abs(p).max() <= bound and np.abs(p).max() > 0.9 * bound, name
            assert abs(p.std() / (bound / np.sqrt(3)) - 1) < 0.25, name


def test_a_position_sees_only_itself_and_the_past(params, idx_BT):
    changed = idx_BT.at[:, 6].set((idx_BT[:, 6] + 1) % VOCAB)
    before, after = logits(params, idx_BT), logits(params, changed)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (np.abs(before[:, 6:] - after[:, 6:]).max(axis=(0, 2)) > 0).all()  # and all of the past is seen


def test_cached_reading_equals_reading_at_once(params, idx_BT):
    model = models.bind(CONFIG, VOCAB, Numerics())

    @jax.jit
    def read(params, idx_1T, cache, start):
        gpt = model(params)
        x_1TC, cache = gpt.hidden(idx_1T, cache=cache, start=start)
        return gpt.lm_head(x_1TC)[0], cache

    whole = logits(params, idx_BT[:1])[0]
    cache, start, pieces = empty_cache(params, CONFIG, 1), 0, []
    for length in (4, 1, 3, 1, 1):
        piece, cache = read(params, idx_BT[:1, start : start + length], cache, start)
        pieces.append(piece)
        start += length
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-6)  # float32 sums over 10 keys in another order


def test_ids_outside_the_vocabulary_are_loud(params):
    assert np.isnan(logits(params, jnp.full((1, 3), VOCAB))).all()


def test_bfloat16_casts_the_products_only(params, idx_BT):
    half = Numerics(compute_dtype=jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(lambda p: logits(p, idx_BT, numerics=half))(params))
    products = [line for line in jaxpr.splitlines() if "dot_general[" in line]
    assert products and all(p.dtype == jnp.float32 for p in params.values())
    out = logits(params, idx_BT, numerics=half)
    exact = logits(params, idx_BT)
    assert out.dtype == jnp.float32
    error = float(jnp.abs(out - exact).max() / jnp.abs(exact).max())
    assert 1e-4 < error < 3e-2  # bf16 has 8 bits: the products really were rounded, and only as much as that


def test_float64_is_float64_throughout(params, idx_BT):
    with jax.enable_x64(True):
        exact = Numerics(jnp.float64, jnp.float64)
        wide = {k: jnp.asarray(np.asarray(p), jnp.float64) for k, p in params.items()}
        jaxpr = str(jax.make_jaxpr(lambda p: logits(p, idx_BT, numerics=exact))(wide))
        assert "f32" not in jaxpr and "f64" in jaxpr
        own = models.init_params(jax.random.key(0), CONFIG, VOCAB, exact)
        assert all((own[k] == wide[k]).all() for k in wide)  # the same start as in float32


def test_dropout_keeps_the_right_share_and_rows_are_independent():
    x_NC = jnp.ones((6 * 500, 40))
    keys = jax.random.split(jax.random.key(3), 6)
    y = np.asarray(models.dropout(x_NC, 0.3, keys, site=1))
    share = (y != 0).mean()
    assert abs(share - 0.7) < 5 * np.sqrt(0.21 / y.size) and np.allclose(y[y != 0], 1 / 0.7)
    rows = y.reshape(6, -1)
    assert not (rows[0] == rows[1]).all()
    assert not (y == np.asarray(models.dropout(x_NC, 0.3, keys, site=2))).all()
    np.testing.assert_array_equal(models.dropout(x_NC[:1000], 0.3, keys[:2], 1), y[:1000])  # wherever a row is computed


def test_dropout_is_off_without_keys(params, idx_BT):
    config = dataclasses.replace(CONFIG, dropout=0.5)
    keys = jax.random.split(jax.random.key(0), 4)
    np.testing.assert_array_equal(logits(params, idx_BT, config), logits(params, idx_BT))
    assert not np.allclose(logits(params, idx_BT, config, keys=keys), logits(params, idx_BT))


def test_cudnn_attention_is_asked_for_where_it_is_allowed(monkeypatch):
    def chosen(capability, **fields):
        device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
        return parallel.numerics(TrainConfig(**fields), device)

    on_gpu = dict(chunk_logits=2**28, head_multiple=128, fused_qkv=True)
    assert chosen("9.0") == Numerics(jnp.float32, jnp.dtype("bfloat16"), "cudnn", **on_gpu)
    assert chosen("9.0", dtype="float32").attention == "xla"
    assert chosen("9.0", model=ModelConfig(n_embd=12, n_head=3)).attention == "xla"  # heads of 4
    wide = ModelConfig(n_embd=256, n_head=1)
    assert [chosen(c, model=wide).attention for c in ("9.0", "8.0")] == ["cudnn", "xla"]
    assert [chosen(c).attention for c in ("7.5", "gfx942", "8.6")] == ["xla", "xla", "cudnn"]
    documents = [
        chosen("9.0", packing="documents", tokenizer="gpt2", model=ModelConfig(block_size=T)).attention
        for T in (128, 129)
    ]
    assert documents == ["cudnn", "xla"]
    asked = {}

    def attention(q, k, v, **kwargs):
        asked.update(kwargs)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    q = jnp.zeros((1, 4, 2, 8), jnp.bfloat16)
    models.causal_attention(q, q, q, 0, "cudnn")
    assert asked == {"is_causal": True, "implementation": "cudnn", "mask": None}
    models.causal_attention(q, q, q, 0, "cudnn", jnp.array([[0, 0, 1, 1]]))
    two = np.array([[True, True, False, False]] * 2)
    np.testing.assert_array_equal(asked["mask"], np.concatenate([two, ~two])[None, None])


def test_splash_attention_is_chosen_on_tpus_where_it_is_allowed():
    def chosen(**fields):
        return parallel.numerics(TrainConfig(**fields), types.SimpleNamespace(platform="tpu"))

    on_tpu = dict(chunk_logits=2**29, head_multiple=128, fused_qkv=True)
    assert chosen() == Numerics(jnp.float32, jnp.dtype("bfloat16"), "splash", **on_tpu)
    assert chosen(packing="documents", tokenizer="gpt2").attention == "splash"
    assert chosen(dtype="float32").attention == "xla"
    assert [chosen(model=ModelConfig(block_size=T)).attention for T in (64, 200, 384)] == ["xla", "xla", "splash"]
    assert chosen(model=ModelConfig(n_embd=512, n_head=1)).attention == "xla"


def test_on_cpu_float32_is_the_default():
    assert parallel.numerics(TrainConfig()) == Numerics(jnp.float32, jnp.dtype("float32"), "xla")
