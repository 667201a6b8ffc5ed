"""Tokenizers of Hugging Face's folders: `tokenizer.json` of the `tokenizers` library, or GPT-2's two older files.

Read are byte pairs in GPT-2's pattern, single bytes and single characters: what the tokenizers here are. Anything else
is no error, as weights can be had without a tokenizer, but is not taken for one of them.
"""

from pathlib import Path
from typing import Any

from jaxgpt import strict_json
from jaxgpt.data.files import NotAvailable, read_small
from jaxgpt.data.tokenizer import (
    END_OF_TEXT,
    GPT2_FILES,
    MAX_FILE_BYTES,
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Gpt2Tokenizer,
    Tokenizer,
    byte_chars,
    gpt2_folder,
)
from jaxgpt.errors import UserError

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# Options of a BPE that change its tokens, and that no tokenizer here has.
OTHER_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
BYTE_CHARS = frozenset(byte_chars())
ANY_CHARACTER = r"[\s\S]"


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer of any kind."""
    return any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"))


def read(folder: Path, data_dir: Path | None) -> Tokenizer | None:
    """The tokenizer of a folder; None if there is none, or one of a kind that is not known here.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged.
    """
    if (folder / "tokenizer.json").is_file():
        return _from_json(_json(folder / "tokenizer.json"), data_dir)
    older = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if older and not (folder / "added_tokens.json").exists():  # which no tokenizer here has
        lines = read_small(folder / "merges.txt", MAX_FILE_BYTES).decode().split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        return _byte_pairs({"vocab": _json(folder / "vocab.json"), "merges": merges}, data_dir)
    return None


def _json(path: Path) -> dict[str, Any]:
    values = strict_json.loads(read_small(path, MAX_FILE_BYTES))
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return values


def _from_json(values: dict[str, Any], data_dir: Path | None) -> Tokenizer | None:
    model, splits = values.get("model"), values.get("pre_tokenizer")
    if not isinstance(model, dict) or not isinstance(splits, dict) or values.get("normalizer"):
        return None
    vocab, added = model.get("vocab"), values.get("added_tokens") or []
    if not isinstance(vocab, dict) or not isinstance(added, list) or not all(isinstance(each, dict) for each in added):
        return None
    if any(model.get(option) for option in OTHER_OPTIONS):
        return None
    if any(each.get("content") != END_OF_TEXT for each in added):  # tokens that no text is cut into here
        return None
    if END_OF_TEXT not in vocab:  # the library keeps a special token beside the vocabulary
        vocab = vocab | {each["content"]: each.get("id") for each in added if each.get("content") == END_OF_TEXT}
    if sorted(vocab.values(), key=str) != sorted(range(len(vocab)), key=str):
        return None
    if model.get("type") == "WordLevel":
        chars = sorted(vocab, key=vocab.__getitem__)
        splits_all = splits.get("type") == "Split" and splits.get("pattern") == {"Regex": ANY_CHARACTER}
        if splits_all and all(len(char) == 1 for char in chars) and chars == sorted(chars):
            return CharTokenizer("".join(chars))
    elif model.get("type", "BPE") == "BPE" and splits.get("type") == "ByteLevel" and not splits.get("add_prefix_space"):
        if vocab == _byte_vocab() and not model.get("merges"):
            return ByteTokenizer()
        if splits.get("use_regex", True):
            return _byte_pairs({**model, "vocab": vocab}, data_dir)
    return None


def _byte_vocab() -> dict[str, int]:
    return {char: byte for byte, char in enumerate(byte_chars())}


def _byte_pairs(model: dict[str, Any], data_dir: Path | None) -> Tokenizer | None:
    """The tokenizer of byte pairs after which comes the end of a text; GPT-2's own through tiktoken."""
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list) or vocab.get(END_OF_TEXT) != len(vocab) - 1:
        return None
    pairs = {token: i for token, i in vocab.items() if token != END_OF_TEXT}
    if not all(set(token) <= BYTE_CHARS for token in pairs):
        return None
    content = strict_json.dumps(tokenizer_json({"vocab": pairs, "merges": merges}, None))
    try:
        tokenizer = BpeTokenizer(content)
    except Exception as e:  # the library raises bare Exceptions
        raise ValueError(f"its byte pairs are damaged: {e}") from None
    if len(vocab) == 50_257:
        try:
            gpt2 = Gpt2Tokenizer(gpt2_folder(data_dir, lambda line: None))
        except (NotAvailable, UserError):
            return tokenizer
        if gpt2.token_bytes == tokenizer.token_bytes:
            return gpt2
    return tokenizer


