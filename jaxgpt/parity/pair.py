"""A pair: a PyTorch model and the JAX model that should compute the same."""

import dataclasses
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.errors import UserError, first_line

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """What the engine must know of two models to hold one against the other. Nothing of either need know the engine.

    Args:
        torch_model: builds the `torch.nn.Module`, with random or loaded weights; called once for each precision.
        torch_loss: (model, batch of tensors) -> the scalar loss.
        jax_loss: (params, batch of arrays) -> the scalar loss. `params` is what `to_params` returns: an `nnx.Module`,
            an Equinox module, Linen variables, or any pytree, in the dtype of the precision.
        batch: draws a batch from a `numpy.random.Generator`: a dict of numpy arrays, the same for both sides.
            Integers reach PyTorch as int64 and JAX as int32, floats in the dtype of the precision.
        to_params: makes the JAX parameters of a PyTorch `state_dict` of numpy arrays.
        jax_params: builds JAX parameters of any values. Without `to_params` the engine derives the converter from
            their names and shapes, and prints it. With it they give the form: `to_params` may then return nested
            dicts and lists of arrays, as the printed converter does, where the form is a module.
        torch_logits, jax_logits: (model, batch) and (params, batch) -> the model's output, for the level "forward".
        torch_optimizer: builds the optimizer of a model, for the level "updates".
        torch_schedule: builds the learning rate scheduler of that optimizer; it steps after each update.
        optax_optimizer: the gradient transformation, or a function of the parameters that returns it. It includes the
            clip and the schedule.
        clip: the global norm that the PyTorch side clips gradients to; None: no clip.
        n_updates: how many updates the level "updates" makes.
        train: puts the PyTorch model into training mode, as batch norm needs; dropout must be off in the models.
        name: the title of the report.
    """

    torch_model: Callable[[], Any]
    torch_loss: Callable[[Any, Any], Any]
    jax_loss: Callable[[Any, Any], Any]
    batch: Callable[[np.random.Generator], Batch]
    to_params: Callable[[dict[str, np.ndarray]], Any] | None = None
    jax_params: Callable[[], Any] | None = None
    torch_logits: Callable[[Any, Any], Any] | None = None
    jax_logits: Callable[[Any, Any], Any] | None = None
    torch_optimizer: Callable[[Any], Any] | None = None
    torch_schedule: Callable[[Any], Any] | None = None
    optax_optimizer: Any = None
    clip: float | None = None
    n_updates: int = 8
    train: bool = False
    name: str = ""

    def __post_init__(self):
        for name in ("torch_model", "torch_loss", "jax_loss", "batch"):
            if not callable(getattr(self, name)):
                raise UserError(f"Pair {name}: is no function; give a function, or a lambda")
        optional = ("to_params", "jax_params", "torch_logits", "jax_logits", "torch_optimizer", "torch_schedule")
        for name in optional:
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise UserError(f"Pair {name}: is no function; give a function, or leave it out")
        for name, library, kind in (("torch_model", "torch.nn", "Module"), ("jax_params", "flax.nnx", "Module")):
            if library in sys.modules and isinstance(getattr(self, name), getattr(sys.modules[library], kind)):
                raise UserError(f"Pair {name}: is a model; give a function that builds it, lambda: model")
        if self.to_params is None and self.jax_params is None:
            remedy = "give to_params, or jax_params to have the converter derived"
            raise UserError(f"Pair to_params, jax_params: one of the two is needed; {remedy}")
        if (self.torch_logits is None) != (self.jax_logits is None):
            raise UserError("Pair torch_logits, jax_logits: one is given without the other; give both, or neither")
        if (self.torch_optimizer is None) != (self.optax_optimizer is None):
            raise UserError(
                "Pair torch_optimizer, optax_optimizer: one is given without the other; give both, or neither"
            )
        if self.torch_optimizer is None and (self.torch_schedule is not None or self.clip is not None):
            raise UserError(
                "Pair torch_schedule, clip: have an effect with torch_optimizer only; give it, or leave them out"
            )
        if self.clip is not None and not (math.isfinite(self.clip) and self.clip > 0):
            raise UserError(f"Pair clip {self.clip}: give a norm above 0, or None")
        is_number = isinstance(self.n_updates, int | np.integer) and not isinstance(self.n_updates, bool)
        if not is_number or not 1 <= self.n_updates <= 10_000:
            raise UserError(f"Pair n_updates {self.n_updates}: give a whole number from 1 to 10000")
        if not isinstance(self.train, bool):
            raise UserError(f"Pair train {self.train!r}: give True or False")
        if not isinstance(self.name, str) or "\n" in self.name:
            raise UserError(f"Pair name {self.name!r}: give one line of text")


class PairError(UserError):
    """A function of the pair raised, or gave what cannot be compared."""


