"""Text generation: prompts continued by a language model, one as a stream or many in batches.

A continuation ends after `max_new_tokens`, before a stop string, or at the tokenizer's end-of-text token.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from jaxgpt.config import ModelConfig, SamplingConfig
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.model.gpt import GPT, Params
from jaxgpt.model.sampling import generate_batch

BATCH_SIZE = 32  # continuations computed together; their keys and values are in memory at the same time

FinishReason = Literal["length", "stop", "end_of_text"]


@dataclass(frozen=True)
class Continuation:
    """A prompt and what the model wrote after it."""

    prompt: str
    text: str
    """Without the prompt, the stop string and the end-of-text token."""
    tokens: int
    """How many tokens the model chose, with those of a stop string and the end-of-text token."""
    finish_reason: FinishReason
    """length: all `max_new_tokens` are there. stop: a stop string came. end_of_text: the end-of-text token came."""
    seed: int


@dataclass(frozen=True)
class TextModel:
    """What generates text: a model's function, its parameters, its shape and its tokenizer."""

    model: Callable[[Params], GPT]
    """From `LanguageModelingObjective.exact_model`."""
    params: Params
    config: ModelConfig
    tokenizer: Tokenizer


class TextStream:
    """The text of one continuation while its tokens come.

    It holds back an end that may be the beginning of a stop string, so no part of one is ever given out.

    Args:
        sampling: `stop` and `ignore_end_of_text`.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingConfig):
        self._stop = sampling.stop
        self._end_of_text = None if sampling.ignore_end_of_text else tokenizer.end_of_text
        self._ids: deque[int] = deque()
        # `decode_stream` yields one piece for each id that it takes, and one more for bytes that are left.
        self._pieces = tokenizer.decode_stream(iter(self._ids.popleft, None))
        self._held = ""
        self.tokens = 0
        self.finish_reason: FinishReason | None = None

    def push(self, token: int) -> str:
        """The text that one more token completes; after it, `finish_reason` may be set."""
        assert self.finish_reason is None
        self.tokens += 1
        if token == self._end_of_text:
            return self.finish("end_of_text")
        self._ids.append(token)
        self._held += next(self._pieces)
        return self._released()

    def finish(self, reason: FinishReason) -> str:
        """The text that is left when no more tokens come."""
        self._ids.append(None)  # pyright: ignore[reportArgumentType]  (the sentinel that ends `decode_stream`'s ids)
        self._held += "".join(self._pieces)
        text = self._released()
        if self.finish_reason is None:
            text, self._held, self.finish_reason = text + self._held, "", reason
        return text

    def _released(self) -> str:
        """What of the held text cannot belong to a stop string."""
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:  # the first to be complete, so that it does not matter how the text is cut into tokens
            self.finish_reason = "stop"
            text, self._held = self._held[: min(found)[1]], ""
            return text
        n_kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        n_free = len(self._held) - n_kept
        text, self._held = self._held[:n_free], self._held[n_free:]
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, less than all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def encode_prompt(tokenizer: Tokenizer, prompt: str, name: str = "--prompt") -> np.ndarray:
    """The ids of a prompt, int32 [T], T at least 1.

    Args:
        name: what the prompt was given by, for messages.

    Raises:
        UserError: the prompt is empty, or has what the tokenizer cannot encode.
    """
    if not prompt:
        raise UserError(f"{name} '': empty; give at least one character to continue")
    try:
        return tokenizer.encode(prompt)
    except UserError as e:
        raise UserError(f"{name}: {e}") from None


def stream(model: TextModel, prompt: str, sampling: SamplingConfig) -> Generator[str, None, Continuation]:
    """The continuation of one prompt: yields it piece by piece, and returns the whole.

    Raises:
        UserError: as `encode_prompt` does, before anything is computed.
    """
    return _stream(model, prompt, encode_prompt(model.tokenizer, prompt), sampling)


def _stream(
    model: TextModel, prompt: str, ids_T: np.ndarray, sampling: SamplingConfig
) -> Generator[str, None, Continuation]:
    text, pieces = TextStream(model.tokenizer, sampling), []
    for token_B in generate_batch(model.model, model.params, model.config, [ids_T], sampling):
        pieces.append(text.push(int(token_B[0])))
        yield pieces[-1]
        if text.finish_reason:
            break
    else:
        pieces.append(text.finish("length"))
        yield pieces[-1]
    assert text.finish_reason
    return Continuation(prompt, "".join(pieces), text.tokens, text.finish_reason, sampling.seed)


def continuations(model: TextModel, prompts: Sequence[str], sampling: SamplingConfig) -> Iterator[Continuation]:
    """`sampling.samples` continuations of each prompt, in order; computed in batches of `BATCH_SIZE` while you iterate.

    The j-th of a prompt has the seed `sampling.seed` + j, so it does not depend on the other prompts.

    Raises:
        UserError: as `encode_prompt` does, before anything is computed.
    """
    encoded = [encode_prompt(model.tokenizer, prompt) for prompt in prompts]
    return _continuations(model, prompts, encoded, sampling)


def _continuations(
    model: TextModel, prompts: Sequence[str], encoded: Sequence[np.ndarray], sampling: SamplingConfig
) -> Iterator[Continuation]:
    seeds = range(sampling.seed, sampling.seed + sampling.samples)
    rows = ((prompt, ids_T, seed) for prompt, ids_T in zip(prompts, encoded, strict=True) for seed in seeds)
    while batch := list(islice(rows, BATCH_SIZE)):
        texts = [TextStream(model.tokenizer, sampling) for _ in batch]
        parts: list[list[str]] = [[] for _ in batch]
        ids, of_row = [ids_T for _, ids_T, _ in batch], [seed for _, _, seed in batch]
        for token_B in generate_batch(model.model, model.params, model.config, ids, sampling, of_row):
            for text, pieces, token in zip(texts, parts, token_B.tolist(), strict=True):
                if text.finish_reason is None:
                    pieces.append(text.push(token))
            if all(text.finish_reason for text in texts):
                break
        for (prompt, _, seed), text, pieces in zip(batch, texts, parts, strict=True):
            if text.finish_reason is None:
                pieces.append(text.finish("length"))
            assert text.finish_reason
            yield Continuation(prompt, "".join(pieces), text.tokens, text.finish_reason, seed)
