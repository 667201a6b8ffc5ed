"""Faults of a ResNet: padding, kernels' axes, batch norm's statistics in training, SGD."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tests.parity_pairs.planting import (
    Level,
    Plant,
    Planted,
    converter,
    function,
    optimizer,
    patched,
    value,
    with_gradient,
)


def conv_with(**changes: Any) -> Plant:
    """Builds the convolutions with other arguments."""

    def conv(n_in: int, n_out: int, size: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
        padding = ((size // 2, size // 2),) * 2
        settings = {"padding": padding, "use_bias": False} | changes
        return nnx.Conv(n_in, n_out, (size, size), stride, rngs=rngs, **settings)

    return value("conv", conv)


def kernel_as(*axes: int, flip: bool = False) -> Plant:
    """Converts the kernels of convolutions with other axes; those of other shapes are left as they are."""

    def wrapper(original: Any) -> Any:
        def kernel(weight: Any) -> Any:
            if weight.ndim != 4:
                return original(weight)
            changed = weight.transpose(axes)[::-1, ::-1] if flip else weight.transpose(axes)
            right = original(weight)
            return changed if changed.shape == right.shape else right

        return kernel

    return function("kernel", wrapper)


def pooled_over_zeros(x_BHWC: Any) -> Any:
    padded = jnp.pad(x_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return nnx.max_pool(padded, (3, 3), (2, 2), padding="VALID")


def block_call(change: str) -> Plant:
    """The call of every block with one thing changed."""

    def make(module: ModuleType) -> Any:
        def call(self: Any, x_BHWC: Any) -> Any:
            out_BHWC = self.norm2(self.conv2(jax.nn.relu(self.norm1(self.conv1(x_BHWC)))))
            if change == "no residual":
                is_plain = self.shortcut is None
                return jax.nn.relu(out_BHWC if is_plain else out_BHWC + self.residual(x_BHWC))
            return out_BHWC + self.residual(x_BHWC)

        return call

    return patched({"Block.__call__": make})


def shortcut_without_norm(self: Any, x_BHWC: Any) -> Any:
    return x_BHWC if self.shortcut is None else self.shortcut(x_BHWC)


class RunningStatistics(nnx.Module):
    """Batch norm as in evaluation."""

    def __init__(self, n_channels: int):
        self.scale, self.bias = nnx.Param(jnp.ones(n_channels)), nnx.Param(jnp.zeros(n_channels))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(n_channels)), nnx.BatchStat(jnp.ones(n_channels))

    def __call__(self, x_BHWC: Any) -> Any:
        scale_C = self.scale[...] * jax.lax.rsqrt(self.var[...] + 1e-5)
        return (x_BHWC - self.mean[...]) * scale_C + self.bias[...]


def stem_norm_bias_zero(model: Any) -> None:
    model.norm.bias.set_value(jnp.zeros_like(model.norm.bias.get_value()))


def sgd(module: ModuleType, decay: Any = 1e-3, mask: Any = "kernels", **changes: Any) -> optax.GradientTransformation:
    """The example's optimizer, but for the changes."""
    settings: dict[str, Any] = {"momentum": 0.9} | changes
    mask = module.is_kernel if mask == "kernels" else mask
    schedule = optax.cosine_decay_schedule(1e-2, 10)
    return optax.chain(optax.add_decayed_weights(decay, mask), optax.sgd(schedule, **settings))


STEM = r"resnet\.embedder\.embedder"


def fault(name: str, plant: Plant, layer: str, cause: str, level: Level = "forward") -> Planted:
    return Planted(f"ResNet: {name}", "resnet", plant, layer, cause, level)


FAULTS = [
    fault('padding "SAME" in the convolutions', conv_with(padding="SAME"), rf"{STEM}\.convolution", "padding"),
    fault(
        'padding "SAME" in the pooling',
        value("max_pool", lambda x_BHWC: nnx.max_pool(x_BHWC, (3, 3), (2, 2), padding="SAME")),
        r"resnet\.embedder\.pooler",
        "padding",
    ),
    fault(
        "kernels' height and width swapped",
        kernel_as(3, 2, 1, 0),
        rf"{STEM}\.convolution",
        "kernel's spatial axes transposed",
    ),
    fault("kernels flipped", kernel_as(2, 3, 1, 0, flip=True), rf"{STEM}\.convolution", "kernel flipped"),
    fault(
        "inputs for outputs where they are as many",
        kernel_as(2, 3, 0, 1),
        r"resnet\.encoder\.stages\.0\.layers\.0\.layer\.0\.convolution",
        "kernel transposed",
    ),
    fault(
        "epsilon 1e-3, as in Keras",
        function("normalize", lambda f: lambda *args: f(*args, epsilon=1e-3)),
        rf"{STEM}\.normalization",
        "epsilon",
    ),
    fault(
        "running statistics in training",
        value("BatchNorm", RunningStatistics),
        rf"{STEM}\.normalization",
        "batch statistics",
    ),
    fault(
        "the stem's norm without its bias",
        converter(stem_norm_bias_zero),
        rf"{STEM}\.normalization",
        "bias missing",
        "parameters",
    ),
    fault(
        "the shortcuts' norm missing",
        value("Block.residual", shortcut_without_norm),
        r"resnet\.encoder\.stages\.0\.layers\.0\.shortcut\.normalization",
        "norm missing",
    ),
    fault(
        "no ReLU after the residual",
        block_call("no activation"),
        r"resnet\.encoder\.stages\.0\.layers\.0\.activation",
        "activation",
    ),
    fault(
        "no residual where there is no shortcut",
        block_call("no residual"),
        r"resnet\.encoder\.stages\.0\.layers\.\d",
        "residual missing",
    ),
    fault(
        "the gradient of the pooling halved",
        function("max_pool", lambda f: with_gradient(f, 0.5)),
        rf"resnet\.embedder\.pooler|{STEM}(\..*)?",
        "gradient scaled",
        "gradients",
    ),
    fault(
        "Flax's convention of the momentum",
        function("updated", lambda f: lambda running, batch: f(running, batch, momentum=0.9)),
        rf"{STEM}\.normalization",
        "batch norm momentum",
        "updates",
    ),
    fault(
        "running variance over n",
        value("unbiased", lambda var_C, n_values: var_C),
        rf"{STEM}\.normalization",
        "running variance biased",
        "updates",
    ),
    fault("decay of norms and biases", optimizer(lambda m: sgd(m, mask=None)), "optimizer", "decay mask", "updates"),
    fault("momentum 0.95", optimizer(lambda m: sgd(m, momentum=0.95)), "optimizer", "momentum", "updates"),
    fault("Nesterov's momentum", optimizer(lambda m: sgd(m, nesterov=True)), "optimizer", "nesterov", "updates"),
]
