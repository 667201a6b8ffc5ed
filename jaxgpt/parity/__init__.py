"""The parity engine: holds a JAX program against a PyTorch program, and shows that the comparison can fail.

It knows neither model. A user gives a `Pair`; `jaxgpt parity --pair FILE` and the pytest fixture `parity` compare it:

- pair, torch_side, jax_side, params, mapping, sides: the two models, from the same weights
- derive: the converter, where none is given
- levels: parameters, forward, loss, gradients, updates
- graph, jaxprs, changes, diagnosis: where the pair departs, and why
- comparison, page, pytest_plugin: what is done with a pair, and shown

The suite of a project of many checks, as this GPT's in parity_tests/, uses the parts below alone:

- harness: one comparison and its row
- tolerances: the table that rows are held against
- suite: checks, run in several processes
- locate: the first tensor that departs
- mutants: planted faults
- report: tables and JSON
"""

from jaxgpt.parity.pair import Pair, PairError

__all__ = ["Pair", "PairError"]
