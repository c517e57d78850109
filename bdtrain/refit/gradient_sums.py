"""From gradients, one after another, to their variance: total, given the data, with errors.

Gradients g(m, d) are those of M batches of rows and D draws of the noise for each. With all norms over all
parameters in float64,

    given data   mean over m of (sum_d |g(m, d)|^2 - D |g(m)|^2) / (D - 1)       g(m) = mean over d
    total        (sum_m |g(m)|^2 - M |mean g|^2) / (M - 1)  +  given data * (1 - 1 / D)

are unbiased: the second is the variance of one gradient over batches and noise, whatever D. Two running sums
as large as the model are kept.

Standard errors are a jackknife over batches. It needs inner products of each batch's gradient with the mean,
which are read from random signed sums of ``SKETCH`` numbers a batch; the estimates themselves are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bdtrain.diffusion.plan import NoisePlan
from bdtrain.diffusion.plan_variance import comparison_scale
from bdtrain.errors import NonFiniteError, RefitError
from bdtrain.refit.candidates import describe_plan
from bdtrain.refit.search import plain_values

SKETCH = 4096
"""Numbers of a batch's sketch, for each group of parameters."""

GROUPS = ("embedding", "layers", "head")
"""Parameters by where they are; the final norm belongs to the head."""


def name_plan(plan: NoisePlan) -> str:
    """A plan in a few words."""
    return describe_plan(plan) + (", bernoulli" if plan.kind == "bernoulli" else "")


def group_of(name: str) -> str:
    """Which of ``GROUPS`` a parameter belongs to."""
    return {"embedding": "embedding", "decoder": "layers"}.get(name.partition(".")[0], "head")


class GradientSums:
    """What the variance needs of gradients that come one draw after another, a batch's draws together.

    Args:
        parameters: of the model, by name.
        width: numbers of a batch's sketch.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, width: int = SKETCH) -> None:
        self._parameters = dict(parameters)
        self._groups = [GROUPS.index(group_of(name)) for name in parameters]
        self._batch, self._total = (
            [torch.zeros(p.shape, dtype=torch.float64, device=p.device) for p in parameters.values()]
            for _ in range(2)
        )
        self._width = width
        self._draws: list[list[np.ndarray]] = [[]]
        self._means: list[np.ndarray] = []
        self._sketches: list[np.ndarray] = []
        self._losses: list[list[float]] = [[]]

    def add(self, loss: float) -> None:
        """Take the gradients that the parameters hold now, and the loss that they are of.

        Raises:
            NonFiniteError: if something is not finite.
        """
        squares = np.zeros(len(GROUPS))
        for group, parameter, batch in zip(self._groups, self._parameters.values(), self._batch, strict=True):
            if parameter.grad is not None:
                gradient = parameter.grad.double()
                batch += gradient
                squares[group] += float(gradient.square().sum())
        if not (np.isfinite(squares).all() and math.isfinite(loss)):
            raise NonFiniteError(
                f"loss {loss:g} or the gradient of batch {len(self._means)} is not finite; there is no "
                "variance to tell"
            )
        self._draws[-1].append(squares)
        self._losses[-1].append(loss)

    def end_batch(self) -> None:
        """All draws of a batch were added."""
        draws = len(self._draws[-1])
        squares, sketch = np.zeros(len(GROUPS)), np.zeros((len(GROUPS), self._width))
        generator = torch.Generator().manual_seed(0)
        offset = 0
        for group, batch, total in zip(self._groups, self._batch, self._total, strict=True):
            batch /= draws
            total += batch
            squares[group] += float(batch.square().sum())
            # Each parameter begins where the one before ended: small ones do not share the first places.
            sketch[group] += np.roll(self._fold(batch, generator), offset % self._width)
            offset += batch.numel()
            batch.zero_()
        self._means.append(squares)
        self._sketches.append(sketch)
        self._draws.append([])
        self._losses.append([])

    def _fold(self, x: Tensor, generator: torch.Generator) -> np.ndarray:
        """Sums of the entries with random signs, the same at every call of one generator's state."""
        signs = torch.randint(0, 2, (x.numel(),), generator=generator, dtype=torch.int8) * 2 - 1
        flat = x.flatten() * signs.to(x.device)
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % self._width))
        folded: np.ndarray = padded.view(-1, self._width).sum(dim=0).cpu().numpy()
        return folded

    def result(self, plan: NoisePlan) -> PlanVariance:
        """The variances.

        Args:
            plan: that was drawn from.

        Raises:
            RefitError: for fewer than 2 batches.
        """
        batches = len(self._means)
        if batches < 2:
            raise RefitError(f"{batches} batch has no variance; give at least 2")
        draws = np.array(self._draws[:-1])  # batches, draws, groups
        losses = np.array(self._losses[:-1])  # batches, draws
        means, sketches = np.stack(self._means), np.stack(self._sketches)
        total = np.zeros(len(GROUPS))
        for group, one in zip(self._groups, self._total, strict=True):
            total[group] += float(one.square().sum())
        # Inner products with the sum over batches: those of the sketches, shifted to the exact sum.
        products = (sketches * sketches.sum(axis=0)).sum(axis=2)
        products += (total - products.sum(axis=0)) / batches
        found = {
            name: _Moments(draws[:, :, index].mean(axis=1), means[:, index], products[:, index], total[index])
            for index, name in enumerate(GROUPS)
        }
        whole = _Moments(
            draws.sum(axis=2).mean(axis=1), means.sum(axis=1), products.sum(axis=1), float(total.sum())
        )
        mean_losses = losses.mean(axis=1)
        scalar = _Moments(
            (losses**2).mean(axis=1),
            mean_losses**2,
            mean_losses * mean_losses.sum(),
            float(mean_losses.sum() ** 2),
        )
        per_batch = losses.shape[1]
        return PlanVariance(
            name=name_plan(plan),
            plan=plan,
            scale=comparison_scale(plan),
            loss=float(mean_losses.mean()),
            loss_error=float(mean_losses.std(ddof=1) / math.sqrt(batches)),
            losses=scalar.estimate(per_batch),
            gradient=whole.estimate(per_batch),
            groups={name: one.estimate(per_batch) for name, one in found.items()},
        )


