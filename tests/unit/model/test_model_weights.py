"""Whole weights out and in, by the names of the serial model."""

import pytest
import torch

from bdtrain.errors import CheckpointError
from bdtrain.model.weights import full_state, load_full_state


@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
def test_loading_what_was_taken_out_restores_the_model(build, shape):
    source, target = build(shape, seed=1), build(shape, seed=2)
    state = full_state(source)
    load_full_state(target, state)
    for (name, a), (_, b) in zip(source.named_parameters(), target.named_parameters(), strict=True):
        assert a.equal(b), name


def test_the_state_is_a_copy_and_holds_parameters_only(build):
    model = build()
    state = full_state(model)
    assert list(state) == [name for name, _ in model.named_parameters()]
    state["embedding.weight"].zero_()
    assert model.embedding.weight.abs().sum() > 0


def test_wrong_weights_are_refused_all_at_once_and_nothing_is_loaded(build):
    model = build()
    before = full_state(model)
    state = {name: value + 1 for name, value in before.items()}
    state["extra"] = state.pop("final_layernorm.weight")
    state["output_layer.weight"] = torch.zeros(3, 32)
    with pytest.raises(CheckpointError) as caught:
        load_full_state(model, state)
    message = str(caught.value)
    assert "missing: final_layernorm.weight" in message
    assert "unknown: extra" in message
    assert "output_layer.weight has shape (3, 32), the model's is (32, 32)" in message
    assert all(value.equal(before[name]) for name, value in full_state(model).items())
