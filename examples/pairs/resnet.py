"""Hugging Face's ResNet in training mode against one in Flax NNX, whose images are NHWC in place of NCHW.

    jaxgpt parity --pair examples/pairs/resnet.py

Convolutions with stride 2, max-pooling, and batch norm with batch statistics: the running statistics are compared after
the updates. The weights are random: nothing is downloaded. The channels are few, and height and width differ, so that
no swapped axis goes unseen.

Axes: B batch, H height, W width, C channels.
"""

import jax
import jax.numpy as jnp
import optax
import torch
from flax import nnx
from transformers import ResNetConfig, ResNetForImageClassification

from jaxgpt.parity import Pair

BATCH, HEIGHT, WIDTH, N_CLASSES = 5, 24, 40, 7
N_BLOCKS = [2, 1, 1, 1]  # of each stage
N_CHANNELS = [4, 8, 16, 32]
N_EMBD = 8  # channels of the first convolution
EPSILON, MOMENTUM = 1e-5, 0.1  # of batch norm, PyTorch's defaults
config = ResNetConfig(
    embedding_size=N_EMBD, hidden_sizes=N_CHANNELS, depths=N_BLOCKS, layer_type="basic", num_labels=N_CLASSES
)


def torch_model():
    torch.manual_seed(0)
    model = ResNetForImageClassification(config)
    with torch.no_grad():  # norms and biases away from ones and zeros, which would hide those that are wrong
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


# ------------------------------------------------------------------------------------------------------- the JAX model


