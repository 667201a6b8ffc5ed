"""What a training step becomes on accelerators that this machine need not have: memory, kernels, time by estimate.

The trainer's own step is compiled for the target's devices by XLA, as it would be there; nothing is executed. Without
the target's compiler the step is only lowered: its dtypes, kernels, donation and products are known, and no memory.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt import parallel
from jaxgpt.analysis.compiled_program import CompiledProgram
from jaxgpt.analysis.model_summary import lookup_tables
from jaxgpt.analysis.targets import Chip, Target, assumed_cudnn
from jaxgpt.config import TrainConfig, mesh_shape, mesh_text
from jaxgpt.data.sampler import WindowSource
from jaxgpt.errors import UserError
from jaxgpt.memory import size_text
from jaxgpt.objective import LanguageModelingObjective, Objective
from jaxgpt.parallel import Executor
from jaxgpt.train_step import SINGLE_DEVICE, state_shapes, train_steps

MAX_SHAPES = 3  # float32 products, and buffers of a program that does not fit, of which the shapes are told
MATRIX_UNIT = 128  # columns of a TPU's, where the clock is published
N_STEPS = 16  # whose windows a dispatch brings to the devices
COMPILERS = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def make_plan(config: TrainConfig, vocab_size: int, target: Target, n_tokens: float, mesh: str = "") -> dict[str, Any]:
    """The plan of a training on a target, as values that JSON can hold.

    Args:
        vocab_size: the tokenizer's number of tokens.
        n_tokens: how many tokens the estimate of the hours is for.
        mesh: how the devices share the step, as `config.mesh_shape` reads it.

    Raises:
        UserError: the batch does not divide by the target's devices, they are no such mesh, or the compiler refuses the
            topology.
    """
    parallel.require_division(config, target.n_devices, target.name)
    compiled = target.compiler_is_installed
    devices = target.devices() if compiled else [target.stand_in]
    numerics = parallel.numerics(config, devices[0])
    end_of_text = vocab_size - 1 if config.within_documents else None  # GPT-2's is the last; any other costs the same
    objective = LanguageModelingObjective(config, vocab_size, numerics, end_of_text)
    # The products' operands are bfloat16 where they should be, and those that are not are to be seen as they are.
    with assumed_cudnn(), jax.default_matmul_precision("highest"):
        if compiled:
            found = _compile(Executor(objective, devices, mesh), target)
        else:
            found = _Found(_lowered(objective, target), is_compiled=False)
    program = found.program
    state = state_shapes(objective)
    data, fsdp = mesh_shape(mesh, target.n_devices)
    of_state = {"weights": _size(state.params, fsdp), "optimizer_state": _size(state.opt_state, fsdp)}
    memory = {**of_state, **found.memory}
    flop = _flop(objective, target, program)
    estimated = _estimate(program, flop, config, target, n_tokens) if found.is_compiled else None
    return {
        "target": target.name,
        "devices": target.n_devices,
        "mesh": {"data": data, "fsdp": fsdp},
        "chip": _chip(target.chip),
        "preset": config.preset,
        "batch_size": config.batch_size,
        "model": dataclasses.asdict(config.model),
        "read_from": "compiled" if found.is_compiled else "lowered",
        "versions": _versions(),
        "fits": found.fits,
        "to_fit": _to_fit(config, memory, target, fsdp) if found.fits is False else [],
        "problem": found.problem,
        "bytes_per_device": memory,
        "flash_attention": _flash_attention(objective, target, program),
        "products": dict(Counter(f"{p.lhs.dtype} x {p.rhs.dtype}" for p in program.products)),
        "float32_products": _float32_products(program),
        "collectives": _collectives(program),
        "donated": program.donated,
        "donatable": len(jax.tree.leaves(state)),
        "host_callbacks": program.host_callbacks,
        "flop_per_device": flop,
        "bytes_accessed_per_device": found.bytes_accessed,
        "estimated_cycles": program.estimated_cycles,
        "estimated": estimated,
    }


def _source(config: TrainConfig) -> WindowSource:
    """The windows of a dispatch, as the loader sends them for a corpus that stays on the host."""
    return WindowSource(jax.ShapeDtypeStruct((N_STEPS, config.batch_size, config.n_time + 1), jnp.int32))  # pyright: ignore


class _Found(NamedTuple):
    """What the compiler gave."""

    program: CompiledProgram
    is_compiled: bool  # else it is lowered only
    fits: bool | None = None
    memory: Mapping[str, int] = {}
    bytes_accessed: Mapping[str, int | None] | None = None
    problem: str | None = None  # the compiler's, with a program that does not fit


def _compile(executor: Executor, target: Target) -> _Found:
    """The compiled program and its memory; of one that does not fit, the lowered program and the compiler's message."""
    try:
        compiled = executor.lower_train_steps(_source(executor.config)).compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            why = str(e).splitlines()[0][:200]
            raise UserError(
                f"--target {target.name}: its compiler fails ({why}); choose another target or shape"
            ) from e
        need, problem = read_out_of_memory(str(e))
        memory = {"peak": need, "memory": int(target.chip.device_bytes)}
        program = _lowered(executor.objective, target)
        return _Found(program, False, False, memory, problem=problem)
    plan = compiled.memory_analysis()
    memory = {
        "temporary": plan.temp_size_in_bytes,  # activations, gradients, and what the compiler needs besides
        "peak": plan.peak_memory_in_bytes,
        "memory": int(target.chip.device_bytes),
    }
    fits = memory["peak"] <= target.chip.usable_bytes
    program = CompiledProgram(compiled.as_text())
    of_xla = (compiled.cost_analysis() or {}).get("bytes accessed")  # libtpu's, with what stays in vector memory
    bytes_accessed = {"device_memory": program.bytes_accessed, "xla": None if of_xla is None else int(of_xla)}
    return _Found(program, True, fits, memory, bytes_accessed)


