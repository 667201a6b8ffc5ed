"""Text to token ids and back: characters or bytes. A tokenizer is saved as JSON inside each run."""

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from jaxgpt.errors import UserError


class CharTokenizer:
    """One token per character; ids follow the sorted order of the vocabulary's characters (code points)."""

    kind = "char"

    def __init__(self, chars: str):
        assert list(chars) == sorted(set(chars)), "the vocabulary must be sorted and distinct"
        self.chars = chars
        self.vocab_size = len(chars)
        self._codes = np.array([ord(c) for c in chars], np.uint32)

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The vocabulary as in the write-ups: every distinct character of the whole text, validation part included."""
        return cls("".join(sorted(set(text))))

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
    vocab_size = 256

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


Tokenizer = CharTokenizer | ByteTokenizer


def make_tokenizer(kind: str, text: str) -> Tokenizer:
    """The tokenizer of a configuration's `tokenizer` field for a training text."""
    return CharTokenizer.from_text(text) if kind == "char" else ByteTokenizer()


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The whole text of the ids."""
    return "".join(tokenizer.decode_stream(ids))


def load(path: Path) -> Tokenizer:
    """The inverse of writing `to_json()` to a file. Raises ValueError or KeyError if it holds no tokenizer."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["kind"] == "byte":
        return ByteTokenizer()
    if values["kind"] != "char" or list(values["chars"]) != sorted(set(values["chars"])):
        raise ValueError("no vocabulary of sorted characters")
    return CharTokenizer(values["chars"])
