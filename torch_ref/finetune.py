"""The tutorials' fine-tuning on AG News: python -m torch_ref.finetune --weights w.safetensors --dataset ag_news

A linear head over classes reads the final-norm hidden states of a language model over GPT-2's tokens, and the whole
model trains. The weights are those that `jaxgpt convert export` or `torch_ref.train` writes. The parity suite gives
`train` the batches and dropout masks of the JAX side; the command draws its own.

Axes: B batch, T time, C n_embd, K classes, N texts.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from jaxgpt.config import FinetuneConfig, ModelConfig, UserError
from jaxgpt.presets import PRESETS
from torch_ref import command
from torch_ref.datasets import few_shot, load_examples, make_tokenizer
from torch_ref.model import GPT
from torch_ref.train_step import SkippedUpdates, apply, learning_rate, make_optimizer

Batch = tuple[Tensor, Tensor, Tensor]  # token ids int64 [B, T] with padding, lengths [B], classes [B]


class Classifier(GPT):
    """The GPT with a head over classes in place of the one over tokens. `pool` is that of `FinetuneConfig`."""

    def __init__(self, config: ModelConfig, vocab_size: int, n_classes: int, pool: str):
        super().__init__(dataclasses.replace(config, tied_head=True), vocab_size)
        self.pool = pool
        self.classifier = nn.Linear(config.n_embd, n_classes)
        nn.init.normal_(self.classifier.weight, std=0.02)

    def forward(self, idx_BT: Tensor, length_B: Tensor, keep: Sequence[Tensor] | None = None) -> Tensor:
        """Logits [B, K] of texts padded on the right, of which the first `length_B` tokens are real."""
        x_BTC = self.hidden(idx_BT, keep)
        if self.pool == "last":
            x_BC = x_BTC[:, -1]
        elif self.pool == "last_token":
            x_BC = x_BTC[torch.arange(len(x_BTC)), length_B - 1]
        else:
            x_BC = torch.stack([x_TC[:length].mean(0) for x_TC, length in zip(x_BTC, length_B.tolist(), strict=True)])
        return self.classifier(x_BC)


def pad(texts: Sequence[Sequence[int]], max_tokens: int, padding: int) -> tuple[Tensor, Tensor]:
    """Token ids [N, T], truncated and padded on the right, and the number of real tokens of each text [N]."""
    cut = [list(ids[:max_tokens]) for ids in texts]
    idx = [ids + [padding] * (max_tokens - len(ids)) for ids in cut]
    return torch.tensor(idx), torch.tensor([len(ids) for ids in cut])


def train(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    config: FinetuneConfig,
    batches: Iterable[Batch],
    keep_of: Callable[[int], Sequence[Tensor] | None] = lambda step: None,
    skipped: SkippedUpdates | None = None,
) -> Iterator[float]:
    """The training loop. Yields each step's loss, which is the loss before its update.

    Args:
        keep_of, skipped: as in `torch_ref.train.train`.
    """
    skipped = skipped or SkippedUpdates(config)
    for step, (idx_BT, length_B, label_B) in enumerate(batches):
        model.train()
        loss = F.cross_entropy(model(idx_BT, length_B, keep_of(step)), label_B)
        yield apply(loss, model, optimizer, config, learning_rate(config, step - skipped.total), skipped=skipped)


def epochs(data: Batch, config: FinetuneConfig, generator: torch.Generator) -> Iterator[Batch]:
    """Batches of all texts, shuffled anew in each epoch; the last batch of an epoch may be smaller."""
    for _ in range(config.epochs):
        for rows in torch.randperm(len(data[0]), generator=generator).split(config.batch_size):
            yield tuple(x[rows] for x in data)


@torch.no_grad()
def test(model: Classifier, data: Batch, batch_size: int) -> tuple[float, float]:
    """Mean loss and accuracy on all texts, in evaluation mode."""
    model.eval()
    idx_NT, length_N, label_N = data
    parts = zip(idx_NT.split(batch_size), length_N.split(batch_size), strict=True)
    logits_NK = torch.cat([model(*part) for part in parts])
    accuracy = (logits_NK.argmax(-1) == label_N).double().mean().item()
    return F.cross_entropy(logits_NK, label_N).item(), accuracy


@dataclass(frozen=True)
class ReferenceFlags(FinetuneConfig):
    """The configuration, the model's shape, and the weights to start from."""

    weights: Path = tyro.MISSING
    """Start from these weights of a language model over GPT-2's tokens (safetensors)."""
    data_dir: Path | None = None
    """Folder to look for datasets in first."""
    model: ModelConfig = field(default_factory=lambda: PRESETS["wikitext2"].model)
    steps: tyro.conf.Suppress[int] = 0


def main() -> None:
    flags = command.parse(ReferenceFlags, "torch_ref.finetune", __doc__)
    for name in ("dtype", "parallel", "checkpoint_every", "keep_checkpoints", "patience", "min_delta"):
        if getattr(flags, name) != getattr(FinetuneConfig, name):
            raise UserError(f"--{name.replace('_', '-')}: the reference has no use for it; leave it out")
    classes, train_examples, test_examples = load_examples(flags, flags.data_dir)
    train_examples = few_shot(train_examples, flags.train_samples, flags.seed)
    tokenizer = make_tokenizer("gpt2", "", flags.data_dir)

    torch.manual_seed(flags.seed)
    model = Classifier(flags.model, tokenizer.vocab_size, len(classes), flags.pool)
    weights = command.read_tensors("--weights", flags.weights)
    weights.pop("lm_head.weight", None)
    wanted = {name: p for name, p in model.state_dict().items() if not name.startswith("classifier.")}
    if {name: p.shape for name, p in weights.items()} != {name: p.shape for name, p in wanted.items()}:
        raise UserError(f"--weights {flags.weights}: not of this model over GPT-2's tokens; give other --model flags")
    model.load_state_dict(weights, strict=False)

    def encoded(examples: Sequence[tuple[str, int]]) -> Batch:
        texts = [tokenizer.encode(text) for text, _ in examples]
        labels = torch.tensor([label for _, label in examples])
        return *pad(texts, flags.max_tokens, tokenizer.end_of_text), labels

    train_data, test_data = encoded(train_examples), encoded(test_examples)
    per_epoch = math.ceil(len(train_examples) / flags.batch_size)
    config = dataclasses.replace(flags, steps=flags.epochs * per_epoch)
    optimizer = make_optimizer(model, config)
    batches = epochs(train_data, config, torch.Generator().manual_seed(flags.seed))
    skipped = SkippedUpdates(config)
    for step, loss in enumerate(train(model, optimizer, config, batches, skipped=skipped), 1):
        if reason := skipped.reason_to_stop(loss):
            raise command.LossNotFinite(f"step {step - 1}: {reason}")
        if step % per_epoch == 0:
            test_loss, accuracy = test(model, test_data, flags.batch_size)
            print(
                f"epoch {step // per_epoch}  train loss {loss:.3f}  test loss {test_loss:.4f}  accuracy {accuracy:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(command.exit_code(main))
