"""The pytest fixture `parity`, which pytest finds by itself where jaxgpt is installed.

def test_port(parity):
    parity(pair)
"""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def parity() -> Callable[..., Any]:
    """Compares a `jaxgpt.parity.Pair`; the test fails with the table and the diagnosis if a row does.

    The comparison, with its rows, diagnosis and mutants, is returned.
    """

    def compare(pair: Any, mutants: bool = False) -> Any:
        from jaxgpt.parity.comparison import compare
        from jaxgpt.parity.pair import Pair, PairError

        if not isinstance(pair, Pair):
            pytest.fail(f"parity: got {type(pair).__name__}; give a jaxgpt.parity.Pair", pytrace=False)
        try:
            comparison = compare(pair, mutants)
        except PairError as e:
            pytest.fail(f"{pair.name or 'pair'}: {e}", pytrace=False)
        if not comparison.passed:
            pytest.fail(f"{comparison.name}: not equal\n{comparison.text()}", pytrace=False)
        return comparison

    return compare
