"""`jaxgpt COMMAND ...` in this process."""

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from typing import TextIO

import jax
import pytest


def cli_runner(user_env: dict[str, str]) -> Callable[..., CompletedProcess]:
    """A function that runs `jaxgpt COMMAND ...` in this process, in the given environment, and returns what it did.

    What a command sets for its whole process is put back.
    """
    from jaxgpt.cli import main

    def run(*args: object, cwd: Path | None = None, stdin: str | TextIO = "", **env: str) -> CompletedProcess:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            for name in [name for name in os.environ if name not in user_env]:
                patch.delenv(name)
            for name, value in {**user_env, **env}.items():
                patch.setenv(name, value)
            if cwd is not None:
                patch.chdir(cwd)
            patch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
            x64, precision = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
            try:
                code = main.run([str(arg) for arg in args])
            finally:
                jax.config.update("jax_enable_x64", x64)
                jax.config.update("jax_default_matmul_precision", precision)
        return CompletedProcess(args, code, out.getvalue(), err.getvalue())

    return run
