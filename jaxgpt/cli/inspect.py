"""Look inside a trained run: gradients, attention maps, token probabilities, the computation graph."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro

from jaxgpt.analysis.dot import require_output
from jaxgpt.cli.args import parse_flags
from jaxgpt.errors import UserError, require, require_writable

if TYPE_CHECKING:  # modules that import jax are imported after the flags are checked
    from jaxgpt.runs.restore import RestoredRun
    from jaxgpt.runs.run_dir import RunDir

DESCRIPTION = (
    "Look inside a trained run: jaxgpt inspect RUN --gradients | --attention TEXT | --surprise TEXT | --graph FILE"
)
N_HIGHEST = 5  # tokens of the highest surprisal that are listed
N_CONTEXT = 12  # tokens shown before each of them


@dataclass(frozen=True)
class InspectFlags:
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a language model's run."""
    gradients: bool = False
    """Mean |g|, standard deviation and update over weight of every tensor, on the run's next training batch."""
    attention: str | None = None
    """A text: the attention maps of every layer and head over it."""
    surprise: str | None = None
    """A text: the probability that the model gave each of its tokens, and the tokens of the highest surprisal."""
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
            problem = f"{' and '.join(given)} given" if given else "nothing to inspect"
            raise UserError(f"{given[0] if given else 'RUN'}: {problem}; give one of {', '.join(modes)}")
        if self.graph:
            require_output(self.graph)
            require(not self.out, "out", self.out, "the graph is written to --graph's own file; leave it out")
            require(self.checkpoint == "result", "checkpoint", self.checkpoint, "the graph is the same for all")
        else:
            require(self.level == "block", "level", self.level, "has an effect only with --graph; leave it out")
        if self.out and self.out.suffix.lower() != ".png":
            raise UserError(f"--out {self.out}: a picture is written as .png; name it so")
        if self.out:
            require_writable("--out", self.out)
        needless = self.data_dir and not self.gradients
        require(not needless, "data_dir", self.data_dir, "has an effect only with --gradients; leave it out")


def main(args: list[str]) -> None:
    """Runs the command. Raises `UserError` for flags, runs and texts that cannot be used."""
    flags = parse_flags(InspectFlags, args, DESCRIPTION, "jaxgpt inspect")
    if flags.graph:
        return _graph(flags, flags.graph)
    from jaxgpt.runs.restore import restore_language_model

    restored = restore_language_model(flags.run, flags.checkpoint)
    if flags.gradients:
        _gradients(flags, restored)
    elif flags.attention is not None:
        _attention(flags, restored, flags.attention)
    elif flags.surprise is not None:
        _surprisal(flags, restored, flags.surprise)


def _graph(flags: InspectFlags, out: Path) -> None:
    from jaxgpt.analysis.graph import write_graph
    from jaxgpt.runs.restore import restore_objective

    run, objective = restore_objective(flags.run)
    path, note = write_graph(out, objective, flags.level, _title(run))
    if note:
        print(note)
    print(f"graph: {path}")


def _gradients(flags: InspectFlags, restored: "RestoredRun") -> None:
    from jaxgpt.analysis import diagnostics
    from jaxgpt.data.loader import make_loader
    from jaxgpt.data.sampler import BatchSampler
    from jaxgpt.optimizer import learning_rate
    from jaxgpt.runs.restore import split_of

    run, executor, state = restored
    train_N = split_of(run, "train", flags.data_dir)
    sampler = BatchSampler(run.config, len(train_N))
    loader = make_loader(train_N, sampler, executor.put, executor.bytes_for_tokens, "auto")
    step = int(state.step)
    gradient_flow = executor.compiled(partial(diagnostics.gradient_flow, executor.objective))
    flows = diagnostics.flows(gradient_flow(state, loader.take(step, 1)), state.params)
    loader.close()
    print(diagnostics.table(flows))
    title = f"{_title(run)} after {step} steps: the gradient of the next batch"
    if learning_rate(run.config, step) == 0:
        title += ", whose rate is 0"
        print(f"the schedule's rate at step {step} is 0, and so is its update")
    from jaxgpt.analysis import plots

    _plot(flags, run, "gradients", lambda path: plots.gradient_flow(path, title, flows))


