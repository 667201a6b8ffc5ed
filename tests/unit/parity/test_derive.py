"""Converters are derived for pairs of real models, and their values compared with those of a converter by hand."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn

from jaxgpt.parity.derive.derivation import Derived, derive
from jaxgpt.parity.derive.entries import TorchTensor
from jaxgpt.parity.params import Path

torch.set_num_threads(1)
Arrays = dict[Path, np.ndarray]


def randomized(model: nn.Module) -> nn.Module:
    """The model in float64 with random values everywhere: ones and zeros would hide which tensor is which."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for t in model.state_dict().values():
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape, generator=generator, dtype=torch.float64) + 0.5)
    return model


def numpy_state(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: t.detach().numpy() for name, t in model.state_dict().items()}


def described(model: nn.Module) -> list[TorchTensor]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    first: dict[int, str] = {}
    out = []
    for name, t in model.state_dict(keep_vars=True).items():
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        tied = first.setdefault(t.data_ptr(), name) if t.numel() else name
        out.append(TorchTensor(name, tuple(t.shape), owner, name in parameters, tied if tied != name else None))
    return out


def shapes(arrays: Mapping[Path, np.ndarray]) -> dict[Path, tuple[int, ...]]:
    return {path: np.shape(x) for path, x in arrays.items()}


def is_equal(state: Mapping[str, np.ndarray], wanted: Arrays) -> Callable[[Derived], float]:
    """A check that says no more than a loss would: 0 where all leaves are right, else 1."""

    def check(derived: Derived) -> float:
        got = derived.convert(state)
        return 0.0 if all(np.array_equal(got[path], x) for path, x in wanted.items()) else 1.0

    return check


def flat(tree, path: Path = ()) -> Arrays:
    """The leaves of nested dicts and lists."""
    if isinstance(tree, dict):
        return {p: x for key, value in tree.items() for p, x in flat(value, (*path, key)).items()}
    if isinstance(tree, list):
        return {p: x for i, value in enumerate(tree) for p, x in flat(value, (*path, i)).items()}
    return {path: tree}


def run_code(derived: Derived, state: Mapping[str, np.ndarray]) -> Arrays:
    namespace: dict = {}
    exec(derived.code(), namespace)
    return flat(namespace["to_params"](state))


def require_derived(model: nn.Module, wanted: Arrays, by_value: bool = False) -> Derived:
    """Derives the converter, and compares its leaves, and those of its code, with these.

    Args:
        by_value: names and shapes alone do not give it, the check is needed.
    """
    state = numpy_state(model)
    derived = derive(described(model), shapes(wanted), is_equal(state, wanted) if by_value else None)
    assert derived.missing == (), derived.message()
    got = derived.convert(state)
    wrong = [path for path, x in wanted.items() if not np.array_equal(got[path], x)]
    assert wrong == [], (wrong, [derived.sources[path] for path in wrong])
    coded = run_code(derived, state)
    assert coded.keys() == got.keys()
    for path, x in got.items():
        np.testing.assert_array_equal(coded[path], x)
    if by_value:
        assert derived.error == 0
    return derived


