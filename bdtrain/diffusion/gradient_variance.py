"""Variance of the last layer's gradient under any noise plan, from one pass with stratified mask counts.

For a block with masked rows i, the gradient of its summed nll with respect to the head's weight is

    Gamma = sum_i delta_i h_i^T        delta = softmax - one-hot of the token, h = normed hidden state

and training adds c_n(k) / q_n(k) Gamma to its gradient where it adds c_n(k) / q_n(k) g to its loss. So every
formula of ``plan_variance.py`` holds with squares replaced by squared norms and products of means by inner
products, and the operators compiled there serve here.

What they need of a block is its squared norm, sum_ij (delta_i . delta_j)(h_i . h_j), exact without the
matrix; and of a cell (n, k) the inner products of its mean gradient with those of the other cells. For these
a block keeps a tensor sketch: ``WIDTH`` numbers, linear in the gradient, whose inner products are unbiased
with a standard deviation of at most about sqrt(8 / WIDTH) |A| |B|, 0.13 at 512. That hardly matters: the
squared norm of a mean gradient is small beside the mean squared norm (2 parts in 10,000 in a trained model of
1.3M parameters), and only their difference is judged. The squared norm of the mean of N gradients holds their
variance / N on average, which is taken off.

For the same reason strata, which remove the variance between noise levels, remove little of a gradient's and
much of a loss's: the number of masked tokens moves the loss by its mean, which is not small.

Source of the sketch: Pham and Pagh, "Fast and scalable polynomial kernels via explicit feature maps" (2013).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bdtrain.diffusion.plan_variance import PlanOperator, comparison_scale
from bdtrain.diffusion.variance import BlockRecords, Cells
from bdtrain.errors import DataError, ShapeError

WIDTH = 512
"""Numbers of a sketch."""

DRAWS_AT_A_TIME = 64
"""Bootstrap draws whose mean gradients exist at once."""


@dataclass(frozen=True, eq=False)
class _Fold:
    """Sums of coordinates with random signs, in ``width`` random groups of one size.

    Attributes:
        order: which coordinate stands where, int64 [groups' size * width].
        sign: 1 or -1, and 0 where a place has no coordinate, float32 [groups' size * width].
        width: groups.
    """

    order: Tensor
    sign: Tensor
    width: int

    @classmethod
    def make(cls, size: int, width: int, generator: np.random.Generator, device: torch.device) -> _Fold:
        places = -(-size // width) * width
        order = generator.permutation(places)
        sign = np.where(order < size, generator.choice([-1.0, 1.0], places), 0.0)
        return cls(
            torch.from_numpy(np.minimum(order, size - 1)).to(device),
            torch.from_numpy(sign).to(device, torch.float32),
            width,
        )

    def apply(self, x: Tensor) -> Tensor:
        """[rows, size] to [rows, width]."""
        return (x.index_select(1, self.order) * self.sign).view(len(x), -1, self.width).sum(dim=1)


@dataclass(frozen=True, eq=False)
class GradientSketch:
    """A random linear map of [vocab, hidden] matrices to ``width`` numbers that keeps inner products.

    The same arguments give the same map, on every machine.

    Attributes:
        width: numbers of a sketch.
    """

    width: int
    _left: _Fold
    _right: _Fold

    @classmethod
    def make(
        cls, vocab: int, hidden: int, *, seed: int, device: torch.device, width: int = WIDTH
    ) -> GradientSketch:
        """Draw a map.

        Args:
            vocab: columns of delta.
            hidden: columns of h.
            seed: of the map, at least 0.
            device: where it is used.
            width: numbers of a sketch, at least 1.
        """
        generator = np.random.Generator(np.random.PCG64(seed))
        left = _Fold.make(vocab, width, generator, device)
        return cls(width, left, _Fold.make(hidden, width, generator, device))

    def spectra(self, delta: Tensor, hidden: Tensor) -> Tensor:
        """Fourier transforms of the sketches of ``delta_i h_i^T``, complex [rows, width // 2 + 1].

        The sketch of an outer product is the circular convolution of those of its factors.
        """
        product: Tensor = torch.fft.rfft(self._left.apply(delta)) * torch.fft.rfft(self._right.apply(hidden))
        return product

    def of_spectra(self, spectra: Tensor) -> Tensor:
        """Sketches from sums of ``spectra``, [blocks, width]."""
        sketch: Tensor = torch.fft.irfft(spectra, n=self.width)
        return sketch


def sum_gradients(
    delta: Tensor, hidden: Tensor, block: Tensor, sketch: GradientSketch
) -> tuple[Tensor, Tensor]:
    """Squared norm and sketch of each block's gradient of the head's weight.

    Args:
        delta: softmax minus one-hot, [rows, vocab]; rows of a block side by side.
        hidden: normed hidden states, [rows, hidden].
        block: number of each row's block, int64 [rows]; 0, 1, ... in ascending order, none left out.
        sketch: the map.

    Returns:
        Squared norms, float64 [blocks], and sketches, [blocks, width].

    Raises:
        ShapeError: if the rows do not belong together.
    """
    rows = len(block)
    if delta.shape[0] != rows or hidden.shape[0] != rows or not rows:
        raise ShapeError(
            f"delta {tuple(delta.shape)}, hidden {tuple(hidden.shape)} and block {tuple(block.shape)} must "
            "have the same rows, at least one"
        )
    sizes = torch.bincount(block)
    largest = int(sizes.max())
    place = torch.arange(rows, device=block.device) - (sizes.cumsum(0) - sizes)[block]
    target = block * largest + place

    def by_block(x: Tensor) -> Tensor:
        """[rows, ...] to [blocks, largest, ...] with zeros: sums in an order that is always the same."""
        table = x.new_zeros(len(sizes) * largest, *x.shape[1:])
        return table.index_copy_(0, target, x).view(len(sizes), largest, *x.shape[1:])

    of_delta, of_hidden = by_block(delta), by_block(hidden)
    products = (of_delta @ of_delta.mT).double() * (of_hidden @ of_hidden.mT).double()
    spectra = by_block(sketch.spectra(delta, hidden)).sum(dim=1)
    return products.sum(dim=(1, 2)), sketch.of_spectra(spectra)


@dataclass(frozen=True, eq=False)
class GradientRecords:
    """Measured blocks and what their last-layer gradients came to, in the order of ``blocks``.

    Attributes:
        blocks: the blocks, their mask counts and losses.
        square: squared norm of the gradient of each block's summed nll, float64 [blocks].
        sketch: inner products of rows stand for those of the gradients, float32 [blocks, width].

    Raises:
        ShapeError: at construction, if the numbers of blocks differ.
        DataError: at construction, if a value is not finite.
    """

    blocks: BlockRecords
    square: np.ndarray
    sketch: np.ndarray

    def __post_init__(self) -> None:
        """Refuse what cannot have been measured."""
        count = self.blocks.blocks
        if self.square.shape != (count,) or self.sketch.ndim != 2 or len(self.sketch) != count:
            raise ShapeError(
                f"squares {self.square.shape} and sketches {self.sketch.shape} of {count} blocks; give "
                "[blocks] and [blocks, width]"
            )
        bad = int((~np.isfinite(self.square) | ~np.isfinite(self.sketch).all(axis=1)).sum())
        if bad:
            raise DataError(f"the gradient of {bad} of {count} measured blocks is not finite")

    @classmethod
    def concatenate(cls, parts: Sequence[GradientRecords]) -> GradientRecords:
        """All records in canonical order, as ``BlockRecords.concatenate`` has it.

        Raises:
            DataError: if there is no part, or two parts measured the same sequence.
        """
        blocks = BlockRecords.concatenate([part.blocks for part in parts])
        order = np.argsort(np.concatenate([part.blocks.sequence for part in parts]), kind="stable")
        return cls(
            blocks,
            np.concatenate([part.square for part in parts])[order],
            np.concatenate([part.sketch for part in parts])[order],
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The columns by name, for ``numpy.savez`` or another process."""
        return {**self.blocks.to_arrays(), "square": self.square, "sketch": self.sketch}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> GradientRecords:
        """Read what ``to_arrays`` made.

        Raises:
            DataError: if a column is missing.
        """
        missing = [name for name in ("square", "sketch") if name not in arrays]
        if missing:
            raise DataError(f"gradient records without {', '.join(missing)}; write GradientRecords.to_arrays")
        return cls(BlockRecords.from_arrays(arrays), arrays["square"], arrays["sketch"])


@dataclass(frozen=True, eq=False)
class GradientMoments:
    """Moments of H = Gamma / k by cell, under one set of weights of the sequences per draw.

    Attributes:
        count: weighted records, float64 [draws, cells].
        second: E|H|^2, float64 [draws, cells].
        products: for each n inner products of the cells' mean H, as measured, float64 [draws, cells of n,
            cells of n].
        variance: E|H|^2 - |E H|^2 with the factor count / (count - 1), float64 [draws, cells].
        blocks: weighted blocks by n, float64 [draws, sizes].
    """

    count: np.ndarray
    second: np.ndarray
    products: tuple[np.ndarray, ...]
    variance: np.ndarray
    blocks: np.ndarray

    @property
    def mean_square(self) -> np.ndarray:
        """|E H|^2 by cell without the error of the means, [draws, cells]; may fall below 0."""
        squares = np.concatenate([np.diagonal(one, axis1=1, axis2=2) for one in self.products], axis=1)
        return np.asarray(squares - self.variance / self.count)


def gradient_moments(
    records: GradientRecords, cells: Cells, weights: np.ndarray | None = None
) -> GradientMoments:
    """Moments by cell. A cell to which a draw gives a weight below 2 keeps those without weights.

    Args:
        records: what was measured.
        cells: of ``records.blocks``.
        weights: how often each sequence counts, float64 [draws, sequences], as ``variance.moments`` takes
            them; None: each once, one draw.

    Raises:
        ShapeError: if ``weights`` has another number of sequences.
    """
    if weights is not None and weights.shape[1:] != (cells.sequences,):
        raise ShapeError(f"weights {weights.shape} for {cells.sequences} sequences; give [draws, sequences]")
    once = np.ones((1, cells.sequences))
    base = _sums(records, cells, once, None)
    if weights is None:
        return _join([base], cells)
    parts = [
        _sums(records, cells, weights[start : start + DRAWS_AT_A_TIME], base)
        for start in range(0, len(weights), DRAWS_AT_A_TIME)
    ]
    return _join(parts, cells)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Of some draws: weights as drawn and as used, E|H|^2 [draws, cells], mean sketches, their products."""

    drawn: np.ndarray
    count: np.ndarray
    second: np.ndarray
    mean: np.ndarray
    products: tuple[np.ndarray, ...]


def _sums(records: GradientRecords, cells: Cells, weights: np.ndarray, base: _Sums | None) -> _Sums:
    draws, width = len(weights), records.sketch.shape[1]
    drawn, second = np.zeros((draws, cells.count)), np.zeros((draws, cells.count))
    mean = np.zeros((draws, cells.count, width))
    masked = records.blocks.masked.astype(np.float64)
    for cell in range(cells.count):
        inside = np.flatnonzero(cells.cell == cell)
        each, k = weights[:, cells.sequence_index[inside]], masked[inside]
        drawn[:, cell] = each.sum(axis=1)
        second[:, cell] = each @ (records.square[inside] / k**2)
        mean[:, cell] = each @ (records.sketch[inside] / k[:, None])
    count = drawn
    if base is not None:
        few = drawn < 2.0
        count, second = np.where(few, base.count, drawn), np.where(few, base.second * base.count, second)
        mean = np.where(few[..., None], base.mean * base.count[..., None], mean)
    second, mean = second / count, mean / count[..., None]
    products = tuple(
        mean[:, start:end] @ mean[:, start:end].transpose(0, 2, 1)
        for start, end in zip(cells.offsets[:-1], cells.offsets[1:], strict=True)
    )
    # The means of many draws would fill the memory; only those without weights are used again.
    return _Sums(drawn, count, second, mean if base is None else mean[:0], products)


def _join(parts: Sequence[_Sums], cells: Cells) -> GradientMoments:
    drawn, count, second = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("drawn", "count", "second")
    )
    products = tuple(np.concatenate(of_size) for of_size in zip(*(p.products for p in parts), strict=True))
    squares = np.concatenate([np.diagonal(one, axis1=1, axis2=2) for one in products], axis=1)
    # Not cut off at 0, which would make it biased: the sketch's error may leave a little less than nothing.
    variance = (second - squares) * count / np.maximum(count - 1.0, 1.0)
    blocks = np.add.reduceat(drawn, cells.offsets[:-1], axis=1)
    return GradientMoments(count=count, second=second, products=products, variance=variance, blocks=blocks)


@dataclass(frozen=True, eq=False)
class GradientStatistics:
    """What a plan does to the last layer's gradient of one block, per draw; see ``PlanStatistics``.

    Variances are traces of covariance matrices.

    Attributes:
        mean_square: squared norm of the expected gradient given n, averaged over n, float64 [draws].
        stratified: variance of a block's weighted gradient under strata over a large batch, float64 [draws].
        independent: the same without strata, float64 [draws].
        tokens: maskable tokens per block, float64 [draws].
        scale: factor to the scale on which plans are compared.
        finite: False where the variances are lower bounds of infinite ones.

    Per token means: over B blocks the gradient of sum(X) / sum(n) has a variance of that / B.
    """

    mean_square: np.ndarray
    stratified: np.ndarray
    independent: np.ndarray
    tokens: np.ndarray
    scale: float
    finite: bool

    @property
    def variance_per_token(self) -> np.ndarray:
        """Stratified variance of a block's gradient per token, at the comparison scale, [draws]."""
        return np.asarray(self.stratified * (self.scale / self.tokens) ** 2)

    @property
    def independent_per_token(self) -> np.ndarray:
        """Variance without strata of a block's gradient per token, at the comparison scale, [draws]."""
        return np.asarray(self.independent * (self.scale / self.tokens) ** 2)


def gradient_statistics(operator: PlanOperator, moments: GradientMoments) -> GradientStatistics:
    """Variances of the last layer's gradient under a plan, for every draw of ``moments``.

    Args:
        operator: the plan, compiled against the cells of the moments.
        moments: from ``gradient_moments``.

    Raises:
        ShapeError: if the moments are those of other cells.
    """
    cells = operator.cells
    if moments.second.shape[1] != cells.count:
        raise ShapeError(f"moments of {moments.second.shape[1]} cells for {cells.count} cells")
    error = moments.variance / moments.count
    means, stratified, independent = [], [], []
    for index, products in enumerate(moments.products):
        part = slice(int(cells.offsets[index]), int(cells.offsets[index + 1]))
        coefficient = operator.mean_of[part]
        mean = _quadratic(products, error[:, part], np.outer(coefficient, coefficient))
        second = moments.second[:, part] @ operator.square_of[part]
        means.append(mean)
        independent.append(second - mean)
        if operator.within_of is not None:
            stratified.append(moments.variance[:, part] @ operator.within_of[part])
        else:
            form = (operator.between_of or ())[index]
            stratified.append(second - _quadratic(products, error[:, part], form))
    shares = moments.blocks / moments.blocks.sum(axis=1, keepdims=True)

    def averaged(columns: list[np.ndarray]) -> np.ndarray:
        return np.asarray((shares * np.stack(columns, axis=1)).sum(axis=1))

    return GradientStatistics(
        mean_square=averaged(means),
        stratified=averaged(stratified),
        independent=averaged(independent),
        tokens=(shares * cells.sizes).sum(axis=1),
        scale=comparison_scale(operator.plan),
        finite=operator.finite,
    )


def _quadratic(products: np.ndarray, error: np.ndarray, form: np.ndarray) -> np.ndarray:
    """sum_ab form_ab <E H_a, E H_b> without the error of the means, [draws]."""
    return np.asarray((products * form).sum(axis=(1, 2)) - error @ np.diagonal(form))