def call(pair: Pair, name: str, *args: Any) -> Any:
    """Calls one of the pair's functions. Raises `PairError` with the place in the user's file if it raises."""
    function = getattr(pair, name)
    with blamed(name, function):
        return function(*args)


@contextmanager
def blamed(name: str, function: Any = None) -> Iterator[None]:
    """Raises `PairError` for what is raised inside: the field of the pair, the error, and the place in its file."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as e:
        what = f"{type(e).__name__}: {first_line(e)}".removesuffix(": ")
        raise PairError(f"Pair {name}: raises {what}{_place(e, function)}; mend it there") from e


def _place(error: BaseException, function: Any) -> str:
    """ " (FILE:LINE)": the last frame of the traceback in the pair's own file, or else in no installed package."""
    frames = traceback.extract_tb(error.__traceback__)
    own_file = getattr(getattr(inspect.unwrap(function) if function else None, "__code__", None), "co_filename", "")
    users = [frame for frame in frames if is_users(frame.filename)]
    own = [frame for frame in users if frame.filename == own_file] or users
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def is_users(filename: str) -> bool:
    """Whether a source file is the user's: of no installed package, not Python's, and not of this engine."""
    here = str(Path(__file__).parent)
    parts = Path(filename).parts
    return not (
        filename.startswith(("<", here, sys.base_prefix + "/lib"))
        or "site-packages" in parts
        or "dist-packages" in parts
    )


def draw_batches(pair: Pair, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """The first batches of a seed, as numpy arrays. Raises `PairError` for what is no dict of arrays."""
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        batch = call(pair, "batch", rng)
        if not isinstance(batch, Mapping) or not batch or not all(isinstance(name, str) for name in batch):
            what = type(batch).__name__ if not isinstance(batch, Mapping) else f"a dict with the keys {list(batch)}"
            raise PairError(f"Pair batch: gives {what}; return a dict of numpy arrays by name")
        with blamed("batch", pair.batch):
            arrays = {name: np.asarray(value) for name, value in batch.items()}
        batches.append({name: _as_native(name, array) for name, array in arrays.items()})
    return batches


def _as_native(name: str, array: np.ndarray) -> np.ndarray:
    """An array of a dtype that both frameworks know. Raises `PairError` for what one of them could not hold."""
    if array.dtype.kind not in "biuf":
        raise PairError(f"Pair batch: {name!r} has dtype {array.dtype}; give numbers or booleans")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise PairError(f"Pair batch: {name!r} holds a value that is not finite; give finite numbers")
        return array.astype(np.float64)
    if array.dtype.kind in "iu" and array.size and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31:
        raise PairError(f"Pair batch: {name!r} holds integers beyond int32, JAX's default; give smaller ones")
    return array if array.dtype.kind == "b" else array.astype(np.int64)


def load_pair(argument: str) -> Pair:
    """The pair of `FILE` or `FILE:NAME`. It may import what lies in its own folder, and in the current one.

    Raises:
        UserError: no such file, a file that raises, no pair in it, or several and none named.
    """
    file, _, wanted = argument.rpartition(":") if not Path(argument).exists() else (argument, "", "")
    file = file or argument
    path = Path(file).absolute()
    if not path.is_file():
        raise UserError(f"--pair {file}: no such file; give a Python file that defines a jaxgpt.parity.Pair")
    name = f"_pair_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--pair {file}: is no Python file; give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # They stay there: the pair's functions may import when they are called.
    sys.path[:0] = [folder for folder in (str(path.parent), str(Path.cwd())) if folder not in sys.path]
    try:
        spec.loader.exec_module(module)
    except UserError as e:
        raise UserError(f"--pair {file}: {e}") from None
    except ModuleNotFoundError as e:
        raise UserError(f"--pair {file}: imports {e.name}, which is not installed; install it") from None
    except (Exception, SystemExit) as e:
        where = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
        line = e.lineno if isinstance(e, SyntaxError) else where[-1] if where else None
        at = f" in line {line}" if line else ""
        raise UserError(f"--pair {file}: raises {type(e).__name__}: {first_line(e)}{at}; mend it there") from None
    pairs = {key: value for key, value in vars(module).items() if isinstance(value, Pair)}
    if wanted:
        if wanted not in pairs:
            found = ", ".join(pairs) or "none"
            raise UserError(f"--pair {argument}: no Pair named {wanted}; the file has {found}")
        return _named(pairs[wanted], path.stem)
    if "pair" in pairs:
        return _named(pairs["pair"], path.stem)
    if len(pairs) != 1:
        remedy = f"name one, {file}:{next(iter(pairs))}" if pairs else "define one, pair = Pair(...)"
        raise UserError(f"--pair {file}: has {len(pairs)} pairs; {remedy}")
    return _named(next(iter(pairs.values())), path.stem)


def _named(pair: Pair, name: str) -> Pair:
    return pair if pair.name else dataclasses.replace(pair, name=name)
