"""Finding, downloading and refusing data. The network's part is played by a server on this machine."""

import functools
import hashlib
import http.server
import threading
import time

import numpy as np
import pytest

from jaxgpt import data_files, datasets
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.errors import UserError
from jaxgpt.run_folder import recorded_choice
from jaxgpt.tokenizer import ByteTokenizer, make_tokenizer
from jaxgpt.tokens import split_tokens


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No data in any folder, an empty cache."""
    monkeypatch.setattr(data_files, "CHECKOUT", tmp_path / "checkout")
    monkeypatch.delenv("JAXGPT_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture
def server(nowhere, monkeypatch):
    """A stand-in for the network: serves a folder, and makes `tinyshakespeare` a small text on it."""
    folder = nowhere / "served"
    folder.mkdir()
    data = ("Words, words, words.\n" * 500).encode()
    (folder / "input.txt").write_bytes(data)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    remote = datasets.Remote(
        f"http://127.0.0.1:{served.server_port}/input.txt",
        hashlib.sha256(data).hexdigest(),
        "tinyshakespeare/input.txt",
    )
    monkeypatch.setitem(datasets.REMOTES, "tinyshakespeare", remote)
    yield folder
    served.shutdown()


def load(spec, data_dir=None):
    said = []
    return datasets.load_corpus(spec, data_dir, said.append), said


def put(folder, data):
    path = folder / "tinyshakespeare/input.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path


def test_downloads_verifies_and_caches(server, nowhere, capfd):
    corpus, _ = load("tinyshakespeare")
    assert corpus.text.startswith("Words, words") and len(corpus.text) == 10500
    assert "tinyshakespeare" in capfd.readouterr().err  # the progress bar
    cached = nowhere / "cache/jaxgpt/data/tinyshakespeare"
    assert [p.name for p in cached.iterdir()] == ["input.txt"]  # nothing partial stays
    (server / "input.txt").unlink()
    assert load("tinyshakespeare")[0] == corpus


def test_a_download_that_is_another_file_is_not_kept(server, nowhere):
    (server / "input.txt").write_bytes(b"Something else")
    with pytest.raises(UserError, match="not the file"):
        load("tinyshakespeare")
    assert not list((nowhere / "cache/jaxgpt/data/tinyshakespeare").iterdir())


def test_a_damaged_cache_is_downloaded_again(server, nowhere):
    path = put(nowhere / "cache/jaxgpt/data", b"damaged")
    corpus, said = load("tinyshakespeare")
    assert corpus.text.startswith("Words") and path.read_text() == corpus.text
    assert len(said) == 1 and "damaged" in said[0]


def test_a_missing_page_is_told(server):
    (server / "input.txt").unlink()
    with pytest.raises(UserError, match="404"):
        load("tinyshakespeare")


def test_folders_are_searched_in_order(server, nowhere, monkeypatch):
    data = (server / "input.txt").read_bytes()
    (server / "input.txt").unlink()  # the network has nothing
    flag, env = nowhere / "flag", nowhere / "env"
    order = [nowhere / "checkout/../shared/data", nowhere / "shared/data", nowhere / "checkout/data"]
    order += [nowhere / "work/data", env, flag]
    (nowhere / "checkout").mkdir()
    monkeypatch.setenv("JAXGPT_DATA_DIR", str(env))
    flag.mkdir()
    found = []
    for folder in order:
        if not (folder / "tinyshakespeare").exists():
            put(folder, data)
        found.append(load("tinyshakespeare", flag)[0].source)
    assert found[-1].startswith(str(flag)) and found[-2].startswith(str(env))
    assert found[-3] == str(nowhere / "work/data/tinyshakespeare/input.txt") and len(set(found)) == 5


def test_another_file_in_a_folder_is_refused(server, nowhere):
    put(nowhere / "work/data", b"my own text")
    with pytest.raises(UserError, match="another file.*--dataset file:"):
        load("tinyshakespeare")


@pytest.mark.parametrize("host", ["does-not-exist.invalid", "127.0.0.1:9"])
def test_without_a_network_refused_within_five_seconds(nowhere, monkeypatch, host):
    remote = datasets.REMOTES["tinyshakespeare"]
    monkeypatch.setitem(
        datasets.REMOTES, "tinyshakespeare", datasets.Remote(f"http://{host}/x", remote.sha256, remote.file)
    )
    begun = time.monotonic()
    with pytest.raises(UserError) as e:
        load("tinyshakespeare")
    assert time.monotonic() - begun < 5
    message = str(e.value)
    assert "--dataset pydoc" in message and str(nowhere / "work/data") in message and "put the file" in message


def test_a_host_that_never_answers_is_given_up(nowhere, monkeypatch):
    def never(*args, **kwargs):
        time.sleep(2)
        raise OSError

    monkeypatch.setattr(data_files.urllib.request, "urlopen", never)
    begun = time.monotonic()
    assert data_files.unreachable("http://x/", seconds=0.2) == "no answer"
    assert time.monotonic() - begun < 1.5


def test_a_list_takes_the_first_that_can_be_had(nowhere, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    corpus, said = load("tinyshakespeare,pydoc")
    assert corpus.name == "pydoc" and len(said) == 1 and "pydoc" in said[0]
    assert len(corpus.text) > 100_000


def test_a_run_is_resumed_with_the_dataset_it_was_begun_with(tmp_path):
    """Begun offline with pydoc: the same list names it again when the first of the list can be had."""
    assert recorded_choice(tmp_path, "tinyshakespeare,pydoc") == "tinyshakespeare,pydoc"
    (tmp_path / "data.json").write_text('{"dataset": "pydoc"}')
    assert recorded_choice(tmp_path, "tinyshakespeare, pydoc") == "pydoc"
    assert recorded_choice(tmp_path, "tinyshakespeare") == "tinyshakespeare"
    assert recorded_choice(None, "tinyshakespeare,pydoc") == "tinyshakespeare,pydoc"


def test_unknown_names_in_a_list_are_refused_at_once(nowhere):
    with pytest.raises(UserError, match="'shakespere'.*choose of tinyshakespeare, pydoc, .*file:PATH"):
        load("pydoc,shakespere")


def test_files(nowhere, tmp_path):
    path = tmp_path / "a,b.txt"
    path.write_text("Grüße\r\n", encoding="utf-8", newline="")
    corpus, _ = load(f"file:{path}")
    assert corpus.text == "Grüße\r\n" and corpus.name == f"file:{path}"  # line ends stay; the name is absolute
    with pytest.raises(UserError, match="no such file"):
        load("file:nothing.txt")
    with pytest.raises(UserError, match="cannot be read"):
        load(f"file:{tmp_path}")
    path.write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        load(f"file:{path}")
    path.write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="not UTF-8 text .byte 2."):
        load(f"file:{path}")
    with pytest.raises(UserError, match="--data-dir"):
        load("tinyshakespeare", tmp_path / "nothing")


def config_of(block_size=16, **values):
    return TrainConfig(model=ModelConfig(block_size=block_size), **values)


def test_split_is_the_documented_one(text):
    corpus = datasets.of_text("x", text, "")
    tokenizer = make_tokenizer("char", corpus)
    train, val = split_tokens(corpus, tokenizer, config_of())
    assert (
        len(train) == int(0.9 * len(text)) and np.concatenate([train, val]).tolist() == tokenizer.encode(text).tolist()
    )


@pytest.mark.parametrize("n_bytes, fits", [(160, False), (161, True)])
def test_a_text_must_hold_a_block_plus_one(n_bytes, fits):
    """161 bytes: 144 train and 17 validate, a block of 16 plus one."""
    corpus = datasets.of_text("x", "a" * n_bytes, "")
    if fits:
        assert len(split_tokens(corpus, ByteTokenizer(), config_of())[1]) == 17
    else:
        with pytest.raises(UserError, match="--model.block-size"):
            split_tokens(corpus, ByteTokenizer(), config_of())
