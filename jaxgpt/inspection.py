"""Looking into a trained run: what `scripts/inspect.py` does."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from jaxgpt.checks import require
from jaxgpt.cli import parse_flags
from jaxgpt.dot import require_place
from jaxgpt.errors import UserError

DESCRIPTION = (
    "Look into a run: python scripts/inspect.py RUN --gradients | --attention TEXT | --surprise TEXT | --graph FILE"
)


@dataclass(frozen=True)
class InspectFlags:
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a language model's run."""
    gradients: bool = False
    """Mean |g|, standard deviation and update over weight of every tensor, on the run's next training batch."""
    attention: str | None = None
    """A text: the attention maps of every layer and head over it."""
    surprise: str | None = None
    """A text: the probability that the model gave each of its tokens."""
    graph: Path | None = None
    """A .svg, .png or .dot: the computation graph from the loss back to the embeddings, with shapes. Pictures need
    Graphviz' dot; without it the .dot is written."""
    level: Literal["block", "op"] = "block"
    """graph: a box for each layer, or for every operation, forward and backward (best as .svg)."""
    checkpoint: Literal["result", "last", "best"] = "result"
    """result: the last, or, of a run that stopped early, the best: the one with the lowest validation loss."""
    out: Path | None = None
    """The picture, a .png (default: gradients.png, attention.png or surprise.png in RUN/inspect)."""
    data_dir: Path | None = None
    """gradients: folder to look for datasets in first."""

    def __post_init__(self):
        modes = {f"--{name}": getattr(self, name) for name in ("gradients", "attention", "surprise", "graph")}
        given = [name for name, value in modes.items() if value not in (None, False)]
        if len(given) != 1:
            told = f"{' and '.join(given)} given" if given else "nothing to look at"
            raise UserError(f"{given[0] if given else 'RUN'}: {told}; give one of {', '.join(modes)}")
        if self.graph:
            require_place(self.graph)
            require(not self.out, "out", self.out, "the graph is written to --graph's own file; leave it out")
            require(self.checkpoint == "result", "checkpoint", self.checkpoint, "the graph is the same for all")
        else:
            require(self.level == "block", "level", self.level, "has an effect only with --graph; leave it out")
        if self.out and self.out.suffix.lower() != ".png":
            raise UserError(f"--out {self.out}: a picture is written as .png; name it so")
        if self.out and (self.out.is_dir() or len(self.out.name) > 200):
            raise UserError(f"--out {self.out}: no place for a picture; choose another name")
        if self.out and not self.out.absolute().parent.is_dir():
            raise UserError(f"--out {self.out}: its folder does not exist; make it, or choose another")
        needless = self.data_dir and not self.gradients
        require(not needless, "data_dir", self.data_dir, "has an effect only with --gradients; leave it out")


def main() -> None:
    flags = parse_flags(InspectFlags, sys.argv[1:], DESCRIPTION)
    if flags.graph:
        return _graph(flags, flags.graph)
    look = _gradients if flags.gradients else _attention if flags.attention is not None else _surprise
    from jaxgpt.trained import open_trained

    look(flags, *open_trained(flags.run, flags.checkpoint))


def _graph(flags: InspectFlags, out: Path) -> None:
    from jaxgpt.graph import write_graph
    from jaxgpt.trained import program_of

    run, program = program_of(flags.run)
    path, line = write_graph(out, program, flags.level, _name(run))
    if line:
        print(line)
    print(f"graph: {path}")


def _gradients(flags: InspectFlags, run: Any, executor: Any, state: Any) -> None:
    from jaxgpt import diagnostics
    from jaxgpt.batches import Order
    from jaxgpt.loader import make_loader
    from jaxgpt.optimizer import learning_rate
    from jaxgpt.trained import split_of

    train_N = split_of(run, "train", flags.data_dir)
    loader = make_loader(train_N, Order(run.config, len(train_N)), executor, "auto")
    step = int(state.step)
    flow = executor.compiled(partial(diagnostics.gradient_flow, executor.program))
    found = diagnostics.flows(flow(state, loader.take(step, 1)), state.params)
    loader.close()
    from jaxgpt import diagrams

    title = f"{_name(run)} after {step} steps: the gradient of the next batch"
    if learning_rate(run.config, step) == 0:
        title += ", whose rate is 0"
    picture = partial(diagrams.gradient_flow, title=title, flows=found)
    print(diagnostics.table(found))
    if learning_rate(run.config, step) == 0:
        print(f"the schedule's rate at step {step} is 0, and so is its update")
    _draw(flags, run, "gradients", picture)


