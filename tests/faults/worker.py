"""A process that runs jaxgpt's commands: one with a fault, or many one after another.

    python -m tests.faults.worker PLAN ARG ...     one command, with a `calls.Plan` as JSON
    python -m tests.faults.worker                  commands from standard input, a line of JSON each

The second spares the imports, and compiles a program once: hundreds of cases run the same few.
"""

import contextlib
import gc
import io
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.faults import calls
from tests.faults import poison as poisons
from tests.faults.snapshots import snapshot


def main() -> None:
    if len(sys.argv) > 1:
        from jaxgpt.cli import main as cli

        plan = calls.Plan(**json.loads(sys.argv[1]))
        sys.argv[1:] = sys.argv[2:]
        with calls.planned(plan):
            cli.main()
    serve()


def serve() -> None:
    """Answers each line of standard input with a line on what was standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes to the log
    requests, sys.stdin = sys.stdin, io.StringIO()
    with compiled_once():
        for line in requests:
            request = json.loads(line)
            answer = run_here(**request["run"]) if "run" in request else snapshot(Path(request["snapshot"]))
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def run_here(
    args: list[str], plan: dict[str, Any] | None = None, poison: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Runs a command in this process as `jaxgpt ARG ...` would; `plan` and `poison` are the fields of those classes."""
    import jax

    from jaxgpt.cli import main as cli

    out, err = io.StringIO(), io.StringIO()
    x64, precision = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
    planned = calls.planned(calls.Plan(**plan)) if plan else contextlib.nullcontext({})
    poisoned = poisons.poisoned(poisons.Poison(**poison)) if poison else contextlib.nullcontext()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), planned as counts, poisoned:
        try:
            code = cli.run(args)
        except BaseException:  # the interpreter would print it and exit with 1
            code = 1
            traceback.print_exc()
    jax.config.update("jax_enable_x64", x64)
    jax.config.update("jax_default_matmul_precision", precision)
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "counts": dict(counts),
        "resident": resident,
    }


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Keeps the programs that are compiled within, by their text, devices and options.

    JAX's own cache on the disk would have to read each one back. Where this version of JAX has no such function,
    programs are compiled anew.
    """
    from jax._src import compiler

    compile_and_load = getattr(compiler, "backend_compile_and_load", None)
    if compile_and_load is None:
        yield
        return
    programs: dict[tuple, Any] = {}

    def once(backend: Any, module: Any, executable_devices: Any, options: Any, host_callbacks: Any) -> Any:
        if host_callbacks:
            return compile_and_load(backend, module, executable_devices, options, host_callbacks)
        key = (str(module), str(executable_devices), options.SerializeAsString())
        if key not in programs:
            programs[key] = compile_and_load(backend, module, executable_devices, options, host_callbacks)
        return programs[key]

    with mock.patch.object(compiler, "backend_compile_and_load", once):
        yield


if __name__ == "__main__":
    main()