def conv(n_in, n_out, size, stride, rngs):
    """A convolution with as much padding on each side; "SAME" has less before than after where the stride is 2."""
    padding = ((size // 2, size // 2),) * 2
    return nnx.Conv(n_in, n_out, (size, size), stride, padding=padding, use_bias=False, rngs=rngs)


def batch_statistics(x_BHWC):
    """The mean and the variance [C] of a batch; the variance divides by the number of values, not by one less."""
    mean_C = x_BHWC.mean(axis=(0, 1, 2))
    return mean_C, jnp.square(x_BHWC - mean_C).mean(axis=(0, 1, 2))


def normalize(x_BHWC, mean_C, var_C, scale_C, bias_C, epsilon=EPSILON):
    return (x_BHWC - mean_C) * jax.lax.rsqrt(var_C + epsilon) * scale_C + bias_C


def updated(running_C, batch_C, momentum=MOMENTUM):
    """The running statistic; PyTorch's momentum is the weight of the new value, Flax's that of the old one."""
    return (1 - momentum) * running_C + momentum * batch_C


def unbiased(var_C, n_values):
    """The variance that divides by one less, of which PyTorch keeps the running mean; Flax keeps the other's."""
    return var_C * (n_values / (n_values - 1))


class BatchNorm(nnx.Module):
    """PyTorch's BatchNorm2d in training mode."""

    def __init__(self, n_channels):
        self.scale, self.bias = nnx.Param(jnp.ones(n_channels)), nnx.Param(jnp.zeros(n_channels))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(n_channels)), nnx.BatchStat(jnp.ones(n_channels))

    def __call__(self, x_BHWC):
        mean_C, var_C = batch_statistics(x_BHWC)
        self.mean[...] = updated(self.mean[...], mean_C)
        self.var[...] = updated(self.var[...], unbiased(var_C, x_BHWC.size // mean_C.size))
        return normalize(x_BHWC, mean_C, var_C, self.scale[...], self.bias[...])


def max_pool(x_BHWC):
    return nnx.max_pool(x_BHWC, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


class Block(nnx.Module):
    def __init__(self, n_in, n_out, stride, rngs):
        self.conv1, self.norm1 = conv(n_in, n_out, 3, stride, rngs), BatchNorm(n_out)
        self.conv2, self.norm2 = conv(n_out, n_out, 3, 1, rngs), BatchNorm(n_out)
        changes_shape = stride != 1 or n_in != n_out
        self.shortcut = nnx.data(conv(n_in, n_out, 1, stride, rngs) if changes_shape else None)
        self.shortcut_norm = nnx.data(BatchNorm(n_out) if changes_shape else None)

    def __call__(self, x_BHWC):
        out_BHWC = jax.nn.relu(self.norm1(self.conv1(x_BHWC)))
        out_BHWC = self.norm2(self.conv2(out_BHWC))
        return jax.nn.relu(out_BHWC + self.residual(x_BHWC))

    def residual(self, x_BHWC):
        return x_BHWC if self.shortcut is None else self.shortcut_norm(self.shortcut(x_BHWC))


class SmallResNetNNX(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = conv(3, N_EMBD, 7, 2, rngs), BatchNorm(N_EMBD)
        blocks, n_in = [], N_EMBD
        for stage, (n_out, n_blocks) in enumerate(zip(N_CHANNELS, N_BLOCKS, strict=True)):
            for i in range(n_blocks):
                blocks.append(Block(n_in, n_out, 2 if stage > 0 and i == 0 else 1, rngs))
                n_in = n_out
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(n_in, N_CLASSES, rngs=rngs)

    def __call__(self, x_BHWC):
        x_BHWC = max_pool(jax.nn.relu(self.norm(self.conv(x_BHWC))))
        for block in self.blocks:
            x_BHWC = block(x_BHWC)
        return self.head(x_BHWC.mean(axis=(1, 2)))


def logits(model, batch):
    return model(batch["images"].transpose(0, 2, 3, 1))


def loss(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits(model, batch), batch["labels"]).mean()


# ------------------------------------------------------------------------------------------------------- the converter


def kernel(weight):
    """A kernel from torch's weight: [H, W, in, out] from [out, in, H, W], or [in, out] from [out, in]."""
    return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T


def to_params(state_dict):
    """The NNX model of Hugging Face's state dict. The counts of batches are left out: nothing here needs them."""
    embedder = "resnet.embedder.embedder"
    modules = {"conv": f"{embedder}.convolution", "norm": f"{embedder}.normalization", "head": "classifier.1"}
    inside = {"conv1": "layer.0.convolution", "norm1": "layer.0.normalization"}
    inside |= {"conv2": "layer.1.convolution", "norm2": "layer.1.normalization"}
    inside |= {"shortcut": "shortcut.convolution", "shortcut_norm": "shortcut.normalization"}
    stages = [(stage, i) for stage, n_blocks in enumerate(N_BLOCKS) for i in range(n_blocks)]
    for number, (stage, i) in enumerate(stages):
        block = f"resnet.encoder.stages.{stage}.layers.{i}"
        modules |= {f"blocks.{number}.{ours}": f"{block}.{theirs}" for ours, theirs in inside.items()}
    last = {"scale": "weight", "kernel": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

    def tensor(path):
        *module, leaf = map(str, path)
        value = state_dict[f"{modules['.'.join(module)]}.{last[leaf]}"]
        return kernel(value) if leaf == "kernel" else value

    graphdef, state = nnx.split(nnx.eval_shape(lambda: SmallResNetNNX(nnx.Rngs(0))))
    return nnx.merge(graphdef, nnx.map_state(lambda path, p: p.replace(tensor(path)), state))


# ------------------------------------------------------------------------------------------------------------ the pair


def batch(rng):
    """Images as PyTorch has them, [B, C, H, W], and their classes."""
    return {
        "images": rng.standard_normal((BATCH, 3, HEIGHT, WIDTH)),
        "labels": rng.integers(0, N_CLASSES, BATCH),
    }


def torch_optimizer(model):
    kernels, others = ([p for p in model.parameters() if (p.ndim > 1) == is_kernel] for is_kernel in (True, False))
    groups = [{"params": kernels, "weight_decay": 1e-3}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=1e-2, momentum=0.9)


def is_kernel(params):
    """True for what decays. Norms and biases have one axis."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


pair = Pair(
    torch_model=torch_model,
    torch_loss=lambda model, batch: model(batch["images"], labels=batch["labels"]).loss,
    torch_logits=lambda model, batch: model(batch["images"]).logits,
    jax_loss=loss,
    jax_logits=logits,
    batch=batch,
    to_params=to_params,
    torch_optimizer=torch_optimizer,
    torch_schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10),
    optax_optimizer=optax.chain(
        optax.add_decayed_weights(1e-3, is_kernel), optax.sgd(optax.cosine_decay_schedule(1e-2, 10), momentum=0.9)
    ),
    train=True,
)
