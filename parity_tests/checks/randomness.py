"""Random draws: initial weights, dropout masks, sampled tokens.

Each is compared with its distribution, in standard errors. Seeds are fixed: a row that passes here passes everywhere.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from scipy import stats

from jaxgpt.config import ModelConfig, SamplingConfig
from jaxgpt.interop.torch_names import to_torch
from jaxgpt.model import gpt
from jaxgpt.model import sampling as ours
from jaxgpt.parity.harness import Row
from jaxgpt.parity.jax_side import precision_of
from jaxgpt.presets import PRESETS
from jaxgpt.rng import SAMPLE, stream_key
from parity_tests.cases import SIZES, VOCAB, Case, flax_params, objective_of, small, torch_model
from parity_tests.tolerances import row
from torch_ref.generate import generate, log_probabilities


def check_initial_weights(quick: bool) -> Iterator[Row]:
    """Every initial tensor's mean and standard deviation, ours and PyTorch's, against the documented distribution."""
    for init in ("documented", "gpt2"):
        config = dataclasses.replace(PRESETS["minigpt"], model=dataclasses.replace(PRESETS["minigpt"].model, init=init))
        case = Case(f"init {init}", config, 65, "documented")
        with precision_of("float32"):
            params = to_torch(objective_of(case, "float32").init_params())
        (error, where), (torch_error, _) = (_worst_z(p, config.model) for p in (params, case.start))
        yield row("initial weights", "float32", case.name, error, torch_error, note=where)


def _worst_z(params: dict[str, np.ndarray], config: ModelConfig) -> tuple[float, str]:
    """How far mean and second moment are from the documented ones, the worst tensor's in standard errors."""
    worst, where = 0.0, ""
    for name, p in params.items():
        x = p.astype(np.float64).ravel()
        module = name.split(".")[-2]
        if module.startswith("ln"):
            z = math.inf if (x != (1 if name.endswith("weight") else 0)).any() else 0.0
        elif x.ndim and p.ndim == 2:
            scaled = config.init == "gpt2" and name.endswith(("Wo.weight", "ff.2.weight"))
            z = _z_of_moments(x, 0.02 / (2 * config.n_layer) ** 0.5 if scaled else 0.02, kurtosis=3.0)
        elif config.init == "gpt2":
            z = math.inf if x.any() else 0.0
        else:
            fan_in = params[name.replace("bias", "weight")].shape[1]
            inside = np.abs(x).max() <= fan_in**-0.5 and len(np.unique(x)) > 0.9 * x.size  # drawn, not one value
            z = _z_of_moments(x, (3 * fan_in) ** -0.5, kurtosis=1.8) if inside else math.inf
        if z > worst:
            worst, where = z, name
    return worst, where


def _z_of_moments(x: np.ndarray, deviation: float, kurtosis: float) -> float:
    n = x.size
    z_mean = abs(x.mean()) / deviation * n**0.5
    z_second = abs((x**2).mean() / deviation**2 - 1) * (n / (kurtosis - 1)) ** 0.5
    return max(z_mean, z_second)


def check_dropout(quick: bool) -> Iterator[Row]:
    """The masks that training draws: their rate, their scale, and that no two of them are alike."""
    rate = 0.2
    case = small("dropout 0.2", model=dataclasses.replace(SIZES, dropout=rate, block_size=170))
    objective = objective_of(case, "float32")
    n_rows, block_size, n_embd = case.config.batch_size, case.config.model.block_size, case.config.model.n_embd
    ones_NC = jnp.ones((n_rows * block_size, n_embd), jnp.float32)

    def masks_of(step: int) -> np.ndarray:
        """[sites, B, T, C], as the step applies them."""
        keys = objective.dropout_keys(jnp.int32(step))
        sites = range(2 * case.config.model.n_layer + 1)
        return np.stack([gpt.dropout(ones_NC, rate, keys, site).reshape(n_rows, block_size, n_embd) for site in sites])

    masks = np.stack([masks_of(step) for step in range(2)])  # [steps, sites, B, T, C]
    kept = masks != 0
    z = abs(kept.mean() - (1 - rate)) / (rate * (1 - rate) / kept.size) ** 0.5
    yield row("dropout, keep rate", "float32", case.name, float(z))
    yield row("dropout, scale", "float32", case.name, float(np.abs(masks[kept] * (1 - rate) - 1).max()))
    kept = kept - (1 - rate)
    heads = kept.reshape(*kept.shape[:-1], case.config.model.n_head, -1)
    pairs = {
        "steps": [(kept[0], kept[1])],
        "layers": [(kept[:, a], kept[:, b]) for a, b in itertools.combinations(range(kept.shape[1]), 2)],
        "rows": [(kept[:, :, a], kept[:, :, b]) for a, b in itertools.combinations(range(n_rows), 2)],
        "heads": [(heads[..., a, :], heads[..., b, :]) for a, b in itertools.combinations(range(heads.shape[-2]), 2)],
        "times": [(kept[..., 1:, :], kept[..., :-1, :])],
        "channels": [(kept[..., 1:], kept[..., :-1])],
    }
    for over, of in pairs.items():
        z = max(abs(float((a * b).sum())) / (rate * (1 - rate)) / a.size**0.5 for a, b in of)
        yield row("dropout, independence", "float32", f"over {over}", z)


