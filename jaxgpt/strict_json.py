"""Strict JSON (RFC 8259), which every program reads: no NaN, no Infinity. Python's `json` writes and takes both."""

import json
import math
from typing import Any


def dumps(values: Any, indent: int | None = None, **options: Any) -> str:
    """Values as JSON; a number that is not finite becomes null.

    Args:
        indent, options: as of `json.dumps`.
    """
    return json.dumps(_finite(values), indent=indent, allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """The values of a JSON text.

    Raises:
        ValueError: the text is not JSON, holds a number that is not finite, or is nested too deeply to be read.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_parse_float)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _finite(values: Any) -> Any:
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return values


def _parse_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is no finite number")
