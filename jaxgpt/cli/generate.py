"""Continue prompts with a trained run: jaxgpt generate RUN --prompt "ROMEO:" """

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxgpt import strict_json
from jaxgpt.cli.args import parse_flags, print_error
from jaxgpt.config import SamplingConfig
from jaxgpt.errors import UserError

MAX_PROMPTS_BYTES = 2**26  # of a file of prompts, and of a line of standard input


@dataclass(frozen=True)
class GenerateFlags(SamplingConfig):
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Folder of a run."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; several times for several (default: ROMEO:)."""
    prompts_file: Path | None = None
    """File of prompts, one a line, in UTF-8."""
    interactive: bool = False
    """Read prompts from standard input, one a line, until it ends (Ctrl-D) or Ctrl-C."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text ends before this; several times for several."""
    json: bool = False
    """Print {"prompt", "text", "tokens", "finish_reason", "seed"} for each text, one a line, and nothing else."""
    checkpoint: Literal["result", "last", "best"] = "result"
    """result: best if the run stopped early, else last. best: the one with the lowest validation loss."""

    def __post_init__(self):
        super().__post_init__()
        if self.prompts_file and self.prompt:
            raise UserError(f"--prompts-file {self.prompts_file}: --prompt is given too; give one of both")
        if self.interactive and (self.prompts_file or self.prompt):
            raise UserError("--interactive: reads the prompts; leave --prompt and --prompts-file out")
        if "" in self.prompt:
            raise UserError("--prompt '': empty; give at least one character to continue")


def main(args: list[str]) -> None:
    flags = parse_flags(GenerateFlags, args, __doc__, "jaxgpt generate")
    prompts = _lines_of(flags.prompts_file) if flags.prompts_file else list(flags.prompt or ["ROMEO:"])
    from jaxgpt.api import load_local
    from jaxgpt.runs.restore import print_progress

    model = load_local(flags.run, flags.checkpoint, print_progress)
    if flags.interactive:
        _interact(model, flags)
    else:
        _show(model, prompts, flags)


def _show(model: Any, prompts: list[str], flags: GenerateFlags) -> None:
    """Prints the continuations of the prompts: a single one as it comes, others whole."""
    import jaxgpt

    if len(prompts) == flags.samples == 1 and not flags.json:
        pieces = jaxgpt.stream(model, prompts[0], flags)
        print(prompts[0], end="", flush=True)
        for text in pieces:
            print(text, end="", flush=True)
        print()
        return
    for i, one in enumerate(jaxgpt.generate(model, prompts, flags)):
        if flags.json:
            print(strict_json.dumps(vars(one)), flush=True)
            continue
        number, seed = f"prompt {i // flags.samples + 1}", f"seed {one.seed}"
        title = [number] * (len(prompts) > 1) + [seed] * (flags.samples > 1)
        print(f"--- {', '.join(title)} ---\n{one.prompt}{one.text}", flush=True)


def _interact(model: Any, flags: GenerateFlags) -> None:
    """Continues each line of standard input until it ends. A prompt that cannot be continued is reported, and kept out.

    Ctrl-C is a way to end it, too.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is reported by the tokenizer, as of --prompt
    try:
        while True:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline(MAX_PROMPTS_BYTES)
            if not line:
                break
            try:
                if not (prompt := line.rstrip("\r\n")):
                    raise UserError("the line is empty; give at least one character to continue")
                _show(model, [prompt], flags)
            except UserError as e:
                print_error(e, 2)
    except KeyboardInterrupt:
        print()


def _lines_of(path: Path) -> list[str]:
    """The prompts of a file, one a line.

    Raises:
        UserError: the file cannot be read, is no UTF-8, or holds no prompt or an empty one.
    """
    from jaxgpt.data.files import read_small

    try:
        text = read_small(path, MAX_PROMPTS_BYTES).decode()
    except OSError as e:
        raise UserError(f"--prompts-file {path}: cannot be read ({e.strerror}); give a text file") from None
    except UnicodeDecodeError as e:
        raise UserError(f"--prompts-file {path}: not UTF-8 at byte {e.start}; convert it") from None
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    for number, line in enumerate(lines, 1):
        if not line:
            raise UserError(f"--prompts-file {path}: line {number} is empty; give at least one character to continue")
    return lines
