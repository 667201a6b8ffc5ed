"""A Flax (NNX) GPT trainer that is held equal to PyTorch. Importing this package imports no jax.

The names of the library are imported from their modules when they are first used:

    configure   a configuration from a preset and flags
    train       train a language model
    load        a trained language model, a run's or another's
    logits      its logits
    generate    its continuations of prompts
    stream      its continuation of one prompt, piece by piece
    evaluate    its loss over a split
    import_run, export_run   a model of Hugging Face, nanoGPT or llm.c as a run, and a run's model for them
    UserError   what a user can put right
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgpt.api import LanguageModel, evaluate, export_run, generate, import_run, load, logits, stream, train
    from jaxgpt.errors import UserError
    from jaxgpt.presets import configure

__version__ = "0.1.0"

__all__ = [
    "LanguageModel",
    "UserError",
    "configure",
    "evaluate",
    "export_run",
    "generate",
    "import_run",
    "load",
    "logits",
    "stream",
    "train",
]

_MODULES = {"UserError": "jaxgpt.errors", "configure": "jaxgpt.presets"}  # of the names that are not in jaxgpt.api


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES.get(name, "jaxgpt.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
