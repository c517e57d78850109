"""The efficiency ablation compares ways to compute one and the same loss: losses and gradients agree."""

import pytest
import torch

from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.micro_batch import MicroBatch
from bdtrain.diffusion.objectives.block_diffusion import BlockDiffusion
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.errors import ShapeError
from bdtrain.model.build import build_model
from bdtrain.testing import single_process_groups, tiny_model_config
from tools.bench.training_passes import OURS, all_passes, attention_backend, one_pass

MASK, VOCAB = 4, 29


@pytest.fixture(scope="module")
def groups():
    with single_process_groups() as collection:
        yield collection


def make_case(groups, *, shape="qwen3", seq=18, block_size=4, isolate=False, copies=1):
    """A float64 model, its objective and a batch; 18 tokens in blocks of 4: the last one has 2."""
    config = tiny_model_config(shape)
    model = build_model(config, pg_collection=groups, mask_id=MASK, seed=7, dtype=torch.float64)
    objective = BlockDiffusion(NoisePlan(block_size), MASK, VOCAB, isolate_documents=isolate)
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randint(MASK + 1, VOCAB, (3, seq), generator=generator)
    documents = (torch.arange(seq) >= seq // 2).to(torch.int32).expand(3, seq)
    index, layout = torch.arange(3), objective.layout(documents)
    corrupted = objective.corrupt(
        x0,
        layout,
        torch.ones(3, seq, dtype=torch.bool),
        key=NoiseKey(0, Purpose.TRAIN, 1),
        sample_index=index,
        batch_index=index,
        global_batch=3,
        copies=copies,
    )
    return model, objective, MicroBatch(layout=layout, corrupted=corrupted)


def results_of(run, model, objective, micro_batch):
    model.zero_grad(set_to_none=True)
    loss = run(model, objective, micro_batch)
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
@pytest.mark.parametrize(("seq", "block_size"), [(18, 4), (16, 1), (16, 16), (70, 16)])
def test_every_pass_gives_the_same_loss_and_gradients(groups, shape, seq, block_size):
    case = make_case(groups, shape=shape, seq=seq, block_size=block_size)
    passes = all_passes()
    # Without a GPU it has no backward.
    del passes["one pass, FlexAttention"]
    passes["one pass, tree"] = one_pass("tree")
    loss, gradients = results_of(passes.pop("one pass, one masked call"), *case)
    assert loss > 0.1
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    assert OURS in passes
    for name, run in passes.items():
        other, others = results_of(run, *case)
        assert other == pytest.approx(loss, rel=1e-10), name
        for parameter, gradient in gradients.items():
            error = (others[parameter] - gradient).norm() / gradient.norm()
            assert error < 1e-10, (name, parameter, float(error))


@pytest.mark.parametrize("isolate", [False, True])
def test_the_flex_pass_gives_the_same_loss(groups, isolate, monkeypatch):
    case, passes = make_case(groups, isolate=isolate), all_passes()
    # On a CPU it has a forward alone.
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    with torch.no_grad():
        found, wanted = (passes[name](*case).item() for name in ("one pass, FlexAttention", OURS))
    assert wanted > 0.1
    assert found == pytest.approx(wanted, rel=1e-6)


def test_every_pass_but_the_loops_knows_documents(groups):
    case = make_case(groups, isolate=True)
    losses = {}
    for name, run in all_passes().items():
        if name.startswith("loop"):
            with pytest.raises(ShapeError, match="several documents"):
                run(*case)
        elif "Flex" not in name:
            losses[name] = results_of(run, *case)[0]
    assert len(losses) == 5
    assert max(losses.values()) == pytest.approx(min(losses.values()), rel=1e-10)


def test_several_copies_are_refused_where_only_one_is_computed(groups):
    case = make_case(groups, copies=2)
    with pytest.raises(ShapeError, match="2 noisy copies"):
        all_passes()["two passes, dense masks"](*case)


def test_the_backend_of_the_model_comes_back_after_an_error(groups):
    model, _, _ = make_case(groups)
    with pytest.raises(RuntimeError), attention_backend(model, "dense"):
        assert model.config.block_attention_backend == "dense"
        raise RuntimeError
    assert model.config.block_attention_backend == "auto"
