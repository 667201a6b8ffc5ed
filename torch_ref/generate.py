"""The tutorials' sampling: for each token a forward pass over the whole context, cropped to the last block.

Axes: V vocabulary, T time.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from jaxgpt.config import SamplingConfig
from torch_ref.model import GPT


def log_probabilities(logits_V: Tensor, sampling: SamplingConfig) -> Tensor:
    """The log-probabilities [V] that a token is drawn from: after temperature, then top-k, then top-p (nucleus)."""
    log_V = torch.log_softmax(logits_V / sampling.temperature, -1)
    if sampling.top_k:
        least = log_V.topk(min(sampling.top_k, len(log_V))).values[-1]
        log_V = torch.log_softmax(log_V.masked_fill(log_V < least, -torch.inf), -1)
    if sampling.top_p < 1:
        sorted_V, order_V = log_V.sort(descending=True, stable=True)
        before_V = sorted_V.exp().cumsum(-1) - sorted_V.exp()
        outside_V = (before_V >= sampling.top_p).index_fill(0, torch.tensor(0), False)
        log_V = torch.log_softmax(log_V.index_fill(0, order_V[outside_V], -torch.inf), -1)
    return log_V


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    noise: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yields the new tokens. Temperature 0 is greedy decoding.

    Args:
        prompt: at least one token id.
        noise: Gumbel noise, [V] for each new token: the token is argmax(log p + noise). None: torch draws the token.
        generator: what torch draws from.
    """
    model.eval()
    context = list(prompt)
    for i in range(sampling.max_new_tokens):
        idx_1T = torch.tensor([context[-model.pos_emb.num_embeddings :]])
        logits_V = model(idx_1T)[0, -1]
        if sampling.temperature == 0:
            token = logits_V.argmax()
        elif noise is not None:
            token = (log_probabilities(logits_V, sampling) + noise[i]).argmax()
        else:
            token = torch.multinomial(log_probabilities(logits_V, sampling).exp(), 1, generator=generator)[0]
        context.append(int(token))
        yield context[-1]
