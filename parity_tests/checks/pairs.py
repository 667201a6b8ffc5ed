"""Our GPT and torch_ref as any two models: the levels of `jaxgpt parity --pair`, with the recipes of the loops."""

import dataclasses
from collections.abc import Iterator

from jaxgpt.parity.comparison import compare_levels
from jaxgpt.parity.harness import Row
from parity_tests import pairs


def check_pairs(quick: bool) -> Iterator[Row]:
    """Parameters, forward, loss, gradients and updates, as the engine compares any pair."""
    for pair in [pairs.wikitext2] if quick else [pairs.tinygpt, pairs.minigpt, pairs.wikitext2, pairs.nanogpt]:
        for row in compare_levels(pair)[1]:
            yield dataclasses.replace(row, check=f"pair: {row.check}")