def _attention(flags: InspectFlags, restored: "RestoredRun", text: str) -> None:
    run, executor, state = restored
    ids_T, tokens = _encode(run, "--attention", text, 1)
    from jaxgpt.analysis import diagnostics, plots
    from jaxgpt.parallel import on_one_device

    maps_LHTS = diagnostics.attention_maps(executor.objective, on_one_device(state.params), ids_T)
    n_layer, n_head = maps_LHTS.shape[:2]
    print(f"tokens: {len(tokens)}, layers: {n_layer}, heads of each: {n_head}")
    title = f"{_title(run)} after {int(state.step)} steps: who attends to whom"
    _plot(flags, run, "attention", lambda path: plots.attention_maps(path, title, maps_LHTS, tokens))


def _surprisal(flags: InspectFlags, restored: "RestoredRun", text: str) -> None:
    run, executor, state = restored
    ids_T, tokens = _encode(run, "--surprise", text, 2)
    from rich.console import Console
    from rich.text import Text

    from jaxgpt.analysis import diagnostics, plots
    from jaxgpt.data.tokenizer import visible
    from jaxgpt.parallel import on_one_device

    result = diagnostics.token_probabilities(executor.objective, on_one_device(state.params), ids_T)
    console, colored = Console(highlight=False), Text(tokens[0], style="black on grey85", end="")
    for previous, token, probability in zip(tokens, tokens[1:], result.probability_T, strict=False):
        if previous.endswith("\u21b5"):
            colored.append("\n")
        colored.append(token, style=f"black on {plots.token_color(float(probability))}")
    console.print(colored, soft_wrap=True)
    console.print()
    loss = float(np.mean(result.surprisal_T))
    print(
        f"tokens predicted: {len(result.surprisal_T)}, loss {loss:.4f}, perplexity {np.exp(loss):.2f}; "
        "the highest surprisal:"
    )
    for i in np.argsort(-result.surprisal_T, kind="stable")[:N_HIGHEST]:
        likeliest = ", ".join(
            f"{visible(run.tokenizer, int(token))} {probability:.1%}"
            for token, probability in zip(result.likeliest_TK[i], result.likeliest_probability_TK[i], strict=True)
        )
        context = "".join(tokens[max(0, i + 1 - N_CONTEXT) : i + 1])
        print(f"  token {i + 2}  {tokens[i + 1]}  {result.probability_T[i]:.2%}  after {context}  ({likeliest})")
    title = f"{_title(run)} after {int(state.step)} steps: loss {loss:.3f}, perplexity {np.exp(loss):.1f}"
    _plot(flags, run, "surprise", lambda path: plots.token_probabilities(path, title, tokens, result.probability_T))


def _encode(run: "RunDir", flag: str, text: str, at_least: int) -> tuple[np.ndarray, list[str]]:
    """The token ids of a text, and each token as visible text.

    Raises:
        UserError: it has fewer than `at_least` tokens or more than a block, or the tokenizer cannot encode it.
    """
    from jaxgpt.data.tokenizer import visible

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


def _title(run: "RunDir") -> str:
    kind = "classifier" if run.labels else run.config.preset
    return f"{kind} on {run.config.dataset.rsplit('/')[-1]}"


def _plot(flags: InspectFlags, run: "RunDir", kind: str, plot: Callable[[Path], None]) -> None:
    """Draws a picture to --out, or else to <kind>.png in the run's folder inspect/."""
    path = flags.out or run.path / "inspect" / f"{kind}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        plot(path)
    except OSError as e:
        named = f"--out {path}" if flags.out else f"RUN {run.path}"
        raise UserError(f"{named}: the picture cannot be written ({e.strerror}); give --out another place") from None
    print(f"picture: {path}")
