"""Defaults, derived values, frozen sections, and agreement with the rooms that read them."""

from __future__ import annotations

import pydantic
import pytest

from bdtrain.config import ModelConfig, RunConfig
from bdtrain.config.explain import describe
from bdtrain.config.problems import known_keys
from tests.unit.config.helpers import load


def test_every_setting_has_a_meaning_a_unit_and_a_kind() -> None:
    for key in known_keys():
        setting = describe(key)
        assert setting.meaning.endswith("."), key
        assert setting.unit, key
        assert setting.kind, key


def test_defaults_are_those_of_the_papers_optimizer() -> None:
    optim = load().config.optim
    assert (optim.lr, optim.betas, optim.epsilon, optim.weight_decay) == (3e-4, (0.9, 0.999), 1e-8, 0.0)
    assert (optim.grad_clip_norm, optim.ema_decay) == (1.0, 0.9999)


def test_null_sizes_are_derived_from_the_settings_above() -> None:
    model = load().config.model
    assert (model.num_kv_heads, model.head_dim) == (4, 16)
    # 8/3 of 64 is 170.7, the next multiple of 64 is 192.
    assert model.ffn_size == 192
    assert load("model.shape=bd3lm").config.model.ffn_size == 256


def test_explicit_sizes_win_over_derived_ones() -> None:
    model = load("model.num_kv_heads=2", "model.head_dim=32", "model.ffn_size=100").config.model
    assert (model.num_kv_heads, model.head_dim, model.ffn_size) == (2, 32, 100)


def test_the_folder_follows_the_name() -> None:
    assert load("run.name=abc").config.run.folder == "runs/abc"
    assert load("run.name=abc", "run.folder=/tmp/x").config.run.folder == "/tmp/x"


@pytest.mark.parametrize(
    ("overrides", "block_size"),
    [
        ([], 16),
        (["diffusion.block_size=4"], 4),
        (["diffusion.algo=mdlm", "data.seq_len=96"], 96),
        (["diffusion.algo=mdlm"], 1024),
        (["diffusion.algo=mdlm", "data.seq_len=96", "diffusion.block_size=96"], 96),
        (["diffusion.algo=ar"], 1),
    ],
)
def test_the_block_size_follows_the_objective(overrides: list[str], block_size: int) -> None:
    assert load(*overrides).config.diffusion.block_size == block_size


def test_a_configuration_cannot_be_changed_in_place() -> None:
    config = load("diffusion.plan.clip_range=[0.3,0.8]", "optim.groups=[{match: x, lr_scale: 2}]").config
    for section, name, value in [
        (config, "model", None),
        (config.model, "num_layers", 3),
        (config.diffusion.plan, "clip_range", None),
        (config.optim.groups[0], "match", "y"),
    ]:
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(section, name, value)
    assert isinstance(config.diffusion.plan.clip_range, tuple)
    assert isinstance(config.optim.betas, tuple)
    assert isinstance(config.optim.groups, tuple)
    hash(config)


def test_sections_refuse_unknown_names_when_built_in_code() -> None:
    with pytest.raises(pydantic.ValidationError, match="layers"):
        ModelConfig(num_layers=1, hidden_size=8, num_heads=1, layers=2)  # type: ignore[call-arg]


def test_schedules_and_their_names_in_the_config_are_the_same() -> None:
    from bdtrain.diffusion.schedule import SCHEDULES

    assert set(describe("diffusion.schedule").allowed.split(", ")) == set(SCHEDULES)


def test_tokens_per_step_are_clean_tokens_of_all_rows() -> None:
    config: RunConfig = load("data.seq_len=64", "train.micro_batch_size=2").config
    assert config.tokens_per_step == 8 * 64