def read_out_of_memory(message: str) -> tuple[int, str]:
    """Of libtpu's message about a program that does not fit: the bytes that it needs at the least, and its largest
    buffers."""
    used = re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    one = re.search(r"Allocation \(size=(\d+)\)", message)
    if used:
        need = int(float(used[1]) * _UNITS[used[2]])
    else:
        need = int(one[1]) if one else 0
    sizes = re.findall(r"Size: ([\d.]+[KMGT]?)\b.*?Shape: (\w+\[[\d,]*\])", message, re.DOTALL)
    shapes = [f"{shape} of {size}iB" for size, shape in sizes] or re.findall(r"\[shape: (\w+\[[\d,]*\])", message)
    shapes = list(dict.fromkeys(shapes))
    return need, f"largest buffers: {', '.join(shapes[:MAX_SHAPES])}" if shapes else message.splitlines()[0][:200]


def _lowered(objective: Objective, target: Target) -> CompiledProgram:
    """One device's share of the step, lowered for the target's platform, as XLA's compiler would receive it."""
    config = dataclasses.replace(objective.config, batch_size=objective.config.batch_size // target.n_devices)
    objective = dataclasses.replace(objective, config=config)

    def program(state: Any, source: Any, n_steps: Any) -> Any:
        return train_steps(objective, state, source, n_steps, SINGLE_DEVICE)

    state = state_shapes(objective)
    n_steps = jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.jit(program, donate_argnums=0).trace(state, _source(config), n_steps)
    lowered = traced.lower(lowering_platforms=(target.chip.platform,))
    return CompiledProgram(lowered.compiler_ir("hlo").as_hlo_text())  # pyright: ignore


def _size(tree: Any, fsdp: int) -> int:
    """The bytes of a device's shards of parameters or moments."""

    def n_bytes(x: Any) -> int:
        whole = math.prod(x.shape) * x.dtype.itemsize
        return whole if parallel.shard_axis(x.shape, fsdp) is None else whole // fsdp

    return sum(map(n_bytes, jax.tree.leaves(tree)))


def _chip(chip: Chip) -> dict[str, Any]:
    """The figures that the estimate uses, of a device."""
    return {
        "name": chip.name,
        "memory_bytes": int(chip.device_bytes),
        "flop_per_s": chip.device_flop_per_s,
        "memory_bytes_per_s": chip.memory_bytes_per_s / chip.cores,
        "interconnect_bytes_per_s": chip.interconnect_bytes_per_s / chip.cores,
        "clock_hz": chip.clock_hz,
    }


def _versions() -> dict[str, str]:
    found = {"jax": jax.__version__}
    for name in COMPILERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _to_fit(config: TrainConfig, memory: Mapping[str, int], target: Target, fsdp: int) -> list[str]:
    """What to change so that the step needs less memory."""
    more_shards = [f"--mesh fsdp={target.n_devices}"] if fsdp < target.n_devices else []
    if memory["weights"] + memory["optimizer_state"] > target.chip.usable_bytes:
        return [*more_shards, "a smaller model: the weights and the optimizer state alone exceed a device"]
    rows = config.batch_size // target.n_devices
    more = [n for n in range(config.grad_accum + 1, rows + 1) if rows % n == 0]
    changes = [*more_shards, *([f"--grad-accum {more[0]}"] if more else [])]
    changes += ["--remat block"] if config.remat != "block" else []
    half = rows // 2 // config.grad_accum * config.grad_accum
    changes += [f"--batch-size {target.n_devices * half}", "more devices"] if half else []
    return changes or ["a shorter --model.block-size, or a smaller model"]


def _flash_attention(objective: Objective, target: Target, program: CompiledProgram) -> dict[str, Any]:
    found, config = program.flash_attention, objective.config
    why_not = None
    if not found.forward:
        head_size = config.model.n_embd // config.model.n_head
        if objective.numerics.compute_dtype != jnp.bfloat16:
            why_not = f"it computes in bfloat16, and --dtype is {jnp.dtype(objective.numerics.compute_dtype).name}"
        elif config.within_documents:
            why_not = f"none for --packing documents with {config.n_time} tokens on {target.chip.name}"
        else:
            why_not = f"none for heads of {head_size} channels and {config.n_time} tokens on {target.chip.name}"
    return {**found._asdict(), "layers": config.model.n_layer, "why_not": why_not}


def _float32_products(program: CompiledProgram) -> dict[str, Any]:
    """Those with an operand in float32, the largest first."""
    found = sorted((p for p in program.products if p.is_float32), key=lambda p: -p.flop)
    shapes = list(dict.fromkeys(f"{p.lhs} x {p.rhs}" for p in found))
    return {"count": len(found), "flop": sum(p.flop for p in found), "largest": shapes[:MAX_SHAPES]}


def _collectives(program: CompiledProgram) -> dict[str, int]:
    """The bytes of a step on a device, by kind; those of a device alone, on an axis of size 1, move nothing."""
    found: Counter[str] = Counter()
    for collective in program.collectives:
        if collective.group_size != 1:
            found[collective.kind] += collective.times * collective.n_bytes
    return dict(found)


def _flop(objective: Objective, target: Target, program: CompiledProgram) -> dict[str, float]:
    """A step's floating-point operations on a device: of the program's products and attention kernels, and by the
    usual counts (`ModelConfig.flop_per_token`).

    A flash-attention kernel computes the causal half of the scores: 2 products forward, 5 backward.
    """
    config, model = objective.config, objective.config.model
    shapes = objective.param_shapes
    n_counted = sum(math.prod(p.shape) for name, p in shapes.items() if name not in lookup_tables(model))
    tokens = config.tokens_per_step / target.n_devices
    kernels = program.flash_attention
    of_product = tokens * config.n_time * model.n_embd  # 2 B T T C, its causal half
    attention = of_product * (2 * kernels.forward + 5 * kernels.backward)
    products = sum(p.flop for p in program.products)
    counts = {name: n * tokens for name, n in model.flop_per_token(n_counted).items()}
    return {"compiled": products + attention, "products": products, "flash_attention": attention, **counts}


def _estimate(
    program: CompiledProgram, flop: Mapping[str, float], config: TrainConfig, target: Target, n_tokens: float
) -> dict[str, Any]:
    """A step's time by a roofline, in seconds: the longest of arithmetic, memory traffic and, on a TPU whose clock is
    known, libtpu's cycles; then the collectives, as far as nothing is computed beside them.

    libtpu has no cycles for kernels of Pallas. Those of attention are added at the matrix units' speed, of which heads
    narrower than a unit use a part. An all-reduce sends each byte twice around the ring of its devices, the other
    collectives once.
    """
    chip = _chip(target.chip)
    parts = {
        "flop_s": flop["compiled"] / chip["flop_per_s"],
        "memory_s": program.bytes_accessed / chip["memory_bytes_per_s"],
    }
    if program.estimated_cycles and chip["clock_hz"]:
        head_size = config.model.n_embd // config.model.n_head
        of_kernels = flop["flash_attention"] / (chip["flop_per_s"] * min(1, head_size / MATRIX_UNIT))
        parts["cycles_s"] = program.estimated_cycles / chip["clock_hz"] + of_kernels
    collectives_s = exposed_s = 0.0
    for collective in program.collectives:
        n = collective.group_size or target.n_devices
        sent = (2 if collective.kind == "all-reduce" else 1) * collective.n_bytes * (n - 1) / n
        takes = sent / chip["interconnect_bytes_per_s"]
        beside = max(
            collective.flop_meanwhile / chip["flop_per_s"], collective.bytes_meanwhile / chip["memory_bytes_per_s"]
        )
        collectives_s += collective.times * takes
        exposed_s += collective.times * max(0.0, takes - beside)
    bound = max(parts, key=lambda name: parts[name])
    step_s = parts[bound] + exposed_s
    tokens_per_s = config.tokens_per_step / step_s
    return {
        "step_s": step_s,
        "tokens_per_s": tokens_per_s,
        "mfu": flop["F12"] / (step_s * chip["flop_per_s"]),
        "tokens": n_tokens,
        "hours": n_tokens / tokens_per_s / 3600,
        "bound": bound.removesuffix("_s"),
        **parts,
        "collectives_s": collectives_s,
        "collectives_exposed_s": exposed_s,
    }


# ---------------------------------------------------------------------------------------------------------------- text

BOUNDS = {"flop": "arithmetic", "memory": "memory traffic", "cycles": "libtpu's cycles"}


def text(plan: Mapping[str, Any], target: Target) -> str:
    """The plan for a person, a line for each subject."""
    versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
    n, size = plan["devices"], size_text(plan["chip"]["memory_bytes"])
    devices = f"{n} devices" if n > 1 else "1 device"
    if plan["mesh"]["fsdp"] > 1:
        devices += f" ({mesh_text(plan['mesh'])})"
    lines = [f"{plan['preset']} on {target.name}: {devices} of {size}, batch {plan['batch_size']} ({versions})"]
    if plan["fits"] is None:
        lines.append(
            f"lowered only: without the compiler nothing is known of memory and time; install it with "
            f'pip install -e ".[{target.extra}]" in a checkout'
        )
    else:
        lines.append(_fits_line(plan))
        if plan["problem"]:
            lines.append(plan["problem"])
    lines += [_flash_line(plan["flash_attention"]), _products_line(plan)]
    if plan["read_from"] == "compiled":
        kinds = ", ".join(f"{kind} {size_text(n)}" for kind, n in plan["collectives"].items()) or "none"
        lines.append(f"collectives: {kinds}")
    lines.append(f"donated: {plan['donated']} of {plan['donatable']} arrays; host callbacks: {plan['host_callbacks']}")
    flop = plan["flop_per_device"]
    line = f"each device, a step: {flop['compiled']:.3g} FLOP (F6 {flop['F6']:.3g}, F12 {flop['F12']:.3g})"
    if plan["bytes_accessed_per_device"]:
        line += f", {size_text(plan['bytes_accessed_per_device']['device_memory'])} of memory read and written"
    return "\n".join([*lines, line, *_estimate_lines(plan["estimated"])])


def _fits_line(plan: Mapping[str, Any]) -> str:
    memory = plan["bytes_per_device"]
    names = {"weights": "weights", "optimizer_state": "optimizer state", "temporary": "activations and temporary"}
    kinds = ", ".join(f"{name} {size_text(memory[key])}" for key, name in names.items() if key in memory)
    answer = "fits" if plan["fits"] else "does not fit"
    line = f"{answer}: {size_text(memory['peak'])} of {size_text(memory['memory'])} at the peak ({kinds})"
    return line if plan["fits"] else f"{line}; try {', or '.join(plan['to_fit'])}"


def _flash_line(flash: Mapping[str, Any]) -> str:
    if not flash["forward"]:
        return f"flash attention: in none of {flash['layers']} layers ({flash['why_not']})"
    return f"flash attention: {flash['forward']} forward and {flash['backward']} backward in {flash['layers']} layers"


def _products_line(plan: Mapping[str, Any]) -> str:
    kinds = ", ".join(f"{n} of {kind}" for kind, n in plan["products"].items())
    float32 = plan["float32_products"]
    line = f"products: {kinds}"
    return f"{line}; float32 in {float32['count']}, as {'; '.join(float32['largest'])}" if float32["count"] else line


def _estimate_lines(estimated: Mapping[str, Any] | None) -> list[str]:
    if estimated is None:
        return []
    parts = [f"{name} {_ms(estimated[f'{key}_s'])}" for key, name in BOUNDS.items() if f"{key}_s" in estimated]
    parts += [f"collectives {_ms(estimated['collectives_s'])}, {_ms(estimated['collectives_exposed_s'])} of it alone"]
    return [
        f"estimated: {_ms(estimated['step_s'])} a step, {estimated['tokens_per_s']:,.0f} tokens/s, "
        f"MFU {estimated['mfu']:.0%}, {estimated['hours']:.3g} hours for {estimated['tokens']:.3g} tokens",
        f"estimated from: {'; '.join(parts)}",
    ]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
