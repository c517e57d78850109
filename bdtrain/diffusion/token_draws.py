"""One token from a distribution: temperature, nucleus, inversion in float64; the entropy of what came out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def draw_tokens(
    logits: Tensor, u: Tensor, *, mask_id: int, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """Draw one token per row of logits by inverting the CDF, in float64.

    Args:
        logits: [rows, vocab]; [MASK] is excluded here whatever it holds.
        u: uniforms in [0, 1), float64 [rows].
        mask_id: id of [MASK].
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: mass that is kept, in (0, 1].

    Returns:
        Token ids, int64 [rows], and their probability under the network itself (temperature 1, no top-p),
        float64 [rows].
    """
    scores = logits.to(torch.float64).clone()
    scores[:, mask_id] = -torch.inf
    plain = scores.softmax(dim=-1)
    if temperature == 0.0:
        token = scores.argmax(dim=-1)
    else:
        chances = plain if temperature == 1.0 else (scores / temperature).softmax(dim=-1)
        if top_p < 1.0:
            chances = keep_top_p(chances, top_p)
        cumulative = chances.cumsum(dim=-1)
        total = cumulative[:, -1]
        # u below 1 can still round up to the total, where every token would be passed over.
        target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
        token = (cumulative <= target[:, None]).sum(dim=-1)
    return token, plain.gather(1, token[:, None]).squeeze(1)


def keep_top_p(chances: Tensor, top_p: float) -> Tensor:
    """Zero all but the most probable tokens of mass ``top_p``; the token that crosses the mass is kept.

    Args:
        chances: probabilities, float64 [rows, vocab].
        top_p: in (0, 1].

    Returns:
        The kept probabilities, not normalised, [rows, vocab].
    """
    ordered, order = chances.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(chances).scatter(1, order, torch.where(before < top_p, ordered, 0.0))


def unigram_entropy(tokens: Sequence[int]) -> float:
    """Entropy of the token counts, nats."""
    total = len(tokens)
    return -sum(count / total * math.log(count / total) for count in Counter(tokens).values())