SAMPLINGS = {
    "temperature 1": SamplingConfig(),
    "temperature 0.8, top-k 7": SamplingConfig(temperature=0.8, top_k=7),
    "temperature 1.3, top-p 0.8": SamplingConfig(temperature=1.3, top_p=0.8),
    "temperature 0.7, top-k 12, top-p 0.9": SamplingConfig(temperature=0.7, top_k=12, top_p=0.9),
}


def check_g_test(quick: bool) -> Iterator[Row]:
    """A million draws of one token against PyTorch's probabilities: the G statistic."""
    n_draws = 10**5 if quick else 10**6
    logits = np.random.default_rng(0).normal(0, 1.5, VOCAB).astype(np.float32)
    for name, sampling in SAMPLINGS.items():

        @jax.jit
        def draw(keys: Any, sampling: SamplingConfig = sampling) -> Any:
            top_k = sampling.top_k or VOCAB
            tokens = jax.vmap(lambda key: ours.choose(logits, key, sampling.temperature, top_k, sampling.top_p))(keys)
            return jnp.bincount(tokens, length=VOCAB)

        keys = jax.random.split(stream_key(0, SAMPLE), n_draws).reshape(10, -1)
        observed = sum(np.asarray(draw(some)).astype(np.float64) for some in keys)
        expected = log_probabilities(torch.tensor(logits).double(), sampling).exp().numpy() * n_draws
        possible = expected > 0
        if observed[~possible].any():
            yield row("sampling, G-test", "float32", name, math.inf, note="a token that cannot be drawn was")
            continue
        seen = observed > 0
        g = 2 * float((observed[seen] * np.log(observed[seen] / expected[seen])).sum())
        # -log10 of the probability of a G at least as large
        p = float(stats.chi2.logsf(g, possible.sum() - 1)) / -math.log(10)
        yield row("sampling, G-test", "float32", f"{name}, {n_draws:,} draws", p)


def check_text(quick: bool) -> Iterator[Row]:
    """Greedy text, cached and past the block's end; and sampled text from the same noise."""
    n_tokens = 200 if quick else 1000
    # A block long enough that the cache serves many tokens, and short enough that most come after its end.
    # The seed is the one of ten whose greedy text repeats itself least.
    case = dataclasses.replace(small("text", model=dataclasses.replace(SIZES, block_size=170)), seed=9)
    prompt = case.batch(0)[0][0, :3]
    with precision_of("float64"):
        objective = objective_of(case, "float64")
        params = jax.tree.map(jnp.asarray, flax_params(case, objective))
        reference = torch_model(case, "float64")

        def text(sampling: SamplingConfig) -> list[int]:
            return list(ours.generate(objective.exact_model, params, case.config.model, prompt, sampling))

        def differing(a: list[int], b: list[int]) -> int:
            return sum(x != y for x, y in zip(a, b, strict=True))

        greedy = SamplingConfig(max_new_tokens=n_tokens, temperature=0)
        tokens = text(greedy)
        label = f"{n_tokens} tokens, {len(set(tokens))} distinct"
        yield row(
            "greedy text, tokens that differ",
            "float64",
            label,
            differing(tokens, list(generate(reference, prompt, greedy))),
        )

        # Without a cache: each token of the first block is the most likely after all tokens before it.
        block = case.config.model.block_size
        whole = np.array([*prompt, *tokens])[:block]
        uncached = np.asarray(jax.jit(lambda p, i: objective.exact_model(p)(i))(params, whole[None])[0].argmax(-1))
        n_wrong = int((uncached[len(prompt) - 1 : -1] != whole[len(prompt) :]).sum())
        yield row("greedy text, tokens that differ", "float64", "cached against uncached", n_wrong)

        for name, sampling in list(SAMPLINGS.items())[-1 if quick else 0 :]:
            sampling = dataclasses.replace(sampling, max_new_tokens=n_tokens // 5)
            key = stream_key(sampling.seed, SAMPLE)
            noise = [
                torch.tensor(np.array(jax.random.gumbel(jax.random.fold_in(key, i), (VOCAB,), jnp.float64)))
                for i in range(sampling.max_new_tokens)
            ]
            theirs = list(generate(reference, prompt, sampling, noise))
            n_wrong = differing(text(sampling), theirs)
            yield row("sampled text, tokens that differ", "float64", f"{name}, {len(theirs)} tokens", n_wrong)
