"""Finding and refusing datasets by their names."""

import csv
import json
import random
import time

import pyarrow
import pytest
from unit.data.samples import DOCUMENTS, load_file, write_line_dataset, write_table

from jaxgpt.data import corpora, readers
from jaxgpt.data.corpora import corpus_from_text, load_corpus
from jaxgpt.data.files import RemoteFile
from jaxgpt.errors import UserError


@pytest.fixture
def remote(server, monkeypatch):
    """`tinyshakespeare` is a small text of the server."""
    monkeypatch.setitem(corpora.REMOTE_TEXTS, "tinyshakespeare", server.remote)
    return server


def load(spec, data_dir=None):
    said = []
    return load_corpus(spec, data_dir, said.append), said


def put(folder, data):
    path = folder / "tinyshakespeare/input.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path


# ------------------------------------------------------------------------------------------------------ tinyshakespeare


def test_downloads_verifies_and_caches(remote, own_cache, capfd):
    corpus, _ = load("tinyshakespeare")
    assert corpus.text.startswith("Words, words") and len(corpus.text) == 10500
    assert "tinyshakespeare" in capfd.readouterr().err  # the progress bar
    assert [p.name for p in (own_cache / "data/tinyshakespeare").iterdir()] == ["input.txt"]  # nothing partial stays
    remote.path.unlink()
    assert load("tinyshakespeare")[0] == corpus


def test_a_download_that_is_another_file_is_not_kept(remote, own_cache):
    remote.path.write_bytes(b"Something else")
    with pytest.raises(UserError, match="not the file"):
        load("tinyshakespeare")
    assert not list((own_cache / "data/tinyshakespeare").iterdir())


def test_a_damaged_cache_is_downloaded_again(remote, own_cache):
    path = put(own_cache / "data", b"damaged")
    corpus, said = load("tinyshakespeare")
    assert corpus.text.startswith("Words") and path.read_text() == corpus.text
    assert len(said) == 1 and "damaged" in said[0]


def test_a_missing_page_is_reported(remote):
    remote.path.unlink()
    with pytest.raises(UserError, match="404"):
        load("tinyshakespeare")


def test_folders_are_searched_in_order(remote, nowhere, monkeypatch):
    remote.path.unlink()  # the network has nothing
    flag, env = nowhere / "flag", nowhere / "env"
    order = [nowhere / "checkout/../shared/data", nowhere / "shared/data", nowhere / "checkout/data"]
    order += [nowhere / "place/data", env, flag]
    (nowhere / "checkout").mkdir()
    monkeypatch.setenv("JAXGPT_DATA_DIR", str(env))
    flag.mkdir()
    found = []
    for folder in order:
        if not (folder / "tinyshakespeare").exists():
            put(folder, remote.data)
        found.append(load("tinyshakespeare", flag)[0].source)
    assert found[-1].startswith(str(flag)) and found[-2].startswith(str(env))
    assert found[-3] == str(nowhere / "place/data/tinyshakespeare/input.txt") and len(set(found)) == 5


def test_another_file_in_a_folder_is_refused(remote, nowhere):
    put(nowhere / "place/data", b"my own text")
    with pytest.raises(UserError, match="another file.*--dataset file:"):
        load("tinyshakespeare")


@pytest.mark.parametrize("host", ["does-not-exist.invalid", "127.0.0.1:9"])
def test_without_a_network_refused_within_five_seconds(nowhere, monkeypatch, host):
    known = corpora.REMOTE_TEXTS["tinyshakespeare"]
    unreachable = RemoteFile(f"http://{host}/x", known.sha256, known.file)
    monkeypatch.setitem(corpora.REMOTE_TEXTS, "tinyshakespeare", unreachable)
    begun = time.monotonic()
    with pytest.raises(UserError) as e:
        load("tinyshakespeare")
    assert time.monotonic() - begun < 5
    message = str(e.value)
    assert "--dataset pydoc" in message and str(nowhere / "place/data") in message and "put the file" in message


# ------------------------------------------------------------------------------------------------------ names and lists


