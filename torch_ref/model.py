"""The write-ups' GPT, with their parameter names, attention written out.

Axes: B batch, T time (queries), S time (keys), C n_embd, H heads, D head size, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jaxgpt.config import ModelConfig


class Attention(nn.Module):
    """Causal self-attention with separate query, key, value and output projections, each with bias."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head = config.n_head
        self.Wq = nn.Linear(config.n_embd, config.n_embd)
        self.Wk = nn.Linear(config.n_embd, config.n_embd)
        self.Wv = nn.Linear(config.n_embd, config.n_embd)
        self.Wo = nn.Linear(config.n_embd, config.n_embd)
        seen_TS = torch.tril(torch.ones(config.block_size, config.block_size, dtype=torch.bool))
        self.register_buffer("seen_TS", seen_TS, persistent=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        q_BHTD, k_BHSD, v_BHSD = (
            W(x_BTC).view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for W in (self.Wq, self.Wk, self.Wv)
        )
        score_BHTS = q_BHTD @ k_BHSD.transpose(-2, -1) / math.sqrt(C // self.n_head)
        att_BHTS = score_BHTS.masked_fill(~self.seen_TS[:T, :T], -math.inf).softmax(dim=-1)
        return self.Wo((att_BHTS @ v_BHSD).transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """Pre-norm: x += attn(ln1(x)); x += ff(ln2(x)). `ff` is C -> 4C -> C with exact GELU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C = config.n_embd
        self.ln1 = nn.LayerNorm(C)
        self.attn = Attention(config)
        self.ln2 = nn.LayerNorm(C)
        self.ff = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.dropout(self.attn(self.ln1(x_BTC)))
        return x_BTC + self.dropout(self.ff(self.ln2(x_BTC)))


class GPT(nn.Module):
    """Token and position embeddings, blocks, a final norm, an untied head without bias."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.token_emb = nn.Embedding(vocab_size, config.n_embd)
        self.pos_emb = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):  # biases keep PyTorch's default
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, idx_BT: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        position_T = torch.arange(idx_BT.shape[1], device=idx_BT.device)
        x_BTC = self.dropout(self.token_emb(idx_BT) + self.pos_emb(position_T))
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.lm_head(self.ln_f(x_BTC))


def mean_loss(model: GPT, idx_BT: Tensor, target_BT: Tensor) -> Tensor:
    """Next-token cross-entropy, the mean over all positions of the flattened logits."""
    logits_BTV = model(idx_BT)
    return F.cross_entropy(logits_BTV.view(-1, logits_BTV.shape[-1]), target_BT.reshape(-1))
