"""Models of transformers, nanoGPT and llm.c, in and out again; the library and torch are the witnesses."""

import dataclasses
import json
import os
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import write_labeled
from hub import NAME, serve
from safetensors.numpy import load_file, save_file

from jaxgpt.config import FinetuneConfig, ModelConfig
from jaxgpt.data.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer
from jaxgpt.errors import UserError
from jaxgpt.interop import huggingface, huggingface_tokenizer, torch_files, torch_model
from jaxgpt.interop.pretrained import load_pretrained
from jaxgpt.model import gpt

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# GPT-2's four shapes, scaled down: blocks by four, widths by sixteen, heads by about four.
SHAPES = {"gpt2": (3, 3, 48), "gpt2-medium": (6, 4, 64), "gpt2-large": (9, 5, 80), "gpt2-xl": (12, 5, 100)}
VOCABULARY = 300


def bpe() -> BpeTokenizer:
    return BpeTokenizer.train(["the theory of the other thing then there"] * 3 + ["né \U0001f600 la la"], VOCABULARY)


def theirs(shape="gpt2", vocab_size=None, seed=0, dtype=torch.float64, **options):
    """A GPT-2 of transformers with random weights; biases and norms are random, too."""
    n_layer, n_head, n_embd = SHAPES[shape]
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=32, vocab_size=vocab_size or 50)
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **options)).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def logits_of(found, idx_BT):
    """Our logits of a pretrained model in the dtype of its parameters."""
    dtype = next(iter(found.params.values())).dtype
    with jax.enable_x64(dtype == np.float64):
        model = gpt.bind(found.model, found.vocab_size, gpt.Numerics(dtype, dtype))
        return np.asarray(jax.jit(lambda params: model(params)(idx_BT))(found.params))


def their_logits(model, idx_BT):
    with torch.no_grad():
        return model(torch.from_numpy(idx_BT)).logits.numpy()


def tokens(vocab_size, shape=(2, 20)):
    return np.random.default_rng(1).integers(0, vocab_size, shape)


