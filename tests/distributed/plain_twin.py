"""The twin of the engine's tests: the same few steps by one process and plain torch.

The whole batch at once, dense logits, torch's AdamW: no schedule, no DeepSpeed, no loader.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from engine_ranks import (
    BETAS,
    DECAY,
    EPSILON,
    FIRST,
    MASK,
    SEED,
    VOCAB,
    Case,
    RaggedRows,
    Recorder,
    make_model,
    make_objective,
)
from torch import Tensor


@dataclass
class Plain:
    """What plain torch gave: losses and norms by step, the rest by name; digests as in ``Recorder``."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]  # kind -> name -> tensor
    digests: dict[str, str]


def plain_training(case: Case, alone: Any, steps: int) -> Plain:
    """Some steps; ``alone`` are process groups of this rank by itself."""
    model = make_model(replace(case, tp=1, pp=1, sp=False, recompute="none"), alone)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p], **plain_group(case, name, p)} for name, p in named.items()],
        lr=case.lr,
        betas=BETAS,
        eps=EPSILON,
    )
    objective = Recorder(make_objective(case))
    average = {name: p.detach().clone() for name, p in named.items()}
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        loss = plain_loss(model, objective, case, step)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {name: p.grad.clone() for name, p in named.items()}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip).item())
        optimizer.step()
        taken = step + 1
        keep = min(case.ema, (1 + taken) / (10 + taken))
        for name, p in named.items():
            average[name] = keep * average[name] + (1 - keep) * p.detach()
    state = {"master": {name: p.detach() for name, p in named.items()}, "ema": average}
    for kind in ("exp_avg", "exp_avg_sq"):
        state[kind] = {name: optimizer.state[p][kind] for name, p in named.items()}
    return Plain(losses, norms, gradients, state, objective.digests)


def plain_group(case: Case, name: str, parameter: Tensor) -> dict[str, float]:
    """Learning rate and weight decay of a parameter: RULES in other words."""
    decay = DECAY if parameter.dim() > 1 else 0.0
    if not case.rules:
        return {"lr": case.lr, "weight_decay": decay}
    if name.startswith("decoder.layers.1."):
        return {"lr": 0.5 * case.lr, "weight_decay": decay}
    if name.startswith("embedding."):
        return {"lr": 2 * case.lr, "weight_decay": 0.0}
    return {"lr": case.lr, "weight_decay": 0.3 if "layernorm" in name else decay}


def plain_loss(model: Any, objective: Any, case: Case, step: int) -> Tensor:
    """Weighted nats per counted token and copy, over the whole global batch."""
    from bdtrain.data.loader import make_batch
    from bdtrain.diffusion.keyed import NoiseKey, Purpose

    source = RaggedRows()
    positions = [step * case.rows + row for row in range(case.rows)]
    rows = [source.sample(position) for position in positions]
    batch = make_batch(rows, source.tokenizer_info, positions, range(case.rows))
    layout = objective.layout(batch.documents)
    corrupted = objective.corrupt(
        batch.tokens,
        layout,
        batch.counted,
        key=NoiseKey(SEED, Purpose.TRAIN, step),
        sample_index=batch.sample_index,
        batch_index=batch.batch_index,
        global_batch=case.rows,
        copies=case.copies,
    )
    losses = dense_losses(model, layout, corrupted)
    return losses.sum() / (corrupted.counted.sum() * case.copies)


def dense_losses(model: Any, layout: Any, corrupted: Any) -> Tensor:
    """Weighted nats of every position of every copy, [batch, copies, seq], from the logits of all of them."""
    copies = corrupted.noisy.shape[1]
    streams = torch.cat([corrupted.noisy.flatten(1), corrupted.clean], dim=1)
    everything = torch.ones_like(corrupted.rows)
    logits = model(streams, layout, noisy_copies=copies, clean=True, rows=everything).logits()[:, :VOCAB]
    logits = logits.float().index_fill(1, torch.tensor([MASK]), float("-inf"))
    targets = torch.where(corrupted.rows, corrupted.targets, FIRST).flatten()
    nll = F.cross_entropy(logits, targets, reduction="none").view(corrupted.rows.shape)
    return nll * corrupted.weight * corrupted.rows
