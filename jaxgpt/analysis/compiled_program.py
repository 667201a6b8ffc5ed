"""What XLA made of a program: products, attention kernels, collectives, donation and traffic, read from its HLO text.

The text is that of a compiled program (`compiled.as_text()`), whose instructions stand in the order of their schedule,
or of a lowered one (`lowered.compiler_ir("hlo").as_hlo_text()`). The syntax is described at
https://openxla.org/xla/operation_semantics; only what these figures need is parsed.

A loop's body counts as often as it runs, where the text tells the number of iterations. The loop over training steps
has none, so all figures are those of one step.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Instructions that move no data: they name, group or order buffers.
NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "domain", "add-dependency"),
}
SLICES = ("dynamic-slice", "slice", "gather")  # they read as much as they give
HOST_TRANSFERS = ("infeed", "outfeed")
_COMMENT = re.compile(r"/\*.*?\*/")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%?([\w.\-]+)$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_TARGET, _OP_NAME = r'custom_call_target="([^"]*)"', r'op_name="([^"]*)"'
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class ArrayType(NamedTuple):
    """The type of an array: "bf16[8,1024]"."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False  # in a TPU's vector memory (VMEM), not in its HBM

    @property
    def n_bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int((re.findall(r"\d+", self.dtype) or ["0"])[0])  # "token" has none
        return math.prod(self.dims) * bits // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One instruction: `%name = type opcode(%operand, ...), attributes`."""

    name: str
    opcode: str
    types: tuple[ArrayType, ...]  # of the result; of a tuple all its arrays
    operands: tuple[str, ...]
    attributes: str  # the rest of the line: dimension numbers, metadata, backend_config
    argument: str = ""  # what stands between the parentheses: of a constant its value, of a parameter its number
    is_root: bool = False

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes, or None."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @cached_property
    def called(self) -> dict[str, str]:
        """The computations that it names, by role: "calls", "body", "condition", "to_apply", "branch 0"."""
        found = dict(_CALLED.findall(self.attributes))
        if branches := _BRANCHES.search(self.attributes):
            found |= {f"branch {i}": name.strip().lstrip("%") for i, name in enumerate(branches[1].split(","))}
        return found

    @property
    def n_bytes(self) -> int:
        """Bytes of the result outside of the chip."""
        return sum(t.n_bytes for t in self.types if not t.on_chip)


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text."""

    instructions: dict[str, Instruction] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]

    def users(self, name: str) -> list[Instruction]:
        return [instruction for instruction in self if name in instruction.operands]

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self if instruction.is_root)


class Executed(NamedTuple):
    """An instruction of the schedule, which is no part of a fusion."""

    times: int  # in a training step
    computation: Computation
    instruction: Instruction


class Product(NamedTuple):
    """A matrix product, alone or in a fusion."""

    lhs: ArrayType
    rhs: ArrayType
    result: ArrayType
    times: int
    flop: int  # of all times

    @property
    def is_float32(self) -> bool:
        """Whether an operand is float32 or float64."""
        return bool({"f32", "f64"} & {self.lhs.dtype, self.rhs.dtype})


class Collective(NamedTuple):
    """A collective operation."""

    kind: str
    times: int
    n_bytes: int  # on a device, each time
    flop_meanwhile: int = 0  # of the products that the schedule has between its start and its end
    bytes_meanwhile: int = 0  # that the kernels between them read and write
    group_size: int | None = None  # devices among which it runs; None: the text does not tell, as for all of them


class FlashAttention(NamedTuple):
    """How many flash-attention kernels the text holds. One layer's backward pass may consist of two kernels: it is
    counted once."""

    forward: int
    backward: int


class CompiledProgram:
    """A program's HLO text, parsed.

    Args:
        text: of a whole module.

    Raises:
        ValueError: the text is no HLO module.
    """

    def __init__(self, text: str):
        self.header = text.partition("\n")[0]
        self.computations: dict[str, Computation] = {}
        entry = ""
        current, pending = Computation(), ""
        for line in text.splitlines()[1:]:
            if line.startswith(" "):
                if pending:
                    _add(current, pending)
                pending = line
            elif line == "}" or not line:
                if pending:
                    _add(current, pending)
                pending = ""
            elif pending:  # the rest of an instruction whose attributes hold line breaks
                pending += line
            elif line.endswith("{"):
                name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
                entry = name if line.startswith("ENTRY ") else entry
                current = self.computations[name] = Computation()
        if not entry:
            raise ValueError("no HLO module: it has no ENTRY computation")
        self.entry = self.computations[entry]

    # ------------------------------------------------------------------------------------------------------- walking

    @cached_property
    def executed(self) -> list[Executed]:
        """The instructions of the schedule, with those of loops, calls and branches."""
        return list(self._execute(self.entry, 1))

    def _execute(self, computation: Computation, times: int) -> Iterator[Executed]:
        for instruction in computation:
            yield Executed(times, computation, instruction)
            called = instruction.called
            if instruction.opcode == "while":
                n = times * self._iterations(instruction)
                yield from self._execute(self.computations[called["body"]], n)
            elif instruction.opcode == "call":
                yield from self._execute(self.computations[called["to_apply"]], times)
            elif instruction.opcode == "conditional":
                for role, name in called.items():
                    if role.startswith(("branch", "true", "false")):
                        yield from self._execute(self.computations[name], times)

    def _iterations(self, loop: Instruction) -> int:
        """How often a loop runs: as XLA says, else up to the constant of its condition; 1 where neither is there."""
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        condition = self.computations[loop.called["condition"]]
        root = condition.root
        if root.opcode == "compare" and "direction=LT" in root.attributes:
            limit = condition.operands(root)[-1]
            if limit.opcode == "constant":
                return int(limit.argument)
        return 1

    def _inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """The instructions of a fusion, or of what an asynchronous operation calls, with those of nested ones."""
        if name := _kernel(instruction):
            computation = self.computations[name]
            for inner in computation:
                yield computation, inner
                yield from self._inside(inner)

    def _all(self) -> Iterator[tuple[int, Computation, Instruction]]:
        """Every instruction that is executed, in fusions too, with how often."""
        for times, computation, instruction in self.executed:
            yield times, computation, instruction
            for inner_computation, inner in self._inside(instruction):
                yield times, inner_computation, inner

    # ------------------------------------------------------------------------------------------------------- figures

    @cached_property
    def products(self) -> list[Product]:
        """Dots, convolutions (what TPUs make of dots) and calls of cuBLAS."""
        return [
            product._replace(times=times, flop=times * product.flop)
            for times, computation, instruction in self.executed
            for product in self._products_of(computation, instruction)
        ]

    def _products_of(self, computation: Computation, instruction: Instruction) -> Iterator[Product]:
        """The products of one kernel, once."""
        for owner, inner in [(computation, instruction), *self._inside(instruction)]:
            if flop_of := _PRODUCTS.get(inner.opcode):
                operands = [operand.types[0] for operand in owner.operands(inner)]
                if len(operands) >= 2 and (flop := flop_of(inner, operands[0], operands[1])):
                    yield Product(operands[0], operands[1], inner.types[0], 1, flop)

    @property
    def flash_attention(self) -> FlashAttention:
        """cuDNN's kernels, and on TPUs Pallas' flash and splash kernels."""
        forward = backward = 0
        for _, _, instruction in self._all():
            target = instruction.attribute(_TARGET) or ""
            names = f"{instruction.name} {instruction.attribute(_OP_NAME)}".lower()
            if target.startswith("__cudnn$fmha"):
                backward += "Backward" in target
                forward += "Backward" not in target
            elif target == "tpu_custom_call" and ("flash" in names or "splash" in names):
                is_dq = re.search(r"_dq(_|\b)", instruction.name) is not None  # its dk and dv are another kernel
                is_backward = re.search(r"dkv|bwd|backward", instruction.name) is not None
                backward += is_backward and not is_dq
                forward += not is_backward and not is_dq
        return FlashAttention(forward, backward)

    @cached_property
    def collectives(self) -> list[Collective]:
        """The collectives. One that XLA has split into a start and a done runs beside what the schedule has between
        the two; one inside a fusion, beside the fusion's products. libtpu writes one that runs beside several fusions
        into each of them, with the same chain: it counts once."""
        found: dict[tuple[str, str | int], Collective] = {}  # by kind and chain, or number where there is no chain
        for times, computation, instruction in self.executed:
            inside = list(self._inside(instruction))
            for owner, candidate in [(computation, instruction), *inside]:
                kind = candidate.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                beside = [instruction] if instruction.opcode == "fusion" else _until_done(computation, instruction)
                flop = sum(product.flop for i in beside for product in self._products_of(computation, i))
                traffic = 0 if instruction.opcode == "fusion" else sum(self._traffic(computation, i) for i in beside)
                key = kind, candidate.attribute(r'chain_id="(\w+)"') or len(found)
                before = found.get(
                    key, Collective(kind, times, _payload(owner, candidate), group_size=_group_size(candidate))
                )
                found[key] = before._replace(
                    flop_meanwhile=before.flop_meanwhile + flop, bytes_meanwhile=before.bytes_meanwhile + traffic
                )
        return list(found.values())

    @property
    def donated(self) -> int:
        """How many of the arguments' buffers results take over."""
        aliased = self.header.partition("input_output_alias={")[2].partition(" }, ")[0]
        donors = self.header.partition("buffer_donor={")[2].partition(" }, ")[0]
        return len(re.findall(r"\}: \(\d+", aliased)) + len(re.findall(r"\(\d+, \{", donors))

    @property
    def host_callbacks(self) -> int:
        """Calls of the host, and transfers from and to it."""
        return sum(
            instruction.opcode in HOST_TRANSFERS
            or "is_host_transfer=true" in instruction.attributes
            or "callback" in (instruction.attribute(_TARGET) or "")
            for _, _, instruction in self._all()
        )

    @cached_property
    def bytes_accessed(self) -> int:
        """Bytes that a step reads from and writes to the device's memory: the operands and results of every kernel.

        Slices count what they take, updates in place what they write. Buffers in a TPU's vector memory are left out.
        """
        return sum(times * self._traffic(computation, instruction) for times, computation, instruction in self.executed)

    @property
    def estimated_cycles(self) -> int | None:
        """libtpu's estimate of a step in cycles of the chip: the sum over the kernels that have one. None elsewhere."""
        found = [
            times * int(cycles)
            for times, _, instruction in self.executed
            if (cycles := instruction.attribute(r'"estimated_cycles":"(\d+)"'))
        ]
        return sum(found) if found else None

    def _traffic(self, computation: Computation, instruction: Instruction) -> int:
        opcode = instruction.opcode
        if opcode in NO_TRAFFIC or opcode.endswith(("-done", "-update")):  # a copy counts where it starts
            return 0
        operands = computation.operands(instruction)
        if opcode in SLICES:
            return 2 * instruction.n_bytes
        if opcode in ("dynamic-update-slice", "scatter"):
            return 2 * operands[-1 if opcode == "scatter" else 1].n_bytes
        if opcode in ("copy-start", "slice-start"):  # the result names source and destination
            moved = [t for t in instruction.types if t.dims]
            return sum(t.n_bytes for t in moved[:2] if not t.on_chip)
        if opcode.endswith("-start"):  # the result repeats the operands
            return 2 * sum(operand.n_bytes for operand in operands)
        if opcode == "fusion":
            inner = self.computations[instruction.called["calls"]]
            parameters = {int(i.argument): i for i in inner if i.opcode == "parameter"}
            read = sum(
                _read_of(inner, parameters[k], operand) if k in parameters else operand.n_bytes
                for k, operand in enumerate(operands)
            )
            return read + _written_by(inner, instruction)
        return sum(operand.n_bytes for operand in operands) + instruction.n_bytes


