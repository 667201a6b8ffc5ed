"""The PyTorch side of a pair: its model in each precision, its results, its updates, and a record of its operations."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from jaxgpt.parity.derive.entries import TorchTensor
from jaxgpt.parity.graph import Value
from jaxgpt.parity.pair import Pair, PairError, blamed, call

SEED = 0
# Operations that pass their input on: another view, another type.
PASSING = {
    "view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze", "to",
    "double", "float", "dropout", "dropout_", "clone", "chunk", "split", "__getitem__", "movedim", "unbind", "expand",
    "t", "swapaxes", "detach", "type_as", "T", "mT", "data",
}  # fmt: skip
VIEWS = {"T", "mT", "data"}  # attributes that are tensors
LIFTED = {torch.float32: torch.float64, torch.complex64: torch.complex128}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
UNCOUNTED = {"__get__", "__set__", "__delete__", "size", "dim", "numel", "__len__", "is_floating_point", "stride"}


def prepare_torch(on: bool = True) -> None:
    """Sets PyTorch up as XLA computes on a CPU: it flushes denormal numbers to 0, in this thread and for numpy too."""
    torch.set_flush_denormal(on)
    torch.set_float32_matmul_precision("highest")


# ---------------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class Operation:
    """One call of a PyTorch function, as recorded.

    Attributes:
        name: the function's name: "linear", "softmax".
        module: the path of the innermost module that calls it; "" of the model itself.
        args, kwargs: as they were passed.
        inputs: the operations whose outputs it takes.
        places: of each floating-point input the operation that gave it, and which of that one's arrays it is.
        parameters: names of the parameters and buffers that it takes.
        output: what it returned.
    """

    index: int
    name: str
    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    parameters: tuple[str, ...]
    output: Any
    arrays: tuple[np.ndarray, ...]
    trained: bool


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: the operations from `first` up to and without `end`, and the operation of its input."""

    name: str
    kind: str
    first: int
    end: int
    input: int | None


