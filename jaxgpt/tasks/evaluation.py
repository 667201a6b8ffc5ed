"""Evaluation: a run's loss on any dataset, and the benchmarks that GPT-2's family is compared by.

The core is `log_likelihoods`. WikiText's perplexity is computed in windows as Hugging Face's page "Perplexity of
fixed-length models" cuts them; LAMBADA and HellaSwag as lm-evaluation-harness 0.4 does (`lambada_openai`,
`hellaswag`). Axes: B rows, T time, V vocabulary.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.config import TrainConfig
from jaxgpt.data.corpora import load_corpus, load_test_texts, texts_of_file
from jaxgpt.data.readers import hub_splits, read_rows
from jaxgpt.data.token_cache import open_shards, split_tokens
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.model.gpt import GPT, Params
from jaxgpt.model.loss import perplexity
from jaxgpt.model.sampling import rounded_up
from jaxgpt.tasks.language_modeling import require_stride
from jaxgpt.tasks.text_generation import TextModel

Benchmark = Literal["wikitext-2", "wikitext-103", "lambada", "hellaswag"]
HUB_DATASETS = {
    "lambada": ("EleutherAI/lambada_openai:default", "test"),
    "hellaswag": ("Rowan/hellaswag", "validation"),
}
HELLASWAG_FIELDS = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
DEFAULT_STRIDE = 512  # of the windows of WikiText; half a block for smaller models
BATCH_TOKENS = 4096  # that the model reads at a time
PROGRESS_SECONDS = 20.0

Say = Callable[[str], None]


# ------------------------------------------------------------------------------------------------------ log-likelihoods


class Request(NamedTuple):
    """A context and the tokens after it, whose probability is asked for: ids [T] each, at least one."""

    context: np.ndarray
    target: np.ndarray


class LogLikelihood(NamedTuple):
    """The probability of a target after its context."""

    total: float  # the sum of log p over the target's tokens, in nats
    greedy: bool  # whether each of them is the most likely one, given those before it


def log_likelihoods(model: TextModel, requests: Sequence[Request], say: Say = lambda line: None) -> list[LogLikelihood]:
    """The log-likelihood of each request's target, in the order of the requests.

    The model reads the last block of a context and target that are longer, so a target has at most a block of tokens.
    Rows of similar length are computed together, padded on the right to a power of two (at most a block): causal
    attention sees no padding. The log-probabilities have the parameters' dtype; their sums are in float64.

    Args:
        say: takes lines about the progress.
    """
    block_size = model.config.block_size
    by_length: dict[int, list[int]] = {}
    for i, (context, target) in enumerate(requests):
        assert len(context) and 0 < len(target) <= block_size
        n = min(len(context) + len(target) - 1, block_size)
        by_length.setdefault(rounded_up(n, block_size), []).append(i)
    scores, found, last_said = _scores(model.model), {}, time.monotonic()
    for length, numbers in sorted(by_length.items()):
        n_rows = min(max(1, BATCH_TOKENS // length), 2 ** (len(numbers) - 1).bit_length())
        for at in range(0, len(numbers), n_rows):
            batch = numbers[at : at + n_rows]
            idx_BT, target_BT = np.zeros((2, n_rows, length), np.int32)
            ends = []  # of each row's tokens: the target is at their end
            for row, i in enumerate(batch):
                ids = np.concatenate(requests[i])[-(block_size + 1) :]
                idx_BT[row, : len(ids) - 1], target_BT[row, : len(ids) - 1] = ids[:-1], ids[1:]
                ends.append(len(ids) - 1)
            log_p_BT, greedy_BT = map(np.asarray, scores(model.params, idx_BT, target_BT))
            for row, i in enumerate(batch):
                own = slice(ends[row] - len(requests[i].target), ends[row])
                total = float(log_p_BT[row, own].sum(dtype=np.float64))
                found[i] = LogLikelihood(total, bool(greedy_BT[row, own].all()))
            if time.monotonic() - last_said > PROGRESS_SECONDS:
                last_said = time.monotonic()
                say(f"evaluated {len(found):,} of {len(requests):,} texts")
    return [found[i] for i in range(len(requests))]


@lru_cache(4)
def _scores(model: Callable[[Params], GPT]) -> Callable[[Params, np.ndarray, np.ndarray], tuple[Array, Array]]:
    """The compiled log-probability [B, T] of each target, and whether it is the most likely token."""

    def scores(params: Params, idx_BT: Array, target_BT: Array) -> tuple[Array, Array]:
        gpt = model(params)
        x_BTC, _ = gpt.hidden(idx_BT)

        def of_row(row: tuple[Array, Array]) -> tuple[Array, Array]:
            x_TC, target_T = row
            logits_TV = gpt.logits(x_TC)
            log_p_TV = jax.nn.log_softmax(logits_TV)
            return jnp.take_along_axis(log_p_TV, target_T[:, None], 1)[:, 0], logits_TV.argmax(1) == target_T

        return jax.lax.map(of_row, (x_BTC, target_BT))  # the logits of one row at a time are in memory

    return jax.jit(scores)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """The tokens of a context and its continuation, as lm-evaluation-harness cuts them.

    Blanks at the context's end belong to the continuation, whose tokens are those of the whole text that follow as many
    as the context alone has.

    Raises:
        UserError: the tokenizer cannot encode the text.
    """
    stripped = context.rstrip()
    context_T, whole_T = tokenizer.encode(stripped), tokenizer.encode(context + continuation)
    return Request(context_T, whole_T[len(context_T) :])


# ----------------------------------------------------------------------------------------------------------- benchmarks


def evaluate_benchmark(
    model: TextModel,
    name: Benchmark,
    stride: int | None = None,
    file: Path | None = None,
    data_dir: Path | None = None,
    say: Say = lambda line: None,
) -> dict[str, float | int]:
    """The figures of a benchmark by name.

    Args:
        stride: of WikiText's windows; by default `DEFAULT_STRIDE`, or half a block if that is less.
        file: the benchmark's data: for WikiText a text or a table with a column "text", else JSON Lines. By default the
            test split of WikiText in a data folder, or the Hugging Face hub's.
        data_dir: a folder to look for datasets in first.

    Raises:
        UserError: the stride is out of its range; the data is not valid, or has what the model cannot read.
        NotAvailable: the data is not on this machine and cannot be downloaded.
    """
    if name in HUB_DATASETS:
        if stride is not None:
            raise UserError(f"--stride {stride}: --benchmark {name} has no windows; leave it out")
        option = f"--file {file}" if file else f"--benchmark {name}"
        fields = ("text",) if name == "lambada" else HELLASWAG_FIELDS
        rows = read_rows(file, fields, option) if file else _hub_rows(name, fields, option)
        figures = lambada if name == "lambada" else hellaswag
        return figures(model, rows, option, say)
    block_size = model.config.block_size
    stride = max(1, min(DEFAULT_STRIDE, block_size // 2)) if stride is None else stride
    if file:
        option, texts = f"--file {file}", texts_of_file(file, f"--file {file}")
    else:
        option, texts = f"--benchmark {name}", load_test_texts(name, data_dir, f"--benchmark {name}", "--file PATH")
    return wikitext(model, texts(), stride, option, say)


def wikitext(
    model: TextModel, texts: Iterable[str], stride: int, option: str, say: Say = lambda line: None
) -> dict[str, float | int]:
    """The perplexity of texts joined by an empty line.

    Window j holds the block of tokens from j x stride on, and scores those that no window before it has scored; the
    first token of the first window has no context and is not scored.

    Args:
        stride: 1 to a block. At a block, windows do not overlap, and no window's first token is scored.
        option: what messages begin with. Likewise below.

    Returns:
        "loss" in nats per scored token; "ppl", its exponential; "word_ppl", that of the loss per word, where words are
        separated by white space; "tokens" and "words", the numbers; and the "stride".
    """
    block_size = model.config.block_size
    require_stride(stride, block_size)
    text = "\n\n".join(line if line.strip() else "" for line in texts)  # the hub's rows of blanks alone are empty
    try:
        tokens_N = model.tokenizer.encode(text)
    except UserError as e:
        raise UserError(f"{option}: {e}") from None
    if len(tokens_N) < 2:
        raise UserError(f"{option}: {len(tokens_N)} tokens; give a text of two or more")
    if "<unk>" in text:
        say(f"{option}: holds <unk>, so it is not the raw text that published perplexities of GPT-2 are of")
    requests = list(strided_requests(tokens_N, block_size, stride))
    n_tokens, n_words = sum(len(one.target) for one in requests), len(text.split())
    total = -math.fsum(one.total for one in log_likelihoods(model, requests, say))
    loss, words = total / n_tokens, max(n_words, 1)
    return {
        "loss": loss,
        "ppl": perplexity(loss),
        "word_ppl": perplexity(total / words),
        "tokens": n_tokens,
        "words": n_words,
        "stride": stride,
    }


def strided_requests(tokens_N: np.ndarray, block_size: int, stride: int) -> Iterator[Request]:
    """The windows of `wikitext`, as requests."""
    scored = 0  # tokens before this one are scored, or have no context
    for start in range(0, len(tokens_N), stride):
        end = min(start + block_size, len(tokens_N))
        first = max(scored, start + 1)
        if first < end:
            yield Request(tokens_N[start:first], tokens_N[first:end])
        scored = end
        if end == len(tokens_N):
            return


def lambada(
    model: TextModel, rows: Iterable[tuple[Any, ...]], option: str, say: Say = lambda line: None
) -> dict[str, float | int]:
    """LAMBADA: the last word of each text, given the words before it.

    Returns:
        "accuracy": the share of texts whose last word is, token for token, the most likely one; "ppl": the exponential
        of the mean negative log-likelihood of a last word; "texts": how many.
    """
    requests = []
    for number, (text,) in enumerate(rows, 1):
        where = f"{option}: record {number}"
        context, blank, word = _text(text, "text", where).rpartition(" ")
        if not context.strip():
            raise UserError(f"{where}: the text {text!r:.40} has no word before its last; give whole texts")
        requests.append(_request(model, context, blank + word, where))
    _require_records(requests, option)
    found = log_likelihoods(model, requests, say)
    return {
        "accuracy": sum(one.greedy for one in found) / len(found),
        "ppl": perplexity(-math.fsum(one.total for one in found) / len(found)),
        "texts": len(found),
    }


def hellaswag(
    model: TextModel, rows: Iterable[tuple[Any, ...]], option: str, say: Say = lambda line: None
) -> dict[str, float | int]:
    """HellaSwag: which of a text's endings is the most likely.

    Args:
        rows: the values of `HELLASWAG_FIELDS`.

    Returns:
        "accuracy": the share of texts whose right ending has the greatest log-likelihood; "accuracy_norm": the same by
        the log-likelihood divided by the ending's number of characters; "texts": how many.
    """
    requests, n_chars, labels = [], [], []
    for number, (activity, ctx_a, ctx_b, endings, label) in enumerate(rows, 1):
        where = f"{option}: record {number}"
        activity, ctx_a, ctx_b = (
            _text(value, name, where)
            for value, name in zip((activity, ctx_a, ctx_b), HELLASWAG_FIELDS[:3], strict=True)
        )
        if not isinstance(endings, list) or len(endings) < 2:
            raise UserError(f"{where}: endings is {endings!r:.40}; give a list of two or more texts")
        query = without_brackets(f"{activity}: {ctx_a} {ctx_b.capitalize()}")
        texts = [without_brackets(_text(ending, "endings", where)) for ending in endings]
        if not all(texts):
            raise UserError(f"{where}: an ending is empty; give each a text")
        labels.append(_label(label, len(texts), where))
        n_chars.append([len(text) for text in texts])
        requests += [_request(model, query, f" {text}", where) for text in texts]
    _require_records(requests, option)
    found, at, right, right_norm = log_likelihoods(model, requests, say), 0, 0, 0
    for label, lengths in zip(labels, n_chars, strict=True):
        total_K = np.array([one.total for one in found[at : at + len(lengths)]])
        right += int(total_K.argmax() == label)
        right_norm += int((total_K / np.array(lengths)).argmax() == label)
        at += len(lengths)
    return {"accuracy": right / len(labels), "accuracy_norm": right_norm / len(labels), "texts": len(labels)}


def without_brackets(text: str) -> str:
    """A text of HellaSwag without the marks of WikiHow: " [title]" is a full stop, other brackets are left out.

    As lm-evaluation-harness does it, with its single pass over double blanks.
    """
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hub_rows(name: str, fields: Sequence[str], option: str) -> Iterator[tuple[Any, ...]]:
    spec, split = HUB_DATASETS[name]
    splits: Mapping[Any, Any] = hub_splits(spec, option, own_files="--file PATH")
    if split not in splits:
        raise UserError(f"{option}: {spec} has no {split} split any more; give its file with --file PATH")
    missing = [field for field in fields if field not in splits[split].column_names]
    if missing:
        raise UserError(f"{option}: {spec} has no column {missing[0]!r} any more; give its file with --file PATH")
    for row in splits[split]:
        yield tuple(row[field] for field in fields)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} holds {value!r:.40}, not text; mend the record")
    return value


def _label(value: Any, n_endings: int, where: str) -> int:
    """The number of the right ending: a number, or a string of its digit as the hub's Parquet files have it."""
    number = int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value) else value
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < n_endings:
        raise UserError(f"{where}: the label is {value!r:.40}; give a number from 0 to {n_endings - 1}")
    return number


