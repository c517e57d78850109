"""The view of the logits: lazy, without [MASK] and padding, equal to the dense computation."""

import math

import pytest
import torch
import torch.nn.functional as F

from bdtrain.errors import ShapeError


def make_view(build, rows=11, shape="bd3lm"):
    from bdtrain.model.head import ParallelVocabView

    model = build(shape)
    hidden = torch.randn(
        rows, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    ids = torch.randint(5, 29, (rows,), generator=torch.Generator().manual_seed(1))
    dense = F.linear(hidden, model.output_layer.weight, model.output_layer.bias)
    dense = dense.index_fill(1, torch.tensor([4, 29, 30, 31]), -math.inf)
    return model, ParallelVocabView(hidden, model.output_layer), hidden, ids, dense


def test_every_quantity_equals_the_dense_one(build):
    _, view, _, ids, dense = make_view(build)
    assert (view.num_rows, view.vocab_size) == (11, 29)
    torch.testing.assert_close(view.logits(), dense)
    torch.testing.assert_close(view.logsumexp(), dense.logsumexp(-1))
    torch.testing.assert_close(view.values_at(ids), dense.gather(1, ids[:, None])[:, 0])
    torch.testing.assert_close(view.maximum(), dense.amax(-1))
    p = dense.softmax(-1)
    torch.testing.assert_close(view.sum_over_vocab(p), torch.ones(11, dtype=torch.float64))


@pytest.mark.parametrize("form", ["chunked", "chunked with weights", "from logits"])
def test_every_way_to_the_nll_has_the_dense_values_and_gradients(build, form):
    model, view, hidden, ids, dense = make_view(build)
    if form == "from logits":
        view.logits()  # once there are logits they are used
    weight = torch.linspace(0.1, 2, 11, dtype=torch.float64)
    row_weights = weight if form == "chunked with weights" else None
    torch.testing.assert_close(
        view.nll(ids, row_weights), F.cross_entropy(dense, ids, reduction="none"), rtol=1e-12, atol=1e-12
    )
    leaves = (hidden, model.output_layer.weight, model.output_layer.bias)
    ours = torch.autograd.grad((view.nll(ids, row_weights) * weight).sum(), leaves)
    wanted = torch.autograd.grad((F.cross_entropy(dense, ids, reduction="none") * weight).sum(), leaves)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("from_logits", [False, True])
def test_statistics_have_the_dense_values_and_gradients(build, from_logits):
    model, view, hidden, ids, dense = make_view(build)
    asked = torch.stack((ids, ids.flip(0), ids), dim=1)
    if from_logits:
        view.logits()
    found, wanted = view.statistics(asked), (dense.logsumexp(-1), dense.gather(1, asked))
    weight = torch.linspace(0.1, 2, 11, dtype=torch.float64)
    leaves = (hidden, model.output_layer.weight, model.output_layer.bias)
    gradients = []
    for lse, values in (found, wanted):
        loss = (lse * weight).sum() + (values * torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)).sum()
        gradients.append(torch.autograd.grad(loss, leaves, retain_graph=True))
    for a, b in zip((*found, *gradients[0]), (*wanted, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_losses_alone_never_make_the_logits(build, monkeypatch):
    model, view, _, ids, _ = make_view(build)

    def refuse(*_):
        raise AssertionError("the logits of all rows were made")

    monkeypatch.setattr(type(model.output_layer).__bases__[0], "forward", refuse)
    loss = view.nll(ids) + view.nll(ids, torch.ones(11)) + view.logsumexp() - view.values_at(ids)
    (loss + view.statistics(ids[:, None])[0]).sum().backward()
    with pytest.raises(AssertionError, match="all rows"):
        view.logits()


def test_the_mask_token_is_never_predicted(build):
    _, view, *_ = make_view(build)
    mask = torch.full((11,), 4)
    assert (view.values_at(mask) == -math.inf).all()
    assert (view.nll(mask) == math.inf).all()


def test_no_rows_give_no_loss_and_a_zero_gradient(build):
    model, view, hidden, ids, _ = make_view(build, rows=0)
    view.nll(ids).sum().backward()
    assert hidden.grad.shape == (0, 32)
    assert (model.output_layer.weight.grad == 0).all()


def test_ids_of_another_length_are_refused(build):
    _, view, *_ = make_view(build)
    with pytest.raises(ShapeError, match="11 rows"):
        view.nll(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"\[11, ids\]"):
        view.statistics(torch.zeros(11, dtype=torch.int64))
