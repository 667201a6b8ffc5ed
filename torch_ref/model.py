"""The tutorials' GPT, with their parameter names and attention written out.

Axes: B batch, T time (queries), S time (keys), C n_embd, H heads, D head size, V vocabulary.

Dtypes: parameters and the residual stream share one dtype. With a compute dtype (bfloat16) the operands of the matrix
products are rounded to it; each such line has a comment "cast", as in `jaxgpt/model/gpt.py`. These casts are explicit,
where the tutorials' autocast chooses them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jaxgpt.config import ModelConfig


class Linear(nn.Linear):
    """`nn.Linear` that multiplies in the compute dtype and returns its input's dtype."""

    def __init__(self, n_in: int, n_out: int, compute_dtype: torch.dtype | None, bias: bool = True):
        super().__init__(n_in, n_out, bias=bias)
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype
        if dtype is None:
            return super().forward(x)
        product = F.linear(x.to(dtype), self.weight.to(dtype)).to(x.dtype)  # cast: input and weight, rounded product
        if self.bias is None:
            return product
        return (product + self.bias).to(dtype).to(x.dtype)  # cast: the sum rounded to the compute dtype


class Dropout(nn.Module):
    """Dropout with probability `rate`: drawn by torch, or with a given mask of the elements to keep."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None:
            return F.dropout(x, self.rate, self.training)
        return torch.where(keep, x / (1 - self.rate), 0)


class Attention(nn.Module):
    """Causal self-attention with separate query, key, value and output projections."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype | None):
        super().__init__()
        self.n_head, self.compute_dtype = config.n_head, compute_dtype
        C = config.n_embd
        self.Wq, self.Wk, self.Wv, self.Wo = (Linear(C, C, compute_dtype, config.bias) for _ in range(4))
        self.dropout = Dropout(config.attention_dropout)
        seen_TS = torch.tril(torch.ones(config.block_size, config.block_size, dtype=torch.bool))
        self.register_buffer("seen_TS", seen_TS, persistent=False)

    def forward(self, x_BTC: Tensor, same_BTS: Tensor | None = None, keep_BHTS: Tensor | None = None) -> Tensor:
        att_BHTS, v_BHSD = self.weights(x_BTC, same_BTS), self._heads(self.Wv, x_BTC)
        att_BHTS = self.dropout(att_BHTS, keep_BHTS)
        dtype = self.compute_dtype or x_BTC.dtype
        out_BHTD = (att_BHTS.to(dtype) @ v_BHSD.to(dtype)).to(x_BTC.dtype)  # cast: probabilities and values
        return self.Wo(out_BHTD.transpose(1, 2).reshape(x_BTC.shape))

    def weights(self, x_BTC: Tensor, same_BTS: Tensor | None = None) -> Tensor:
        """The attention weights of each query over the keys, [B, H, T, S].

        Args:
            same_BTS: whether query and key stand in the same document; None: one document.
        """
        T = x_BTC.shape[1]
        q_BHTD, k_BHSD = self._heads(self.Wq, x_BTC), self._heads(self.Wk, x_BTC)
        score_BHTS = q_BHTD @ k_BHSD.transpose(-2, -1) / math.sqrt(q_BHTD.shape[-1])
        seen = self.seen_TS[:T, :T] if same_BTS is None else (self.seen_TS[:T, :T] & same_BTS)[:, None]
        return score_BHTS.masked_fill(~seen, -math.inf).softmax(dim=-1)

    def _heads(self, projection: Linear, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        return projection(x_BTC).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)


def layer_norm(config: ModelConfig) -> nn.LayerNorm:
    """A LayerNorm over the residual stream."""
    return nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)


