"""Optimizer, moving average and learning rate against plain arithmetic."""

import itertools
import math

import pytest
import torch

from bdtrain.parallel.engine import AVERAGE_KEY
from bdtrain.train.optim import AveragedAdamW, learning_rate, parameter_groups


def test_update_equals_torch_adamw_and_average_follows_its_definition():
    torch.manual_seed(0)
    start = torch.randn(5, 3, dtype=torch.float64)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.05}
    optimizer = AveragedAdamW([ours], ema_decay=0.7, **settings)
    reference = torch.optim.AdamW([theirs], **settings)
    average = start.clone()
    for k in range(1, 60):
        gradient = torch.randn(5, 3, dtype=torch.float64)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
        decay = min(0.7, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * theirs.detach()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[ours][AVERAGE_KEY], average, rtol=1e-12, atol=1e-12)


def test_parameter_without_gradient_leaves_its_average_alone():
    moving, still = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = AveragedAdamW([moving, still], ema_decay=0.9, lr=0.1)
    moving.grad = torch.ones(2)
    optimizer.step()
    assert AVERAGE_KEY in optimizer.state[moving]
    assert AVERAGE_KEY not in optimizer.state[still]


def test_no_decay_means_no_average():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = AveragedAdamW([parameter], ema_decay=None, lr=0.1)
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert AVERAGE_KEY not in optimizer.state[parameter]


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    matrices, vectors = parameter_groups(model.named_parameters(), weight_decay=0.1)
    assert [tuple(p.shape) for p in matrices["params"]] == [(4, 3)]
    assert matrices["weight_decay"] == 0.1
    assert all(p.dim() == 1 for p in vectors["params"])
    assert vectors["weight_decay"] == 0.0
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_learning_rate_meets_its_corner_points(schedule):
    def rate(step):
        return learning_rate(
            step, peak=2.0, schedule=schedule, warmup_steps=4, decay_steps=5, total_steps=20, min_ratio=0.1
        )

    assert [rate(s) for s in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rate(4) == 2.0
    if schedule == "constant":
        assert all(rate(s) == 2.0 for s in range(4, 20))
    if schedule == "cosine":
        assert rate(19) == pytest.approx(0.2)
        # 19 - 4 = 15 intervals: the middle of the cosine lies between the 7th and 8th.
        assert (rate(11) + rate(12)) / 2 == pytest.approx(1.1, abs=0.01)
        assert rate(9) == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 3))))
    if schedule == "wsd":
        assert all(rate(s) == 2.0 for s in range(4, 15))
        falls = [rate(s) for s in range(14, 20)]
        assert falls[-1] == pytest.approx(0.2)
        differences = [a - b for a, b in itertools.pairwise(falls)]
        assert differences == pytest.approx([differences[0]] * 5)
