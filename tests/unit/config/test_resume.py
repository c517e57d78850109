"""Which settings a continued run may change."""

from __future__ import annotations

import json

import pytest

from bdtrain.config import changed_settings, fixed_changes, fixed_settings
from bdtrain.config.problems import known_keys
from tests.unit.config.helpers import load


def change(*overrides: str) -> tuple[list, list]:
    """Fixed and free changes between the minimal run and the same with overrides."""
    saved, now = load().config, load(*overrides).config
    return fixed_changes(fixed_settings(saved), fixed_settings(now)), changed_settings(saved, now)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.num_layers=3"], [("model.num_layers", 2, 3)]),
        # What is derived from it changes with it.
        (
            ["model.num_heads=2", "model.head_dim=16"],
            [("model.num_heads", 4, 2), ("model.num_kv_heads", 4, 2)],
        ),
        (["data.seq_len=512"], [("data.seq_len", 1024, 512)]),
        (["data.documents=ignore"], [("data.documents", "isolate", "ignore")]),
        (["data.synthetic_tokens=4096"], [("data.synthetic_tokens", 2**20, 4096)]),
        (["diffusion.block_size=4"], [("diffusion.block_size", 16, 4)]),
        (["diffusion.plan.clip_range=[0.3,0.8]"], [("diffusion.plan.clip_range", None, [0.3, 0.8])]),
        (["run.seed=1"], [("run.seed", 1234, 1)]),
        (["train.global_batch_size=16"], [("train.global_batch_size", 8, 16)]),
    ],
)
def test_what_makes_another_run_is_fixed(overrides: list[str], expected: list) -> None:
    fixed, free = change(*overrides)
    # Keys in the order of the schema.
    assert fixed == expected
    assert free == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim.lr=1.0"], [("optim.lr", 3e-4, 1.0)]),
        (["optim.betas=[0.9,0.95]"], [("optim.betas", [0.9, 0.999], [0.9, 0.95])]),
        (
            ["optim.groups=[{match: x, lr_scale: 2}]"],
            [("optim.groups", [], [{"match": "x", "lr_scale": 2.0, "weight_decay": None}])],
        ),
        (["train.steps=200"], [("train.steps", 100, 200)]),
        (["train.micro_batch_size=2"], [("train.micro_batch_size", None, 2)]),
        (["train.precision=bf16"], [("train.precision", "fp32", "bf16")]),
        (["parallel.tp=2", "parallel.zero_stage=2"], [("parallel.tp", 1, 2), ("parallel.zero_stage", 1, 2)]),
        (["data.prefetch_batches=0"], [("data.prefetch_batches", 2, 0)]),
        (["model.attention_backend=dense"], [("model.attention_backend", "auto", "dense")]),
        (["checkpoint.every_steps=5"], [("checkpoint.every_steps", 0, 5)]),
        (["validation.sequences=5"], [("validation.sequences", None, 5)]),
    ],
)
def test_the_rest_is_free_and_its_change_is_listed(overrides: list[str], expected: list) -> None:
    assert change(*overrides) == ([], expected)


def test_the_place_of_the_corpus_is_free() -> None:
    saved, now = (load("data.kind=corpus", f"data.path={path}").config for path in ("a", "b"))
    assert fixed_changes(fixed_settings(saved), fixed_settings(now)) == []
    assert changed_settings(saved, now) == [("data.path", "a", "b")]


def test_names_folders_and_reports_are_no_change() -> None:
    quiet = ["run.name=x", "run.folder=/tmp/x", "run.resume=false", "train.log_every_steps=1"]
    assert change(*quiet, "tracking.mlflow=false") == ([], [])


def test_a_vocabulary_size_that_was_left_out_is_no_change() -> None:
    assert change("model.vocab_size=256") == ([], [])
    corpus = ["data.kind=corpus", "data.path=x"]
    left_out, given, other = (
        fixed_settings(load(*corpus, *more).config)
        for more in ([], ["model.vocab_size=300"], ["model.vocab_size=301"])
    )
    assert fixed_changes(left_out, given) == fixed_changes(given, left_out) == []
    assert fixed_changes(given, other) == [("model.vocab_size", 300, 301)]
    resolved = load(*corpus).config
    model = resolved.model.model_copy(update={"vocab_size": 300})
    assert changed_settings(load(*corpus).config, resolved.model_copy(update={"model": model})) == []


def test_fixed_settings_survive_json() -> None:
    config = load("diffusion.plan.clip_range=[0.3,0.8]").config
    saved = json.loads(json.dumps(fixed_settings(config)))
    assert saved == fixed_settings(config)
    assert set(saved) <= set(known_keys())


def test_a_setting_that_the_saved_run_did_not_know_is_not_compared() -> None:
    now = fixed_settings(load("data.seq_len=512").config)
    saved = {key: value for key, value in fixed_settings(load().config).items() if key != "data.seq_len"}
    assert fixed_changes(saved, now) == []