# ------------------------------------------------------------------------------------------------------------- parsing


def _add(computation: Computation, line: str) -> None:
    """Adds the instruction of a line; a line that holds none is left out."""
    line = _COMMENT.sub("", line)
    begin = _INSTRUCTION.match(line)
    if not begin:
        return
    end = _closing(line, begin.end()) + 1 if line[begin.end()] == "(" else line.index(" ", begin.end())
    types = tuple(
        ArrayType(
            dtype,
            tuple(int(n.strip("<= ")) for n in dims.split(",") if n.strip("<= ")),
            "T(" in layout and "S(1)" in layout,
        )
        for dtype, dims, layout in _ARRAY.findall(line[begin.end() : end])
    )
    opening = line.index("(", end)
    closing = _closing(line, opening)
    argument = line[opening + 1 : closing]
    operands = [_NAME.search(part.strip()) for part in _split(argument)]
    name = begin[2]
    computation.instructions[name] = Instruction(
        name,
        line[end:opening].strip(),
        types or (ArrayType("token", ()),),
        tuple(found[1] for found in operands if found),
        line[closing + 1 :],
        argument,
        begin[1] is not None,
    )


def _closing(text: str, opening: int) -> int:
    """The position of the parenthesis that closes the one at `opening`; the text's last if none does."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text) - 1


def _split(arguments: str) -> list[str]:
    """Operands, separated by commas outside of brackets: a lowered program's may carry their types."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(arguments):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append(arguments[start:i])
            start = i + 1
    return [*parts, arguments[start:]]


