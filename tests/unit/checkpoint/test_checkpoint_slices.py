"""The arithmetic of shards against index tensors."""

import itertools
import math
import random

import pytest
import torch

from bdtrain.checkpoint.slices import make_cut, rectangles
from bdtrain.errors import ShapeError
from tests.unit.checkpoint.layouts import shard

SHAPES = [
    ((24,), 0, 1),
    ((16, 3), 0, 2),
    ((5, 8), 1, 1),
    ((3, 16, 2), 1, 2),
    ((2, 24), 1, 3),
    ((7,), None, 1),
]


@pytest.mark.parametrize(("shape", "dim", "stride"), SHAPES)
def test_rectangles_cover_each_wanted_element_once_with_the_right_source(shape, dim, stride):
    serial = torch.arange(math.prod(shape)).view(shape)
    chance = random.Random(1)
    for live_size, saved_size in itertools.product([1, 2, 4], repeat=2):
        if dim is not None and any(shape[dim] % (stride * size) for size in (live_size, saved_size)):
            continue
        live_cut, saved_cut = (
            make_cut(shape, dim, stride, live_size),
            make_cut(shape, dim, stride, saved_size),
        )
        saved = [shard(serial, dim, stride, r, saved_size).flatten() for r in range(saved_size)]
        for live_rank in range(live_size if dim is not None else 1):
            wanted = shard(serial, dim, stride, live_rank, live_size).flatten()
            for _ in range(25):
                start = chance.randrange(len(wanted))
                count = chance.randint(1, len(wanted) - start)
                found = torch.full((len(wanted),), -1)
                live, kept, pieces = rectangles(live_cut, live_rank, start, count, saved_cut)
                for piece in pieces:
                    for row in range(*piece.rows):
                        for column in range(piece.saved[1] - piece.saved[0]):
                            target = row * live.row + piece.live[0] + column
                            assert found[target] == -1
                            found[target] = saved[piece.rank][row * kept.row + piece.saved[0] + column]
                assert torch.equal(found[start : start + count], wanted[start : start + count])
                assert (found >= 0).sum() == count


@pytest.mark.parametrize(("shape", "dim", "stride"), SHAPES)
def test_rule_of_the_tests_is_the_models(shape, dim, stride):
    from bdtrain.model.init import take_shard

    serial = torch.arange(math.prod(shape)).view(shape)
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.tensor_model_parallel = dim is not None
    parameter.partition_dim, parameter.partition_stride = dim, stride
    for size in (1, 2, 4):
        if dim is None or shape[dim] % (stride * size) == 0:
            for rank in range(size):
                assert torch.equal(
                    take_shard(serial, parameter, rank, size), shard(serial, dim, stride, rank, size)
                )


def test_the_same_cut_is_one_stretch():
    cut = make_cut((64, 64), 1, 2, 4)
    _, _, pieces = rectangles(cut, 3, 17, 500, cut)
    assert [(p.rank, p.saved, p.live) for p in pieces] == [(3, (17, 517), (17, 517))]


@pytest.mark.parametrize(("dim", "stride", "size"), [(0, 1, 3), (0, 3, 2), (2, 1, 2), (-1, 1, 2)])
def test_shape_that_cannot_be_cut_is_refused(dim, stride, size):
    with pytest.raises(ShapeError, match="cannot be cut"):
        make_cut((8, 4), dim, stride, size)


def test_cuts_along_different_dimensions_are_refused():
    with pytest.raises(ShapeError, match="different dimensions"):
        rectangles(make_cut((8, 4), 0, 1, 2), 0, 0, 4, make_cut((8, 4), 1, 1, 2))
