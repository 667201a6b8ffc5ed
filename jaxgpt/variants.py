"""The flags of `scripts/compare.py`: those of `scripts/train.py`, some with several values -> the combinations.

Each combination is read by the parser of `scripts/train.py`, from words that it could have been given itself.
"""

import dataclasses
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt.checks import flag
from jaxgpt.cli import TrainFlags, config_of, parse_train_flags
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.errors import UserError

MAX_RUNS = 64
WITH_COMMAS = ("dataset", "text_column", "prompt")  # a comma there is part of one value
FIELDS = [
    *(f.name for f in dataclasses.fields(TrainConfig) if f.name not in ("model", *WITH_COMMAS)),
    *(f"model.{f.name}" for f in dataclasses.fields(ModelConfig)),
]
FIELD_OF = {flag(name): name for name in FIELDS}


@dataclass(frozen=True)
class CompareFlags(TrainFlags):
    """The flags of scripts/train.py, for all runs."""

    out_dir: Path | None = None
    """Folder of the comparison, a run folder for each combination in it (default: runs/compare-<preset>-<time>). The
    same command resumes: finished runs stay, an interrupted one goes on."""
    overwrite: bool = False
    """Start the runs again that --out-dir holds."""


@dataclass(frozen=True)
class Variant:
    """One combination of the compared values."""

    label: str  # and the name of its folder: lr=1e-4,optimizer=sgd
    args: list[str]  # the flags of scripts/train.py
    flags: CompareFlags
    fields: list[str]

    @property
    def config(self) -> TrainConfig:
        return config_of(self.flags)

    @property
    def values(self) -> dict[str, Any]:
        """The compared fields' values, by dotted name."""
        return {name: _value(self.config, name) for name in self.fields}


def parse(args: list[str], description: str) -> list[Variant]:
    """All combinations of the flags' values, read as scripts/train.py reads them.

    Raises:
        UserError: a combination is no valid configuration, two are the same, there is but one, or too many.
    """
    places, lists = _places(args)
    count = math.prod(len(values) for values in lists.values())
    if count > MAX_RUNS:
        raise UserError(f"{_flags_of(lists)}: {count:,} combinations; give lists that make at most {MAX_RUNS}")
    variants: list[Variant] = []
    for words in itertools.product(*places):
        chosen = [value for value, _ in words if value is not None]
        label = ",".join(f"{flag(name)[2:]}={value}" for name, value in zip(lists, chosen, strict=True))
        own_args = [word for _, its_words in words for word in its_words]
        try:
            flags = parse_train_flags(own_args, description, CompareFlags)
        except UserError as e:
            # What the first has wrong, mostly all have; what another has, comes of its values.
            raise UserError(f"{label}: {e}") if variants else e from None
        variants.append(Variant(label, own_args, flags, list(lists)))
    if not lists:
        raise UserError(
            "no flag has several values to compare; give one a list, as in --lr 1e-4,3e-4, or use scripts/train.py "
            f"({', '.join(map(flag, WITH_COMMAS))} are never lists to compare)"
        )
    for a, b in itertools.combinations(variants, 2):
        if a.config == b.config:
            raise UserError(f"{_flags_of(lists)}: {a.label} and {b.label} are the same; give each value once")
        if a.config.dataset != b.config.dataset:
            datasets = f"{a.config.dataset} and {b.config.dataset}"
            raise UserError(f"--preset: losses on {datasets} cannot be compared; give all the same --dataset")
    return variants


def _places(args: list[str]) -> tuple[list[list[tuple[str | None, list[str]]]], dict[str, list[str]]]:
    """The arguments as places with alternatives, (value, words) each; and the lists among them, by field."""
    places: list[list[tuple[str | None, list[str]]]] = []
    lists: dict[str, list[str]] = {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        option, equals, text = word.partition("=")
        name = FIELD_OF.get(option.replace("_", "-"))
        if name and not equals and rest and "," in rest[0] and not rest[0].startswith("--"):
            text = rest.pop(0)
        if not name or "," not in text:
            places.append([(None, [word])])
            continue
        if name in lists:
            raise UserError(f"{option}: given twice; give it one list")
        lists[name] = [value.strip() for value in text.split(",")]
        if not all(lists[name]):
            raise UserError(f"{option} {text}: a value is missing; separate values by commas alone, without spaces")
        places.append([(value, _words(option, name, value)) for value in lists[name]])
    return places, lists


def _words(option: str, name: str, value: str) -> list[str]:
    """One value's flag. A switch has no value, but two names."""
    if not isinstance(_value(TrainConfig(), name), bool):
        return [f"{option}={value}"]
    if value.lower() not in ("true", "false"):
        raise UserError(f"{option} {value}: to compare, give true,false")
    return [flag(name) if value.lower() == "true" else re.sub(r"([^.-][^.]*)$", r"no-\1", flag(name))]


def _flags_of(lists: dict[str, list[str]]) -> str:
    return ", ".join(f"{flag(name)} {','.join(values)}" for name, values in lists.items())


def _value(config: TrainConfig, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config
