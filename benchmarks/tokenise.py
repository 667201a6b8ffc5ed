"""The speed and the memory of making shards of tokens, beside tiktoken's own batch encoder, on one core.

    python -m benchmarks.tokenise                  # 50 and 500 MB of text
    python -m benchmarks.tokenise --mb 50 --rounds 7 --json tokenise.json

The stand-in for a web corpus is a Parquet file of documents that are drawn from the lines of wikitext-2, if a data
folder has it, else from Python's language reference. `shard` reads it, tokenizes, writes the shards and their digests,
in a process as a training starts it; `tiktoken` is `encode_ordinary_batch` with one thread, on the same texts in
memory, and neither reads nor writes. They take turns. Then one process reads an epoch's batches, as a training does,
while one worker makes the shards.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import strict_json
from jaxgpt.data.corpora import load_corpus
from jaxgpt.data.files import data_folders
from jaxgpt.data.shard_cache import SHARD_BYTES, ShardMaker, Work
from jaxgpt.data.shards import parquet_files, read_record
from jaxgpt.data.tokenizer import Gpt2Tokenizer, gpt2_folder

DOCUMENT_LINES = (2, 40)
EPOCH_SHARD_BYTES = 2**24  # small, so that the memory of a shard does not hide what grows with the corpus
ROW_GROUP_ROWS = 1000
TIKTOKEN_ROWS = 1024  # texts of a batch


def write_corpus(path: Path, n_bytes: int) -> None:
    """Writes a Parquet file of documents with so many bytes of text, a row group at a time."""
    import pyarrow
    from pyarrow import parquet

    folders = [folder / "wikitext-2" for folder in data_folders(None) if (folder / "wikitext-2").is_dir()]
    paths = sorted(path for folder in folders[:1] for path in folder.iterdir())
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths) or load_corpus("pydoc", None, print).text
    lines, draw, written = [line + "\n" for line in text.splitlines() if len(line) > 40], random.Random(0), 0
    with parquet.ParquetWriter(path, pyarrow.schema([("text", pyarrow.string())])) as writer:
        while written < n_bytes:
            texts = ["".join(draw.choices(lines, k=draw.randint(*DOCUMENT_LINES))) for _ in range(ROW_GROUP_ROWS)]
            writer.write_table(pyarrow.table({"text": texts}))
            written += sum(len(text.encode()) for text in texts)


def worker(pipe: Connection, what: str, path: Path, n_rows: int) -> None:
    """A process that tokenizes the first `n_rows` rows whenever it is asked; sends (tokens, seconds, peak MB)."""
    import pyarrow.parquet

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tokenizer = Gpt2Tokenizer(gpt2_folder(None, print))
    if what == "tiktoken":
        import tiktoken

        os.environ["TIKTOKEN_CACHE_DIR"] = str(tokenizer.folder)
        encoding = tiktoken.get_encoding("gpt2")
        table = pyarrow.parquet.read_table(path)
        texts = table["text"].slice(0, n_rows).to_pylist()
        batches = [texts[i : i + TIKTOKEN_ROWS] for i in range(0, len(texts), TIKTOKEN_ROWS)]

        def tokenize(folder: Path) -> int:
            return sum(len(ids) for b in batches for ids in encoding.encode_ordinary_batch(b, num_threads=1))
    else:

        def tokenize(folder: Path) -> int:
            files = parquet_files({"train": [str(path)]}, str(path.parent), "text", "")
            maker = ShardMaker(Work("benchmark", files, folder, tokenizer.to_json(), "<u2"))
            maker.prepare(0)
            n_shards = maker.work.n_shards(0) or 0
            for number in range(n_shards):
                maker.make(0, number)
            return sum((read_record(maker.work.record(0, number)) or {})["n_tokens"] for number in range(n_shards))

    pipe.send("ready")
    while pipe.recv():
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            n_tokens = tokenize(Path(folder))
            seconds = time.perf_counter() - begun
        pipe.send((n_tokens, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000))


def read_epoch(pipe: Connection, path: Path, n_tokens: int) -> None:
    """A process that reads the batches of an epoch from a new cache; sends (tokens, seconds, peak MB)."""
    from jaxgpt.config import ModelConfig, TrainConfig
    from jaxgpt.data.sampler import ShardSampler
    from jaxgpt.data.shard_cache import ShardCache

    config = TrainConfig(packing="chunks", batch_size=32, model=ModelConfig(block_size=1024))
    tokenizer = Gpt2Tokenizer(gpt2_folder(None, print))
    files = parquet_files({"train": [str(path)]}, str(path.parent), "text", "")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        shards = ShardCache("benchmark", files, tokenizer, np.dtype("<u2"), 0, print, 1, shard_bytes=EPOCH_SHARD_BYTES)
        with contextlib.closing(shards):
            n_steps = (n_tokens - len(shards.validation())) // config.tokens_per_step
            batches, begun = ShardSampler(config, shards).batches(0), time.perf_counter()
            for _ in range(n_steps):
                next(batches)
            seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    pipe.send((n_steps * config.tokens_per_step, seconds, peak))


def measure(mb: int, rounds: int) -> dict[str, Any]:
    """One size: millions of tokens a second (medians and ranges), their ratio, and peak memory."""
    import pyarrow.parquet

    context, found = multiprocessing.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.parquet"
        write_corpus(path, mb * 10**6)
        n_rows = pyarrow.parquet.read_metadata(path).num_rows
        pipes = {}
        for what in ("shard", "tiktoken"):
            pipes[what], other = context.Pipe()
            process = context.Process(target=worker, args=(other, what, path, n_rows), daemon=True)
            process.start()
            assert pipes[what].recv() == "ready"
        results: dict[str, list[tuple[int, float, float]]] = {what: [] for what in pipes}
        for _ in range(rounds):
            for what, pipe in pipes.items():
                pipe.send(True)
                results[what].append(pipe.recv())
        for pipe in pipes.values():
            pipe.send(False)
        pipe, other = context.Pipe()
        context.Process(target=read_epoch, args=(other, path, results["shard"][0][0])).start()
        n_tokens, seconds, peak = pipe.recv()
    for what, rows in results.items():
        speeds = sorted(n_tokens / seconds / 1e6 for n_tokens, seconds, _ in rows)
        found[what] = {
            "million_tokens_per_s": statistics.median(speeds),
            "range": [speeds[0], speeds[-1]],
            "peak_mb": rows[-1][2],
        }
    # The shards have the end of text after each document.
    assert results["shard"][0][0] == results["tiktoken"][0][0] + n_rows
    ratios = [b[1] / a[1] * a[0] / b[0] for a, b in zip(results["shard"], results["tiktoken"], strict=True)]
    found["epoch"] = {"million_tokens_per_s": n_tokens / seconds / 1e6, "peak_mb": peak}
    return {"mb": mb, "tokens": results["shard"][0][0], "ratio": statistics.median(ratios), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, nargs="+", default=[50, 500], help="megabytes of text")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--json", type=Path, help="file for the results")
    flags = parser.parse_args()
    rows = [measure(mb, flags.rounds) for mb in flags.mb]
    print(f"one core, {flags.rounds} rounds, shards of {SHARD_BYTES / 2**20:.0f} MiB of text or more, {sys.platform}")
    for row in rows:
        ours, theirs = row["shard"], row["tiktoken"]
        print(
            f"{row['mb']} MB, {row['tokens']:,} tokens: shards {ours['million_tokens_per_s']:.3f} million tokens/s "
            f"({ours['range'][0]:.3f} to {ours['range'][1]:.3f}), encode_ordinary_batch "
            f"{theirs['million_tokens_per_s']:.3f} ({theirs['range'][0]:.3f} to {theirs['range'][1]:.3f}); "
            f"ratio {row['ratio']:.2f}; peak memory of a worker {ours['peak_mb']:.0f} MB, of a process that reads an "
            f"epoch {row['epoch']['peak_mb']:.0f} MB"
        )
    if flags.json:
        flags.json.write_text(strict_json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