class Block(nn.Module):
    """A pre-norm block: x += attn(ln1(x)); x += ff(ln2(x)). The MLP `ff` is C -> 4C -> C with GELU."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype | None):
        super().__init__()
        C = config.n_embd
        self.ln1 = layer_norm(config)
        self.attn = Attention(config, compute_dtype)
        self.ln2 = layer_norm(config)
        gelu = nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")
        fc, proj = Linear(C, 4 * C, compute_dtype, config.bias), Linear(4 * C, C, compute_dtype, config.bias)
        self.ff = nn.Sequential(fc, gelu, proj)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x_BTC: Tensor,
        keep_attn_BTC: Tensor | None,
        keep_ff_BTC: Tensor | None,
        same_BTS: Tensor | None = None,
        keep_weights_BHTS: Tensor | None = None,
    ) -> Tensor:
        x_BTC = x_BTC + self.dropout(self.attn(self.ln1(x_BTC), same_BTS, keep_weights_BHTS), keep_attn_BTC)
        return x_BTC + self.dropout(self.ff(self.ln2(x_BTC)), keep_ff_BTC)


class GPT(nn.Module):
    """A decoder-only transformer: token and position embeddings, blocks, a final norm, a head without bias.

    With `tied_head` the head's matrix is the token embedding's.

    Args:
        compute_dtype: dtype of the matrix products; None: the parameters' dtype.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self.compute_dtype = compute_dtype
        self.token_emb = nn.Embedding(vocab_size, config.n_embd)
        self.pos_emb = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config, compute_dtype) for _ in range(config.n_layer)])
        self.ln_f = layer_norm(config)
        self.lm_head = None if config.tied_head else nn.Linear(config.n_embd, vocab_size, bias=False)
        self.init_weights(config)

    def init_weights(self, config: ModelConfig) -> None:
        """Draws the weights from N(0, 0.02); biases keep PyTorch's default.

        With `init="gpt2"` biases are 0, and projections into the residual stream are scaled by 1/sqrt(2 n_layer).
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, Linear) and config.init == "gpt2":
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith(("attn.Wo", "ff.2")):
                    nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, idx_BT: Tensor, keep: Sequence[Tensor] | None = None, end_of_text: int | None = None) -> Tensor:
        """Logits [B, T, V]; arguments as in `hidden`."""
        x_BTC = self.hidden(idx_BT, keep, end_of_text)
        weight_VC = self.token_emb.weight if self.lm_head is None else self.lm_head.weight
        dtype = self.compute_dtype or x_BTC.dtype
        # cast: rounds the operands to the compute dtype; the product is in the parameters' dtype
        return F.linear(x_BTC.to(dtype).to(x_BTC.dtype), weight_VC.to(dtype).to(x_BTC.dtype))

    def hidden(self, idx_BT: Tensor, keep: Sequence[Tensor] | None = None, end_of_text: int | None = None) -> Tensor:
        """Final-norm hidden states [B, T, C].

        Args:
            keep: dropout masks, bool [B, T, C] each, True for elements to keep: after the embedding sum, then for each
                block after attention and after the MLP; with attention dropout then for each block those of its
                weights, [B, H, T, S]. None: torch draws them in training.
            end_of_text: the token that ends a packed document. Attention then stops at the document's start, and
                positions count from there. None: the window is one document.
        """
        n_layer = len(self.blocks)
        keep = keep or []
        keep = [*keep, *[None] * (3 * n_layer + 1 - len(keep))]
        position_T = torch.arange(idx_BT.shape[1], device=idx_BT.device)
        position, same_BTS = position_T, None
        if end_of_text is not None:
            ended_BT = idx_BT[:, :-1] == end_of_text
            begins_BT = torch.cat([torch.zeros_like(ended_BT[:, :1]), ended_BT], 1)
            document_BT = begins_BT.cumsum(1)
            same_BTS = document_BT[:, :, None] == document_BT[:, None, :]
            position = position_T - (begins_BT * position_T).cummax(1).values
        x_BTC = self.dropout(self.token_emb(idx_BT) + self.pos_emb(position), keep[0])
        for i, block in enumerate(self.blocks):
            x_BTC = block(x_BTC, keep[2 * i + 1], keep[2 * i + 2], same_BTS, keep[2 * n_layer + 1 + i])
        return self.ln_f(x_BTC)


@torch.no_grad()
def attention_maps(model: GPT, idx_BT: Tensor) -> Tensor:
    """The attention weights of every layer and head, [B, L, H, T, S]."""
    x_BTC = model.token_emb(idx_BT) + model.pos_emb(torch.arange(idx_BT.shape[1]))
    maps = []
    for block in model.blocks:
        maps.append(block.attn.weights(block.ln1(x_BTC)))
        x_BTC = block(x_BTC, None, None)
    return torch.stack(maps, dim=1)


@contextmanager
def exact(model: GPT) -> Iterator[None]:
    """Evaluation mode, with all products in the parameters' dtype, as the tutorials evaluate."""
    was_training, with_dtype = model.training, [m for m in model.modules() if hasattr(m, "compute_dtype")]
    dtypes = [m.compute_dtype for m in with_dtype]
    model.eval()
    for m in with_dtype:
        m.compute_dtype = None
    try:
        yield
    finally:
        for m, dtype in zip(with_dtype, dtypes, strict=True):
            m.compute_dtype = dtype
        model.train(was_training)


def mean_loss(
    model: GPT,
    idx_BT: Tensor,
    target_BT: Tensor,
    keep: Sequence[Tensor] | None = None,
    end_of_text: int | None = None,
) -> Tensor:
    """Next-token cross-entropy, the mean over all positions of the flattened logits.

    With packed documents, the targets that follow an end-of-text token are left out: the first token of a document
    cannot be predicted across a document boundary.
    """
    logits_BTV = model(idx_BT, keep, end_of_text)
    if end_of_text is not None:
        target_BT = target_BT.masked_fill(idx_BT == end_of_text, -100)
    return F.cross_entropy(logits_BTV.view(-1, logits_BTV.shape[-1]), target_BT.reshape(-1), ignore_index=-100)
