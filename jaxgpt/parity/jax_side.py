"""The JAX side of a pair: its parameters in each precision, its results, its updates, and a record of its values."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt.parity import jaxprs
from jaxgpt.parity.graph import Value
from jaxgpt.parity.pair import Pair, PairError, blamed, call
from jaxgpt.parity.params import Path, Structure, path_name

BatchArrays = Mapping[str, np.ndarray]


@contextmanager
def precision_of(precision: str) -> Iterator[None]:
    """Enables float64 for float64 and disables it otherwise; matrix products keep full precision in both."""
    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        yield


class JaxSide:
    """The JAX model of a pair.

    Args:
        structure: the form of the parameters.
        flat: their values by path, float32 values in float64.
        trained: the paths of those that are trained; the others, such as running statistics, are not.
    """

    def __init__(self, pair: Pair, structure: Structure, flat: Mapping[Path, np.ndarray], trained: Sequence[Path]):
        self.pair, self.structure, self.flat = pair, structure, dict(flat)
        self.trained = list(trained)
        self.fixed = [path for path in self.flat if path not in set(self.trained)]
        self._programs: dict[tuple[Any, ...], Any] = {}

    # Parameters travel as two lists, of the trained and the fixed ones, in the order of the paths.

    def arrays(self, precision: str) -> tuple[list[Any], list[Any]]:
        """The initial parameters of a precision."""
        trained = [jnp.asarray(self.flat[path], precision) for path in self.trained]
        return trained, [jnp.asarray(self.flat[path], precision) for path in self.fixed]

    def batch(self, batch: BatchArrays, precision: str) -> dict[str, Any]:
        dtypes = {"f": precision, "i": "int32", "u": "int32", "b": "bool"}
        return {name: jnp.asarray(array, dtypes[array.dtype.kind]) for name, array in batch.items()}

    def _params(self, trained: Sequence[Any], fixed: Sequence[Any]) -> Any:
        return self.structure.build(
            {**dict(zip(self.trained, trained, strict=True)), **dict(zip(self.fixed, fixed, strict=True))}
        )

    def _loss(self, trained: Sequence[Any], fixed: Sequence[Any], batch: Any) -> tuple[Any, list[Any]]:
        """The loss, and the fixed parameters after the call: an NNX module updates its batch statistics."""
        params = self._params(trained, fixed)
        loss = call(self.pair, "jax_loss", params, batch)
        shape = getattr(loss, "shape", None)
        if shape is None or np.prod(shape, dtype=int) != 1:
            what = type(loss).__name__ if shape is None else f"an array of shape {tuple(shape)}"
            raise PairError(f"Pair jax_loss: gives {what}, no scalar; return the mean or the sum, as torch_loss does")
        if not jnp.issubdtype(loss.dtype, jnp.floating):
            raise PairError(f"Pair jax_loss: gives a loss of dtype {loss.dtype}; return a float")
        after = self.structure.split(params) if self.structure.is_nnx else {}
        return loss.reshape(()), [after.get(path, array) for path, array in zip(self.fixed, fixed, strict=True)]

    def _logits(self, trained: Sequence[Any], fixed: Sequence[Any], batch: Any) -> Any:
        logits = call(self.pair, "jax_logits", self._params(trained, fixed), batch)
        if not hasattr(logits, "shape"):
            raise PairError(f"Pair jax_logits: gives {type(logits).__name__}; return one array")
        if jnp.iscomplexobj(logits):
            raise PairError("Pair jax_logits: gives complex numbers; return their real and imaginary parts, stacked")
        return logits

    def optimizer(self) -> optax.GradientTransformation:
        given = self.pair.optax_optimizer
        if not isinstance(given, optax.GradientTransformation | optax.MultiSteps):
            trained = self.structure.only(dict(zip(self.trained, self.arrays("float32")[0], strict=True)))
            given = given(trained) if callable(given) else given
        if isinstance(given, optax.MultiSteps):
            given = given.gradient_transformation()
        if not isinstance(given, optax.GradientTransformation):
            raise PairError(f"Pair optax_optimizer: is {type(given).__name__}; give an optax.GradientTransformation")
        return given

    def _update(self, trained: list[Any], fixed: list[Any], opt_state: Any, batch: Any) -> tuple[Any, ...]:
        """(loss, gradients, trained, fixed, opt_state) of one update; without an optimizer the trained stay."""
        (loss, fixed_after), grads = jax.value_and_grad(self._loss, has_aux=True)(trained, fixed, batch)
        if self.pair.optax_optimizer is None:
            return loss, grads, trained, fixed_after, opt_state
        params = self.structure.only(dict(zip(self.trained, trained, strict=True)))
        tree = self.structure.only(dict(zip(self.trained, grads, strict=True)))
        with blamed("optax_optimizer", self.pair.optax_optimizer):
            updates, opt_state = self.optimizer().update(tree, opt_state, params)
            after = dict(self.structure.leaves(optax.apply_updates(params, updates)))
        return loss, grads, [after[path] for path in self.trained], fixed_after, opt_state

    def _opt_state(self, trained: list[Any]) -> Any:
        if self.pair.optax_optimizer is None:
            return ()
        params = self.structure.only(dict(zip(self.trained, trained, strict=True)))
        with blamed("optax_optimizer", self.pair.optax_optimizer):
            return self.optimizer().init(params)

    def _run(self, name: str, precision: str, *args: Any) -> Any:
        """A method's result, compiled; the program is kept for the precision and the shapes."""
        field = "jax_logits" if name == "_logits" else "jax_loss"
        with blamed(field, getattr(self.pair, field)):
            key = name, precision, *(np.shape(array) for array in jax.tree.leaves(args))
            if key not in self._programs:
                function, options = getattr(self, name), None
                if precision == "float64":
                    function, options = jaxprs.lifted(function, *args), jaxprs.UNOPTIMIZED
                self._programs[key] = jax.jit(function, compiler_options=options)
            return self._programs[key](*args)

    def logits(self, batch: BatchArrays, precision: str) -> np.ndarray | None:
        """The model's output; bfloat16 as float32. None if the pair has no function for it."""
        if self.pair.jax_logits is None:
            return None
        with precision_of(precision):
            logits = self._run("_logits", precision, *self.arrays(precision), self.batch(batch, precision))
            logits = np.asarray(logits)
            return logits.astype(np.float32) if logits.dtype == jnp.bfloat16 else logits

    def _loss_alone(self, trained: Sequence[Any], fixed: Sequence[Any], batch: Any) -> Any:
        return self._loss(trained, fixed, batch)[0]

    def loss(self, batch: BatchArrays, precision: str) -> float:
        """The loss of one batch."""
        with precision_of(precision):
            return float(self._run("_loss_alone", precision, *self.arrays(precision), self.batch(batch, precision)))

    def loss_and_grads(self, batch: BatchArrays, precision: str) -> tuple[float, dict[Path, np.ndarray]]:
        """The loss and the gradients by path of one batch."""
        with precision_of(precision):
            trained, fixed = self.arrays(precision)
            args = (trained, fixed, self._opt_state(trained), self.batch(batch, precision))
            loss, grads, *_ = self._run("_update", precision, *args)
            return float(loss), {path: np.asarray(g) for path, g in zip(self.trained, grads, strict=True)}

    def train(self, batches: Sequence[BatchArrays], precision: str) -> tuple[list[float], list[dict[Path, np.ndarray]]]:
        """The losses of as many updates as there are batches, and all parameters after each, by path."""
        losses, params = [], []
        with precision_of(precision):
            trained, fixed = self.arrays(precision)
            opt_state = self._opt_state(trained)
            for batch in batches:
                args = (trained, fixed, opt_state, self.batch(batch, precision))
                loss, _, trained, fixed, opt_state = self._run("_update", precision, *args)
                losses.append(float(loss))
                arrays = [*zip(self.trained, trained, strict=True), *zip(self.fixed, fixed, strict=True)]
                params.append({path: np.asarray(array) for path, array in arrays})
        return losses, params

    def recorded(self, batch: BatchArrays) -> list[Value]:
        """Every value that the loss of one batch computes, in float64."""
        with precision_of("float64"):
            trained, fixed = self.arrays("float64")
            args = (trained, fixed, self.batch(batch, "float64"))
            names = [*map(path_name, self.trained), *[None] * (len(fixed) + len(batch))]
            with blamed("jax_loss", self.pair.jax_loss):
                found = jaxprs.record(self._loss_alone, args, names)
        return [
            Value(i, r.operation, r.where, r.inputs, r.parameters, _floats(r.array), r.trained)
            for i, r in enumerate(found)
        ]


def _floats(array: np.ndarray) -> np.ndarray | None:
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else None