def test_a_list_takes_the_first_that_is_available(nowhere, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    corpus, said = load("tinyshakespeare,pydoc")
    assert corpus.name == "pydoc" and len(said) == 1 and "pydoc" in said[0]
    assert len(corpus.text) > 100_000


def test_a_list_of_which_nothing_is_available_gives_every_reason(nowhere, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        UserError, match="--dataset tinyshakespeare: not on this .*; --dataset file:x.txt: no such file"
    ):
        load("tinyshakespeare,file:x.txt")


def test_unknown_names_in_a_list_are_refused_first(nowhere):
    with pytest.raises(UserError, match="'shakespere'.*choose of tinyshakespeare, pydoc, .*file:PATH"):
        load("pydoc,shakespere")


def test_a_column_needs_a_table(nowhere):
    with pytest.raises(UserError, match="--text-column body: pydoc has no columns; leave it out"):
        load_corpus("pydoc", None, print, "body")


def test_a_data_folder_must_exist(tmp_path):
    with pytest.raises(UserError, match="--data-dir"):
        load("tinyshakespeare", tmp_path / "nothing")


# ----------------------------------------------------------------------------------------------------------- text files


def test_a_text_file_is_taken_as_it_is(tmp_path):
    path = tmp_path / "a,b.txt"
    path.write_text("Grüße\r\n", encoding="utf-8", newline="")
    corpus, _ = load(f"file:{path}")
    assert corpus.text == "Grüße\r\n"  # line ends stay
    assert corpus.name == f"file:{path}"


def test_the_name_of_a_file_is_absolute(nowhere):
    (nowhere / "place/x.txt").write_text("text")
    assert load("file:x.txt")[0].name == f"file:{nowhere}/place/x.txt"


@pytest.mark.parametrize("data, part", [(b"", "empty"), (b"ab\xff", "not UTF-8 text .byte 2.")])
def test_text_files_that_are_wrong(tmp_path, data, part):
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(UserError, match=part):
        load(f"file:{tmp_path / 'x.txt'}")


def test_text_files_that_cannot_be_read(nowhere):
    with pytest.raises(UserError, match="no such file"):
        load("file:nothing.txt")
    with pytest.raises(UserError, match="cannot be read"):
        load(f"file:{nowhere}")


# --------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_the_rows_of_a_table_are_its_texts(tmp_path, suffix):
    path = write_table(tmp_path, suffix, DOCUMENTS)
    corpus = load_file(path)
    assert list(corpus.splits["all"]()) == DOCUMENTS
    assert corpus.documents
    assert corpus == load_file(path)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_missing_column_is_reported_with_its_flag(tmp_path, suffix):
    path = write_table(tmp_path, suffix, DOCUMENTS)
    with pytest.raises(UserError, match="--text-column txet.*: no column 'txet'; it has 'text', 'other'; did you mean"):
        load_file(path, "txet")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])  # in CSV all values are texts
def test_a_column_of_numbers_is_refused(tmp_path, suffix):
    path = write_table(tmp_path, suffix, DOCUMENTS)
    with pytest.raises(UserError, match="--text-column other: row 1 holds"):
        load_file(path, "other")


def test_texts_longer_than_the_csv_modules_limit_are_read(tmp_path):
    assert csv.field_size_limit() > 2**17
    long = "many words " * 20_000
    assert next(load_file(write_table(tmp_path, "csv", [long, "short"])).splits["all"]()) == long


# ---------------------------------------------------------------------------------------------------- files of lines


def texts_of(corpus):
    return {split: list(texts()) for split, texts in corpus.splits.items()}


def test_wikitext_from_a_folder(tmp_path):
    write_line_dataset(tmp_path, train="a b\n \nc\n", valid="v\n", test="t\n")
    corpus, said = load("wikitext-2", tmp_path)
    assert texts_of(corpus) == {"train": ["a b\n", " \n", "c\n"], "validation": ["v\n"]}
    assert corpus.documents
    assert not said


def test_wikitext_without_its_train_split(tmp_path):
    write_line_dataset(tmp_path, valid="v\n", test="t\n")
    corpus, said = load("wikitext-2", tmp_path)
    assert texts_of(corpus) == {"train": ["v\n"], "validation": ["t\n"]}
    assert said == [f"{tmp_path}/wikitext-2: no train split; valid.txt trains, test.txt validates"]


