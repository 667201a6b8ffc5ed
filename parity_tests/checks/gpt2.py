"""Hugging Face's GPT-2 as an independent reference: a tiny one with random weights, made here, nothing downloaded."""

import dataclasses
import importlib.util
import math
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxgpt.config import ModelConfig, SamplingConfig, TrainConfig
from jaxgpt.interop import torch_names
from jaxgpt.interop.torch_names import tutorial_names
from jaxgpt.model import sampling as ours
from jaxgpt.model.loss import perplexity
from jaxgpt.parity.harness import Row, max_abs, own_errors, worst_tensor
from jaxgpt.parity.jax_side import precision_of
from parity_tests.cases import (
    BATCH,
    SIZES,
    TORCH_DTYPES,
    VOCAB,
    Case,
    flax_params,
    flax_results,
    objective_of,
    torch_batch,
    torch_model,
)
from parity_tests.checks.whole_model import FLOOR
from parity_tests.tolerances import error_row, ratio_row, row

MODEL = dataclasses.replace(SIZES, tied_head=True, gelu="tanh", init="gpt2")
# The other value of each option that Hugging Face's configuration has. Theirs has biases: here, of 0.
OTHER_MODEL = dataclasses.replace(SIZES, tied_head=False, gelu="erf", init="gpt2", bias=False, layer_norm_eps=1e-3)
MISSING = None if importlib.util.find_spec("transformers") else "transformers is not installed"


@cache
def hugging_face(precision: str, shape: ModelConfig = MODEL) -> Any:
    """GPT2LMHeadModel at the small sizes, its weights as after training."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=SIZES.block_size,
        n_embd=SIZES.n_embd,
        n_layer=SIZES.n_layer,
        n_head=SIZES.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function={"tanh": "gelu_new", "erf": "gelu"}[shape.gelu],
        tie_word_embeddings=shape.tied_head,
        layer_norm_epsilon=shape.layer_norm_eps,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(p * 8 if p.ndim == 2 else p + 0.1 * torch.randn(p.shape, generator=draw))
            if name.endswith("bias") and not shape.bias:
                p.zero_()
    return model.to(TORCH_DTYPES[precision]).eval()


@cache
def hugging_face_results(precision: str, shape: ModelConfig) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Logits, loss and gradients by the tutorials' names."""
    model = hugging_face(precision, shape)
    idx_BT, target_BT = torch_batch(_case(shape), 0)
    logits = model(idx_BT).logits
    loss = torch.nn.functional.cross_entropy(logits.view(-1, VOCAB), target_BT.reshape(-1))
    model.zero_grad()
    loss.backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return logits.detach().numpy(), loss.item(), _with_biases(tutorial_names(grads), shape)


def _with_biases(tensors: dict[str, np.ndarray], shape: ModelConfig) -> dict[str, np.ndarray]:
    return {name: p for name, p in tensors.items() if shape.bias or not name.endswith("bias")}


def _case(shape: ModelConfig) -> Case:
    others = "" if shape == MODEL else ", untied, erf, no biases, eps 1e-3"
    return Case(f"GPT-2 of Hugging Face{others}", TrainConfig(model=shape, batch_size=BATCH))


def _case_with_their_weights(shape: ModelConfig) -> Case:
    case = dataclasses.replace(_case(shape), weights="Hugging Face's")
    state = {name: p.numpy() for name, p in hugging_face("float32", shape).state_dict().items()}
    # In place of what `Case.start` would draw.
    case.__dict__["start"] = _with_biases(torch_names.tutorial_names(state), shape)
    return case


def check_gpt2(quick: bool) -> Iterator[Row]:
    """Logits, loss, perplexity, gradients and greedy text from the same weights."""
    if MISSING:
        yield row("GPT-2 logits", "float64", "GPT-2 of Hugging Face", note=MISSING, not_run=True)
        return
    for shape in (MODEL,) if quick else (MODEL, OTHER_MODEL):
        yield from _compare(_case_with_their_weights(shape), quick)


def _compare(case: Case, quick: bool) -> Iterator[Row]:
    shape = case.config.model
    truth, true_loss, true_grads = hugging_face_results("float64", shape)
    for precision in ("float64",) if quick else ("float64", "float32"):
        with precision_of(precision):
            results = flax_results(case, precision)
        if precision == "float64":
            yield error_row("GPT-2 logits", precision, case.name, partial(max_abs, results.logits, truth))
        else:
            theirs = hugging_face_results(precision, shape)[0]
            yield ratio_row("GPT-2 logits", precision, case.name, partial(own_errors, results.logits, theirs, truth))
        yield row("loss", precision, case.name, abs(results.loss / true_loss - 1))
        yield row("perplexity", precision, case.name, abs(perplexity(results.loss) / math.exp(true_loss) - 1))
        compared = {name: g for name, g in true_grads.items() if not name.endswith("Wk.bias")}
        error, where = worst_tensor(results.grads, compared, precision, FLOOR)
        yield row("gradients", precision, case.name, error, note=where)
    yield from _greedy(case, n_prompts=2 if quick else BATCH)


def _greedy(case: Case, n_prompts: int) -> Iterator[Row]:
    """From several prompts to the end of the block, which is as far as their positions go."""
    shape = case.config.model
    model = hugging_face("float64", shape)
    prompts = case.batch(0)[0][:n_prompts, :3]
    n_new = SIZES.block_size - 3
    idx = torch.from_numpy(prompts).long()
    text = model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n_new, do_sample=False)[
        :, 3:
    ].numpy()
    sampling = SamplingConfig(max_new_tokens=n_new, temperature=0)
    with precision_of("float64"):
        objective = objective_of(case, "float64")
        params = jax.tree.map(jnp.asarray, flax_params(case, objective))
        tokens = np.stack(list(ours.generate_batch(objective.exact_model, params, shape, prompts, sampling)), axis=1)
    label = f"{case.name}, {text.size} tokens, {len(np.unique(text))} distinct"
    yield row("greedy text, tokens that differ", "float64", label, int((tokens != text).sum()))


def check_nanogpt_names(quick: bool) -> Iterator[Row]:
    """The same weights under nanoGPT's names (torch Linears, a compiled model's prefix) come in bit by bit the same."""
    if MISSING:
        yield row("conversion, tensors that differ", "float32", "nanoGPT's names", note=MISSING, not_run=True)
        return
    state = {name: p.numpy() for name, p in hugging_face("float32").state_dict().items()}
    nanogpt = {
        "_orig_mod." + name: np.ascontiguousarray(p.T) if p.ndim == 2 and ".h." in name else p
        for name, p in state.items()
    }
    nanogpt["_orig_mod.transformer.h.0.attn.bias"] = np.ones((1, 1, 17, 17), np.float32)  # its mask, a buffer
    theirs, ours_ = torch_names.tutorial_names(state), torch_names.tutorial_names(nanogpt)
    n_wrong = len(set(theirs) ^ set(ours_)) + sum(
        not np.array_equal(theirs[n], ours_[n]) for n in set(theirs) & set(ours_)
    )
    expected = set(torch_model(_case(MODEL), "float32").state_dict())
    yield row("conversion, tensors that differ", "float32", "nanoGPT's names", n_wrong + len(expected ^ set(theirs)))