@dataclass
class Call:
    """A call that an edit takes the place of."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mode: "OperationMode"

    def original(self) -> Any:
        """What the function itself returns."""
        return self.function(*self.args, **self.kwargs)

    def output_of(self, index: int) -> Any:
        """The output of an earlier operation of this run."""
        return self.mode.outputs[index]


Edit = Callable[[Call], Any]


class OperationMode(TorchFunctionMode):
    """Counts the calls of PyTorch's functions, and lifts, edits or records them.

    Args:
        tensors: the model's parameters and buffers by name.
        lift: casts to float32 become casts to float64: models cast on purpose, for a softmax or a norm.
        edits: by the operation's index what is called in its place.
        recording: keeps the operations, with copies of their outputs.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor] | None = None,
        lift: bool = False,
        edits: Mapping[int, Edit] | None = None,
        recording: bool = False,
    ):
        super().__init__()
        self.tensors, self.lift, self.edits, self.recording = tensors or {}, lift, edits or {}, recording
        self.names = {id(tensor): name for name, tensor in self.tensors.items()}
        self.outputs: list[Any] = []
        self.operations: list[Operation] = []
        self.calls: list[ModuleCall] = []
        self.stack: list[str] = []
        self.source: dict[int, int] = {}  # by a tensor's id: the operation that gave it
        self.which: dict[int, int] = {}  # and which of the operation's arrays it is

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__" and func.__self__.__name__ in VIEWS:
            name = func.__self__.__name__
        if name in UNCOUNTED:
            return func(*args, **kwargs)
        if self.lift:
            if name == "float":
                func, args = torch.Tensor.double, args[:1]
            args, kwargs = _lifted(args), _lifted(kwargs)
        if func is F.multi_head_attention_forward:
            return self.inside(func, args, kwargs)
        index = len(self.outputs)
        self.outputs.append(None)
        edit = self.edits.get(index)
        out = edit(Call(func, args, kwargs, self)) if edit else func(*args, **kwargs)
        self.outputs[index] = out
        if self.recording:
            self.record(index, name, args, kwargs, out)
        return out

    def inside(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls a function of torch.nn.functional that consists of others, and counts those."""
        # Without this answer the function would come back here as a whole.
        with patch.object(F, "has_torch_function", lambda tensors: False), self:
            return function(*args, **kwargs)

    def record(self, index: int, name: str, args: Any, kwargs: Any, out: Any) -> None:
        taken = [t for t in _tensors((args, kwargs))]
        inputs = tuple(dict.fromkeys(self.source[id(t)] for t in taken if id(t) in self.source))
        parameters = tuple(dict.fromkeys(self.names[id(t)] for t in taken if id(t) in self.names))
        trained = any(self.operations[i].trained for i in inputs) or any(
            isinstance(t, torch.nn.Parameter) for t in taken
        )
        given = list(_tensors(out))
        places = tuple((self.source[id(t)], self.which[id(t)]) for t in taken if id(t) in self.which)
        for tensor in given:
            if id(tensor) not in self.names:
                self.source[id(tensor)] = index
        for i, tensor in enumerate(t for t in given if t.is_floating_point()):
            if id(tensor) not in self.names:
                self.which[id(tensor)] = i
        arrays = _arrays(given)
        module = self.stack[-1] if self.stack else ""
        operation = Operation(index, name, module, args, kwargs, inputs, places, parameters, out, arrays, trained)
        self.operations.append(operation)

    @contextmanager
    def of(self, model: torch.nn.Module) -> Iterator["OperationMode"]:
        """The mode entered, and the model's calls of its modules followed."""
        names = {id(module): name for name, module in model.named_modules()}
        begun: list[tuple[int, int | None]] = []

        def before(module: Any, args: Any, kwargs: Any) -> None:
            self.stack.append(names.get(id(module), ""))
            sources = [self.source[id(t)] for t in _tensors((args, kwargs)) if id(t) in self.source]
            begun.append((len(self.outputs), sources[0] if sources else None))

        def after(module: Any, args: Any, out: Any) -> None:
            name = self.stack.pop()
            first, source = begun.pop()
            self.calls.append(ModuleCall(name, type(module).__name__, first, len(self.outputs), source))

        handles = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, always_call=True))
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def values(self) -> list[Value]:
        """The record as values to match with the other side's."""
        values: list[Value] = []
        last: dict[int, tuple[int, ...]] = {}
        for op in self.operations:
            places = [(last[i], which) for i, which in op.places]
            inputs = tuple(dict.fromkeys(values_of[min(which, len(values_of) - 1)] for values_of, which in places))
            indices = []
            for array in op.arrays or (None,):
                indices.append(len(values))
                values.append(Value(len(values), op.name, op.module, inputs, op.parameters, array, op.trained))
            last[op.index] = tuple(indices)
        return values

    # What the record says of an operation's neighbours.

    def source_of(self, tensor: Any) -> int | None:
        """The operation that gave a tensor of this record; None for a parameter or what came from outside."""
        return self.source.get(id(tensor))

    def place_of(self, tensor: Any) -> tuple[int, int | None] | None:
        """The operation that gave a tensor, and which of its outputs it is, None if there is one."""
        index = self.source_of(tensor)
        if index is None:
            return None
        output = self.operations[index].output
        if isinstance(output, torch.Tensor):
            return index, None
        return next(((index, i) for i, t in enumerate(output) if t is tensor), None)

    def value_at(self, place: tuple[int, int | None]) -> Any:
        """The output of this run at a place of a recorded one."""
        index, which = place
        return self.outputs[index] if which is None else self.outputs[index][which]

    def skip_back(self, index: int) -> int:
        """The operation itself, or the one before it where it only passes its input on: dropout, a cast."""
        while self.operations[index].name in PASSING and self.operations[index].inputs:
            index = self.operations[index].inputs[0]
        return index

    def root_of(self, tensor: Any) -> int | None:
        """The operation that computed a tensor, before those that only passed it on."""
        index = self.source_of(tensor)
        return None if index is None else self.skip_back(index)

    def depends(self, index: int, on: int) -> bool:
        """Whether an operation's output is computed from that of an earlier one."""
        reached = {on}
        for op in self.operations[on + 1 : index + 1]:
            if reached & set(op.inputs):
                reached.add(op.index)
        return index in reached

    def call_around(self, index: int) -> ModuleCall | None:
        """The innermost call of a module that an operation is part of."""
        around = [call for call in self.calls if call.first <= index < call.end]
        return min(around, key=lambda call: call.end - call.first, default=None)

    def projection_before(self, tensor: Any) -> int | None:
        """The projection that a query, key or value comes from, through views, norms and rotations."""
        index = self.source_of(tensor)
        while index is not None and self.operations[index].name not in ("linear", "addmm"):
            trained = [i for i in self.operations[index].inputs if self.operations[i].trained]
            index = trained[0] if trained else None
        return index

    def projection_after(self, op: Operation) -> int | None:
        """The projection that an attention's output goes into."""
        reached = {op.index}
        for later in self.operations[op.index + 1 :]:
            if reached & set(later.inputs):
                if later.name in ("linear", "addmm"):
                    return later.index
                if later.name not in PASSING:
                    return None
                reached.add(later.index)
        return None

    def uses(self, op: Operation, name: str) -> bool:
        return name in op.parameters

    def time_of(self, logits: torch.Tensor) -> int | None:
        """T of the [B, T, V] that flattened logits [B * T, V] come from."""
        index = self.source_of(logits)
        while index is not None:
            output = self.operations[index].output
            if isinstance(output, torch.Tensor) and output.ndim == 3:
                return output.shape[1]
            if self.operations[index].name not in PASSING:
                return None
            index = next(iter(self.operations[index].inputs), None)
        return None

    def integers(self, n_rows: int, n_time: int) -> list[torch.Tensor]:
        """The integer tensors [n_rows, n_time] that the model was given."""
        given = [t for op in self.operations for t in _tensors((op.args, op.kwargs)) if id(t) not in self.source]
        whole = [t for t in given if tuple(t.shape) == (n_rows, n_time) and t.dtype == torch.int64]
        return list({id(t): t for t in whole}.values())

    def operation_of_value(self, index: int) -> Operation:
        """The operation that gave a value of `values`."""
        for op in self.operations:
            index -= max(1, len(op.arrays))
            if index < 0:
                return op
        raise IndexError(index)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _tensors(value)


