"""What the tests of the data room share: small texts, the files that hold them, and a configuration."""

import csv
import json
import random
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


def write_hub_folder(folder: Path, n_files: int, n_rows: int = 60, row_group_size: int = 10, **columns: list) -> Path:
    """A hub dataset in a folder: Parquet files of a few words a row."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(parents=True)
    for number in range(n_files):
        draw = random.Random(number)
        texts = [" ".join(draw.choices(["north", "süd", "wind", "of"], k=draw.randint(1, 20))) for _ in range(n_rows)]
        table = pyarrow.table(columns or {"text": texts})
        path = folder / f"train-{number:05}-of-{n_files:05}.parquet"
        parquet.write_table(table, path, row_group_size=row_group_size)
    return folder
