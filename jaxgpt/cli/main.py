"""The entry point, `jaxgpt COMMAND ...`. It imports only the module of the command, so that `--help` is instant."""

import time

STARTED = time.perf_counter()  # "time to the first step" counts all other imports

import difflib  # noqa: E402
import importlib  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from typing import NoReturn  # noqa: E402

from jaxgpt import __version__  # noqa: E402
from jaxgpt.cli.args import exit_code, print_error  # noqa: E402
from jaxgpt.environment import require_usable  # noqa: E402
from jaxgpt.errors import UserError  # noqa: E402

COMMANDS = {
    "train": "train a GPT, or resume a run",
    "generate": "continue a prompt with a trained run",
    "evaluate": "compute the loss and perplexity of a run over a whole split",
    "finetune": "fine-tune a trained run to classify texts",
    "classify": "classify new texts by a fine-tuned run",
    "inspect": "show a run's gradients, attention, token probabilities and computation graph",
    "compare": "train the same model several ways and compare",
    "convert": "import weights from PyTorch, and export them to it",
    "parity": "compare this machine's results with PyTorch",
    "bench": "time a training step against PyTorch",
    "plan": "compile the training step for accelerators that are not here",
}
INTERRUPTED = 130  # 128 + SIGINT


def main() -> NoReturn:
    """Runs `jaxgpt` with the arguments of this process, and exits."""
    _run_and_exit(sys.argv[1:])


def script(command: str) -> NoReturn:
    """Runs one command with the arguments of this process, and exits. Each file of scripts/ calls this."""
    _run_and_exit([command, *sys.argv[1:]])


def run(args: list[str]) -> int:
    """Runs a command line, given without the word `jaxgpt`, in this process. Returns the exit code."""
    return exit_code(lambda: _dispatch(args))


def _run_and_exit(args: list[str]) -> NoReturn:
    try:
        code = run(args)
    except KeyboardInterrupt:  # before training has begun, or a second one
        print_error("interrupted", INTERRUPTED)
        os._exit(INTERRUPTED)  # at once: without waiting for threads
    if 0 < code < 128 and (distributed := sys.modules.get("jaxgpt.distributed")):
        distributed.exit_with_error(code)
    sys.exit(code)


def _dispatch(args: list[str]) -> int | None:
    for before, word in zip(["jaxgpt", *args], args, strict=False):
        if "\0" in word:  # no shell can give one, and no file can have such a name
            raise UserError(f"{before} {word!r}: holds a NUL character; leave it out")
    command, rest = (args[0], args[1:]) if args else ("", [])
    if not command:
        print(_usage(), file=sys.stderr)
        return 2
    if command in ("-h", "--help"):
        print(_usage())
        return 0
    if command == "--version":
        print(f"jaxgpt {__version__}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "--help lists them"
        raise UserError(f"jaxgpt {command}: unknown command; choose of {', '.join(COMMANDS)}; {hint}")
    if not {"-h", "--help"} & set(rest):
        require_usable()
    module = importlib.import_module(f"jaxgpt.cli.{command}")
    if command in ("train", "finetune"):
        return module.main(rest, STARTED)
    return module.main(rest)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["usage: jaxgpt COMMAND [flags]", "", *lines, "", "jaxgpt COMMAND --help lists a command's flags."]
    )