def test_wikitext_by_the_names_of_its_releases(tmp_path):
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2/wiki.train.tokens").write_text("a\n")
    (tmp_path / "wikitext-2/wiki.test.raw").write_text("t\n")
    assert texts_of(load("wikitext-2", tmp_path)[0]) == {"train": ["a\n"], "validation": ["t\n"]}


# ------------------------------------------------------------------------------------------------------- the hub, bin


def hub_folder(folder, train, validation=None):
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    for split, values in {"train": train, "validation": validation}.items():
        if values is not None:
            parquet.write_table(pyarrow.table({"text": values}), folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_a_hub_dataset_in_a_local_folder(tmp_path):
    folder = hub_folder(tmp_path / "data_set", ["one", "two"], ["three"])
    corpus, _ = load(f"hf:{folder}")
    assert texts_of(corpus) == {"train": ["one", "two"], "validation": ["three"]}
    assert corpus == load_corpus(f"hf:{folder}", None, print, "text")
    with pytest.raises(UserError, match="no column 'body'; it has 'text'"):
        load_corpus(f"hf:{folder}", None, print, "body")


def test_a_hub_dataset_without_validation_has_no_splits(tmp_path):
    assert texts_of(load(f"hf:{hub_folder(tmp_path / 'whole', ['one', 'two'])}")[0]) == {"all": ["one", "two"]}


def test_a_hub_dataset_of_other_files_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x.csv").write_text("text\na\n")
    with pytest.raises(UserError, match="not of parquet files"):
        load(f"hf:{tmp_path / 'other'}")


def test_a_text_in_memory_is_identified_as_its_file_is(tmp_path):
    (tmp_path / "x.txt").write_text("Grüße", encoding="utf-8")
    assert corpus_from_text("x", "Grüße", "").sha256 == load_file(tmp_path / "x.txt").sha256


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv"])
def test_compressed_files_are_read_as_what_they_hold(tmp_path, name, suffix):
    texts = ["Grüße, \U0001f600\n", "two " * 3000]
    rows = {"x.txt": "".join(texts), "x.jsonl": "".join(json.dumps({"text": t}) + "\n" for t in texts)}
    rows["x.csv"] = 'text\n"Grüße"\n"two"\n'
    (tmp_path / name).write_text(rows[name], encoding="utf-8")
    data = (tmp_path / name).read_bytes()
    with pyarrow.CompressedOutputStream(str(tmp_path / (name + suffix)), {".gz": "gzip", ".zst": "zstd"}[suffix]) as f:
        f.write(data)
    plain, compressed = (load(f"file:{tmp_path / n}")[0] for n in (name, name + suffix))
    assert texts_of(compressed) == texts_of(plain) and compressed.sha256 == plain.sha256


@pytest.mark.parametrize("suffix, codec", [(".gz", "gzip"), (".zst", "zstd")])
def test_damaged_compressed_files_and_bombs_are_refused(tmp_path, suffix, codec, monkeypatch):
    path = tmp_path / f"x.txt{suffix}"
    text = " ".join(random.Random(0).choices(["two", "late", "goals"], k=5000))
    packed = pyarrow.compress(text.encode(), codec, asbytes=True)
    for damaged in (packed[: len(packed) // 2], b"no such thing", packed[:20] + b"\0" * 20 + packed[40:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"x.txt{suffix}: "):
            load(f"file:{path}")
    monkeypatch.setattr(readers, "PARQUET_FLOOR", 2**16)
    path.write_bytes(pyarrow.compress(b"0" * 2**22, codec, asbytes=True))
    with pytest.raises(UserError, match="times the file and more"):
        load(f"file:{path}")


def test_a_folder_of_save_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": ["one", "two"]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "several")
    for kind in ("hf", "file"):
        assert texts_of(load(f"{kind}:{tmp_path / 'one'}")[0]) == {"all": ["one", "two"]}
        found = texts_of(load_corpus(f"{kind}:{tmp_path / 'several'}", None, print, "text", "auto"))
        assert found == {"train": ["one", "two"], "validation": ["two"]}
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a folder of save_to_disk"):
        load(f"file:{tmp_path / 'one'}")