def _kernel(instruction: Instruction) -> str | None:
    """The computation of a fusion or of an asynchronous call; None of another instruction."""
    if instruction.opcode not in ("fusion", "async-start", "call-start", "fusion-start"):
        return None
    return instruction.called.get("calls") or instruction.called.get("to_apply")


# ------------------------------------------------------------------------------------------------------------ products


def _dims(instruction: Instruction, name: str) -> list[int]:
    found = instruction.attribute(rf"\b{name}=\{{([\d,]*)\}}")
    return [int(n) for n in found.split(",") if n] if found else []


def _dot_flop(instruction: Instruction, lhs: ArrayType, rhs: ArrayType) -> int:
    """Two operations for each element of the result and of the contracted axes."""
    contracted = math.prod(lhs.dims[axis] for axis in _dims(instruction, "lhs_contracting_dims"))
    return 2 * math.prod(instruction.types[0].dims) * contracted


def _cublas_flop(instruction: Instruction, lhs: ArrayType, rhs: ArrayType) -> int:
    """As `_dot_flop`, of a custom call whose dimension numbers stand in its configuration; 0 for another one."""
    axes = instruction.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
    if axes is None or "__cublas$" not in (instruction.attribute(_TARGET) or ""):
        return 0
    contracted = math.prod(lhs.dims[int(axis)] for axis in re.findall(r"\d+", axes))
    return 2 * math.prod(instruction.types[0].dims) * contracted


