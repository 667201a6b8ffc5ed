"""Tokenizers: characters, bytes, GPT-2's byte pairs, or byte pairs trained on the corpus.

Every run directory holds its tokenizer as JSON. Every tokenizer has

    vocab_size      the number of tokens, V
    end_of_text     the id of the token that ends a document, or None
    n_bytes_V       int64 [V], the number of UTF-8 bytes that each token stands for, 0 for the end of a text: with it,
                    losses per byte of different tokenizers are comparable
    encode          text -> ids
    decode_stream   ids -> text, piece by piece
"""

import codecs
import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import strict_json
from jaxgpt.data.corpora import Corpus
from jaxgpt.data.files import RemoteFile, atomic_write, cache_folder, data_folders, find_or_download, read_small
from jaxgpt.data.readers import pieces_of
from jaxgpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"
DOCUMENTED_PROMPT = "ROMEO:"
LONGEST_WORD = 20_000  # characters of one kind in a row: the time to learn pairs from them grows with the square
MAX_FILE_BYTES = 2**28  # of a tokenizer's JSON: a million byte pairs take a third of it
LONGEST_BLANK = 100_000  # white-space characters in a row: tiktoken's patterns would exhaust the stack


def _run_of(length: int, *kinds: str) -> re.Pattern[str]:
    """A pattern that finds `length` characters of one kind in a row.

    It tries each run once, from its start, so the search takes linear time.
    """
    return re.compile("|".join(f"(?<!{kind}){kind}{{{length}}}" for kind in kinds))


_TOO_LONG_BLANK = _run_of(LONGEST_BLANK, r"\s")
_TOO_LONG_TO_LEARN = _run_of(LONGEST_WORD, r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)")
_TOO_LONG_BLANK_TO_LEARN = _run_of(LONGEST_WORD, r"\s")

