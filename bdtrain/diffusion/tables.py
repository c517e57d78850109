"""From a NoisePlan to numbers: how often k of a block's n maskable tokens are masked, and with what weight.

Everything is an integral over t of the binomial probability that k of n tokens are masked:

    P_n(k) = average over the drawn t of Binom(k; n, move_chance(t))
    c_n(k) = the same with the weight of t inside: the coefficient of E[g_k] in the objective,
             sum_k c_n(k) E[g_k], where g_k is the summed negative log-likelihood of a uniform k-subset

k >= 1 is drawn from q_n(k), by default P_n(k) / (1 - P_n(0)), and weighs c_n(k) / q_n(k): unbiased for
any q > 0.

Both are computed once, for n = block_size, and passed down to smaller n by leaving one token out at random,

    P_{n-1}(k) = (n-k)/n P_n(k) + (k+1)/n P_n(k+1),

sums of positive terms that keep the relative precision of far tails. Only ``resample`` needs every n for
itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bdtrain.diffusion.plan import NoisePlan

RESAMPLE_NODES = 256


@dataclass(frozen=True)
class PlanTables:
    """Compiled plan. Rows are packed: row n holds k = 1..n at offset n (n - 1) / 2.

    Attributes:
        block_size: the largest n.
        packed_cdf: probability that the drawn count is at most k, float64 [block_size (block_size + 1) / 2];
            the last entry of a row is exactly 1.
        packed_weight: c_n(k) / q_n(k), float64, same shape; 0 where a count is never drawn.
        packed_coefficient: c_n(k), float64, same shape.
        resampled: whether a block of n tokens obeys ``resample``, bool [block_size + 1]; False at n = 0. All
            True (but n = 0) when the plan does not resample.
    """

    block_size: int
    packed_cdf: Tensor
    packed_weight: Tensor
    packed_coefficient: Tensor
    resampled: Tensor

    def to(self, device: torch.device | str) -> PlanTables:
        """The same tables on ``device``."""
        return replace(
            self,
            packed_cdf=self.packed_cdf.to(device),
            packed_weight=self.packed_weight.to(device),
            packed_coefficient=self.packed_coefficient.to(device),
            resampled=self.resampled.to(device),
        )

    def cdf(self, n: int) -> Tensor:
        """P(count <= k) for k = 1..n, [n]."""
        return self.packed_cdf[self._row(n)]

    def weight(self, n: int) -> Tensor:
        """Weight of every masked token of a block with k of n masked, k = 1..n, [n]."""
        return self.packed_weight[self._row(n)]

    def coefficient(self, n: int) -> Tensor:
        """Coefficient of E[g_k] in the objective, k = 1..n, [n]."""
        return self.packed_coefficient[self._row(n)]

    def probability(self, n: int) -> Tensor:
        """q_n(k) for k = 1..n, [n]."""
        cdf = self.cdf(n)
        return torch.diff(cdf, prepend=cdf.new_zeros(1))

    def draw(self, u: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """Invert the count's CDF.

        Args:
            u: uniforms in [0, 1), float64, any shape.
            n: maskable tokens of the block, int64 in [0, block_size], broadcasts with ``u``.

        Returns:
            k, int64, the smallest with cdf_n[k] > u, and its weight, float64; both 0 where n = 0.
        """
        u, n = _broadcast(u, n)
        base = (n * (n - 1)).div(2, rounding_mode="floor").clamp(min=0)
        # Binary search for the number of k whose cdf is <= u; at most n - 1, because the last cdf is 1.
        below = torch.zeros_like(n)
        step = 1 << max(self.block_size - 1, 0).bit_length()
        while step:
            probe = below + step
            at = (base + probe - 1).clamp(max=self.packed_cdf.numel() - 1)
            below = torch.where((probe < n) & (self.packed_cdf[at] <= u), probe, below)
            step >>= 1
        empty = n == 0
        weight = self.packed_weight[(base + below).clamp(max=self.packed_weight.numel() - 1)]
        return torch.where(empty, 0, below + 1), torch.where(empty, 0.0, weight)

    def _row(self, n: int) -> slice:
        if not 1 <= n <= self.block_size:
            raise IndexError(f"n={n}; this plan has rows 1 to {self.block_size}")
        return slice(n * (n - 1) // 2, n * (n + 1) // 2)


def compile_tables(plan: NoisePlan) -> PlanTables:
    """The tables of ``plan``, on the host.

    Args:
        plan: any plan; a ``bernoulli`` one gets the counts it leads to.
    """
    size = plan.block_size
    chances, coefficients = _top_row(plan)
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    resampled = np.ones(size + 1, dtype=bool)
    conditioned = _resampled_rows(plan) if plan.resample else {}
    for n in range(size, 0, -1):
        if n < size:
            chances = _leave_one_out(chances, n + 1)
            coefficients = _leave_one_out(coefficients, n + 1)
        resampled[n] = not plan.resample or n in conditioned
        rows.append(_finish_row(plan, n, *conditioned.get(n, (chances, coefficients))))
    resampled[0] = False
    rows.reverse()
    return PlanTables(
        block_size=size,
        packed_cdf=torch.from_numpy(np.concatenate([row[0] for row in rows])),
        packed_weight=torch.from_numpy(np.concatenate([row[1] for row in rows])),
        packed_coefficient=torch.from_numpy(np.concatenate([row[2] for row in rows])),
        resampled=torch.from_numpy(resampled),
    )


def loss_scale(plan: NoisePlan) -> float:
    """The expected loss of a model whose every masked token has a negative log-likelihood of 1.

    What the range alone makes of the loss, and with it of gradients: its width under ``elbo``, 1 under
    ``reference``, the average share of masked tokens under ``flat``. A density does not change it; the little
    that ``resample`` does is left out.
    """
    _, coefficients = _top_row(plan)
    return float(np.arange(plan.block_size + 1) @ coefficients) / plan.block_size


def _finish_row(
    plan: NoisePlan, n: int, chances: np.ndarray, coefficients: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """cdf, weight and coefficient for k = 1..n from P_n(0..n) and c_n(0..n)."""
    drawn = chances[1:] if plan.density is None else _density_row(plan.density, n)
    mass = drawn.sum()
    cdf = np.cumsum(drawn)
    # Divided by its own last entry the row ends in exact ones, whatever the rounding before.
    cdf /= cdf[-1]
    positive = drawn > 0.0
    weight = np.divide(coefficients[1:] * mass, drawn, out=np.zeros(n), where=positive)
    return cdf, weight, coefficients[1:].copy()


def _density_row(density: tuple[float, ...], n: int) -> np.ndarray:
    """Mass of the piecewise constant density over ((k-1)/n, k/n], k = 1..n."""
    edges = np.linspace(0.0, 1.0, len(density) + 1)
    cumulative = np.concatenate(([0.0], np.cumsum(density)))
    return np.diff(np.interp(np.arange(n + 1) / n, edges, cumulative))


def _leave_one_out(row: np.ndarray, n: int) -> np.ndarray:
    """A row over k = 0..n of n tokens -> over k = 0..n-1 of n - 1 tokens."""
    k = np.arange(n)
    shorter: np.ndarray = ((n - k) * row[:-1] + (k + 1) * row[1:]) / n
    return shorter


def _top_row(plan: NoisePlan) -> tuple[np.ndarray, np.ndarray]:
    """P_n(0..n) and c_n(0..n) at n = block_size; c_n(0) is not used and is 0."""
    n = plan.block_size
    if plan.full_masking:
        chances = np.zeros(n + 1)
        chances[n] = 1.0
        return chances, chances.copy()
    if plan.schedule in ("linear", "reference_linear"):
        chances, integral = _linear_row(plan.interval, n)
    else:
        chances, integral = _quadrature_row(plan, n)
    if plan.weighting == "flat":
        return chances, chances.copy()
    beta, omega = plan.interval
    return chances, integral if plan.weighting == "elbo" else integral / (omega - beta)


def _linear_row(interval: tuple[float, float], n: int) -> tuple[np.ndarray, np.ndarray]:
    """P_n(k), and the integral of Binom(k; n, p) / p, in closed form for p uniform on the interval."""
    beta, omega = interval
    chances = _cdf_difference(n + 1, beta, omega)[: n + 1] / ((n + 1) * (omega - beta))
    integral = np.zeros(n + 1)
    integral[1:] = _cdf_difference(n, beta, omega)[:n] / np.arange(1, n + 1)
    return chances, integral


def _cdf_difference(n: int, beta: float, omega: float) -> np.ndarray:
    """F(k; n, beta) - F(k; n, omega) for k = 0..n, to relative precision in both tails."""
    pmf_beta, pmf_omega = binomial_chances(n, np.array([beta, omega]))
    lower_beta, lower_omega = np.cumsum(pmf_beta), np.cumsum(pmf_omega)
    upper_beta, upper_omega = _upper_sums(pmf_beta), _upper_sums(pmf_omega)
    # Differences of two numbers near 1 lose the tail: take the side on which both are small.
    difference: np.ndarray = np.where(lower_beta < 0.5, lower_beta - lower_omega, upper_omega - upper_beta)
    return difference


def _upper_sums(pmf: np.ndarray) -> np.ndarray:
    """Sum of pmf over counts above k, for each k."""
    return np.concatenate((np.cumsum(pmf[:0:-1])[::-1], [0.0]))


def binomial_chances(n: int, p: np.ndarray) -> np.ndarray:
    """How likely k of n tokens are masked when each is with chance p.

    Args:
        n: tokens.
        p: chances in [0, 1], exact 0 and 1 included, [p].

    Returns:
        Binom(k; n, p) for k = 0..n, float64 [p, n + 1].
    """
    k = torch.arange(n + 1, dtype=torch.float64)
    chance = torch.from_numpy(np.asarray(p, dtype=np.float64))[:, None]
    log_choose = math.lgamma(n + 1.0) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    log_pmf = log_choose + torch.special.xlogy(k, chance) + torch.special.xlog1py(n - k, -chance)
    pmf: np.ndarray = log_pmf.exp().numpy()
    return pmf


def _quadrature_row(plan: NoisePlan, n: int) -> tuple[np.ndarray, np.ndarray]:
    """P_n(k), and the integral over t of loss_weight(t) Binom(k; n, move_chance(t)), for any schedule.

    Integrated in sqrt(t): every schedule is analytic in it, up to its own kinks, where the panels break. For
    a schedule without clamps the second is 1 / k exactly, because the bound does not depend on the schedule.
    """
    schedule, (low, high) = plan.noise_schedule, plan.interval
    cuts = [low, *(kink for kink in schedule.kinks if low < kink < high), high]
    # The binomial peak has a width of about 1 / sqrt(n).
    nodes, weights = np.polynomial.legendre.leggauss(64 + 16 * int(np.ceil(np.sqrt(n))))
    chances, integral = np.zeros(n + 1), np.zeros(n + 1)
    for left, right in zip(np.sqrt(cuts[:-1]), np.sqrt(cuts[1:]), strict=True):
        root = (left + right) / 2 + (right - left) / 2 * nodes
        measure = weights * (right - left) / 2 * 2 * root
        t = torch.from_numpy(root**2)
        pmf = binomial_chances(n, schedule.move_chance(t).numpy())
        chances += measure @ pmf
        integral += (measure * schedule.loss_weight(t).numpy()) @ pmf
    integral[0] = 0.0
    if not schedule.is_reference:
        integral[1:] = 1.0 / np.arange(1, n + 1)
    return chances / (high - low), integral


def _resampled_rows(plan: NoisePlan) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """P_n(k) and c_n(k) when k given t is binomial conditioned on k / n inside the clip range.

    All nodes go from n - 1 to n together, Binom(k; n) = (1 - t) Binom(k; n - 1) + t Binom(k - 1; n - 1), in
    three passes over [n, nodes]: sums of positive terms, and neither logarithms nor exponentials.

    Returns:
        Both over k = 0..n, by n; none for an n without such a count.
    """
    beta, omega = plan.interval
    nodes, weights = np.polynomial.legendre.leggauss(RESAMPLE_NODES)
    t = (beta + omega) / 2 + (omega - beta) / 2 * nodes
    scale = omega - beta if plan.weighting == "elbo" else 1.0
    shares = np.stack((weights / 2, weights / 2 / t * scale))
    # Counts first: what a step touches lies together.
    pmf, moved = np.zeros((2, plan.block_size + 1, RESAMPLE_NODES))
    pmf[0] = 1.0
    rows = {}
    for n in range(1, plan.block_size + 1):
        np.multiply(pmf[:n], t, out=moved[:n])
        pmf[:n] *= 1.0 - t
        pmf[1 : n + 1] += moved[:n]
        if not plan.can_resample(n):
            continue
        counts = plan.feasible_counts(n)
        allowed = pmf[counts.start : counts.stop]
        row = np.zeros((2, n + 1))
        row[:, counts.start : counts.stop] = (shares / allowed.sum(axis=0)) @ allowed.T
        row[1, 0] = 0.0
        rows[n] = (row[0], row[0] if plan.weighting == "flat" else row[1])
    return rows


def _broadcast(u: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Both at their common shape."""
    shape = (u + n).shape
    return u.expand(shape), n.to(torch.int64).expand(shape)
