"""What the tests of the data room share: small texts, the files that hold them, and a configuration."""

import csv
import json
from pathlib import Path

from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.data.corpora import Corpus, load_corpus

SHARED = Path(__file__).resolve().parents[4] / "shared/data"
DOCUMENTS = ["The first text, long enough.", "", "Second: x", "Ein dritter Text mit Umlaut: ä.", "The fourth one."] * 8


def config_of(block_size: int = 4, **values) -> TrainConfig:
    return TrainConfig(model=ModelConfig(block_size=block_size), batch_size=2, **values)


def load_file(path: Path, column: str | None = None) -> Corpus:
    return load_corpus(f"file:{path}", None, print, column)


def write_table(folder: Path, suffix: str, texts: list, column: str = "text") -> Path:
    """A file texts.SUFFIX with the columns `column` and "other"."""
    path = folder / f"texts.{suffix}"
    rows = [{column: text, "other": number} for number, text in enumerate(texts)]
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif suffix == "csv":
        with path.open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, [column, "other"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_line_dataset(folder: Path, **texts: str) -> None:
    """A wikitext-2 below `folder`, with a file NAME.txt for each text."""
    (folder / "wikitext-2").mkdir(parents=True)
    for name, text in texts.items():
        (folder / "wikitext-2" / f"{name}.txt").write_text(text)