def _convolution_flop(instruction: Instruction, lhs: ArrayType, rhs: ArrayType) -> int:
    """Two operations for each pair of an element of the result and one of the kernel that meet in the input.

    TPUs compute a batched product as a convolution over the batch, dilated so that most pairs meet zeros.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if not labels:
        return 0
    lhs_labels, rhs_labels, out_labels = labels.groups()
    out = instruction.types[0]
    flop = 2 * out.dims[out_labels.index("b")] * out.dims[out_labels.index("f")] * rhs.dims[rhs_labels.index("i")]
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    for axis in (label for label in out_labels if label.isdigit()):
        sizes = (lhs.dims[lhs_labels.index(axis)], rhs.dims[rhs_labels.index(axis)], out.dims[out_labels.index(axis)])
        flop *= _meeting_pairs(*sizes, window, int(axis))
    return flop


def _meeting_pairs(n_in: int, n_kernel: int, n_out: int, window: str, axis: int) -> int:
    """Of a spatial axis, the pairs of an output and a kernel position that meet an element of the input."""

    def value(name: str, default: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", window)
        return found[1].split("x")[axis] if found else default

    stride, dilation, kernel_dilation = (int(value(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    padding = int(value("pad", "0_0").split("_")[0])
    return sum(
        0 <= at < n_in * dilation and at % dilation == 0
        for output in range(n_out)
        for kernel in range(n_kernel)
        for at in [output * stride + kernel * kernel_dilation - padding]
    )


_PRODUCTS = {"dot": _dot_flop, "convolution": _convolution_flop, "custom-call": _cublas_flop}

# -------------------------------------------------------------------------------------------------------- collectives


def _payload(computation: Computation, instruction: Instruction) -> int:
    """A collective's bytes on a device: of its operands or of its result, whichever is more."""
    operands = sum(t.n_bytes for operand in computation.operands(instruction) for t in operand.types)
    if instruction.opcode.endswith("-start"):  # its own result repeats the operands: take that of its done
        done = [user for user in computation.users(instruction.name) if user.opcode.endswith("-done")]
        return max([operands, *(sum(t.n_bytes for t in user.types) for user in done)])
    return max(operands, sum(t.n_bytes for t in instruction.types))


def _group_size(instruction: Instruction) -> int | None:
    """How many devices take part in a collective.

    It is written as `replica_groups={{0,1},{2,3}}`, `[2,2]<=[4]` or `mesh['data'=2,'fsdp'=2] {'fsdp'}`: two in each.
    """
    if size := instruction.attribute(r"replica_groups=\[\d+,(\d+)\]"):
        return int(size)
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([\w',]*)\}", instruction.attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", axes[2]))
    group = instruction.attribute(r"replica_groups=\{\{([\d,]+)\}")
    return len(group.split(",")) if group else None


def _until_done(computation: Computation, start: Instruction) -> list[Instruction]:
    """What the schedule has between an asynchronous operation's start and its done; nothing for another operation."""
    if not start.opcode.endswith("-start"):
        return []
    between, names = [], {start.name}
    for instruction in list(computation)[list(computation.instructions).index(start.name) + 1 :]:
        if not names & set(instruction.operands):
            between.append(instruction)
        elif instruction.opcode.endswith("-done"):
            return between
        else:
            names.add(instruction.name)  # an update between the two
    return between


# ------------------------------------------------------------------------------------------------------------- traffic


def _read_of(inner: Computation, parameter: Instruction, operand: Instruction) -> int:
    """The bytes that a fusion reads of an operand: where it only slices, the slices; what it updates in place, none."""
    if not operand.n_bytes:
        return 0
    users = inner.users(parameter.name)
    if users and all(user.opcode in SLICES and user.operands[0] == parameter.name for user in users):
        return min(operand.n_bytes, sum(user.n_bytes for user in users))
    updated = [user for user in users if user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name]
    return 0 if users and len(updated) == len(users) else operand.n_bytes


def _written_by(inner: Computation, fusion: Instruction) -> int:
    """The bytes that a fusion writes: of a result that it updates in place, the update."""
    root = inner.root
    if root.opcode == "dynamic-update-slice" and fusion.n_bytes:
        return sum(t.n_bytes for t in inner.operands(root)[1].types)
    return fusion.n_bytes
