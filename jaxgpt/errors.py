"""The exceptions that end a command with a message, and the checks of flags' values that raise them.

`cli.args.exit_code` turns the exceptions into exit codes.
"""

from typing import Any


class UserError(Exception):
    """Something that the user can put right. The message is one sentence that names the flag and the remedy. Exit 2."""


class LossNotFinite(ArithmeticError):
    """Training diverged: a loss or a gradient norm is NaN or infinite. The message names the step. Exit 3."""


def flag(name: str) -> str:
    """The command-line flag of a field: `model.n_layer` -> `--model.n-layer`."""
    return "--" + name.replace("_", "-")


def require(ok: bool, name: str, value: Any, remedy: str) -> None:
    """Raises `UserError` with the flag, the value and the remedy unless `ok`."""
    if not ok:
        raise UserError(f"{flag(name)} {value}: {remedy}")


def require_at_least(minimum: int, config: Any, *names: str, prefix: str = "") -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= minimum, prefix + name, value, f"give a whole number of at least {minimum}")


def require_at_most(maximum: int, config: Any, *names: str, prefix: str = "") -> None:
    """For sizes beyond any machine, which would end without memory and without a word."""
    for name in names:
        value = getattr(config, name)
        require(value <= maximum, prefix + name, value, f"give at most {maximum}")


def require_seed(seed: int) -> None:
    require(0 <= seed < 2**31, "seed", seed, "give a whole number from 0 to 2147483647")