@dataclass(frozen=True, eq=False)
class _Moments:
    """Of one group of parameters: by batch the mean |g(m, d)|^2, |g(m)|^2, g(m) . sum, and |sum|^2."""

    each: np.ndarray
    mean: np.ndarray
    product: np.ndarray
    total: float

    def estimate(self, draws: int) -> Variance:
        """Variances and their jackknife errors for ``draws`` draws a batch."""
        batches = len(self.each)
        values = _variances(self.each.sum(), self.mean.sum(), self.total, batches, draws)
        left = None
        if batches > 2:
            left = _variances(
                self.each.sum() - self.each,
                self.mean.sum() - self.mean,
                self.total - 2.0 * self.product + self.mean,
                batches - 1,
                draws,
            )
        return Variance.of(values, left, has_given_data=draws > 1)


def _variances(each: Any, mean: Any, total: Any, batches: int, draws: int) -> np.ndarray:
    """Total, given data, and |E g|^2 from sums over batches, [3, ...]."""
    between = (mean - total / batches) / (batches - 1)
    given = (each - mean) / batches * draws / max(draws - 1, 1)
    return np.array(
        [between + given * (1.0 - 1.0 / draws), given, total / batches**2 - between / batches],
        dtype=np.float64,
    )


@dataclass(frozen=True)
class Variance:
    """Variance of a gradient (trace of its covariance) or of a loss, at the stated batch size.

    Attributes:
        total: over batches and noise.
        total_error: its jackknife standard error; None for 2 batches.
        given_data: of the noise alone; None for one draw a batch.
        given_data_error: its error.
        mean_square: squared norm of the mean, without the error of the mean; may fall below 0 where that is
            larger.
        mean_square_error: its error.
        relative: ``total`` over ``mean_square``; None where that is not above 0.
        relative_given_data: ``given_data`` over ``mean_square``.
        left_out: jackknife values of the first three without each batch, for errors of differences and
            ratios; None for 2 batches.
    """

    total: float
    total_error: float | None
    given_data: float | None
    given_data_error: float | None
    mean_square: float
    mean_square_error: float | None
    relative: float | None
    relative_given_data: float | None
    left_out: np.ndarray | None

    @classmethod
    def of(cls, values: np.ndarray, left: np.ndarray | None, *, has_given_data: bool) -> Variance:
        """From total, given data and |E g|^2, and the same without each batch, [3, batches]."""
        total, given, mean = (float(value) for value in values)
        errors = [None] * 3 if left is None else [jackknife_error(one) for one in left]
        return cls(
            total=total,
            total_error=errors[0],
            given_data=given if has_given_data else None,
            given_data_error=errors[1] if has_given_data else None,
            mean_square=mean,
            mean_square_error=errors[2],
            relative=total / mean if mean > 0.0 else None,
            relative_given_data=given / mean if has_given_data and mean > 0.0 else None,
            left_out=left,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "left_out"}


def jackknife_error(left: np.ndarray) -> float:
    """Standard error from the values without each batch, [batches]."""
    return float(np.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum()))


@dataclass(frozen=True)
class PlanVariance:
    """A plan's variances.

    Attributes:
        name: of the plan in words.
        plan: the plan.
        scale: factor from its loss to the scale on which plans are compared
            (``plan_variance.comparison_scale``); its square applies to variances.
        loss: mean training loss, nats per counted token; of the plan's own objective.
        loss_error: its standard error.
        losses: variance of a batch's loss, nats^2.
        gradient: of all parameters.
        groups: by the names of ``GROUPS``.
    """

    name: str
    plan: NoisePlan
    scale: float
    loss: float
    loss_error: float
    losses: Variance
    gradient: Variance
    groups: Mapping[str, Variance]

    def ratio_to(self, other: PlanVariance, which: int) -> tuple[float, float | None]:
        """Gradient variance over another plan's, at the comparison scale, and the error, paired by batch.

        Args:
            other: measured on the same batches.
            which: 0 total, 1 given data.
        """
        scale = (self.scale / other.scale) ** 2
        names = ("total", "given_data")
        ratio = scale * getattr(self.gradient, names[which]) / getattr(other.gradient, names[which])
        if self.gradient.left_out is None or other.gradient.left_out is None:
            return ratio, None
        return ratio, jackknife_error(scale * self.gradient.left_out[which] / other.gradient.left_out[which])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, None in place of what is not finite."""
        values: dict[str, Any] = plain_values(
            {
                "name": self.name,
                "scale": self.scale,
                "loss": self.loss,
                "loss_error": self.loss_error,
                "loss_variance": self.losses.to_dict(),
                "gradient": self.gradient.to_dict(),
                "groups": {name: one.to_dict() for name, one in self.groups.items()},
            }
        )
        return {**values, "plan": self.plan.to_dict()}
