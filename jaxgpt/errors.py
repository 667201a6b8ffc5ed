"""The two ways in which a command ends early on purpose; `cli.run_command` turns them into exit codes."""


class UserError(Exception):
    """Something that the user can put right. The message is one sentence that names the flag and the remedy. Exit 2."""


class LossNotFinite(ArithmeticError):
    """Training diverged: a loss or a gradient norm is NaN or infinite. The message names the step. Exit 3."""
