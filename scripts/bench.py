"""Time a training step against PyTorch on this machine, alternately in one run: python scripts/bench.py"""

import importlib.util
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxgpt.cli import parse_flags, run_command
from jaxgpt.errors import UserError
from jaxgpt.presets import PRESETS


@dataclass(frozen=True)
class BenchFlags:
    preset: Literal["tinygpt", "minigpt"] = "minigpt"
    """Whose model, batch and optimiser are timed."""
    rounds: int = 12
    """Turns of each side; the median turn counts."""
    steps: int = 5
    """Updates per turn."""
    json: Path | None = None
    """Also write the figures to this file."""


class Torch:
    """The documented PyTorch loop, eager, on the batches of (seed, step)."""

    def __init__(self, config: Any, params: dict[str, Any], batch_of: Any):
        import torch

        from jaxgpt.convert import to_torch
        from torch_ref.model import GPT
        from torch_ref.train_step import make_optimizer

        self.name = f"PyTorch {torch.__version__} eager, the documented loop"
        self.config, self.batch_of, self.step = config, batch_of, 0
        self.model = GPT(config.model, len(params["token_emb.embedding"]))
        self.model.load_state_dict({k: torch.tensor(v) for k, v in to_torch(params).items()})
        self.optimizer = make_optimizer(self.model, config)

    def run(self, n_steps: int) -> list[float]:
        import torch

        from torch_ref.train_step import update

        losses = []
        for _ in range(n_steps):
            idx_BT, target_BT = (torch.from_numpy(x).long() for x in self.batch_of(self.step))
            losses.append(update(self.model, self.optimizer, self.config, self.config.lr, idx_BT, target_BT))
            self.step += 1
        return losses


class Ours:
    """The trainer's own compiled step."""

    def __init__(self, executor: Any, state: Any, loader: Any):
        import jax

        self.name = f"jaxgpt, jax {jax.__version__}"
        self.executor, self.loader, self.step = executor, loader, 0
        self.state, _ = executor.updates(state, loader.take(0, 0), 0)  # compiles

    def run(self, n_steps: int) -> list[float]:
        self.state, metrics = self.executor.updates(self.state, self.loader.take(self.step, n_steps), n_steps)
        self.step += n_steps
        return metrics[:, 0].tolist()


def main() -> None:
    flags = parse_flags(BenchFlags, sys.argv[1:], __doc__)
    if flags.rounds < 1 or flags.steps < 1:
        raise UserError(f"--rounds {flags.rounds}, --steps {flags.steps}: give whole numbers of at least 1")
    if importlib.util.find_spec("torch") is None:
        raise UserError("PyTorch is not installed, so there is nothing to compare with; run make env")
    if flags.json and not flags.json.parent.is_dir():
        raise UserError(f"--json {flags.json}: no such folder; create it first")
    import numpy as np

    from jaxgpt import parallel
    from jaxgpt.batches import Order
    from jaxgpt.data_files import cache_folder
    from jaxgpt.loader import DeviceLoader
    from jaxgpt.train_step import Program

    config = PRESETS[flags.preset]
    parallel.prepare(config, cache_folder() / "xla")
    vocab_size, block_size = 65, config.model.block_size
    tokens = np.random.default_rng(0).integers(0, vocab_size, 100_000).astype(np.uint8)
    executor = parallel.Executor(Program(config, vocab_size, parallel.numerics(config)))
    state = executor.init_state()
    params = {name: np.array(p) for name, p in state.params.items()}

    order = Order(config, len(tokens))
    starts_KB = order.starts(0, flags.steps * (flags.rounds + 1))

    def batch_of(step: int) -> tuple[Any, Any]:
        window = tokens[starts_KB[step][:, None] + np.arange(block_size + 1)]
        return window[:, :-1], window[:, 1:]

    loader = DeviceLoader(tokens, order, executor.put)
    sides = [Torch(config, params, batch_of), Ours(executor, state, loader)]
    losses: list[list[float]] = [[] for _ in sides]
    ms: list[list[float]] = [[] for _ in sides]
    for turn in range(flags.rounds + 1):
        for i, side in enumerate(sides):
            begun = time.perf_counter()
            losses[i] += side.run(flags.steps)
            if turn:  # the first warms up
                ms[i].append((time.perf_counter() - begun) / flags.steps * 1e3)
    gap = max(abs(a - b) for a, b in zip(*losses, strict=True))
    assert gap < 1e-3, f"the losses differ by {gap}: one side is wrong, so its time means nothing"
    ratio = statistics.median(t / o for t, o in zip(*ms, strict=True))
    rows = [
        {"name": side.name, "ms_per_step": statistics.median(t), "ms_min": min(t), "ms_max": max(t)}
        for side, t in zip(sides, ms, strict=True)
    ]
    print(f"{flags.preset}: batch {config.batch_size}, block {block_size}, {parallel.describe_devices()}")
    for row in rows:
        print(f"  {row['name']:<48} {row['ms_per_step']:7.1f} ms/step  ({row['ms_min']:.1f} to {row['ms_max']:.1f})")
    print(f"  jaxgpt is {ratio:.2f}x as fast (median of the turns' ratios); losses equal within {gap:.1e}")
    if flags.json:
        flags.json.write_text(
            json.dumps({"preset": flags.preset, "rows": rows, "ratio": ratio, "loss_gap": gap}) + "\n"
        )


if __name__ == "__main__":
    run_command(main)