class Mlp(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


@pytest.mark.parametrize("transposed", [True, False])
def test_square_kernels_are_decided_by_the_models_output(transposed):
    model = randomized(Mlp([8, 8, 8, 8]))
    state = numpy_state(model)
    x_BC = np.random.default_rng(0).normal(size=(3, 8))
    expected = model(torch.tensor(x_BC)).detach().numpy()

    def check(derived):
        p, h = derived.convert(state), x_BC
        for i in range(3):
            w = p["layers", i, "w"]
            h = (h @ w if transposed else h @ w.T) + p["layers", i, "b"]
            h = np.tanh(h) if i < 2 else h
        return np.abs(h - expected).max() / np.abs(expected).max()

    leaves = {("layers", i, k): (8, 8) if k == "w" else (8,) for i in range(3) for k in "wb"}
    derived = derive(described(model), leaves, check)
    assert derived.error is not None and derived.error < 1e-14
    for i in range(3):
        w = state[f"layers.{i}.weight"]
        np.testing.assert_array_equal(derived.convert(state)["layers", i, "w"], w.T if transposed else w)
    assert "by value" in derived.code() and not derived.candidates


def test_mlp_of_sequential_to_linen():
    model = randomized(
        nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 3))
    )
    s = numpy_state(model)
    wanted = {
        ("params", "LayerNorm_0", "scale"): s["1.weight"],
        ("params", "LayerNorm_0", "bias"): s["1.bias"],
    }
    for i, k in enumerate((0, 3, 5)):
        wanted["params", f"Dense_{i}", "kernel"] = s[f"{k}.weight"].T
        wanted["params", f"Dense_{i}", "bias"] = s[f"{k}.bias"]
    require_derived(model, wanted)


def gpt2(**changes):
    import transformers

    config = transformers.GPT2Config(**dict(vocab_size=31, n_positions=12, n_embd=16, n_layer=3, n_head=4) | changes)
    return randomized(transformers.GPT2LMHeadModel(config))


def test_gpt2_to_a_plain_dict_with_separate_query_key_value():
    model = gpt2()
    s = {name.removeprefix("transformer."): x for name, x in numpy_state(model).items()}
    wanted: Arrays = {("tok_emb",): s["wte.weight"], ("pos_emb",): s["wpe.weight"]}
    wanted |= {("ln_f", "g"): s["ln_f.weight"], ("ln_f", "b"): s["ln_f.bias"]}
    for i in range(3):
        at, h = ("layers", i), f"h.{i}"
        for k, name in enumerate("qkv"):
            wanted[*at, f"w{name}"] = s[f"{h}.attn.c_attn.weight"][:, 16 * k : 16 * (k + 1)]
            wanted[*at, f"b{name}"] = s[f"{h}.attn.c_attn.bias"][16 * k : 16 * (k + 1)]
        wanted |= {(*at, "wo"): s[f"{h}.attn.c_proj.weight"], (*at, "bo"): s[f"{h}.attn.c_proj.bias"]}
        wanted |= {(*at, "w1"): s[f"{h}.mlp.c_fc.weight"], (*at, "b1"): s[f"{h}.mlp.c_fc.bias"]}
        wanted |= {(*at, "w2"): s[f"{h}.mlp.c_proj.weight"], (*at, "b2"): s[f"{h}.mlp.c_proj.bias"]}
        for k in (1, 2):
            wanted |= {(*at, f"ln{k}", "g"): s[f"{h}.ln_{k}.weight"], (*at, f"ln{k}", "b"): s[f"{h}.ln_{k}.bias"]}
    derived = require_derived(model, wanted)
    assert derived.unused == ()
    assert "for i in range(3)" in derived.code() and "h.{i}" in derived.code()


def test_gpt2_to_our_own_gpt():
    from jaxgpt.interop.torch_names import from_torch, tutorial_names
    from jaxgpt.presets import PRESETS  # noqa: F401

    model = gpt2()
    state = numpy_state(model)
    own = {}
    for i in range(3):
        b = f"blocks.{i}"
        for w in ("Wq", "Wk", "Wv", "Wo"):
            own |= {f"{b}.attn.{w}.kernel": (16, 16), f"{b}.attn.{w}.bias": (16,)}
        own |= {f"{b}.mlp.fc.kernel": (16, 64), f"{b}.mlp.fc.bias": (64,)}
        own |= {f"{b}.mlp.proj.kernel": (64, 16), f"{b}.mlp.proj.bias": (16,)}
        for ln in ("ln1", "ln2"):
            own |= {f"{b}.{ln}.scale": (16,), f"{b}.{ln}.bias": (16,)}
    own |= {"token_emb.embedding": (31, 16), "pos_emb.embedding": (12, 16), "ln_f.scale": (16,), "ln_f.bias": (16,)}
    like = {name: jax.ShapeDtypeStruct(shape, np.float64) for name, shape in own.items()}
    by_hand = from_torch(tutorial_names(state), like)
    wanted = {tuple(int(c) if c.isdigit() else c for c in name.split(".")): x for name, x in by_hand.items()}
    require_derived(model, wanted)