# In tiktoken's cache, the name of a file is the SHA-1 of its URL.
GPT2_FILES = (
    RemoteFile(
        url="https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
        sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        file="tiktoken/6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    ),
    RemoteFile(
        url="https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
        sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        file="tiktoken/6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    ),
)


class CharTokenizer:
    """One token per character.

    Args:
        chars: the vocabulary, distinct characters sorted by code point. A character's id is its position.
    """

    kind = "char"
    end_of_text = None

    def __init__(self, chars: str):
        assert list(chars) == sorted(set(chars)), "the vocabulary must be sorted and distinct"
        self.chars = chars
        self.vocab_size = len(chars)
        self._codes = np.array([ord(c) for c in chars], np.uint32)
        self.n_bytes_V = np.array([len(c.encode("utf-8", "surrogatepass")) for c in chars])

    @classmethod
    def from_text(cls, text: Iterable[str]) -> "CharTokenizer":
        """The tokenizer of a text's distinct characters; as documented, of the whole text with its validation part."""
        chars: set[str] = set()
        for piece in text:
            chars.update(piece)
        return cls("".join(sorted(chars)))

    def encode(self, text: str) -> np.ndarray:
        """The ids, int32 [len(text)].

        Raises:
            UserError: a character is not in the vocabulary. The message names the first one.
        """
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = np.minimum(np.searchsorted(self._codes, codes), self.vocab_size - 1)
        unseen = self._codes[ids] != codes
        if unseen.any():
            position = int(unseen.argmax())
            raise UserError(
                f"the character {text[position]!r} (U+{codes[position]:04X}, position {position}) is not in the "
                f"vocabulary of {self.vocab_size} characters; use only characters of the training text"
            )
        return ids.astype(np.int32)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The character of each id."""
        for i in ids:
            yield self.chars[i]

    def to_json(self) -> dict:
        """What `load` reads. Likewise for the other tokenizers."""
        return {"kind": self.kind, "chars": self.chars}


class ByteTokenizer:
    """One token per byte of the UTF-8 encoding, so every text can be encoded."""

    kind = "byte"
    end_of_text = None
    vocab_size = 256
    n_bytes_V = np.ones(256, np.int64)

    def encode(self, text: str) -> np.ndarray:
        """The ids, int32 [number of bytes].

        Raises:
            UserError: the text has a lone surrogate, as from an argument that is not UTF-8.
        """
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The characters that each id completes. Invalid bytes become U+FFFD."""
        return _decode_utf8(bytes([i]) for i in ids)

    def to_json(self) -> dict:
        return {"kind": self.kind}


class _BytePairTokenizer:
    """The common part of byte-pair tokenizers. A text never encodes to the end-of-text token, even if it spells it.

    Args:
        token_bytes: the bytes of each token, without the end-of-text token, which takes the last id.
        encode_ordinary: the library's encoder.
    """

    def __init__(self, token_bytes: Sequence[bytes], encode_ordinary: Callable[[str], list[int]]):
        self.end_of_text = len(token_bytes)
        self.vocab_size = len(token_bytes) + 1
        self.token_bytes = [*token_bytes, END_OF_TEXT.encode()]
        self._encode_ordinary = encode_ordinary

    @cached_property
    def n_bytes_V(self) -> np.ndarray:
        return np.array([*(len(token) for token in self.token_bytes[:-1]), 0])

    def encode(self, text: str) -> np.ndarray:
        """The ids, int32 [number of tokens].

        Raises:
            UserError: the text has a lone surrogate, or `LONGEST_BLANK` white-space characters in a row.
        """
        _utf8(text)
        if _TOO_LONG_BLANK.search(text):
            raise UserError(f"the text holds a run of {LONGEST_BLANK:,} blanks; shorten it")
        # In pieces: `tokenizers` uses 200 bytes of memory for each byte of a text.
        ids = [np.array(self._encode_ordinary(piece), np.int32) for piece in pieces_of(text)]
        return np.concatenate(ids) if ids else np.zeros(0, np.int32)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The characters that each id completes. Invalid bytes become U+FFFD."""
        return _decode_utf8(self.token_bytes[i] for i in ids)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"the text is not valid UTF-8 at position {e.start}; give UTF-8 text") from None


def _decode_utf8(pieces: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


class Gpt2Tokenizer(_BytePairTokenizer):
    """GPT-2's 50,256 byte pairs and the end of text, through tiktoken.

    Args:
        folder: holds tiktoken's two files, as `gpt2_folder` finds and verifies them.
    """

    kind = "gpt2"

    def __init__(self, folder: Path):
        import tiktoken

        before = os.environ.get("TIKTOKEN_CACHE_DIR")
        os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)  # tiktoken takes a folder in no other way
        try:
            encoding = tiktoken.get_encoding("gpt2")
        finally:
            if before is None:
                del os.environ["TIKTOKEN_CACHE_DIR"]
            else:
                os.environ["TIKTOKEN_CACHE_DIR"] = before
        self.folder = folder
        token_bytes = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
        super().__init__(token_bytes, encoding.encode_ordinary)

    def to_json(self) -> dict:
        return {"kind": self.kind, "folder": os.path.abspath(self.folder)}


class BpeTokenizer(_BytePairTokenizer):
    """Byte pairs trained on a corpus with the `tokenizers` library: GPT-2's pattern, the 256 bytes, then the merges.

    Args:
        model: the library's tokenizer, in the library's JSON.
    """

    kind = "bpe"

    def __init__(self, model: str):
        import tokenizers

        self._model = model
        tokenizer = tokenizers.Tokenizer.from_str(model)
        byte_of = {char: byte for byte, char in enumerate(byte_chars())}
        by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if [i for _, i in by_id] != list(range(len(by_id))):
            raise ValueError("the ids of the tokens are not 0, 1, 2, ...")
        token_bytes = [bytes(byte_of[char] for char in token) for token, _ in by_id]
        super().__init__(token_bytes, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BpeTokenizer":
        """A tokenizer with at most `vocab_size` tokens, fewer if the texts have no more pairs to merge.

        Args:
            vocab_size: with the 256 bytes and the end of text.

        Raises:
            UserError: a text has a word of `LONGEST_WORD` characters, or as many blanks in a row.
        """
        import tokenizers

        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(map(_require_short_words, texts), trainer)
        return cls(tokenizer.to_str())

    def to_json(self) -> dict:
        return {"kind": self.kind, "model": strict_json.loads(self._model)}


def _require_short_words(text: str) -> str:
    """Returns the text if the `tokenizers` library learns from each of its words within a second, else raises."""
    too_long = _TOO_LONG_BLANK_TO_LEARN.search(text)
    if not too_long and max(map(len, text.split()), default=0) >= LONGEST_WORD:  # a cheap test before the search
        too_long = _TOO_LONG_TO_LEARN.search(text)
    if too_long:
        raise UserError(
            f"the text holds {LONGEST_WORD:,} letters, digits, signs or blanks in a row ({too_long[0][:20]!r}...), too "
            "many to learn pairs from; break them up or give --tokenizer char, byte or gpt2"
        )
    return text


Tokenizer = CharTokenizer | ByteTokenizer | Gpt2Tokenizer | BpeTokenizer


def make_tokenizer(
    kind: str, corpus: Corpus, data_dir: Path | None = None, say: Callable[[str], None] = lambda line: None
) -> Tokenizer:
    """The tokenizer for a corpus.

    Args:
        kind: the configuration's `tokenizer`: "char", "byte", "gpt2" or "bpe:N", N the vocabulary's size.
        data_dir: a folder to search for GPT-2's vocabulary before all others.
        say: receives lines about a download or a training.

    Raises:
        UserError: GPT-2's vocabulary is not available; the corpus consists of tokens of another tokenizer; or a text
            cannot be encoded.
    """
    chars = corpus.nanogpt.chars if corpus.nanogpt else None
    if chars is not None:
        if kind != "char":
            raise UserError(
                f"--tokenizer {kind}: the tokens of {corpus.name} are {len(chars)} characters, by its meta.pkl; give "
                "--tokenizer char"
            )
        return CharTokenizer(chars)
    if corpus.holds_tokens and kind not in ("gpt2", "byte"):
        unknown = ", and no meta.pkl says which characters they are" if corpus.nanogpt else ""
        raise UserError(
            f"--tokenizer {kind}: {corpus.name} holds tokens, not texts{unknown}; give the one they were made with, "
            "gpt2 or byte"
        )
    if corpus.shards and kind not in ("gpt2", "byte"):
        raise UserError(
            f"--tokenizer {kind}: is made from all texts, and {corpus.name} is streamed; give gpt2 or byte, or "
            "--streaming never"
        )
    if kind == "byte":
        return ByteTokenizer()
    if kind == "gpt2":
        return Gpt2Tokenizer(gpt2_folder(data_dir, say))
    if kind == "char":
        return CharTokenizer.from_text(text for texts in corpus.splits.values() for text in texts())
    return _trained_bpe(corpus, int(kind.removeprefix("bpe:")), say)


_MARKS = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}  # in common fonts


def visible(tokenizer: Tokenizer, i: int) -> str:
    r"""A printable form of a token: marks for white space, code points for what does not print, `\xNN` for bytes."""
    if isinstance(tokenizer, CharTokenizer):
        text = tokenizer.chars[i]
    else:
        token = bytes([i]) if isinstance(tokenizer, ByteTokenizer) else tokenizer.token_bytes[i]
        text = token.decode("utf-8", "backslashreplace")
    return "".join(_MARKS.get(c) or (c if c.isprintable() else f"U+{ord(c):04X}") for c in text)


def choice(tokenizer: Tokenizer) -> str:
    """The value of `--tokenizer` that makes a tokenizer of this kind and size."""
    return f"bpe:{tokenizer.vocab_size}" if isinstance(tokenizer, BpeTokenizer) else tokenizer.kind


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of the ids."""
    return "".join(tokenizer.decode_stream(ids))


def load(path: Path) -> Tokenizer:
    """The tokenizer of a file that holds its `to_json()`.

    Raises:
        OSError: the file cannot be read, or is no regular file.
        ValueError: the file holds no tokenizer.
        UserError: GPT-2's vocabulary is not available.
    """
    return from_json(strict_json.loads(read_small(path, MAX_FILE_BYTES)))


def from_json(values: Any) -> Tokenizer:
    """The inverse of a tokenizer's `to_json`.

    Raises:
        ValueError: the values describe no tokenizer.
        UserError: GPT-2's vocabulary is not available.
    """
    try:
        return _from_json(values)
    except (AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"no tokenizer ({type(e).__name__}: {e})") from None


def _from_json(values: Any) -> Tokenizer:
    match values["kind"]:
        case "byte":
            return ByteTokenizer()
        case "char":
            chars = values["chars"]
            if isinstance(chars, str) and chars and list(chars) == sorted(set(chars)):
                return CharTokenizer(chars)
        case "gpt2":
            return Gpt2Tokenizer(gpt2_folder(Path(values["folder"]).parent, lambda line: None))
        case "bpe":
            try:
                return BpeTokenizer(strict_json.dumps(values["model"]))
            except Exception as e:  # the library raises bare Exceptions
                raise ValueError(f"no tokenizer: {e}") from None
    raise ValueError("no vocabulary of sorted characters")


def same(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether both tokenizers encode every text alike."""
    return identity(a.to_json()) == identity(b.to_json())


def identity(values: dict) -> dict:
    """What determines a tokenizer's encoding: its JSON without the folder of its files."""
    return {name: value for name, value in values.items() if name != "folder"}


def sample_prompt(prompt: str | None, tokenizer: Tokenizer, corpus: Corpus) -> str:
    """The prompt of a run's sample: the one given, else the documented one, or a character that the vocabulary has.

    Args:
        prompt: the value of `--prompt`; None without the flag.

    Raises:
        UserError: `--prompt` has characters outside the vocabulary.
    """
    try:
        tokenizer.encode(prompt or DOCUMENTED_PROMPT)
    except UserError as e:
        if prompt:
            raise UserError(f"--prompt: {e}") from None
        if corpus.holds_tokens:  # characters, as the others encode every text
            return decode(tokenizer, [0])
        texts = next(iter(corpus.splits.values()))
        return next(text[0] for text in texts() if text)
    return prompt or DOCUMENTED_PROMPT


def gpt2_folder(data_dir: Path | None, say: Callable[[str], None]) -> Path:
    """The folder of tiktoken's two files for GPT-2, verified.

    Searches `TIKTOKEN_CACHE_DIR`, then `tiktoken` in the data folders; else downloads the files into the cache.

    Args:
        data_dir: a folder to search before the other data folders; None without `--data-dir`.
        say: receives a line if a damaged file of the cache is downloaded again.

    Raises:
        NotAvailable: the files are not on this machine and cannot be downloaded.
        UserError: a folder other than the cache has different files under these names.
    """
    folders, remotes = data_folders(data_dir), list(GPT2_FILES)
    tiktoken_folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    in_tiktoken_folder = [dataclasses.replace(remote, file=Path(remote.file).name) for remote in remotes]
    if tiktoken_folder and _has_files(Path(tiktoken_folder), in_tiktoken_folder):
        folders, remotes = [Path(tiktoken_folder), *folders[-1:]], in_tiktoken_folder
    # The first folder with both files, so that a folder with one of them does not hide a complete one after it.
    complete = [folder for folder in folders[:-1] if _has_files(folder, remotes)][:1]
    folders = [*complete, folders[-1]] if complete else folders
    option, alternative = "--tokenizer gpt2", "--tokenizer char, byte or bpe:N"
    return [find_or_download(remote, option, folders, say, alternative) for remote in remotes][0].parent


def _has_files(folder: Path, remotes: list[RemoteFile]) -> bool:
    return all(os.path.isfile(folder / remote.file) for remote in remotes)


def _trained_bpe(corpus: Corpus, vocab_size: int, say: Callable[[str], None]) -> BpeTokenizer:
    """The byte pairs of a corpus' training texts, or of all texts if it has no splits; kept in the cache."""
    import tokenizers

    path = cache_folder() / "tokenizers" / f"bpe-{vocab_size}-{corpus.sha256}-{tokenizers.__version__}-digest.json"
    try:
        values = strict_json.loads(read_small(path, MAX_FILE_BYTES))
        if values.pop("sha256") == _digest(values):
            return BpeTokenizer(strict_json.dumps(values["model"]))
        say(f"{path} is damaged; training the vocabulary again")
    except FileNotFoundError:
        pass
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        say(f"{path} is damaged; training the vocabulary again")
    say(f"training a byte-pair vocabulary of {vocab_size:,} entries")
    texts = corpus.splits.get("train") or corpus.splits["all"]
    try:
        tokenizer = BpeTokenizer.train(texts(), vocab_size)
    except UserError as e:
        raise UserError(f"--dataset {corpus.name}: {e}") from None
    if tokenizer.vocab_size < vocab_size:
        say(f"the corpus has pairs to merge for {tokenizer.vocab_size:,} entries only")
    try:
        values = tokenizer.to_json()
        atomic_write(path, strict_json.dumps(values | {"sha256": _digest(values)}).encode())
    except OSError:  # without a cache the next start trains it again
        pass
    return tokenizer


def _digest(values: Any) -> str:
    return hashlib.sha256(strict_json.dumps(values, sort_keys=True).encode()).hexdigest()


def byte_chars() -> list[str]:
    """GPT-2's printable character for each byte: its own if it prints, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
