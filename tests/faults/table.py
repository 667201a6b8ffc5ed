"""The faults of the suite, in the order of docs/reliability.md."""

from tests.faults import corruptions, endurance, inputs, kills, limits, numbers, power_loss

FAULTS = [*kills.FAULTS, corruptions.FAULT, *limits.FAULTS, *power_loss.FAULTS, *endurance.FAULTS, *numbers.FAULTS]
ALL = [*FAULTS, *inputs.FAULTS]  # with those that have tests of their own