@pytest.mark.parametrize("fused_by_head", [False, True])
def test_separate_projections_to_a_fused_leaf(fused_by_head):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(self, name, nn.Linear(16, 16))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Attention() for _ in range(2))

    model = randomized(Model())
    s = numpy_state(model)
    wanted = {}
    for i in range(2):
        w = np.stack([s[f"layers.{i}.{n}_proj.weight"] for n in "qkv"])  # [3, O, I]
        b = np.stack([s[f"layers.{i}.{n}_proj.bias"] for n in "qkv"])
        if fused_by_head:
            w = w.reshape(3, 4, 4, 16).transpose(3, 1, 0, 2).reshape(16, 48)
            b = b.reshape(3, 4, 4).transpose(1, 0, 2).reshape(48)
        else:
            w, b = w.reshape(48, 16).T, b.reshape(48)
        wanted |= {(f"layers_{i}", "qkv", "kernel"): w, (f"layers_{i}", "qkv", "bias"): b}
        wanted |= {(f"layers_{i}", "out", "kernel"): s[f"layers.{i}.o_proj.weight"].T}
        wanted |= {(f"layers_{i}", "out", "bias"): s[f"layers.{i}.o_proj.bias"]}
    require_derived(model, wanted, by_value=fused_by_head)


def bert():
    import transformers

    config = transformers.BertConfig(
        vocab_size=29, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=11,
    )  # fmt: skip
    return randomized(transformers.BertModel(config, add_pooling_layer=True))


def test_bert_to_nnx_attention():
    model = bert()
    s = numpy_state(model)
    wanted: Arrays = {}
    for own, theirs in (("word", "word"), ("position", "position"), ("type", "token_type")):
        wanted[f"{own}_embed", "embedding"] = s[f"embeddings.{theirs}_embeddings.weight"]

    def norm(path, name):
        wanted.update({(*path, "scale"): s[f"{name}.weight"], (*path, "bias"): s[f"{name}.bias"]})

    def dense(path, name):
        wanted.update({(*path, "kernel"): s[f"{name}.weight"].T, (*path, "bias"): s[f"{name}.bias"]})

    norm(("embed_norm",), "embeddings.LayerNorm")
    for i in range(2):
        at, e = ("layers", i), f"encoder.layer.{i}"
        for n in ("query", "key", "value"):
            w = s[f"{e}.attention.self.{n}.weight"]
            wanted[*at, "attention", n, "kernel"] = w.T.reshape(16, 4, 4)
            wanted[*at, "attention", n, "bias"] = s[f"{e}.attention.self.{n}.bias"].reshape(4, 4)
        wanted[*at, "attention", "out", "kernel"] = s[f"{e}.attention.output.dense.weight"].T.reshape(4, 4, 16)
        wanted[*at, "attention", "out", "bias"] = s[f"{e}.attention.output.dense.bias"]
        norm((*at, "attention_norm"), f"{e}.attention.output.LayerNorm")
        norm((*at, "mlp_norm"), f"{e}.output.LayerNorm")
        dense((*at, "up"), f"{e}.intermediate.dense")
        dense((*at, "down"), f"{e}.output.dense")
    dense(("pooler",), "pooler.dense")
    require_derived(model, wanted)


