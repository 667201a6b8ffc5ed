"""Hold this machine's JAX side against PyTorch, check by check: python scripts/parity.py"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxgpt.cli.args import import_from_checkout, parse_flags
from jaxgpt.errors import UserError, require_writable
from jaxgpt.presets import PRESETS


@dataclass(frozen=True)
class ParityFlags:
    quick: bool = False
    """The core of the suite, in about a minute."""
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
        modes = {"--run": self.run, "--mutants": self.mutants, "--end-to-end": self.end_to_end}
        given = [name for name, value in modes.items() if value]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)}: each is a run of its own; give one of them")
        suite_only = {"--quick": self.quick, "--locate": self.locate, "--mutant": self.mutant}
        for name, value in suite_only.items():
            if given and value:
                raise UserError(f"{name}: has an effect on the suite only; leave it out, or leave out {given[0]}")
        if self.data_dir and not (self.run or self.end_to_end):
            raise UserError("--data-dir: has an effect only with --run or --end-to-end; add one, or leave it out")
        if self.checkpoint != "result" and not self.run:
            raise UserError("--checkpoint: has an effect only with --run; add it, or leave it out")
        if self.seeds != 5 and not self.end_to_end or self.seeds < 1:
            raise UserError(f"--seeds {self.seeds}: give at least 1, and --end-to-end with it")
        if self.docs and (self.run or self.mutant or self.quick):
            raise UserError(
                "--docs: the page shows the whole suite, --mutants and --end-to-end; leave out what goes with it"
            )
        if self.json:
            require_writable("--json", self.json)
            if self.json.suffix == ".png":
                raise UserError(f"--json {self.json}: the picture beside it would have the same name; end it in .json")
        if self.end_to_end and self.end_to_end not in PRESETS:
            raise UserError(f"--end-to-end {self.end_to_end}: unknown preset; choose of {', '.join(PRESETS)}")


def main(args: list[str]) -> int:
    flags = parse_flags(ParityFlags, args, __doc__, "jaxgpt parity")
    import_from_checkout("parity_tests")
    if importlib.util.find_spec("torch") is None:
        raise UserError("PyTorch is not installed, so there is nothing to compare with; run make env")
    return import_from_checkout("parity_tests.command").run(flags)