@pytest.mark.parametrize(
    "shape", [shape if shape == "gpt2" else pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES]
)
@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_of_transformers_computes_the_same(shape, activation, tied, tmp_path):
    if shape == "gpt2" and (activation == "gelu") == tied:
        pytest.skip("of the smallest shape two of the four are enough")
    model = theirs(shape, activation_function=activation, tie_word_embeddings=tied, layer_norm_epsilon=1e-3)
    model.save_pretrained(tmp_path)
    found = load_pretrained(str(tmp_path))
    assert (found.kind, found.vocab_size, found.tokenizer) == ("Hugging Face", 50, None)
    assert (found.model.tied_head, found.model.gelu) == (tied, "tanh" if activation == "gelu_new" else "erf")
    assert found.model.layer_norm_eps == 1e-3
    idx_BT = tokens(50)
    np.testing.assert_allclose(logits_of(found, idx_BT), their_logits(model, idx_BT), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shards_of_any_float_dtype(dtype, tmp_path):
    model = theirs(dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size="150KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    found = load_pretrained(str(tmp_path))
    table = model.transformer.wte.weight.detach().float().numpy()
    np.testing.assert_array_equal(found.params["token_emb.embedding"], table)
    assert {p.dtype for p in found.params.values()} == {np.dtype(np.float32)}


def test_the_model_without_a_head(tmp_path):
    """GPT2Model writes its tensors without the prefix `transformer.`."""
    model = theirs()
    model.transformer.save_pretrained(tmp_path)
    found = load_pretrained(str(tmp_path))
    np.testing.assert_allclose(logits_of(found, tokens(50)), their_logits(model, tokens(50)), rtol=0, atol=1e-12)


TOKENIZERS = {
    "char": lambda: CharTokenizer("".join(sorted(set("\n\t the aé\U0001f600.'<|endoftext|>")))),
    "byte": ByteTokenizer,
    "bpe": bpe,
}
TEXTS = ["the the\n\n  theé \U0001f600.", "a\t the 'the'", "   ", "teeth\n"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_goes_out_and_comes_back(kind, tmp_path):
    tokenizer = TOKENIZERS[kind]()
    for name, text in huggingface_tokenizer.files(tokenizer, 32).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(auto) == tokenizer.vocab_size
    for text in TEXTS + ([] if kind == "char" else ["\x00\x7f né\r\n　x" * 3]):
        ids = auto(text)["input_ids"]
        assert ids == tokenizer.encode(text).tolist() and auto.decode(ids) == text
    back = huggingface_tokenizer.read(tmp_path, None)
    assert back is not None and back.kind == kind
    assert (
        back.vocab_size == tokenizer.vocab_size
        and back.encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist()
    )


def nanogpt_checkpoint(bias, vocab_size=50, step=7, prefix=""):
    """A checkpoint in the form that nanoGPT's train.py saves, with random numbers, and its tensors by name."""
    draw, C, T, L = np.random.default_rng(0), 16, 8, 2
    shapes = {"transformer.wte.weight": (vocab_size, C), "transformer.wpe.weight": (T, C)}
    for i in range(L):
        block = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
        block |= {"ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
        for name, shape in block.items():
            shapes[f"transformer.h.{i}.{name}.weight"] = shape
            if bias:
                shapes[f"transformer.h.{i}.{name}.bias"] = shape[:1]
    shapes |= {"transformer.ln_f.weight": (C,)} | ({"transformer.ln_f.bias": (C,)} if bias else {})
    random = lambda shape: torch.from_numpy(draw.standard_normal(shape).astype(np.float32))  # noqa: E731
    weights = {name: random(shape) for name, shape in shapes.items()}
    names = sorted(shapes, key=lambda name: len(shapes[name]) < 2)
    state = {
        i: {"step": torch.tensor(float(step)), "exp_avg": random(shapes[n]), "exp_avg_sq": random(shapes[n]) ** 2}
        for i, n in enumerate(names)
    }
    n_matrices = sum(len(shape) == 2 for shape in shapes.values())
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8}
    groups = [{**group, "weight_decay": 0.1, "params": list(range(n_matrices))}]
    groups += [{**group, "weight_decay": 0.0, "params": list(range(n_matrices, len(names)))}]
    config = dict(batch_size=4, gradient_accumulation_steps=2, max_iters=20, warmup_iters=3, lr_decay_iters=20)
    config |= dict(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.99, grad_clip=1.0, min_lr=1e-4)
    saved = {
        "model": {
            prefix + name: p for name, p in {**weights, "lm_head.weight": weights["transformer.wte.weight"]}.items()
        },
        "optimizer": {"state": state, "param_groups": groups},
        "model_args": dict(n_layer=L, n_head=2, n_embd=C, block_size=T, bias=bias, vocab_size=vocab_size, dropout=0.0),
        "iter_num": step,
        "best_val_loss": torch.tensor(3.5),
        "config": {**config, "decay_lr": True, "eval_interval": 5, "eval_iters": 2, "dataset": "some"},
    }
    return saved, names


@pytest.mark.parametrize("bias", [False, True])
def test_nanogpts_checkpoint_with_its_optimizer(bias, tmp_path):
    saved, names = nanogpt_checkpoint(bias, prefix="_orig_mod.")
    torch.save(saved, tmp_path / "ckpt.pt")
    for path in (tmp_path / "ckpt.pt", tmp_path):  # nanoGPT's out_dir, too
        found = load_pretrained(str(path))
        assert (found.kind, found.step, found.model.bias, found.vocab_size) == ("nanoGPT", 7, bias, 50)
    fused = saved["model"]["_orig_mod.transformer.h.1.attn.c_attn.weight"].numpy()
    np.testing.assert_array_equal(found.params["blocks.1.attn.Wk.kernel"], fused[16:32].T)
    number = names.index("transformer.h.1.attn.c_attn.weight")
    moment = saved["optimizer"]["state"][number]["exp_avg_sq"].numpy()
    np.testing.assert_array_equal(found.optimizer_state["exp_avg_sq.blocks.1.attn.Wv.weight"], moment[32:])
    number = names.index("transformer.ln_f.weight")
    moment = saved["optimizer"]["state"][number]["exp_avg"].numpy()
    np.testing.assert_array_equal(found.optimizer_state["exp_avg.ln_f.weight"], moment)
    expected = dict(lr=1e-3, beta2=0.99, batch_size=8, grad_accum=2, steps=20, clip=1.0, schedule="warmup-cosine")
    expected |= dict(warmup_steps=3, decay_steps=20, min_lr=1e-4, decay_mask="matrices", weight_decay=0.1)
    assert {name: found.recipe[name] for name in expected} == expected


def test_padding_rows_are_cut_and_said(tmp_path):
    """nanoGPT pads GPT-2's 50,257 tokens to 50,304."""
    saved, _ = nanogpt_checkpoint(False, vocab_size=50304)
    torch.save(saved, tmp_path / "ckpt.pt")
    lines = []
    found = load_pretrained(str(tmp_path / "ckpt.pt"), say=lines.append)
    assert found.vocab_size == 50257 and any("47 rows of padding" in line for line in lines)
    assert found.params["token_emb.embedding"].shape[0] == 50257
    assert found.optimizer_state["exp_avg.token_emb.weight"].shape[0] == 50257


@pytest.mark.parametrize("version", [3, 5])
def test_llmcs_file(version, tmp_path):
    V, padded, T, L, C = 50, 128, 8, 2, 16
    draw = np.random.default_rng(0)
    shapes = [(padded, C), (T, C), (L, C), (L, C), (L, 3 * C, C), (L, 3 * C), (L, C, C), (L, C), (L, C), (L, C)]
    shapes += [(L, 4 * C, C), (L, 4 * C), (L, C, 4 * C), (L, C), (C,), (C,)]
    tensors = [draw.standard_normal(shape).astype(np.float32) for shape in shapes]
    if version == 5:
        tensors = [(p.view(np.uint32) >> 16 << 16).view(np.float32) for p in tensors]  # as bfloat16 has them
    header = struct.pack("<256i", 20240326, version, T, V, L, 2, C, padded, *[0] * 248)
    data = [p.tobytes() if version == 3 else (p.view(np.uint32) >> 16).astype("<u2").tobytes() for p in tensors]
    (tmp_path / "model.bin").write_bytes(header + b"".join(data))
    found = load_pretrained(str(tmp_path / "model.bin"))
    assert (found.kind, found.vocab_size, found.model.gelu, found.model.n_head) == ("llm.c", V, "tanh", 2)
    np.testing.assert_array_equal(found.params["token_emb.embedding"], tensors[0][:V])
    np.testing.assert_array_equal(found.params["blocks.1.attn.Wk.kernel"], tensors[4][1, C : 2 * C].T)
    np.testing.assert_array_equal(found.params["blocks.0.mlp.proj.bias"], tensors[13][0])
    (tmp_path / "model.bin").write_bytes(header + b"".join(data)[:-4])
    with pytest.raises(UserError, match="another size than its header says"):
        load_pretrained(str(tmp_path / "model.bin"))


# ------------------------------------------------------------------------------------------------ files that do not fit


def changed(folder, **values):
    """Changes values of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_tensor(folder, name, p):
    save_file({**load_file(folder / "model.safetensors"), name: p}, folder / "model.safetensors", {"format": "pt"})


WTE = "transformer.wte.weight"
BAD_FOLDERS = {
    "llama": (lambda d: changed(d, model_type="llama"), "only gpt2"),
    "parameters": (lambda d: changed(d, n_layer=900, n_embd=99_996, n_head=3), "belong together"),
    "more parameters": (lambda d: changed(d, n_embd=10**12), "."),
    "heads": (lambda d: changed(d, n_head=5), "not divisible"),
    "no heads": (lambda d: changed(d, n_head=0), "."),
    "type": (lambda d: changed(d, n_layer="3"), "n_layer"),
    "truth": (lambda d: changed(d, n_layer=True), "n_layer"),
    "tie": (lambda d: changed(d, tie_word_embeddings="yes"), "tied_head|tie_word_embeddings"),
    "vocabulary": (lambda d: changed(d, vocab_size=60), "token_emb.weight"),
    "vocabulary type": (lambda d: changed(d, vocab_size=5.5), "vocab_size"),
    "inner": (lambda d: changed(d, n_inner=100), "n_inner"),
    "scale": (lambda d: changed(d, scale_attn_weights=False), "scale_attn_weights"),
    "inverse": (lambda d: changed(d, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    "cross": (lambda d: changed(d, add_cross_attention=True), "add_cross_attention"),
    "activation": (lambda d: changed(d, activation_function="relu"), "activation_function"),
    "activation type": (lambda d: changed(d, activation_function=["gelu"]), "activation_function"),
    "epsilon": (lambda d: changed(d, layer_norm_epsilon=0), "."),
    "dropout": (lambda d: changed(d, resid_pdrop="much", embd_pdrop="much"), "dropout|resid_pdrop"),
    "bias": (lambda d: changed(d, bias=False), "bias"),
    "untied": (lambda d: changed(d, tie_word_embeddings=False), "lm_head.weight"),
    "JSON": (lambda d: (d / "config.json").write_text('{"model_type": "gpt2", "n_layer": NaN}'), "config.json"),
    "not a number": (lambda d: with_tensor(d, WTE, np.full((50, 48), np.nan, np.float32)), "not finite"),
    "integers": (lambda d: with_tensor(d, WTE, np.ones((50, 48), np.int32)), "token_emb|wte"),
    "shape": (lambda d: with_tensor(d, WTE, np.ones((50, 40), np.float32)), "token_emb.weight"),
    "scalar": (lambda d: with_tensor(d, WTE, np.array(1, np.float32)), "token_emb.weight"),
    "left over": (lambda d: with_tensor(d, "transformer.h.0.attn.more", np.ones(3, np.float32)), "left over"),
    "classifier": (lambda d: with_tensor(d, "score.weight", np.ones((2, 48), np.float32)), "classifier"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "cut": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]),
        "safetensors",
    ),
    "header": (lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}"), "safetensors"),
    "tokenizer": (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer"),
    "tokenizer list": (lambda d: (d / "tokenizer.json").write_text("[]"), "."),
    "pipe": (lambda d: [(d / "model.safetensors").unlink(), os.mkfifo(d / "model.safetensors")], "."),
    "pipe of JSON": (lambda d: [(d / "config.json").unlink(), os.mkfifo(d / "config.json")], "."),
    "loop": (lambda d: [(d / "config.json").unlink(), (d / "config.json").symlink_to("config.json")], "."),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    theirs(dtype=torch.float32).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_folder_that_does_not_fit_is_refused(name, folder, tmp_path):
    spoil, what = BAD_FOLDERS[name]
    spoil(shutil.copytree(folder, tmp_path / "model"))
    with pytest.raises(UserError, match=f"(?s)^--init-from .*model.*: .*({what})") as caught:
        load_pretrained(str(tmp_path / "model"))
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


def test_a_missing_shard_is_refused(tmp_path):
    theirs(dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="150KB")
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name}.*no such file"):
        load_pretrained(str(tmp_path))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="other folders"):
        load_pretrained(str(tmp_path))


BAD_CHECKPOINTS = {
    "no model": lambda c: c.pop("model"),
    "args": lambda c: c.update(model_args=[1]),
    "type": lambda c: c["model_args"].update(n_layer="2"),
    "sizes": lambda c: c["model_args"].update(n_layer=900, n_embd=99_996),
    "vocabulary": lambda c: c["model_args"].update(vocab_size=10**12),
    "negative": lambda c: c["model_args"].update(vocab_size=-1),
    "iteration": lambda c: c.update(iter_num="many"),
    "endless": lambda c: c.update(iter_num=float("inf")),
    "not a number": lambda c: c.update(iter_num=float("nan")),
    "weights": lambda c: c["model"].update({"transformer.wte.weight": torch.full((50, 16), torch.nan)}),
    "names": lambda c: c.update(model={0: torch.zeros(2)}),
}
OTHER_OPTIMIZERS = {
    "moments": lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    "state": lambda c: c["optimizer"]["state"].pop(0),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_is_refused(name, tmp_path):
    saved, _ = nanogpt_checkpoint(False)
    BAD_CHECKPOINTS[name](saved)
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="^--init-from .*ckpt.pt: .*;") as caught:
        load_pretrained(str(tmp_path / "ckpt.pt"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_of_another_optimizer_the_weights_alone_are_read(name, tmp_path):
    saved, _ = nanogpt_checkpoint(False)
    OTHER_OPTIMIZERS[name](saved)
    torch.save(saved, tmp_path / "ckpt.pt")
    found = load_pretrained(str(tmp_path / "ckpt.pt"))
    assert found.optimizer_state is None and any("optimizer's state" in note for note in found.notes)


def test_nested_values_of_a_checkpoint_neither_crash_nor_hang(tmp_path):
    """Tuples of tuples: as a key they would be hashed, and in a message written out, by recursion."""
    nested: tuple = ()
    for _ in range(60):
        nested = (nested, nested)
    saved, _ = nanogpt_checkpoint(False)
    saved["model_args"]["n_layer"] = nested
    torch_files.save(tmp_path / "value.pt", {"model": {}, "model_args": {**saved["model_args"], "n_layer": (1, (2,))}})
    with pytest.raises(UserError, match="n_layer is a tuple"):
        load_pretrained(str(tmp_path / "value.pt"))
    assert torch_model.shown(nested) == "a tuple"
    torch_files.save(tmp_path / "key.pt", {"model": {(1, (2,)): 3}, "model_args": {}})
    with pytest.raises(UserError, match="a dictionary has a tuple as a key"):
        load_pretrained(str(tmp_path / "key.pt"))


@pytest.mark.parametrize("change", ["added", "first", "characters"])
def test_a_tokenizer_that_is_not_known_is_left_out_and_no_other_taken(change, tmp_path, gpt2):
    """Even if the vocabulary has the size of GPT-2's, and its tokens are no padding."""
    files = huggingface_tokenizer.files(bpe(), 32)
    values = json.loads(files["tokenizer.json"])
    vocab = values["model"]["vocab"]
    if change == "added":
        values["added_tokens"].append({**values["added_tokens"][0], "content": "<|user|>", "id": len(vocab)})
    elif change == "first":
        ids = {token: i + 1 for token, i in vocab.items() if token != "<|endoftext|>"}
        values["model"]["vocab"], values["added_tokens"][0]["id"] = {"<|endoftext|>": 0, **ids}, 0
    else:
        values["model"]["vocab"] = {"\u65e5" if i == 5 else token: i for token, i in vocab.items()}
    theirs(vocab_size=50_257, dtype=torch.float32).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    found = load_pretrained(str(tmp_path))
    assert found.tokenizer is None and found.vocab_size == 50_257
    assert any("its tokenizer is of a kind that is not known here" in note for note in found.notes)
    (tmp_path / "tokenizer.json").unlink()
    assert load_pretrained(str(tmp_path)).tokenizer.token_bytes == gpt2.token_bytes


def test_flags_that_were_given_count_before_the_recipe(cli, text_file, tmp_path):
    """Also those whose values are the preset's own."""
    saved, _ = nanogpt_checkpoint(False, vocab_size=16)
    torch.save(saved, tmp_path / "ckpt.pt")
    flags = ["--dataset", f"file:{text_file}", "--out", tmp_path / "run", "--schedule=constant", "--lr=3e-4"]
    done = cli("convert", "import", tmp_path / "ckpt.pt", *flags, "--batch-size=32", "--model.block-size=4")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["lr"], config["batch_size"], config["schedule"]) == (3e-4, 32, "constant")
    assert config["model"]["block_size"] == 4 and config["beta2"] == saved["config"]["beta2"]
    done = cli("convert", "import", tmp_path / "ckpt.pt", *flags, "--overwrite", "--model.n-layer=4")
    assert done.returncode == 2 and "--model.n-layer 4" in done.stderr and "has 2" in done.stderr


def test_a_safetensors_file_names_what_it_cannot_know(folder):
    path = str(folder / "model.safetensors")
    for told, missing in (
        ({}, "--model.n-head"),
        ({"n_head": 3}, "--model.gelu"),
        ({"gelu": "tanh"}, "--model.n-head"),
    ):
        with pytest.raises(UserError, match=missing):
            load_pretrained(path, told=told)
    found = load_pretrained(path, told={"n_head": 3, "gelu": "tanh"})
    assert (found.model.n_layer, found.model.n_embd, found.model.block_size) == (3, 48, 32)
    assert found.model.tied_head and found.model.bias and found.vocab_size == 50


# ------------------------------------------------------------------------------------------------------- whole commands


@pytest.fixture(scope="module")
def exported(cli, trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model"
    done = cli("convert", "export", trained, "--to", "huggingface", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_an_exported_run_in_transformers(cli, trained, exported):
    """The same greedy text, and the same logits but for float32's rounding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer("la ti mo", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    ours = cli("generate", trained, "--prompt", "la ti mo", "--max-new-tokens=8", "--temperature=0")
    assert ours.stdout.rstrip("\n") == tokenizer.decode(ids[0]).rstrip("\n")
    found = load_pretrained(str(exported))
    idx_BT = tokens(found.vocab_size, (2, 16))
    np.testing.assert_allclose(logits_of(found, idx_BT), their_logits(model, idx_BT), rtol=0, atol=2e-5)
    card = (exported / "README.md").read_text()
    assert "words.txt" in card and str(trained.parent) not in card and "loss" in card


@pytest.mark.slow
def test_an_import_without_data(cli, exported, text_file, tmp_path):
    done = cli("convert", "import", exported, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert cli("generate", tmp_path / "run", "--prompt", "la", "--max-new-tokens=3").returncode == 0
    assert cli("inspect", tmp_path / "run", "--attention", "la ti").returncode == 0
    done = cli("evaluate", tmp_path / "run")
    assert done.returncode == 2 and "--dataset" in done.stderr
    done = cli("train", "--dataset", f"file:{text_file}", "--out-dir", tmp_path / "run")
    assert done.returncode == 2 and "--init-from" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_command_that_goes_on(cli, text_file, tmp_path):
    """A training that nanoGPT began goes on here by the command that the import prints, and there again."""
    import shlex

    n_chars = len(set(text_file.read_text()))
    saved, names = nanogpt_checkpoint(True, vocab_size=n_chars)
    torch.save(saved, tmp_path / "ckpt.pt")
    run = tmp_path / "run"
    done = cli("convert", "import", tmp_path / "ckpt.pt", "--out", run, "--dataset", f"file:{text_file}")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.partition("jaxgpt train")[2])
    done = cli("train", *words)
    assert done.returncode == 0 and "resuming after 7 of 20" in done.stdout, (done.stdout, done.stderr)
    done = cli("convert", "export", run, "--to", "nanogpt", "--out", tmp_path / "back.pt")
    assert done.returncode == 0, done.stderr
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back["iter_num"] == 20 and list(back["model"]) == list(saved["model"])
    assert back["model_args"] == saved["model_args"]
    groups = [group["params"] for group in back["optimizer"]["param_groups"]]
    assert groups == [group["params"] for group in saved["optimizer"]["param_groups"]]
    for number, name in enumerate(names):
        assert back["optimizer"]["state"][number]["exp_avg"].shape == saved["model"][name].shape


def classifier(n_classes=3, pool="last_token", bias=True):
    """A classifier's configuration and random parameters, by Flax name."""
    model = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, gelu="tanh", bias=bias)
    config = FinetuneConfig(dataset="file:rows.csv", pool=pool, max_tokens=8, model=model)
    like = jax.eval_shape(
        lambda: gpt.init_params(jax.random.key(0), model, bpe().vocab_size, gpt.Numerics(), n_classes)
    )
    draw = np.random.default_rng(0)
    return config, {name: draw.standard_normal(p.shape) for name, p in like.items()}


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
def test_a_classifiers_bias_goes_into_the_final_norm(bias, tmp_path):
    """Of random float64 weights: the class scores of transformers' classifier are ours."""
    config, params = classifier(bias=bias)
    model = config.model
    score_KC, norm_C = huggingface.folded_classifier(params)
    body = {name: p for name, p in params.items() if not name.startswith("classifier.")}
    tensors = huggingface.weights(model, body) | {"score.weight": score_KC, "transformer.ln_f.bias": norm_C}
    values = huggingface.config_json(dataclasses.replace(model, tied_head=True), bpe(), num_labels=3, dtype="float64")
    theirs = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**values)).double().eval()
    missing = theirs.load_state_dict({name: torch.from_numpy(np.array(p)) for name, p in tensors.items()}, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    idx_BT = np.array([[5, 6, 7, 8], [9, 10, values["eos_token_id"], values["eos_token_id"]]])
    with jax.enable_x64():
        ours = gpt.bind(model, bpe().vocab_size, gpt.Numerics(jnp.float64, jnp.float64), 3)(params)
        expected = ours(idx_BT, jnp.array([4, 2]), "last_token")
    theirs.config.pad_token_id = values["eos_token_id"]
    np.testing.assert_allclose(their_logits(theirs, idx_BT), expected, rtol=0, atol=1e-11)


def test_a_bias_that_no_norm_makes_up_for_is_refused():
    _, params = classifier()
    params["classifier.kernel"] = np.zeros_like(params["classifier.kernel"])
    with pytest.raises(UserError, match="--to huggingface"):
        huggingface.folded_classifier(params)


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["last_token", "last"])
def test_an_exported_classifier(pool, cli, trained, tmp_path):
    """Of characters, none of which is padding: a text at a time. Another pooling is refused."""
    rows = write_labeled(tmp_path / "rows.csv")
    flags = (
        "--dataset",
        f"file:{rows}",
        "--pool",
        pool,
        "--max-tokens=16",
        "--epochs=2",
        "--out-dir",
        tmp_path / "run",
    )
    assert cli("finetune", trained, *flags).returncode == 0
    done = cli("convert", "export", tmp_path / "run", "--to", "huggingface", "--out", tmp_path / "out")
    if pool == "last":
        assert done.returncode == 2 and "--pool last_token" in done.stderr and not (tmp_path / "out").exists()
        return
    assert done.returncode == 0, done.stderr
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("la ti", "mo ru mo s", " la"):
        with torch.no_grad():
            scores_K = torch.softmax(model(**tokenizer(text, return_tensors="pt")).logits[0], 0)
        theirs = {model.config.id2label[i]: float(p) for i, p in enumerate(scores_K)}
        ours = json.loads(cli("classify", tmp_path / "run", text, "--json").stdout)
        ours = (ours[0] if isinstance(ours, list) else ours)["probabilities"]
        assert set(ours) == set(theirs) and all(abs(ours[name] - theirs[name]) < 1e-5 for name in ours)


def test_a_repository_by_its_name(folder, tmp_path, monkeypatch):
    """The configuration and the weights come from the hub, and nothing that could be executed."""
    model = shutil.copytree(folder, tmp_path / "model")
    for name in ("pytorch_model.bin", "modeling_evil.py", "README.md"):
        (model / name).write_text("evil")
    with serve(model) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        found = load_pretrained(NAME)
        assert (found.kind, found.source, found.vocab_size) == ("Hugging Face", NAME, 50)
        read = {line.rpartition("/")[2] for line in hub.requests if "/resolve/" in line}
        assert read == {"config.json", "model.safetensors"}
        with pytest.raises(UserError, match="someone/other: no such file or folder, and as a repository"):
            load_pretrained("someone/other")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no network.*HF_HUB_OFFLINE"):
        load_pretrained("someone/other")