def encoder_layers():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return randomized(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def test_encoder_layers_to_linen():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.LayerNorm()(x + linen.MultiHeadDotProductAttention(4)(x, x))
            h = linen.relu(linen.Dense(24)(x))
            return linen.LayerNorm()(x + linen.Dense(16)(h))

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            for _ in range(2):
                x = Block()(x)
            return x

    model = encoder_layers()
    s = numpy_state(model)
    wanted: Arrays = {}
    for i in range(2):
        at, e = ("params", f"Block_{i}"), f"layers.{i}"
        attn = (*at, "MultiHeadDotProductAttention_0")
        for k, n in enumerate(("query", "key", "value")):
            rows = slice(16 * k, 16 * (k + 1))
            wanted[*attn, n, "kernel"] = s[f"{e}.self_attn.in_proj_weight"][rows].T.reshape(16, 4, 4)
            wanted[*attn, n, "bias"] = s[f"{e}.self_attn.in_proj_bias"][rows].reshape(4, 4)
        wanted[*attn, "out", "kernel"] = s[f"{e}.self_attn.out_proj.weight"].T.reshape(4, 4, 16)
        wanted[*attn, "out", "bias"] = s[f"{e}.self_attn.out_proj.bias"]
        for k in (0, 1):
            wanted[*at, f"Dense_{k}", "kernel"] = s[f"{e}.linear{k + 1}.weight"].T
            wanted[*at, f"Dense_{k}", "bias"] = s[f"{e}.linear{k + 1}.bias"]
            wanted[*at, f"LayerNorm_{k}", "scale"] = s[f"{e}.norm{k + 1}.weight"]
            wanted[*at, f"LayerNorm_{k}", "bias"] = s[f"{e}.norm{k + 1}.bias"]
    variables = jax.eval_shape(Model().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 3, 16), np.float32))
    assert shapes(flat(variables)) == shapes(wanted)
    require_derived(model, wanted)


def test_layers_stacked_for_scan():
    model = encoder_layers()
    s = numpy_state(model)

    def stacked(name, change=lambda x: x):
        return np.stack([change(s[f"layers.{i}.{name}"]) for i in range(2)])

    wanted = {
        ("blocks", "attn", "qkv"): stacked("self_attn.in_proj_weight", lambda w: w.T.reshape(16, 3, 4, 4)),
        ("blocks", "attn", "qkv_bias"): stacked("self_attn.in_proj_bias", lambda b: b.reshape(3, 4, 4)),
        ("blocks", "attn", "out"): stacked("self_attn.out_proj.weight", lambda w: w.T.reshape(4, 4, 16)),
        ("blocks", "attn", "out_bias"): stacked("self_attn.out_proj.bias"),
    }
    for k in (1, 2):
        wanted["blocks", "mlp", f"w{k}"] = stacked(f"linear{k}.weight", lambda w: w.T)
        wanted["blocks", "mlp", f"b{k}"] = stacked(f"linear{k}.bias")
        wanted["blocks", f"norm{k}", "scale"] = stacked(f"norm{k}.weight")
        wanted["blocks", f"norm{k}", "bias"] = stacked(f"norm{k}.bias")
    derived = require_derived(model, wanted)
    assert "for layer in range(2)" in derived.code() or "np.stack" in derived.code()


def llama(**changes):
    import transformers

    config = transformers.LlamaConfig(
        **dict(
            vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=16,
        )
        | changes
    )  # fmt: skip
    return randomized(transformers.LlamaForCausalLM(config))


