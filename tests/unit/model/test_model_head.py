"""The view of the logits: lazy, without [MASK] and padding, equal to the dense computation."""

import math
import threading

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


@pytest.mark.parametrize("form", ["chunked", "chunked with weights", "vocabulary-parallel"])
def test_every_way_to_the_nll_has_the_dense_values_and_gradients(build, form):
    model, view, hidden, ids, dense = make_view(build)
    if form == "vocabulary-parallel":
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


def test_no_rows_give_no_loss_and_a_zero_gradient(build):
    model, view, hidden, ids, _ = make_view(build, rows=0)
    view.nll(ids).sum().backward()
    assert hidden.grad.shape == (0, 32)
    assert (model.output_layer.weight.grad == 0).all()


def test_ids_of_another_length_are_refused(build):
    _, view, *_ = make_view(build)
    with pytest.raises(ShapeError, match="11 rows"):
        view.nll(torch.zeros(3, dtype=torch.int64))


def test_two_shards_of_the_vocabulary_give_the_dense_values(build, monkeypatch):
    """The tensor-parallel form with the two ranks as threads; the collectives are a sum and a
    concatenation."""
    from bdtrain.model import head as head_module

    _, _, hidden, ids, dense = make_view(build)
    barrier, box = threading.Barrier(2), {}

    class Group:
        def __init__(self, rank):
            self.number = rank

        def size(self):
            return 2

        def rank(self):
            return self.number

    def exchange(x, group):
        box[group.rank()] = x
        barrier.wait()
        both = [box[0], box[1]]
        barrier.wait()
        return both

    monkeypatch.setattr(
        head_module, "reduce_from_tensor_model_parallel_region", lambda x, group: sum(exchange(x, group))
    )
    monkeypatch.setattr(
        head_module,
        "gather_from_tensor_model_parallel_region",
        lambda x, group: torch.cat(exchange(x, group), -1),
    )

    class Shard:
        def __init__(self, rank):
            self.tp_group, self.first_id = Group(rank), rank * 16
            self.config = type("C", (), {"vocab_size": 29})

        def __call__(self, hidden):
            return dense.detach()[:, self.first_id : self.first_id + 16]

    results = {}

    def rank_work(rank):
        view = head_module.ParallelVocabView(hidden.detach(), Shard(rank))
        results[rank] = view.nll(ids), view.maximum(), view.logsumexp(), view.values_at(ids)

    threads = [threading.Thread(target=rank_work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    wanted = (
        F.cross_entropy(dense, ids, reduction="none"),
        dense.amax(-1),
        dense.logsumexp(-1),
        dense.gather(1, ids[:, None])[:, 0],
    )
    for rank in range(2):
        for ours, value in zip(results[rank], wanted, strict=True):
            torch.testing.assert_close(ours, value.detach())