def _attention(flags: InspectFlags, run: Any, executor: Any, state: Any) -> None:
    ids_T, tokens = _encoded(run, "--attention", flags.attention or "", 1)
    from jaxgpt import diagnostics, diagrams
    from jaxgpt.parallel import on_one_device

    maps_LHTS = diagnostics.attention_maps(executor.program, on_one_device(state.params), ids_T)
    n_layer, n_head = maps_LHTS.shape[:2]
    print(f"tokens: {len(tokens)}, layers: {n_layer}, heads of each: {n_head}")
    title = f"{_name(run)} after {int(state.step)} steps: who attends to whom"
    _draw(flags, run, "attention", partial(diagrams.attention_maps, title=title, maps_LHTS=maps_LHTS, tokens=tokens))


def _surprise(flags: InspectFlags, run: Any, executor: Any, state: Any) -> None:
    ids_T, tokens = _encoded(run, "--surprise", flags.surprise or "", 2)
    from rich.console import Console
    from rich.text import Text

    from jaxgpt import diagnostics, diagrams
    from jaxgpt.parallel import on_one_device
    from jaxgpt.tokenizer import visible

    found = diagnostics.surprise(executor.program, on_one_device(state.params), ids_T)
    console, text = Console(highlight=False), Text(tokens[0], style="black on grey85", end="")
    for before, token, probability in zip(tokens, tokens[1:], found.probability_T, strict=False):
        if before.endswith("\u21b5"):
            text.append("\n")
        text.append(token, style=f"black on {diagrams.token_colour(float(probability))}")
    console.print(text, soft_wrap=True)
    console.print()
    with np.errstate(divide="ignore"):
        loss_T = -np.log(found.probability_T)
    loss = float(np.mean(loss_T))
    print(f"tokens foretold: {len(loss_T)}, loss {loss:.4f}, perplexity {np.exp(loss):.2f}; the greatest surprises:")
    for i in np.argsort(-loss_T, kind="stable")[:5]:
        instead = ", ".join(
            f"{visible(run.tokenizer, int(token))} {share:.1%}"
            for token, share in zip(found.likeliest_TK[i], found.likeliest_probability_TK[i], strict=True)
        )
        share, before = f"{found.probability_T[i]:.2%}", "".join(tokens[max(0, i - 11) : i + 1])
        print(f"  token {i + 2}  {tokens[i + 1]}  {share}  after {before}  ({instead})")
    title = f"{_name(run)} after {int(state.step)} steps: loss {loss:.3f}, perplexity {np.exp(loss):.1f}"
    _draw(flags, run, "surprise", partial(diagrams.surprise, title=title, tokens=tokens, found=found))


def _encoded(run: Any, flag: str, text: str, at_least: int) -> tuple[np.ndarray, list[str]]:
    """The ids of a text, and each as it can be seen. Raises `UserError` for one that the run cannot read at once."""
    from jaxgpt.tokenizer import visible

    try:
        ids_T = run.tokenizer.encode(text)
    except UserError as e:
        raise UserError(f"{flag}: {e}") from None
    block_size = run.config.model.block_size
    if len(ids_T) < at_least:
        raise UserError(f"{flag} {text!r}: of {len(ids_T)} tokens; give a text of at least {at_least}")
    if len(ids_T) > block_size:
        raise UserError(f"{flag}: a text of {len(ids_T)} tokens, and the run's block is {block_size}; shorten it")
    return ids_T, [visible(run.tokenizer, int(i)) for i in ids_T]


def _name(run: Any) -> str:
    kind = "classifier" if run.labels else run.config.preset
    return f"{kind} on {run.config.dataset.rsplit('/')[-1]}"


def _draw(flags: InspectFlags, run: Any, kind: str, picture: Any) -> None:
    path = flags.out or run.path / "inspect" / f"{kind}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        picture(path)
    except OSError as e:
        named = f"--out {path}" if flags.out else f"RUN {run.path}"
        raise UserError(f"{named}: the picture cannot be written ({e.strerror}); give --out another place") from None
    print(f"picture: {path}")