def _request(model: TextModel, context: str, continuation: str, where: str) -> Request:
    try:
        request = encode_pair(model.tokenizer, context, continuation)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    if not len(request.context):
        raise UserError(f"{where}: nothing stands before the text to predict; give it a context")
    if (n := len(request.target)) > (block_size := model.config.block_size):
        raise UserError(
            f"{where}: {n} tokens to predict, and the run's block has {block_size}; evaluate a run with a larger block"
        )
    return request


def _require_records(requests: Sequence[Request], option: str) -> None:
    if not requests:
        raise UserError(f"{option}: holds no record; give a file that has some")


# ------------------------------------------------------------------------------------------------------- other datasets


def tokens_of_dataset(
    config: TrainConfig,
    tokenizer: Tokenizer,
    spec: str,
    split: Literal["val", "train", "test"],
    data_dir: Path | None,
    say: Say,
) -> np.ndarray:
    """The tokens [N] of any dataset's split.

    Args:
        config, tokenizer: the model's. All texts of the dataset are taken, whatever the model was trained with.
        spec: as of `data.corpora.load_corpus`.
        data_dir: a folder to look for datasets in first.

    Raises:
        UserError: the dataset has no such split, or the tokenizer cannot encode it.
        NotAvailable: the dataset cannot be had.
    """
    config = dataclasses.replace(config, dataset=spec, text_column=None)
    config = dataclasses.replace(config, min_chars=0, max_train_texts=0, max_val_texts=0, max_val_tokens=0)
    # What `split_tokens` and `open_shards` ask of a training, whatever this run's was.
    config = dataclasses.replace(config, packing="chunks", batch_size=1, eval_batches=0, eval_every=1, epochs=0)
    if split == "test":
        texts = load_test_texts(spec, data_dir, f"--split test: --dataset {spec}", "--dataset file:PATH")
        tokens_N, block_size = _documents(texts(), tokenizer, f"--dataset {spec}"), config.model.block_size
        if len(tokens_N) <= block_size:
            raise UserError(
                f"--split test: --dataset {spec} has {len(tokens_N)} tokens, fewer than the run's block plus one "
                f"({block_size + 1}); give a longer text"
            )
        return tokens_N
    corpus = load_corpus(spec, data_dir, say)
    if corpus.shards:
        if split == "train":
            raise UserError(f"--split train: --dataset {spec} comes in shards, which only a training reads; give val")
        return open_shards(corpus, tokenizer, config, say)[1]
    train_N, val_N = split_tokens(corpus, tokenizer, config, say)
    return train_N if split == "train" else val_N


def _documents(texts: Iterable[str], tokenizer: Tokenizer, option: str) -> np.ndarray:
    """The tokens of texts, each with the end-of-text token after it, if the tokenizer has one."""
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    tokens: list[np.ndarray] = []
    for text in texts:
        try:
            tokens += [tokenizer.encode(text), np.array(end, np.int32)] if text else []
        except UserError as e:
            raise UserError(f"{option}: {e}") from None
    return np.concatenate(tokens) if tokens else np.zeros(0, np.int32)
