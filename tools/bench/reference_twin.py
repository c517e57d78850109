"""The published block diffusion training step, written anew in plain torch: what ours is timed against.

It computes what the published code computes, in the same order and with the same waste: both streams through
every layer, a dense boolean mask over 2n x 2n scores, adaptive layer norm from a constant noise level, the
head on all 2n rows, log-probabilities of every token by the substitution rule, and a weighted sum over all
positions. Parameter names are the published checkpoints', and a test holds it against golden vectors of that
code, logits and gradients.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEG_INFINITY = -1_000_000.0


class Rotary(nn.Module):
    """Angles of positions 0..n-1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10000.0 ** (torch.arange(0, dim, 2).float() / dim))

    def forward(self, n: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine, [n, dim]."""
        angles = torch.outer(torch.arange(n).float(), self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [batch, n, heads, dim] by its positions, half-split layout."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[None, :, None] + torch.cat((-second, first), dim=-1) * sin[None, :, None]


class Norm(nn.Module):
    """Layer norm with a weight and no bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.layer_norm(x, [self.dim]) * self.weight[None, None]


class SigmaEmbedding(nn.Module):
    """Noise level to conditioning vector."""

    def __init__(self, cond: int, frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.frequencies = frequencies

    def forward(self, sigma: Tensor) -> Tensor:
        """[batch] -> [batch, cond]."""
        half = self.frequencies // 2
        scale = torch.exp(-math.log(10000) * torch.arange(half).to(sigma) / half)
        angles = sigma[:, None] * scale[None]
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1))


class Block(nn.Module):
    """One transformer layer with adaptive layer norm."""

    def __init__(self, dim: int, heads: int, cond: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(dim), Norm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        self.adaLN_modulation = nn.Linear(cond, 6 * dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], c: Tensor, mask: Tensor | None) -> Tensor:
        """[batch, rows, dim] -> the same."""
        batch, rows, dim = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.attn_qkv(h).view(batch, rows, 3, self.heads, dim // self.heads).unbind(dim=2)
        n = rotary[0].shape[0]
        if rows == n:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        else:  # each half carries positions 0..n-1
            q = torch.cat((rotate(q[:, :n], *rotary), rotate(q[:, n:], *rotary)), dim=1)
            k = torch.cat((rotate(k[:, :n], *rotary), rotate(k[:, n:], *rotary)), dim=1)
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        )
        x = x + gate1 * self.attn_out(attended.transpose(1, 2).reshape(batch, rows, dim))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Embedding(nn.Module):
    """Token embedding."""

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab, dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        """Look tokens up."""
        return self.embedding[tokens]


class Head(nn.Module):
    """Final norm and projection to the vocabulary."""

    def __init__(self, dim: int, vocab: int, cond: int) -> None:
        super().__init__()
        self.norm_final = Norm(dim)
        self.linear = nn.Linear(dim, vocab)
        self.adaLN_modulation = nn.Linear(cond, 2 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """[batch, rows, dim] -> [batch, rows, vocab]."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Backbone(nn.Module):
    """The network."""

    def __init__(self, vocab: int, dim: int, layers: int, heads: int, cond: int) -> None:
        super().__init__()
        self.vocab_embed = Embedding(vocab, dim)
        self.sigma_map = SigmaEmbedding(cond)
        self.rotary_emb = Rotary(dim // heads)
        self.blocks = nn.ModuleList(Block(dim, heads, cond) for _ in range(layers))
        self.output_layer = Head(dim, vocab, cond)

    def forward(self, tokens: Tensor, sigma: Tensor, mask: Tensor | None, n: int) -> Tensor:
        """Logits of the noisy half, [batch, n, vocab]; the head sees every row."""
        x = self.vocab_embed(tokens)
        c = F.silu(self.sigma_map(sigma))
        rotary = self.rotary_emb(n)
        for block in self.blocks:
            x = block(x, rotary, c, mask)
        return self.output_layer(x, c)[:, :n]


class ReferenceTwin(nn.Module):
    """The training step's computation.

    Args:
        vocab: tokens, the mask (the last one) included.
        dim: hidden size.
        layers: number of layers.
        heads: attention heads.
        cond: size of the conditioning.
        block_size: tokens per block; the row length for MDLM, which has no clean half.
    """

    def __init__(self, *, vocab: int, dim: int, layers: int, heads: int, cond: int, block_size: int) -> None:
        super().__init__()
        self.backbone = Backbone(vocab, dim, layers, heads, cond)
        self.mask_id, self.block_size = vocab - 1, block_size

    def logits(self, xt: Tensor, x0: Tensor) -> Tensor:
        """Raw logits [batch, n, vocab] of noisy rows ``xt`` beside clean rows ``x0``."""
        n = xt.shape[1]
        two_streams = self.block_size < n
        tokens = torch.cat((xt, x0), dim=1) if two_streams else xt
        mask = dense_mask(n, self.block_size) if two_streams else None
        return self.backbone(tokens, torch.zeros(xt.shape[0]), mask, n)

    def log_probs(self, logits: Tensor, xt: Tensor) -> Tensor:
        """The mask is never predicted, a visible token predicts itself. Overwrites ``logits``."""
        logits[:, :, self.mask_id] += NEG_INFINITY
        logits = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
        visible = xt != self.mask_id
        logits[visible] = NEG_INFINITY
        logits[visible, xt[visible]] = 0
        return logits

    def loss(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Mean over all tokens of the weighted negative log-likelihood; ``t`` is [batch, n]."""
        log_p = self.log_probs(self.logits(xt, x0), xt)
        return (-1 / t * torch.gather(log_p, -1, x0[:, :, None])[:, :, 0]).mean()


def dense_mask(n: int, block_size: int) -> Tensor:
    """The published mask over [noisy ; clean] x [noisy ; clean], bool [2n, 2n]."""
    block = torch.arange(n) // block_size
    same, later = block[:, None] == block[None], block[:, None] > block[None]
    empty = torch.zeros(n, n, dtype=torch.bool)
    return torch.cat((torch.cat((same, later), dim=1), torch.cat((empty, same | later), dim=1)))