@pytest.mark.parametrize("names", [("gate", "up"), ("w1", "w3"), ("a", "b"), ("b", "a")])
def test_llama_with_gate_and_up_of_the_same_shape(names):
    model = llama()
    s = numpy_state(model)
    gate, up = names
    wanted = {("tok_emb",): s["model.embed_tokens.weight"], ("norm",): s["model.norm.weight"]}
    wanted["lm_head",] = s["lm_head.weight"].T
    for i in range(2):
        at, h = ("layers", i), f"model.layers.{i}"
        for n in "qkvo":
            wanted[*at, f"w{n}"] = s[f"{h}.self_attn.{n}_proj.weight"].T
        wanted[*at, gate] = s[f"{h}.mlp.gate_proj.weight"].T
        wanted[*at, up] = s[f"{h}.mlp.up_proj.weight"].T
        wanted[*at, "down"] = s[f"{h}.mlp.down_proj.weight"].T
        wanted[*at, "attn_norm"] = s[f"{h}.input_layernorm.weight"]
        wanted[*at, "mlp_norm"] = s[f"{h}.post_attention_layernorm.weight"]
    require_derived(model, wanted, by_value=True)


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """The modules of torchvision's ResNet-18, under its names, an eighth as wide."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        widths = [8, 8, 16, 32, 64]
        for stage in range(4):
            a, b = widths[stage : stage + 2]
            setattr(self, f"layer{stage + 1}", nn.Sequential(BasicBlock(a, b, 1 + (a != b)), BasicBlock(b, b, 1)))
        self.fc = nn.Linear(64, 10)


@pytest.mark.parametrize("form", ["stages", "flat", "linen"])
def test_resnet(form):
    model = randomized(ResNet())
    s = numpy_state(model)
    wanted: Arrays = {}

    def norm(path, name):
        if form == "linen":
            wanted.update(
                {("params", *path, "scale"): s[f"{name}.weight"], ("params", *path, "bias"): s[f"{name}.bias"]}
            )
            wanted["batch_stats", *path, "mean"] = s[f"{name}.running_mean"]
            wanted["batch_stats", *path, "var"] = s[f"{name}.running_var"]
        else:
            wanted.update({(*path, "scale"): s[f"{name}.weight"], (*path, "bias"): s[f"{name}.bias"]})
            wanted.update({(*path, "mean"): s[f"{name}.running_mean"], (*path, "var"): s[f"{name}.running_var"]})

    def conv(path, name):
        collection = ("params",) if form == "linen" else ()
        wanted[*collection, *path, "kernel"] = s[f"{name}.weight"].transpose(2, 3, 1, 0)

    conv(("conv1",) if form != "linen" else ("conv_init",), "conv1")
    norm(("bn1",) if form != "linen" else ("bn_init",), "bn1")
    for stage in range(4):
        for block in range(2):
            e = f"layer{stage + 1}.{block}"
            at: Path = {
                "stages": ("stages", stage, "blocks", block),
                "flat": ("blocks", 2 * stage + block),
                "linen": (f"ResNetBlock_{2 * stage + block}",),
            }[form]
            first = 0 if form == "linen" else 1
            names = ("Conv_", "BatchNorm_") if form == "linen" else ("conv", "bn")
            for k in (0, 1):
                conv((*at, f"{names[0]}{k + first}"), f"{e}.conv{k + 1}")
                norm((*at, f"{names[1]}{k + first}"), f"{e}.bn{k + 1}")
            if f"{e}.downsample.0.weight" in s:
                conv((*at, "conv_proj" if form == "linen" else "shortcut"), f"{e}.downsample.0")
                norm((*at, "norm_proj" if form == "linen" else "shortcut_bn"), f"{e}.downsample.1")
    head = ("params", "Dense_0") if form == "linen" else ("fc",)
    wanted |= {(*head, "kernel"): s["fc.weight"].T, (*head, "bias"): s["fc.bias"]}
    derived = require_derived(model, wanted)
    assert derived.unused == ()


class Lstm(nn.Module):
    def __init__(self, cls, layers):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.rnn = cls(6, 5, num_layers=layers)
        self.head = nn.Linear(5, 11)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("form", ["nnx", "optimized", "linen", "equinox"])
def test_lstm(form, layers):
    model = randomized(Lstm(nn.LSTM, layers))
    s = numpy_state(model)
    wanted = {("embed", "embedding"): s["embedding.weight"]}
    wanted |= {("head", "kernel"): s["head.weight"].T, ("head", "bias"): s["head.bias"]}
    for i in range(layers):
        w_ih, w_hh = s[f"rnn.weight_ih_l{i}"], s[f"rnn.weight_hh_l{i}"]
        bias = s[f"rnn.bias_ih_l{i}"] + s[f"rnn.bias_hh_l{i}"]
        if form in ("nnx", "linen"):
            at = ("cells", i) if form == "nnx" else ("params", f"LSTMCell_{i}")
            for k, gate in enumerate("ifgo"):
                rows = slice(5 * k, 5 * k + 5)
                wanted[*at, "if_" if form == "nnx" and gate == "f" else f"i{gate}", "kernel"] = w_ih[rows].T
                wanted |= {(*at, f"h{gate}", "kernel"): w_hh[rows].T, (*at, f"h{gate}", "bias"): bias[rows]}
        elif form == "optimized":
            at = ("cells", i)
            wanted |= {(*at, "dense_i", "kernel"): w_ih.T, (*at, "dense_h", "kernel"): w_hh.T}
            wanted[*at, "dense_h", "bias"] = bias
        else:
            wanted |= {("cells", i, "weight_ih"): w_ih, ("cells", i, "weight_hh"): w_hh, ("cells", i, "bias"): bias}
    require_derived(model, wanted)


@pytest.mark.parametrize("form", ["linen", "equinox"])
def test_gru(form):
    model = randomized(Lstm(nn.GRU, 1))
    s = numpy_state(model)
    wanted = {("embed",): s["embedding.weight"], ("head", "w"): s["head.weight"].T, ("head", "b"): s["head.bias"]}
    b_ih, b_hh = s["rnn.bias_ih_l0"], s["rnn.bias_hh_l0"]
    if form == "linen":
        for k, gate in enumerate("rzn"):
            rows = slice(5 * k, 5 * k + 5)
            wanted["cell", f"i{gate}", "kernel"] = s["rnn.weight_ih_l0"][rows].T
            wanted["cell", f"h{gate}", "kernel"] = s["rnn.weight_hh_l0"][rows].T
            wanted["cell", f"i{gate}", "bias"] = b_ih[rows] + (0 if gate == "n" else b_hh[rows])
        wanted["cell", "hn", "bias"] = b_hh[10:]
    else:
        wanted |= {("cell", "weight_ih"): s["rnn.weight_ih_l0"], ("cell", "weight_hh"): s["rnn.weight_hh_l0"]}
        wanted |= {("cell", "bias"): np.concatenate([b_ih[:10] + b_hh[:10], b_ih[10:]]), ("cell", "bias_n"): b_hh[10:]}
    require_derived(model, wanted)


def test_equinox_leaves_are_as_torchs():
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 36), nn.Linear(36, 36)))
    s = numpy_state(model)
    wanted = {("conv", "weight"): s["0.weight"], ("conv", "bias"): s["0.bias"].reshape(4, 1, 1)}
    for i, k in ((0, 3), (2, 4)):
        wanted |= {("mlp", "layers", i, "weight"): s[f"{k}.weight"], ("mlp", "layers", i, "bias"): s[f"{k}.bias"]}
    require_derived(model, wanted)


def test_flattened_channels_are_found_by_value():
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 5)))
    s = numpy_state(model)
    wanted = {("conv", "kernel"): s["0.weight"].transpose(2, 3, 1, 0), ("conv", "bias"): s["0.bias"]}
    kernel = s["2.weight"].reshape(5, 4, 3, 3).transpose(2, 3, 1, 0).reshape(36, 5)
    wanted |= {("dense", "kernel"): kernel, ("dense", "bias"): s["2.bias"]}
    derived = require_derived(model, wanted, by_value=True)
    assert "# by value: dense.kernel: " in derived.code()


def test_transposed_convolution_is_reversed():
    model = randomized(nn.Sequential(nn.ConvTranspose2d(3, 4, 2)))
    torch_conv = model[0]
    layer = nnx.ConvTranspose(3, 4, (2, 2), padding="VALID", rngs=nnx.Rngs(0), param_dtype=np.float32)
    x_BHWC = np.random.default_rng(0).normal(size=(1, 3, 3, 3)).astype(np.float32)
    expected = torch_conv(torch.tensor(x_BHWC.transpose(0, 3, 1, 2)).double()).detach().numpy().transpose(0, 2, 3, 1)
    derived = derive(described(model), {("kernel",): (2, 2, 3, 4), ("bias",): (4,)})
    params = derived.convert(numpy_state(model))
    layer.kernel[...], layer.bias[...] = params["kernel",], params["bias",]
    np.testing.assert_allclose(layer(x_BHWC), expected, rtol=1e-5)


def test_meaningless_names_are_decided_by_value():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(self, name, nn.Linear(8, 8, bias=False))

    model = randomized(Attention())
    s = numpy_state(model)
    wanted = {("A",): s["k_proj.weight"].T, ("B",): s["o_proj.weight"].T, ("C",): s["q_proj.weight"].T}
    wanted["D",] = s["v_proj.weight"].T
    derived = require_derived(model, wanted, by_value=True)
    assert not derived.candidates


def test_what_cannot_be_decided_is_said_with_the_candidates():
    model = randomized(Mlp([8, 8]))
    leaves = {("w",): (8, 8), ("b",): (8,)}
    derived = derive(described(model), leaves)
    assert derived.candidates.keys() == {("w",)}
    assert [s.code() for s in derived.candidates["w",]] == [
        'state_dict["layers.0.weight"].T',
        'state_dict["layers.0.weight"]',
    ]
    assert "w: cannot be decided; candidates: state_dict[" in derived.message()
    hopeless = derive(described(model), leaves, lambda derived: 0.3)
    assert hopeless.candidates.keys() == {("w",)} and hopeless.error == 0.3


def test_a_faulty_model_still_shows_the_better_weights():
    """A fault of the JAX model leaves an error with the right weights too, far below that with wrong ones."""
    model = randomized(Mlp([8, 8]))
    state = numpy_state(model)
    right = state["layers.0.weight"]

    def check(derived):
        return 1e-4 if np.array_equal(derived.convert(state)["w",], right) else 0.7

    derived = derive(described(model), {("w",): (8, 8), ("b",): (8,)}, check)
    np.testing.assert_array_equal(derived.convert(state)["w",], right)
    assert not derived.candidates and derived.error == 1e-4


def test_missing_and_unused_tensors_are_named():
    model = randomized(Mlp([4, 6, 5]))
    leaves: dict[Path, tuple[int, ...]] = {("layers", i, "kernel"): s for i, s in enumerate([(4, 6), (6, 5)])}
    leaves |= {("layers", 0, "bias"): (6,), ("norm", "scale"): (7,)}
    derived = derive(described(model), leaves, lambda derived: pytest.fail("a check without all leaves"))
    assert derived.missing == (("norm", "scale"),)
    assert derived.unused == ("layers.1.bias",)
    assert "norm.scale: no torch tensor gives it" in derived.message()
    assert "layers.1.bias: no leaf takes it" in derived.message()


@pytest.mark.parametrize("name", ["wte", "lm_head"])
def test_a_tie_needs_one_leaf_under_either_name(name):
    model = gpt2(n_layer=1)
    s = numpy_state(model)
    assert [t.tied_to for t in described(model) if t.name == "lm_head.weight"] == ["transformer.wte.weight"]
    leaves = {(name,): (31, 16), ("wpe",): (12, 16)}
    derived = derive(described(model), leaves)
    np.testing.assert_array_equal(derived.convert(s)[name,], s["lm_head.weight"])
    assert "lm_head.weight" not in derived.unused and "transformer.wte.weight" not in derived.unused


def test_counters_are_not_unused():
    derived = derive(described(nn.BatchNorm1d(3)), {("scale",): (3,), ("bias",): (3,), ("mean",): (3,), ("var",): (3,)})
    assert derived.message() == ""
