"""Every change of a forward pass."""

from jaxgpt.parity.changes.attention import attention, heads, rotary
from jaxgpt.parity.changes.base import Change, grouped
from jaxgpt.parity.changes.functions import (
    activation,
    constants,
    joins,
    padding,
    pooling,
    resizing,
    rounding,
    sums,
    tables,
)
from jaxgpt.parity.changes.losses import losses
from jaxgpt.parity.changes.norms import epsilon, norm_forms, norm_placement
from jaxgpt.parity.changes.recurrent import recurrent
from jaxgpt.parity.changes.weights import fused, swaps, weights
from jaxgpt.parity.torch_side import OperationMode

FINDERS = (
    epsilon,
    norm_forms,
    norm_placement,
    activation,
    weights,
    swaps,
    fused,
    recurrent,
    heads,
    attention,
    rotary,
    sums,
    tables,
    constants,
    padding,
    joins,
    pooling,
    resizing,
    losses,
    rounding,
)


def all_changes(record: OperationMode) -> list[Change]:
    """Every change of a recorded forward pass: in one place, in all places of a pattern, and in all places."""
    single = [change for find in FINDERS for change in find(record)]
    return [*single, *grouped(single)]