# -------------------------------------------------------------------------------------------------------------- writing


def tokenizer_json(model: dict[str, Any], end_of_text: int | None) -> dict[str, Any]:
    """The content of a tokenizer.json for byte pairs in GPT-2's pattern.

    Args:
        model: "vocab" and "merges".
        end_of_text: the id of the token that ends a text, which the library calls special; None for none.
    """
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [] if end_of_text is None else [{"id": end_of_text, "content": END_OF_TEXT, **special}]
    options = dict(dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", **options, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **model},
    }


def files(tokenizer: Tokenizer, max_tokens: int) -> dict[str, str]:
    """The texts of the files with which `AutoTokenizer` loads a tokenizer, by name.

    The library takes the end of a text from a text that spells it; the tokenizers here never do.

    Args:
        max_tokens: the longest text that the model reads.

    Raises:
        UserError: a character of the vocabulary cannot be written.
    """
    if isinstance(tokenizer, CharTokenizer):
        content = _of_characters(tokenizer)
    elif isinstance(tokenizer, ByteTokenizer):
        content = tokenizer_json({"vocab": _byte_vocab(), "merges": []}, None)
        content["pre_tokenizer"] = {**BYTE_LEVEL, "use_regex": False}
    elif isinstance(tokenizer, BpeTokenizer):
        content = _with_end_of_text(tokenizer.to_json()["model"]["model"], tokenizer.end_of_text)
    else:
        content = _with_end_of_text(_gpt2_model(tokenizer), tokenizer.end_of_text)
    special = (
        {}
        if tokenizer.end_of_text is None
        else dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **special,
    }
    try:
        return {
            "tokenizer.json": strict_json.dumps(content, ensure_ascii=False).encode().decode(),
            "tokenizer_config.json": strict_json.dumps(config, indent=2) + "\n",
        }
    except UnicodeEncodeError:
        raise UserError("--to huggingface: the vocabulary holds half of a surrogate pair, which no JSON can") from None


def _with_end_of_text(model: dict[str, Any], end_of_text: int) -> dict[str, Any]:
    vocab = {**model["vocab"], END_OF_TEXT: end_of_text}
    return tokenizer_json({"vocab": vocab, "merges": model["merges"]}, end_of_text)


def _gpt2_model(tokenizer: Gpt2Tokenizer) -> dict[str, Any]:
    """GPT-2's byte pairs, from the files that tiktoken reads."""
    merges_file, vocab_file = (tokenizer.folder / Path(remote.file).name for remote in GPT2_FILES)
    lines = read_small(merges_file, MAX_FILE_BYTES).decode().split("\n")
    return {"vocab": _json(vocab_file), "merges": [line for line in lines[1:] if line]}


def _of_characters(tokenizer: CharTokenizer) -> dict[str, Any]:
    """Each character is a word of the library's, and a text is cut into all of them."""
    content = tokenizer_json({"vocab": {}, "merges": []}, None)
    vocab = {char: i for i, char in enumerate(tokenizer.chars)}
    # A character that is not in the vocabulary is an error: it has no unknown token.
    content["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    pattern = {"Regex": ANY_CHARACTER}
    content["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    content["decoder"] = {"type": "Fuse"}
    return content
