"""Text to token ids and back: characters, bytes, GPT-2's byte pairs, or byte pairs of one's own corpus.

A tokenizer is saved as JSON inside each run. All have `vocab_size`; `end_of_text`, the id that ends a document, or
None; `n_bytes_V`, how many bytes of UTF-8 each token stands for (0 for the end of a text), so that losses per byte
compare.
"""

import codecs
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from jaxgpt.data_files import Remote, cache_folder, data_folders, find, write_whole
from jaxgpt.datasets import Corpus
from jaxgpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"
LONGEST_WORD = 20_000  # of one kind of characters: to train on it takes time that grows with its square


def _run(length: int, *kinds: str) -> re.Pattern[str]:
    """Finds so many characters of one kind in a row. Each run is looked at once, from its start: time is linear."""
    return re.compile("|".join(f"(?<!{kind}){kind}{{{length}}}" for kind in kinds))


_ENDLESS = _run(100_000, r"\s")
_LONG_WORD, _LONG_BLANK = _run(LONGEST_WORD, r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)"), _run(LONGEST_WORD, r"\s")

# tiktoken's own cache names a file by the digest of its address.
GPT2_FILES = (
    Remote(
        url="https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
        sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        file="tiktoken/6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    ),
    Remote(
        url="https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
        sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        file="tiktoken/6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    ),
)


class CharTokenizer:
    """One token per character; ids follow the sorted order of the vocabulary's characters (code points)."""

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
        """The vocabulary as in the write-ups: every distinct character of the whole text, validation part included."""
        chars: set[str] = set()
        for piece in text:
            chars.update(piece)
        return cls("".join(sorted(chars)))

    def encode(self, text: str) -> np.ndarray:
        """The ids, int32 [len(text)]. Raises `UserError` naming the first character outside the vocabulary."""
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
        """The text of each id as it comes."""
        for i in ids:
            yield self.chars[i]

    def to_json(self) -> dict:
        return {"kind": self.kind, "chars": self.chars}


class ByteTokenizer:
    """One token per byte of the UTF-8 encoding; knows every text."""

    kind = "byte"
    end_of_text = None
    vocab_size = 256
    n_bytes_V = np.ones(256, np.int64)

    def encode(self, text: str) -> np.ndarray:
        """The ids, int32 [number of bytes]. A lone surrogate (undecodable argument bytes) raises `UserError`."""
        try:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        except UnicodeEncodeError as e:
            raise UserError(f"the text is not valid UTF-8 at position {e.start}; give UTF-8 text") from None

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text as its bytes complete characters; bytes that form none come out as U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield decoder.decode(bytes([i]))
        yield decoder.decode(b"", final=True)

    def to_json(self) -> dict:
        return {"kind": self.kind}


class _BytePairs:
    """What tokenizers of byte pairs share; their texts never hold the end-of-text token, whatever is written there."""

    def __init__(self, token_bytes: Sequence[bytes]):
        self.end_of_text = len(token_bytes)
        self.vocab_size = len(token_bytes) + 1
        self._bytes = [*token_bytes, END_OF_TEXT.encode()]

    @cached_property
    def n_bytes_V(self) -> np.ndarray:
        return np.array([*(len(token) for token in self._bytes[:-1]), 0])

    def encode(self, text: str) -> np.ndarray:
        """The ids, int32 [number of tokens]. A lone surrogate raises `UserError`."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise UserError(f"the text is not valid UTF-8 at position {e.start}; give UTF-8 text") from None
        if _ENDLESS.search(text):  # tiktoken's patterns would exhaust the stack
            raise UserError("the text holds a run of 100,000 blanks; shorten it")
        return np.array(self._encode(text), np.int32)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text as tokens complete characters; bytes that form none come out as U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield decoder.decode(self._bytes[i])
        yield decoder.decode(b"", final=True)


class Gpt2Tokenizer(_BytePairs):
    """GPT-2's byte pairs through tiktoken, 50,257 with the end of text.

    Args:
        folder: holds tiktoken's two files, verified.
    """

    kind = "gpt2"

    def __init__(self, folder: Path):
        import tiktoken

        before = os.environ.get("TIKTOKEN_CACHE_DIR")
        os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
        try:
            encoding = tiktoken.get_encoding("gpt2")
        finally:
            if before is None:
                del os.environ["TIKTOKEN_CACHE_DIR"]
            else:
                os.environ["TIKTOKEN_CACHE_DIR"] = before
        self.folder = folder
        self._encode = encoding.encode_ordinary
        super().__init__([encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)])

    def to_json(self) -> dict:
        return {"kind": self.kind, "folder": os.path.abspath(self.folder)}


class BpeTokenizer(_BytePairs):
    """Byte pairs of a corpus, by the `tokenizers` library: GPT-2's pattern, the 256 bytes, then the merges.

    Args:
        model: the library's tokenizer as its JSON.
    """

    kind = "bpe"

    def __init__(self, model: str):
        import tokenizers

        self._model = model
        tokenizer = tokenizers.Tokenizer.from_str(model)
        self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        byte_of = {char: byte for byte, char in enumerate(_byte_chars())}
        in_order = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        super().__init__([bytes(byte_of[char] for char in token) for token, _ in in_order])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BpeTokenizer":
        """Of at most `vocab_size` entries with the end of text; fewer if the corpus has no more pairs to merge.

        Raises:
            UserError: a text holds a word of `LONGEST_WORD` characters, or as many blanks.
        """
        import tokenizers

        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(map(_require_words, texts), trainer)
        return cls(tokenizer.to_str())

    def to_json(self) -> dict:
        return {"kind": self.kind, "model": json.loads(self._model)}


def _require_words(text: str) -> str:
    """The text, if the `tokenizers` library can learn from each of its words within a second."""
    found = _LONG_BLANK.search(text)
    if not found and max(map(len, text.split()), default=0) >= LONGEST_WORD:  # rare, and quicker to see
        found = _LONG_WORD.search(text)
    if found:
        raise UserError(
            f"the text holds {LONGEST_WORD:,} letters, digits, signs or blanks in a row ({found[0][:20]!r}...), too "
            "many to learn pairs from; break them up or give --tokenizer char, byte or gpt2"
        )
    return text


Tokenizer = CharTokenizer | ByteTokenizer | Gpt2Tokenizer | BpeTokenizer


def make_tokenizer(
    kind: str, corpus: Corpus, data_dir: Path | None = None, say: Callable[[str], None] = lambda line: None
) -> Tokenizer:
    """The tokenizer of a configuration's `tokenizer` field for a corpus.

    Raises:
        UserError: GPT-2's vocabulary cannot be had; or the corpus is of tokens already, and not of such.
    """
    if corpus.bins and kind not in ("gpt2", "byte"):
        raise UserError(f"--tokenizer {kind}: {corpus.name} holds tokens, not texts; give the one they were made with")
    if kind == "byte":
        return ByteTokenizer()
    if kind == "gpt2":
        return Gpt2Tokenizer(gpt2_folder(data_dir, say))
    if kind == "char":
        return CharTokenizer.from_text(text for texts in corpus.splits.values() for text in texts())
    return _trained(corpus, int(kind.removeprefix("bpe:")), say)


# Marks that common fonts have.
_MARKS = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}


def visible(tokenizer: Tokenizer, i: int) -> str:
    """One token for a person: white space as marks, what does not print as its number, stray bytes as \\xNN."""
    if isinstance(tokenizer, CharTokenizer):
        text = tokenizer.chars[i]
    else:
        token = bytes([i]) if isinstance(tokenizer, ByteTokenizer) else tokenizer._bytes[i]
        text = token.decode("utf-8", "backslashreplace")
    return "".join(_MARKS.get(c) or (c if c.isprintable() else f"U+{ord(c):04X}") for c in text)


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The whole text of the ids."""
    return "".join(tokenizer.decode_stream(ids))


def load(path: Path) -> Tokenizer:
    """The inverse of writing `to_json()` to a file.

    Raises:
        ValueError or KeyError: it holds no tokenizer. UserError: GPT-2's vocabulary cannot be had.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    match values["kind"]:
        case "byte":
            return ByteTokenizer()
        case "char" if list(values["chars"]) == sorted(set(values["chars"])):
            return CharTokenizer(values["chars"])
        case "gpt2":
            return Gpt2Tokenizer(gpt2_folder(Path(values["folder"]).parent, lambda line: None))
        case "bpe":
            try:
                return BpeTokenizer(json.dumps(values["model"]))
            except Exception as e:  # the library raises bare Exceptions
                raise ValueError(f"no tokenizer: {e}") from None
    raise ValueError("no vocabulary of sorted characters")


def same(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether both give every text the same ids."""
    forms = [{name: value for name, value in t.to_json().items() if name != "folder"} for t in (a, b)]
    return forms[0] == forms[1]


def gpt2_folder(data_dir: Path | None, say: Callable[[str], None]) -> Path:
    """The folder with tiktoken's two files, verified: `TIKTOKEN_CACHE_DIR`, the data folders, or downloaded."""
    own, named, instead = os.environ.get("TIKTOKEN_CACHE_DIR"), "--tokenizer gpt2", "--tokenizer char, byte or bpe:N"
    folders, remotes = data_folders(data_dir), list(GPT2_FILES)
    bare = [dataclasses.replace(remote, file=Path(remote.file).name) for remote in remotes]
    if own and all(os.path.isfile(Path(own) / remote.file) for remote in bare):
        folders, remotes = [Path(own), *folders[-1:]], bare
    # Of the folders the first with both, so that one cut off halfway through a download does not hide another.
    there = [f for f in folders[:-1] if all(os.path.isfile(f / remote.file) for remote in remotes)][:1]
    looked = there + folders[-1:] if there else folders
    return [find(remote, named, looked, say, instead) for remote in remotes][0].parent


def _trained(corpus: Corpus, vocab_size: int, say: Callable[[str], None]) -> BpeTokenizer:
    """A BPE of the corpus' training texts (all texts of one that is not yet split), kept in the cache."""
    import tokenizers

    path = cache_folder() / "tokenizers" / f"bpe-{vocab_size}-{corpus.sha256}-{tokenizers.__version__}.json"
    try:
        tokenizer = load(path)
        if isinstance(tokenizer, BpeTokenizer):
            return tokenizer
    except (OSError, AttributeError, KeyError, TypeError, ValueError):  # not there, or damaged
        pass
    say(f"training a byte-pair vocabulary of {vocab_size:,} entries")
    texts = corpus.splits.get("train") or corpus.splits["all"]
    try:
        tokenizer = BpeTokenizer.train(texts(), vocab_size)
    except UserError as e:
        raise UserError(f"--dataset {corpus.name}: {e}") from None
    if tokenizer.vocab_size < vocab_size:
        say(f"the corpus has pairs to merge for {tokenizer.vocab_size:,} entries only")
    try:
        write_whole(path, json.dumps(tokenizer.to_json()).encode())
    except OSError:  # a cache that cannot be written only costs time
        pass
    return tokenizer


def _byte_chars() -> list[str]:
    """GPT-2's visible character for each byte: itself where it prints, else the next free one from U+0100 on."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return [chr(byte if byte in prints else next(free)) for byte in range(256)]
