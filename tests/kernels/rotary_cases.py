"""Heads as they lie in a fused projection, and the gradients that float64 gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdtrain_kernels.rotary import reference_rotation


@dataclass(frozen=True)
class HeadCase:
    """Queries of some groups.

    Attributes:
        name: for the test's name.
        seq: rows of the sequence axis, all streams together.
        batch: rows of the batch.
        groups: key heads.
        heads: queries per key head; 0 for the keys, which have no axis of their own for that.
        dim: head_dim.
        streams: streams that repeat the same positions.
        table_rows: batch rows of the table, 1 or ``batch``.
    """

    name: str
    seq: int
    batch: int
    groups: int
    heads: int
    dim: int
    streams: int = 1
    table_rows: int = 1

    def tensors(
        self, dtype: torch.dtype, *, normed: bool, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """A view of the projection, cos, sin, weight or None, gradient of the result."""
        generator = torch.Generator().manual_seed(self.seq + self.dim)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        width = max(self.heads, 1) * self.dim
        fused = (2 * draw(self.seq, self.batch, self.groups * (width + 2 * self.dim))).to(device, dtype)
        x = fused.unflatten(-1, (self.groups, -1))
        if self.heads:
            x = x[..., :width].unflatten(-1, (self.heads, self.dim))
        else:
            x = x[..., width : width + self.dim]
        positions = torch.arange(self.seq // self.streams).repeat(self.streams)
        positions = positions[:, None] + 5 * torch.arange(self.table_rows)
        angle = positions[..., None] * 100.0 ** (-torch.arange(self.dim // 2, dtype=torch.float64) / self.dim)
        cos, sin = angle.cos().to(device, dtype), angle.sin().to(device, dtype)
        weight = (1 + 0.3 * draw(self.dim)).to(device, dtype).requires_grad_() if normed else None
        # With a mean, which a sum in 16 bits could not hold; in the order attention gives it back.
        grad = 0.3 + draw(self.batch, self.groups * max(self.heads, 1), self.seq, self.dim)
        return x.requires_grad_(), cos, sin, weight, grad.to(device, dtype).permute(2, 0, 1, 3)


CASES = (
    HeadCase("grouped queries D64", seq=37, batch=2, groups=2, heads=3, dim=64),
    HeadCase("keys D64", seq=33, batch=2, groups=3, heads=0, dim=64),
    HeadCase("D128, one row", seq=18, batch=1, groups=1, heads=5, dim=128),
    HeadCase("D96, not a power of two", seq=23, batch=2, groups=2, heads=2, dim=96),
    HeadCase("D32, three streams", seq=3 * 27, batch=1, groups=2, heads=2, dim=32, streams=3),
    HeadCase("a position per row of the batch", seq=6, batch=3, groups=2, heads=2, dim=32, table_rows=3),
    HeadCase("one number", seq=1, batch=1, groups=1, heads=1, dim=2),
)


def expected_gradients(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, grad: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Result and gradients of the definition in float64, on the CPU."""
    x, cos, sin, grad = (t.detach().double().cpu() for t in (x, cos, sin, grad))
    leaves = [x.requires_grad_()]
    if weight is not None:
        leaves.append(weight.detach().double().cpu().requires_grad_())
    out = reference_rotation(x, cos, sin, *leaves[1:], eps=eps)
    return out.detach(), torch.autograd.grad(out, leaves, grad)
