"""The speed of generating text beside `transformers.generate`, on a CPU, from the same weights.

    python -m benchmarks.generation                # prints the figures
    python -m benchmarks.generation --docs         # and puts them into docs/benchmarks.md

Each side is a process of its own. In each round both continue the same random prompt of 32 tokens by 128, greedily, in
float32, one after the other; a ratio is taken round by round. What compiles is over before the first round. A third
figure bounds both: a token of one text reads every weight once, so no program in float32 makes more tokens a second
than the memory's bytes a second over the weights' bytes. The memory's speed is measured in each round, too, by threads
that sum an array of half a gigabyte.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.page import FOLDER, table, write_between
from jaxgpt import strict_json
from jaxgpt.config import ModelConfig, SamplingConfig

BEGIN, END = "<!-- generation: written by python -m benchmarks.generation --docs -->", "<!-- end of generation -->"
PROMPT, NEW = 32, 128
READ_FLOATS = 2**27
SHAPES = {  # model and vocabulary; a head of its own would not be GPT-2
    "gpt2-124m": (ModelConfig(12, 12, 768, 1024, tied_head=True, gelu="tanh", init="gpt2"), 50257),
    "minigpt": (ModelConfig(4, 4, 64, 128, tied_head=True, gelu="tanh", init="gpt2"), 65),
}


def n_new_tokens(config: ModelConfig) -> int:
    """How many tokens follow the prompt: `transformers` has no positions past the block."""
    return min(NEW, config.block_size - PROMPT)


def prompts(shape: str, batch: int) -> np.ndarray:
    """Random token ids, int64 [B, T]."""
    return np.random.default_rng(batch).integers(0, SHAPES[shape][1], (batch, PROMPT))


def transformers_side(shape: str, threads: int, weights: Path) -> Any:
    """Writes random weights to a file; returns a function from prompts [B, T] to new tokens [B, N]."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config, vocab_size = SHAPES[shape]
    sizes = dict(n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer, n_head=config.n_head)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=vocab_size, **sizes, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    ).eval()
    np.savez(weights, **{name: p.detach().numpy() for name, p in model.state_dict().items()})

    def run(idx_BT: np.ndarray) -> np.ndarray:
        idx = torch.from_numpy(idx_BT)
        flags = dict(max_new_tokens=n_new_tokens(config), do_sample=False, attention_mask=torch.ones_like(idx))
        with torch.inference_mode():
            return model.generate(idx, **flags)[:, PROMPT:].numpy()

    return run