def _arrays(tensors: Sequence[torch.Tensor]) -> tuple[np.ndarray, ...]:
    """The numbers of the floating-point tensors; nothing inside `torch.func.vmap`, where tensors hold none."""
    try:
        return tuple(t.detach().to(torch.float64).numpy().copy() for t in tensors if t.is_floating_point())
    except RuntimeError:
        return ()


def _lifted(tree: Any) -> Any:
    if isinstance(tree, torch.dtype):
        return LIFTED.get(tree, tree)
    if type(tree) is dict:
        return {key: _lifted(value) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_lifted(value) for value in tree)
    return tree


# ------------------------------------------------------------------------------------------------------- the side


@dataclass(frozen=True)
class Results:
    """What one batch gives: the model's output (None if the pair has no function for it), loss, gradients by name."""

    logits: np.ndarray | None
    loss: float
    grads: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Trajectory:
    """The losses of the updates, the parameters after each, and the buffers after the last."""

    losses: list[float]
    params: list[dict[str, np.ndarray]]
    buffers: dict[str, np.ndarray]


class TorchSide:
    """The PyTorch model of a pair.

    A tensor that is constant, such as biases of 0 and norms of 1, would hide what is done with it. So the engine moves
    each away from its constant, by a tenth, with seed 0; `moved` names them.

    Attributes:
        state: the weights and buffers that all precisions and both sides start from, float32 values in float64.
    """

    def __init__(self, pair: Pair):
        self.pair = pair
        model = self._built(torch.float32)
        self.parameters = [name for name, p in model.named_parameters() if p.requires_grad]
        if not self.parameters:
            raise PairError("Pair torch_model: has no parameter that requires a gradient; there is nothing to compare")
        self.ties: dict[str, str] = {}
        self.state: dict[str, np.ndarray] = {}
        self.moved: list[str] = []
        self._models: dict[str, torch.nn.Module] = {}
        with blamed("torch_model"):
            self._read_state(model)
            self.tensors = self._describe(model)

    def _read_state(self, model: torch.nn.Module) -> None:
        first: dict[int, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, torch.Tensor):
                raise PairError(f"Pair torch_model: its state_dict holds {name}, no tensor; leave get_extra_state out")
            if tensor.is_complex() and tensor.requires_grad:
                remedy = "give its real and imaginary part, torch.view_as_real of it"
                raise PairError(f"Pair torch_model: the parameter {name} is complex; {remedy}")
            if id(tensor) in first:
                self.ties[name] = first[id(tensor)]
            first.setdefault(id(tensor), name)
        rng = np.random.default_rng(SEED)
        for name, tensor in model.state_dict().items():
            if name in self.ties:
                self.state[name] = self.state[self.ties[name]]
                continue
            array = tensor.detach().cpu().float().numpy() if tensor.is_floating_point() else tensor.cpu().numpy()
            if tensor.is_floating_point():
                if not np.isfinite(array).all():
                    raise PairError(f"Pair torch_model: {name} holds a value that is not finite; give finite weights")
                if array.size > 1 and (array == array.flat[0]).all():
                    array = array + np.float32(0.1) * self._noise(rng, array)
                    self.moved.append(name)
                array = array.astype(np.float64)
            self.state[name] = array

    @staticmethod
    def _noise(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
        noise = rng.standard_normal(array.shape, np.float32)
        return np.abs(noise) if array.flat[0] > 0 else noise  # a variance stays above 0

    def _built(self, dtype: torch.dtype) -> torch.nn.Module:
        with default_dtype(dtype), OperationMode(lift=dtype == torch.float64):
            torch.manual_seed(SEED)
            model = call(self.pair, "torch_model")
        if not isinstance(model, torch.nn.Module):
            raise PairError(f"Pair torch_model: gives {type(model).__name__}; return a torch.nn.Module")
        with contextlib.suppress(RuntimeError, TypeError):  # a copy, for a pair that returns the same model each time
            model = copy.deepcopy(model)  # PyTorch refuses to copy one with torch.nn.utils.weight_norm
        with blamed("torch_model"):
            return model.cpu().train(self.pair.train)

    def _describe(self, model: torch.nn.Module) -> list[TorchTensor]:
        parameters = set(self.parameters)
        found = []
        for name, array in self.state.items():
            owner = model.get_submodule(name.rpartition(".")[0])
            is_parameter = self.ties.get(name, name) in parameters
            found.append(TorchTensor(name, array.shape, type(owner).__name__, is_parameter, self.ties.get(name)))
        return found

    def model(self, precision: str) -> torch.nn.Module:
        """A model of the precision that holds the weights of `state`."""
        dtype = DTYPES[precision]
        if precision not in self._models:
            model = self._built(torch.float64 if precision == "float64" else torch.float32)
            with blamed("torch_model"):
                for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                    if tensor.is_complex():
                        tensor.data = tensor.data.to(torch.complex128 if precision == "float64" else torch.complex64)
                    # In bfloat16, tables that the model computes keep their digits.
                    elif tensor.is_floating_point() and (precision != "bfloat16" or name in self.state):
                        tensor.data = tensor.data.to(dtype)
            self._models[precision] = model
        model = self._models[precision]
        with blamed("torch_model"):
            own = model.state_dict()
            model.load_state_dict({name: torch.tensor(a).to(own[name].dtype) for name, a in self.state.items()})
        model.zero_grad(set_to_none=True)
        return model

    def batch(self, batch: Mapping[str, np.ndarray], precision: str) -> dict[str, torch.Tensor]:
        """The batch as tensors."""
        dtypes = {"f": DTYPES[precision], "i": torch.int64, "u": torch.int64, "b": torch.bool}
        return {name: torch.from_numpy(np.array(a)).to(dtypes[a.dtype.kind]) for name, a in batch.items()}

    def mode(
        self, model: torch.nn.Module, precision: str, edits: Mapping[int, Edit] | None = None, recording: bool = False
    ) -> OperationMode:
        tensors = dict([*model.named_buffers(), *model.named_parameters()])
        return OperationMode(tensors, precision == "float64", edits, recording)

    def results(
        self,
        batch: Mapping[str, np.ndarray],
        precision: str,
        edits: Mapping[int, Edit] | None = None,
        logits: bool = True,
        grads: bool = True,
    ) -> Results:
        """The model's output, loss and gradients of one batch.

        Args:
            edits: of the operations of the loss; those of `torch_logits` come first in the same forward pass of
                most models, so they meet the same edits.
        """
        model, tensors = self.model(precision), self.batch(batch, precision)
        output = None
        if logits and self.pair.torch_logits:
            with torch.no_grad(), self.mode(model, precision, edits), default_dtype(_default(precision)):
                output = call(self.pair, "torch_logits", model, tensors)
            output = _array(output, "torch_logits")  # outside the mode, which would lift the cast
            if self.pair.train:
                model = self.model(precision)  # a forward pass in training mode changes the buffers
        with self.mode(model, precision, edits):  # with gradients in any case: a loss may take some itself
            loss = self.loss(model, tensors, precision)
        found = {}
        if grads:
            if loss.requires_grad or not edits:  # an edit may have stopped every gradient
                self.backward(loss)
            for name, p in model.named_parameters():
                if p.requires_grad:
                    found[name] = (torch.zeros_like(p) if p.grad is None else p.grad.to_dense()).numpy().copy()
        return Results(output, float(loss.detach()), found)

    def loss(self, model: torch.nn.Module, tensors: dict[str, torch.Tensor], precision: str) -> torch.Tensor:
        with default_dtype(_default(precision)):
            loss = call(self.pair, "torch_loss", model, tensors)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise PairError(f"Pair torch_loss: gives {what}, no scalar; return the mean or the sum")
        if not loss.is_floating_point():
            raise PairError(f"Pair torch_loss: gives a loss of dtype {loss.dtype}; return a float")
        return loss.reshape(())

    def backward(self, loss: torch.Tensor) -> None:
        if not loss.requires_grad:
            raise PairError("Pair torch_loss: does not reach a parameter; leave detach, item and no_grad out of it")
        with blamed("torch_loss", self.pair.torch_loss):
            loss.backward()

    def recorded(self, batch: Mapping[str, np.ndarray], edits: Mapping[int, Edit] | None = None) -> OperationMode:
        """The operations of the loss of one batch, in float64."""
        model, tensors = self.model("float64"), self.batch(batch, "float64")
        mode = self.mode(model, "float64", edits, recording=True)
        with mode.of(model):
            self.loss(model, tensors, "float64")
        return mode

    def train(
        self,
        batches: Sequence[Mapping[str, np.ndarray]],
        precision: str,
        make_update: "Callable[[Update], None] | None" = None,
        edits: Mapping[int, Edit] | None = None,
    ) -> Trajectory:
        """As many updates as there are batches.

        Args:
            make_update: makes an update in place of the pair's optimizer.
        """
        model = self.model(precision)
        optimizer, schedule = self.optimizer(model)
        losses, params, memory = [], [], {}
        for step, batch in enumerate(batches):
            optimizer.zero_grad(set_to_none=True)
            tensors = self.batch(batch, precision)  # outside the mode, which counts operations
            with self.mode(model, precision, edits):
                loss = self.loss(model, tensors, precision)
            self.backward(loss)
            losses.append(float(loss.detach()))
            update = Update(self.pair, model, optimizer, schedule, step, memory)
            (make_update or Update.make)(update)
            params.append({n: p.detach().numpy().copy() for n, p in model.named_parameters() if p.requires_grad})
        buffers = {n: b.numpy().copy() for n, b in model.named_buffers() if n in self.state and b.is_floating_point()}
        return Trajectory(losses, params, buffers)

    def optimizer(self, model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        """The pair's optimizer of a model, and its scheduler, None without one."""
        optimizer = call(self.pair, "torch_optimizer", model)
        if not isinstance(optimizer, torch.optim.Optimizer):
            what = type(optimizer).__name__
            raise PairError(f"Pair torch_optimizer: gives {what}; return a torch.optim.Optimizer of the model")
        own = {id(p) for p in model.parameters()}
        if not all(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise PairError("Pair torch_optimizer: holds tensors that the model has not; give it model.parameters()")
        if self.pair.torch_schedule is None:
            return optimizer, None
        schedule = call(self.pair, "torch_schedule", optimizer)
        if not callable(getattr(schedule, "step", None)):
            raise PairError(f"Pair torch_schedule: gives {type(schedule).__name__}; return the scheduler")
        return optimizer, schedule


@dataclass
class Update:
    """One update of the PyTorch side: the gradients are there, the weights are still those before it."""

    pair: Pair
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any
    step: int
    memory: dict[Any, Any]

    def make(self) -> None:
        """The clip, the optimizer's step, the scheduler's."""
        if self.pair.clip is not None:
            self.clip(self.pair.clip)
        with blamed("torch_optimizer", self.pair.torch_optimizer):
            self.optimizer.step()
        if self.schedule is not None:
            with blamed("torch_schedule", self.pair.torch_schedule):
                self.schedule.step()

    def clip(self, norm: float) -> None:
        """Scales all gradients by min(1, norm / global norm), as optax does.

        `clip_grad_norm_` divides by the global norm + 1e-6: the two differ by that relative 1e-6 / norm.
        """
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        total = torch.sqrt(sum((g.square().sum() for g in grads), torch.zeros((), dtype=grads[0].dtype)))
        for grad in grads:
            grad.mul_(torch.clamp(norm / total, max=1.0))


def _array(output: Any, name: str) -> np.ndarray:
    if not isinstance(output, torch.Tensor):
        raise PairError(f"Pair {name}: gives {type(output).__name__}; return one tensor")
    if output.is_complex():
        raise PairError(f"Pair {name}: gives complex numbers; return torch.view_as_real of them")
    return (output.float() if output.dtype == torch.bfloat16 else output).detach().numpy()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes it the dtype of what PyTorch functions create: tables in a forward pass are float64, too, in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _default(precision: str) -> torch.dtype:
    return torch.float64 if precision == "float64" else torch.float32
