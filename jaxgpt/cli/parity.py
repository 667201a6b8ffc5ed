"""Hold this machine's JAX side against PyTorch, check by check: python scripts/parity.py"""

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxgpt import strict_json
from jaxgpt.cli.args import import_from_checkout, parse_flags
from jaxgpt.errors import UserError, first_line, require_writable
from jaxgpt.presets import PRESETS
from jaxgpt.runs import files


@dataclass(frozen=True)
class ParityFlags:
    quick: bool = False
    """The core of the suite, in about a minute. With --pair: leave out the mutants."""
    json: Path | None = None
    """Write every row to this file, and a picture of the trajectories beside it (.png)."""
    locate: bool = False
    """If a check fails, walk op, layer, gradient and step, and name the first tensor that departs."""
    run: Path | None = None
    """Instead of the suite: a run of yours, both frameworks on its own validation split."""
    checkpoint: Literal["result", "last", "best"] = "result"
    """With --run, result: the last, or, of a run that stopped early, the best: the one with the lowest validation
    loss."""
    data_dir: Path | None = None
    """With --run and --end-to-end: folder to look for datasets in first."""
    pair: str | None = None
    """Instead of the suite: hold a JAX model of yours against its PyTorch model. FILE.py or FILE.py:NAME, a file that
    defines a jaxgpt.parity.Pair."""
    html: Path | None = None
    """With --pair: write the result to this file, as one self-contained page."""
    mutants: bool = False
    """Instead of the suite: plant each fault in the JAX side, and show the check that catches it."""
    mutant: str | None = None
    """Plant this fault, then run the suite: what a failure looks like."""
    end_to_end: str | None = None
    """Instead of the suite: whole runs of this preset in both frameworks, five seeds (minigpt: about an hour;
    wikitext2: some 45 minutes a seed)."""
    seeds: int = 5
    """With --end-to-end: how many."""
    docs: bool = False
    """Write the result into docs/parity.md."""

    def __post_init__(self):
        modes = {"--pair": self.pair, "--run": self.run, "--mutants": self.mutants, "--end-to-end": self.end_to_end}
        given = [name for name, value in modes.items() if value not in (None, False)]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)}: each is a run of its own; give one of them")
        suite_only = {"--quick": self.quick and self.pair is None, "--locate": self.locate, "--mutant": self.mutant}
        for name, value in suite_only.items():
            if given and value:
                raise UserError(f"{name}: has an effect on the suite only; leave it out, or leave out {given[0]}")
        if self.data_dir and not (self.run or self.end_to_end):
            raise UserError("--data-dir: has an effect only with --run or --end-to-end; add one, or leave it out")
        if self.checkpoint != "result" and not self.run:
            raise UserError("--checkpoint: has an effect only with --run; add it, or leave it out")
        if self.seeds != 5 and not self.end_to_end or self.seeds < 1:
            raise UserError(f"--seeds {self.seeds}: give at least 1, and --end-to-end with it")
        if self.html and self.pair is None:
            raise UserError("--html: has an effect only with --pair; add it, or leave it out")
        if self.docs and (self.pair is not None or self.run or self.mutant or self.quick):
            raise UserError(
                "--docs: the page shows the whole suite, --mutants and --end-to-end; leave out what goes with it"
            )
        files = {"--pair": Path((self.pair or "").partition(".py:")[0]), "--json": self.json, "--html": self.html}
        taken: dict[Path, str] = {}
        for name, path in files.items():
            # realpath, unlike resolve, raises nothing for a loop of links, which require_writable tells of.
            if path is not None and (other := taken.setdefault(Path(os.path.realpath(path)), name)) != name:
                raise UserError(f"{name} {path}: is the file of {other} as well; choose another")
        if self.html:
            require_writable("--html", self.html)
        if self.json:
            require_writable("--json", self.json)
            if self.json.suffix == ".png" and self.pair is None:
                raise UserError(f"--json {self.json}: the picture beside it would have the same name; end it in .json")
        if self.end_to_end is not None and self.end_to_end not in PRESETS:
            raise UserError(f"--end-to-end {self.end_to_end}: unknown preset; choose of {', '.join(PRESETS)}")


def main(args: list[str]) -> int:
    flags = parse_flags(ParityFlags, args, __doc__, "jaxgpt parity")
    if flags.pair is not None:
        return compare_pair(flags, flags.pair)
    import_from_checkout("parity_tests")
    require_torch()
    return import_from_checkout("parity_tests.command").run(flags)


def require_torch() -> None:
    """Raises `UserError` without PyTorch."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("PyTorch is not installed, so there is nothing to compare with; pip install torch, or make env")
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as e:
        raise UserError(f"PyTorch cannot be imported ({first_line(e)}); install it anew") from None


def compare_pair(flags: ParityFlags, argument: str) -> int:
    """Compares the user's pair; returns 0 if it is equal, 1 if not."""
    require_torch()
    from jaxgpt.parity.comparison import compare
    from jaxgpt.parity.page import html
    from jaxgpt.parity.pair import PairError, load_pair

    pair = load_pair(argument)
    try:
        comparison = compare(pair, not flags.quick, lambda line: print(line, file=sys.stderr, flush=True))
    except PairError as e:
        raise UserError(f"--pair {argument}: {e}") from e
    print(comparison.text())
    if comparison.converter:
        print(f"\nThe derived converter, to keep as the pair's to_params beside jax_params:\n\n{comparison.converter}")
    print(f"{comparison.name}: {'equal' if comparison.passed else 'NOT EQUAL'}, in {comparison.seconds:.1f} s")
    if flags.json:
        write_text("--json", flags.json, strict_json.dumps(comparison.to_json(), indent=1) + "\n")
    if flags.html:
        write_text("--html", flags.html, html(comparison))
    return 0 if comparison.passed else 1


def write_text(option: str, path: Path, text: str) -> None:
    """Writes whole or not at all. Raises `UserError` where it cannot."""
    try:
        files.write_text(path, text)
    except OSError as e:
        raise UserError(f"{option} {path}: cannot be written ({e.strerror}); choose a writable place") from None