def our_side(shape: str, threads: int, weights: Path) -> Any:
    """Reads the weights; returns a function from prompts [B, T] to new tokens [B, N]."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # XLA makes a thread for each core it sees
    import jax

    from jaxgpt.interop import torch_names
    from jaxgpt.model.gpt import Numerics, bind, init_params
    from jaxgpt.model.sampling import generate_batch

    jax.config.update("jax_default_matmul_precision", "highest")  # as `parallel.configure_jax` does
    (config, vocab_size), numerics = SHAPES[shape], Numerics()
    like = jax.eval_shape(lambda key: init_params(key, config, vocab_size, numerics), jax.random.key(0))
    with np.load(weights) as tensors:
        theirs = torch_names.from_torch(torch_names.tutorial_names(dict(tensors)), like)
    params, model = jax.device_put(theirs), bind(config, vocab_size, numerics)
    sampling = SamplingConfig(max_new_tokens=n_new_tokens(config), temperature=0)
    return lambda idx_BT: np.stack(list(generate_batch(model, params, config, idx_BT, sampling)), axis=1)


def worker(pipe: Connection, side: str, shape: str, threads: int, weights: Path) -> None:
    """A process of one side: for each prompts that it receives sends the new tokens and the seconds."""
    run = {"ours": our_side, "transformers": transformers_side}[side](shape, threads, weights)
    pipe.send("ready")
    while (idx_BT := pipe.recv()) is not None:
        begun = time.perf_counter()
        tokens_BN = run(idx_BT)
        pipe.send((tokens_BN, time.perf_counter() - begun))


def read_speed(threads: int, array: np.ndarray) -> float:
    """The bytes a second of threads that sum an array together."""
    workers = [threading.Thread(target=part.sum) for part in np.array_split(array, threads)]
    begun = time.perf_counter()
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    return array.nbytes / (time.perf_counter() - begun)


def measure(shape: str, batches: list[int], rounds: int, threads: int) -> list[dict[str, Any]]:
    """The figures of one model's shape, a row for each batch."""
    context, array = multiprocessing.get_context("spawn"), np.ones(READ_FLOATS, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        weights, pipes, processes = Path(folder) / "weights.npz", {}, []
        for side in ("transformers", "ours"):  # the first writes the weights
            pipes[side], other = context.Pipe()
            processes.append(context.Process(target=worker, args=(other, side, shape, threads, weights), daemon=True))
            processes[-1].start()
            assert pipes[side].recv() == "ready"
        with np.load(weights) as tensors:
            # The head is the table of tokens; of the positions' table a token reads one row.
            n_bytes = sum(
                tensors[n].nbytes for n in tensors.files if n not in ("lm_head.weight", "transformer.wpe.weight")
            )
        rows = []
        for batch in batches:
            idx_BT, seconds, tokens, reads = prompts(shape, batch), {side: [] for side in pipes}, {}, []
            for round_ in range(rounds + 1):
                for side, pipe in pipes.items():
                    pipe.send(idx_BT)
                    tokens[side], took = pipe.recv()
                    seconds[side] += [took] * (round_ > 0)  # the first compiles
                reads.append(read_speed(threads, array))
            n_tokens = tokens["ours"].size
            rates = {side: sorted(n_tokens / s for s in found) for side, found in seconds.items()}
            rows.append(
                {
                    "name": f"{shape}, batch {batch}",
                    "shape": shape,
                    "batch": batch,
                    "tokens_s": {side: statistics.median(found) for side, found in rates.items()},
                    "range": {side: [found[0], found[-1]] for side, found in rates.items()},
                    "ratio": statistics.median(
                        t / o for t, o in zip(seconds["transformers"], seconds["ours"], strict=True)
                    ),
                    "equal_tokens": int((tokens["ours"] == tokens["transformers"]).sum()),
                    "tokens": n_tokens,
                    "memory_gb_s": statistics.median(reads) / 1e9,
                    "bound_tokens_s": batch * statistics.median(reads) / n_bytes,
                }
            )
        for pipe in pipes.values():
            pipe.send(None)
        for process in processes:
            process.join()
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = ["model", "batch", "tokens/s (range)", "`transformers`", "ratio", "tokens that are equal", "memory's bound"]
    lines = []
    for row in rows:
        sides = [
            f"{row['tokens_s'][side]:,.0f} ({row['range'][side][0]:,.0f} to {row['range'][side][1]:,.0f})"
            for side in ("ours", "transformers")
        ]
        bound = f"{row['bound_tokens_s']:,.0f}" if row["shape"] == "gpt2-124m" else "in the cache"
        equal = f"{row['equal_tokens']:,} of {row['tokens']:,}"
        lines.append([f"`{row['shape']}`", str(row["batch"]), *sides, f"{row['ratio']:.2f}", equal, bound])
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="models")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="texts at a time")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--threads", type=int, default=2, help="cores of each")
    parser.add_argument("--docs", action="store_true", help="keep the figures in docs/")
    flags = parser.parse_args()
    rows = [row for shape in flags.shapes for row in measure(shape, flags.batches, flags.rounds, flags.threads)]
    print(show(rows))
    if flags.docs:
        import jax
        import torch
        import transformers

        cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "CPU")
        machine = {
            "cpu": cpu.partition(": ")[2],
            "threads": flags.threads,
            "python": platform.python_version(),
            "jax": jax.__version__,
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        }
        (FOLDER / "generation.json").write_text(strict_json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        write_docs()


def write_docs() -> None:
    """Writes the part of docs/benchmarks.md that docs/generation.json holds."""
    kept = json.loads((FOLDER / "generation.json").read_text(encoding="utf-8"))
    m, memory = kept["machine"], statistics.median(row["memory_gb_s"] for row in kept["rows"])
    title = (
        f"{m['threads']} cores of {m['cpu']}, float32, Python {m['python']}, jax {m['jax']}, PyTorch {m['torch']}, "
        f"transformers {m['transformers']}; reading memory {memory:.1f} GB/s"
    )
    write_between(FOLDER / "benchmarks.md", BEGIN, END, f"\n{title}\n\n{show(kept['rows'])}\n")


if __name__ == "__main__":
    main()
