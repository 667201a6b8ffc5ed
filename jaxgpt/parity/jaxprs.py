"""Jaxprs evaluated equation by equation: with float32 lifted to float64, or with every value recorded.

Models cast to float32 on purpose, for a softmax or a norm, and a comparison in float64 would end at those casts.
Lifted, they cast to float64. The derivative rules of custom JVPs and VJPs stay: a gradient is traced before it is
lifted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from jaxgpt.parity.pair import is_users

CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # the parameters in which a call keeps its body
SCATTERS = {
    "scatter": jax.lax.scatter,
    "scatter-add": jax.lax.scatter_add,
    "scatter-mul": jax.lax.scatter_mul,
    "scatter-min": jax.lax.scatter_min,
    "scatter-max": jax.lax.scatter_max,
}
FLOAT32 = np.dtype("float32")
LIFTED = {FLOAT32: np.dtype("float64"), np.dtype("complex64"): np.dtype("complex128")}
# Primitives that are bound as they are, on inputs of the dtypes that they were traced with: they hold a program of
# their own, or a function of the host, or read an array's bits.
AS_TRACED = {"bitcast_convert_type", "custom_linear_solve", "io_callback", "pure_callback", "reduce", "shard_map"}
MOST_LIFTED = 65_536  # elements of a constant that are lifted one by one
# A float64 program runs a few times, so its compilation is most of its cost: without LLVM's optimizations it takes half
# as long. Programs of other precisions are compiled as users compile them, because their rounding is compared.
UNOPTIMIZED = {"xla_backend_optimization_level": 0}


@dataclass
class Recorded:
    """One value of a trace: what `graph.Value` needs, its array still a tracer."""

    operation: str
    where: str
    inputs: tuple[int, ...]
    parameters: tuple[str, ...]
    array: Any
    trained: bool


@dataclass(frozen=True)
class Known:
    """An array, and what it comes from: a recorded value, or a parameter, or neither."""

    array: Any
    value: int | None = None
    parameter: str | None = None
    trained: bool = False


def lifted(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """The function with every float32 in it in float64. It is traced once, here.

    Args:
        args: arguments of the shapes and dtypes that it is called with.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    structure = jax.tree.structure(shape)
    has_float32 = _has_float32(closed)

    def in_float64(*args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        if has_float32:
            outs = [out.array for out in _Evaluation(lift=True).run_closed(closed, [Known(a) for a in leaves])]
        else:
            outs = core.jaxpr_as_fun(closed)(*leaves)
        return jax.tree.unflatten(structure, outs)

    return in_float64


def record(function: Callable[..., Any], args: Any, names: Sequence[str | None]) -> list[Recorded]:
    """Every value that the function computes, in order; float32 in it is lifted to float64.

    Args:
        args: the arguments.
        names: for each leaf of the arguments the name of the parameter, None for what is none.
    """
    closed = jax.make_jaxpr(function)(*args)
    evaluation = _Evaluation(lift=True, recording=True)

    def all_arrays(leaves: list[Any]) -> list[Any]:
        evaluation.values.clear()
        known = [Known(a, None, name, name is not None) for a, name in zip(leaves, names, strict=True)]
        evaluation.run_closed(closed, known)
        return [value.array for value in evaluation.values]

    arrays = jax.jit(all_arrays, compiler_options=UNOPTIMIZED)(jax.tree.leaves(args))
    for value, array in zip(evaluation.values, arrays, strict=True):
        value.array = np.asarray(array)
    return evaluation.values


class _Evaluation:
    """An interpreter of jaxprs."""

    def __init__(self, lift: bool, recording: bool = False):
        self.lift, self.recording = lift, recording
        self.values: list[Recorded] = []

    def run_closed(self, closed: Any, args: Sequence[Known]) -> list[Known]:
        jaxpr = _open(closed)
        consts = getattr(closed, "consts", ())
        return self.run(jaxpr, [Known(self._lift_array(c)) for c in consts], args)

    def run(self, jaxpr: Any, consts: Sequence[Known], args: Sequence[Known]) -> list[Known]:
        known: dict[Any, Known] = {}
        known.update(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, args, strict=True))

        def read(var: Any) -> Known:
            return Known(self._lift_array(var.val)) if isinstance(var, core.Literal) else known[var]

        for equation in jaxpr.eqns:
            outs = self.equation(equation, [read(var) for var in equation.invars])
            known.update(zip(equation.outvars, outs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def equation(self, equation: Any, inputs: list[Known]) -> list[Known]:
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            return self.scan(equation, inputs)
        if name == "while":
            return self.while_loop(equation, inputs)
        if name == "cond":
            return self.cond(equation, inputs)
        as_traced = name in AS_TRACED or "pallas" in name
        body = next((params[key] for key in CALLS if hasattr(params.get(key), "eqns")), None)
        if body is not None and len(_open(body).invars) == len(inputs) and not as_traced:
            return self.run_closed(body, inputs)
        arrays = [known.array for known in inputs]
        if self.lift and as_traced:
            dtypes = [getattr(var.aval, "dtype", None) for var in equation.invars]
            arrays = [_cast(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)]
        elif self.lift:
            arrays = [self._lift_array(array) for array in arrays]
            params = {key: _lift_dtype(value) for key, value in params.items()}
        if self.lift and name in SCATTERS:  # keeps a jaxpr of its own for two numbers, in the old dtype
            options = {key: params[key] for key in ("indices_are_sorted", "unique_indices", "mode")}
            operand, indices, updates = arrays
            outs = SCATTERS[name](operand, indices, updates, params["dimension_numbers"], **options)
        else:
            outs = equation.primitive.bind(*arrays, **equation.primitive.get_bind_params(params))
        outs = list(outs) if equation.primitive.multiple_results else [outs]
        return self.known(equation, inputs, [self._lift_array(out) for out in outs] if as_traced else outs)

    def known(self, equation: Any, inputs: Sequence[Known], outs: Sequence[Any]) -> list[Known]:
        """The outputs, each with what it comes from; recorded if this is a recording."""
        trained = any(known.trained for known in inputs)
        if not self.recording:
            return [Known(out, trained=trained) for out in outs]
        sources = tuple(dict.fromkeys(known.value for known in inputs if known.value is not None))
        names = tuple(known.parameter for known in inputs if known.parameter is not None)
        results = []
        for out in outs:
            if jnp.issubdtype(out.dtype, jax.dtypes.extended):
                results.append(Known(out))
                continue
            self.values.append(Recorded(equation.primitive.name, place(equation), sources, names, out, trained))
            results.append(Known(out, len(self.values) - 1, None, trained))
        return results

    def scan(self, equation: Any, inputs: list[Known]) -> list[Known]:
        params, body = equation.params, equation.params["jaxpr"]
        inner = _open(body)
        # Outputs of the body that keep their rank are the carry, inputs that lose an axis are scanned over.
        n_carry = sum(o.aval.ndim == b.aval.ndim for o, b in zip(equation.outvars, inner.outvars, strict=True))
        n_scanned = sum(o.aval.ndim > b.aval.ndim for o, b in zip(equation.invars, inner.invars, strict=True))
        n_consts = len(inputs) - n_carry - n_scanned
        consts, carry, scanned = inputs[:n_consts], inputs[n_consts : n_consts + n_carry], inputs[n_consts + n_carry :]
        if not self.recording:

            def step(carry: Any, xs: Any) -> tuple[Any, Any]:
                outs = self.run_closed(body, [*consts, *map(Known, carry), *map(Known, xs)])
                return [out.array for out in outs[:n_carry]], [out.array for out in outs[n_carry:]]

            first = [self._lift_array(known.array) for known in carry]
            xs = [self._lift_array(known.array) for known in scanned]
            options = {key: params[key] for key in ("length", "reverse", "unroll")}
            carried, stacked = jax.lax.scan(step, first, xs, **options)
            return [Known(array) for array in [*carried, *stacked]]
        if not params["length"]:
            empty = [jnp.zeros(var.aval.shape, _lift_dtype(var.aval.dtype)) for var in equation.outvars[n_carry:]]
            return [*carry, *self.known(equation, inputs, empty)]
        rows: list[list[Known]] = []
        order = range(params["length"])
        for i in reversed(order) if params["reverse"] else order:
            xs = [Known(known.array[i], known.value, known.parameter, known.trained) for known in scanned]
            outs = self.run_closed(body, [*consts, *carry, *xs])
            carry = outs[:n_carry]
            rows.append(outs[n_carry:])
        rows = rows[::-1] if params["reverse"] else rows
        stacked = []
        for column in zip(*rows, strict=True):
            out = jnp.stack([known.array for known in column])
            stacked += self.known(equation, column, [out])
        return [*carry, *stacked]

    def while_loop(self, equation: Any, inputs: list[Known]) -> list[Known]:
        test, body, n_carry = equation.params["cond_jaxpr"], equation.params["body_jaxpr"], len(equation.outvars)
        n_test = len(_open(test).invars) - n_carry
        n_body = len(_open(body).invars) - n_carry
        arrays = [self._lift_array(known.array) for known in inputs]
        test_consts, body_consts = arrays[:n_test], arrays[n_test : n_test + n_body]
        quiet = _Evaluation(self.lift)

        def again(carry: list[Any]) -> Any:
            return quiet.run_closed(test, [*map(Known, test_consts), *map(Known, carry)])[0].array

        def step(carry: list[Any]) -> list[Any]:
            return [out.array for out in quiet.run_closed(body, [*map(Known, body_consts), *map(Known, carry)])]

        return self.known(equation, inputs, jax.lax.while_loop(again, step, arrays[n_test + n_body :]))

    def cond(self, equation: Any, inputs: list[Known]) -> list[Known]:
        quiet = _Evaluation(self.lift)
        arrays = [self._lift_array(known.array) for known in inputs]

        def branch(body: Any) -> Callable[..., list[Any]]:
            return lambda *operands: [out.array for out in quiet.run_closed(body, [Known(a) for a in operands])]

        branches = [branch(body) for body in equation.params["branches"]]
        return self.known(equation, inputs, jax.lax.switch(arrays[0], branches, *arrays[1:]))

    def _lift_array(self, array: Any) -> Any:
        """In float64 what is in float32, and in complex128 what is in complex64."""
        if not self.lift:
            return array
        if isinstance(array, Tracer):
            return _cast(array, _lift_dtype(array.dtype))
        return _lift_constant(array)


def _lift_constant(constant: Any) -> Any:
    """A constant, whose float32 numbers become their shortest decimals, which are what the source says: 1e-5.

    A float64 number that float32 holds as well was float32 before the trace: jnp.float32(0.1) becomes 0.1. Numbers of
    few binary digits, such as 0.5 and 3, are what they are.
    """
    dtype = getattr(constant, "dtype", None)
    if dtype not in (FLOAT32, np.float64) or np.size(constant) > MOST_LIFTED:
        return _cast(constant, _lift_dtype(dtype))
    numbers = np.asarray(constant, np.float64)
    rounded = numbers.astype(np.float32)
    fraction = np.frexp(rounded)[0] * 2**16
    if dtype == np.float64 and not ((rounded == numbers) & (fraction != np.round(fraction))).any():
        return constant
    if dtype == np.float64 and not (rounded == numbers).all():
        return constant  # numbers of float64
    decimals = [
        float(str(x)) if f != np.round(f) else float(x) for x, f in zip(rounded.flat, fraction.flat, strict=True)
    ]
    return np.array(decimals, np.float64).reshape(numbers.shape)[()]


def _cast(array: Any, dtype: Any) -> Any:
    if dtype is None or getattr(array, "dtype", dtype) == dtype:
        return array
    return jax.lax.convert_element_type(array, dtype)


def _lift_dtype(value: Any) -> Any:
    return LIFTED.get(value, value) if isinstance(value, np.dtype) else value


def _open(jaxpr: Any) -> Any:
    """The open jaxpr of a closed one; newer JAX has one class for both."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _bodies(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        found += [item for item in (value if isinstance(value, tuple | list) else [value]) if hasattr(item, "eqns")]
    return found


def _has_float32(closed: Any) -> bool:
    """Whether a program gives float32 or complex64 anywhere, or holds constants that were float32."""
    constants = [*getattr(closed, "consts", ())]
    for equation in _open(closed).eqns:
        if any(getattr(out.aval, "dtype", None) in LIFTED for out in equation.outvars):
            return True
        constants += [var.val for var in equation.invars if isinstance(var, core.Literal)]
        if any(_has_float32(body) for body in _bodies(equation.params)):
            return True
    return any(_lift_constant(constant) is not constant for constant in constants)


def place(equation: Any) -> str:
    """FILE:LINE (FUNCTION) of the user's code that gave an equation, then its `named_scope` and `checkpoint_name`."""
    source = equation.source_info
    frames = getattr(source.traceback, "frames", ()) if source.traceback else ()
    named = (f"{Path(f.file_name).name}:{f.line_num} ({_function(f)})" for f in frames if is_users(f.file_name))
    scope = str(source.name_stack)
    name = equation.params["name"] if equation.primitive.name == "name" else ""
    return next(named, "") + (f" in {scope}" if scope else "") + (f", named {name}" if name else "")


def _function(frame: Any) -> str:
    return frame.function_name.rpartition("<locals>.")[2]
