"""Every refusal: unknown keys, wrong types, values that do not fit, settings that would be ignored."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import pytest

from bdtrain.config import check_paths, dump_resolved, load_config
from bdtrain.config.checks import find_conflicts, without_effect
from bdtrain.config.problems import OTHER_WORDS, known_keys
from bdtrain.errors import ConfigError
from tests.unit.config.helpers import load, only_problem, problems


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optim.lrr", "optim.lr"),
        ("train.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("model.layers", "model.num_layers"),
        ("model.num_layer", "model.num_layers"),
        ("diffusion.clip_range", "diffusion.plan.clip_range"),
        ("diffusion.blocksize", "diffusion.block_size"),
        ("train.block_size", "diffusion.block_size"),
        ("train.batch_size", "train.micro_batch_size"),
        ("data.seqlen", "data.seq_len"),
        ("difusion.algo", "diffusion.algo"),
        ("seed", "run.seed"),
        ("train.zero_stage", "parallel.zero_stage"),
        ("model.tp", "parallel.tp"),
        ("train.sequence_parallel", "parallel.sequence_parallel"),
        ("checkpoint.every_step", "checkpoint.every_steps"),
        ("tracking.mlflow_url", "tracking.mlflow_uri"),
        ("optim.group", "optim.groups"),
        # What others call it.
        ("optim.learning_rate", "optim.lr"),
        ("d_model", "model.hidden_size"),
        ("train.max_steps", "train.steps"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(key: str, meant: str) -> None:
    assert only_problem(f"{key}=1") == f"{key} is not a setting; did you mean {meant}? [command line]"


def test_words_of_other_trainers_lead_to_settings_that_exist_and_hide_none() -> None:
    words = {key.rpartition(".")[2] for key in known_keys()}
    assert set(OTHER_WORDS.values()) <= set(known_keys())
    assert not words & set(OTHER_WORDS)


def test_an_unknown_key_without_neighbour_lists_what_there_is() -> None:
    assert "settings of checkpoint: checkpoint.every_steps, checkpoint.keep_last," in only_problem(
        "checkpoint.zzz=1"
    )
    assert "sections: run, model, data" in only_problem("qqq=1")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_layers='2'", "model.num_layers='2'; it must be a whole number"),
        ("model.num_layers=2.5", "model.num_layers=2.5; it must be a whole number"),
        ("model.num_layers=true", "model.num_layers=true; it must be a whole number"),
        ("model.num_layers=0", "model.num_layers=0; it must be at least 1"),
        ("model.num_layers=[1]", "model.num_layers=[1]; it must be a whole number"),
        ("optim.lr=fast", "optim.lr='fast'; it must be a number"),
        ("optim.lr=0", "optim.lr=0; it must be greater than 0"),
        ("optim.lr=.nan", "optim.lr=nan; it must be a finite number"),
        ("optim.lr=.inf", "optim.lr=inf; it must be a finite number"),
        ("optim.ema_decay=1.0", "optim.ema_decay=1.0; it must be less than 1"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]; it must be a list of two numbers"),
        ("optim.betas=[0.9,0.99,0.999]", "it must be a list of two numbers"),
        ("optim.betas=0.9", "optim.betas=0.9; it must be a list of two numbers"),
        ("optim.betas=0.9,0.95", 'it must be a list of two numbers, written "optim.betas=[A,B]"'),
        ("optim.betas=[0.9,x]", "optim.betas[1]='x'; it must be a number"),
        ("optim.betas=[0.9,1.0]", "both must be at least 0 and below 1"),
        ("diffusion.plan.resample=1", "diffusion.plan.resample=1; it must be true or false"),
        ("diffusion.algo=mdml", "choose from block_diffusion, mdlm, ar (did you mean mdlm?)"),
        ("parallel.zero_stage=4", "parallel.zero_stage=4; choose from 1, 2, 3"),
        ("parallel.zero_stage=0", "parallel.zero_stage=0; choose 1, 2 or 3: DeepSpeed's stage 0 clips"),
        ("parallel.zero_stage=false", "parallel.zero_stage=false; choose from 1, 2, 3"),
        ("parallel.tp=0", "parallel.tp=0; it must be at least 1"),
        ("parallel.pp=two", "parallel.pp='two'; it must be a whole number"),
        ("parallel.sequence_parallel=1", "parallel.sequence_parallel=1; it must be true or false"),
        ("train.precision=fp16", "train.precision='fp16'; choose from fp32, bf16 (did you mean bf16?)"),
        ("train.recompute=all", "train.recompute='all'; choose from none, core_attn, full"),
        ("train.peak_tflops=0", "train.peak_tflops=0; it must be greater than 0"),
        ("train.micro_batch_size=0", "train.micro_batch_size=0; it must be at least 1"),
        ("run.resume=yes please", "run.resume='yes please'; it must be true or false"),
        ("checkpoint.every_steps=-1", "checkpoint.every_steps=-1; it must be at least 0"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last=0; it must be at least 1"),
        ("checkpoint.keep_every_tokens=0.5", "checkpoint.keep_every_tokens=0.5; it must be a whole number"),
        ("checkpoint.save_final=1", "checkpoint.save_final=1; it must be true or false"),
        ("tracking.mlflow=1", "tracking.mlflow=1; it must be true or false"),
        ("tracking.mlflow_uri=''", "tracking.mlflow_uri=''; it must not be empty"),
        ("tracking.experiment=''", "tracking.experiment=''; it must not be empty"),
        ("tracking.drain_timeout_s=-1", "tracking.drain_timeout_s=-1; it must be at least 0"),
        ("run.name=no", "run.name=false; it must be text (YAML read it as another type: put it in quotes)"),
        ("run.name=../x", "run.name='../x'; it must match"),
        ("run.seed=-1", "run.seed=-1; it must be at least 0"),
        ("run.seed=4294967296", "run.seed=4294967296; it must be less than 4294967296"),
        ("data.on_corrupt=fail", "data.on_corrupt is not a setting"),
        ("train.dtype=fp32", "train.dtype is not a setting"),
    ],
)
def test_a_value_of_the_wrong_kind_says_what_is_allowed(override: str, expected: str) -> None:
    problem = only_problem(override)
    assert expected in problem
    assert problem.endswith("[command line]")


@pytest.mark.parametrize(
    "key", ["model.num_layers", "model.hidden_size", "train.steps", "train.global_batch_size"]
)
def test_a_required_setting_that_is_missing_is_named(key: str) -> None:
    assert only_problem(f"{key}=null").startswith(f"{key} is required")


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {num_layers: two, hidden_size: 64, num_heads: 3, depth: 4}\n"
        "train: {steps: 10, global_batch_size: 8, micro_batch_size: 3, lr: 1}\n"
        "data: {kind: synthetic, seq_len: 100}\n"
        "optim: {warmup_steps: 20, grad_clip_norm: -1}\n"
        "run: {name: '${x}'}\n"
    )
    lines = problems("optim.schedul=wsd", "diffusion.block_size=16", files=(file,))
    for text in (
        "model.num_layers='two'",
        "model.depth is not a setting",
        "model.num_heads=3 does not divide model.hidden_size=64",
        "train.micro_batch_size=3 does not divide train.global_batch_size=8",
        "train.lr is not a setting; did you mean optim.lr?",
        "diffusion.block_size=16 does not divide data.seq_len=100",
        "optim.warmup_steps=20 is more than train.steps=10",
        "optim.grad_clip_norm=-1",
        "interpolation",
        "optim.schedul is not a setting; did you mean optim.schedule?",
    ):
        assert sum(text in line for line in lines) == 1, (text, lines)
    assert len(lines) == 10
    assert f"[{file}:1]" in next(line for line in lines if "num_heads=3" in line)


def test_a_rule_is_not_applied_to_a_value_that_was_refused() -> None:
    assert only_problem("data.seq_len=none", "diffusion.block_size=12").startswith("data.seq_len='none'")
    assert only_problem("diffusion.algo=arr", "diffusion.noise_copies=2").startswith("diffusion.algo='arr'")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["model.num_heads=5"],
            "model.num_heads=5 does not divide model.hidden_size=64; choose num_heads from 1, 2",
        ),
        (["model.num_heads=64"], "model.head_dim=1 is odd"),
        (["model.head_dim=15"], "model.head_dim=15 is odd"),
        (
            ["model.num_kv_heads=3"],
            "model.num_kv_heads=3 does not divide model.num_heads=4; choose it from 1, 2, 4",
        ),
        (["model.shape=bd3lm", "model.num_kv_heads=2"], "multi-head attention"),
        (["model.shape=bd3lm", "model.head_dim=8"], "is not model.hidden_size=64"),
        (["data.seq_len=100"], "diffusion.block_size=16 does not divide data.seq_len=100"),
        (["diffusion.algo=mdlm", "diffusion.block_size=16"], "whose block is the row of data.seq_len=1024"),
        (["diffusion.algo=ar", "diffusion.block_size=16"], "diffusion.algo=ar, which has no blocks"),
        (
            ["train.micro_batch_size=3"],
            "does not divide train.global_batch_size=8; choose it from 1, 2, 4, 8",
        ),
        (["train.micro_batch_size=16"], "does not divide train.global_batch_size=8"),
        (["optim.warmup_steps=101"], "optim.warmup_steps=101 is more than train.steps=100"),
        (
            ["optim.schedule=wsd", "optim.warmup_steps=60", "optim.decay_steps=41"],
            "optim.warmup_steps=60 plus optim.decay_steps=41 is more than train.steps=100",
        ),
        (["optim.schedule=wsd"], "optim.decay_steps is missing"),
        (["data.kind=corpus"], "data.path is missing"),
        (["model.vocab_size=100"], "model.vocab_size=100 is not data.synthetic_vocab_size=256; leave"),
        (["model.vocab_size=300"], "model.vocab_size=300 is not data.synthetic_vocab_size=256; leave"),
        (["validation.sample_prompt=once"], "data.kind=synthetic, which has no tokenizer"),
        (["diffusion.algo=mdlm", "validation.sample_tokens=1025"], "choose at most 1024"),
        (["data.synthetic_tokens=1000"], "less than one row of data.seq_len=1024"),
        (["data.epoch_tokens=1000"], "less than one row of data.seq_len=1024"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_a_remedy(overrides: list[str], expected: str) -> None:
    assert expected in only_problem(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.vocab_size=256"],
        ["validation.sample_prompt="],
        ["diffusion.algo=mdlm", "validation.sample_tokens=1024"],
        ["diffusion.algo=block_diffusion", "validation.sample_tokens=1025"],
        ["data.kind=corpus", "data.path=x", "model.vocab_size=300", "validation.sample_prompt=once"],
        ["run.seed=4294967295"],
        ["parallel.sequence_parallel=false", "tracking.mlflow=false", "tracking.mlflow_uri=null"],
        ["parallel.tp=2", "parallel.sequence_parallel=true"],
        ["checkpoint.every_steps=10", "checkpoint.keep_last=1", "checkpoint.keep_every_tokens=1"],
        ["train.peak_tflops=989", "optim.groups=[]"],
    ],
)
def test_settings_at_the_edge_of_a_rule_are_let_through(overrides: list[str]) -> None:
    load(*overrides)


@pytest.mark.parametrize(
    ("overrides", "block_size"),
    [
        (["diffusion.algo=mdlm", "diffusion.block_size=null"], "row"),
        (["diffusion.algo=ar", "diffusion.block_size=null", "diffusion.plan=null", "refit=null"], 1),
    ],
)
def test_the_quickstart_run_takes_the_other_algorithms(
    repository: Path, overrides: list[str], block_size: int | str
) -> None:
    loaded = load_config([repository / "configs" / "run" / "quickstart.yaml"], overrides)
    expected = loaded.config.data.seq_len if block_size == "row" else block_size
    assert loaded.config.diffusion.block_size == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["clip_range=[0.8,0.3]"], "is empty"),
        (["clip_range=[0.5,0.5]"], "is empty"),
        (["clip_range=[0,0]"], "is empty"),
        (["clip_range=[-0.1,0.5]"], "leaves [0, 1]"),
        (["clip_range=[0.3,1.5]"], "leaves [0, 1]"),
        (["clip_range=[0.3]"], "must be a list of two numbers"),
        (["resample=true"], "nothing to hold blocks to"),
    ],
)
def test_an_impossible_clip_range_is_refused(overrides: list[str], expected: str) -> None:
    assert expected in only_problem(*(f"diffusion.plan.{text}" for text in overrides))


@pytest.mark.parametrize("clip_range", ["[0.3,0.8]", "[0,1]", "[1,1]", "[0,0.5]", "[0.5,1]", "null"])
def test_a_possible_clip_range_is_taken(clip_range: str) -> None:
    load(f"diffusion.plan.clip_range={clip_range}")


def test_a_clip_range_wants_the_linear_schedule_or_a_reference_one() -> None:
    for name in ("cosine", "square", "square_root", "logarithmic"):
        problem = only_problem(f"diffusion.schedule={name}", "diffusion.plan.clip_range=[0.3,0.8]")
        assert f"diffusion.schedule={name}" in problem
    for name in ("linear", "reference_cosine", "reference_linear"):
        load(f"diffusion.schedule={name}", "diffusion.plan.clip_range=[0.3,0.8]")


def test_the_config_and_the_noise_plan_refuse_the_same_plans() -> None:
    from bdtrain.diffusion.plan import NoisePlan
    from bdtrain.diffusion.schedule import SCHEDULES

    config = load("diffusion.block_size=4").config
    ranges = [None, (0.0, 1.0), (0.3, 0.8), (0.3, 0.4), (0.8, 0.3), (0.5, 0.5), (1.0, 1.0), (0.5, 1.5)]
    for schedule, clip_range, resample in product(SCHEDULES, ranges, (False, True)):
        changes = {"clip_range": clip_range, "resample": resample}
        plan = config.diffusion.plan.model_copy(update=changes)
        diffusion = config.diffusion.model_copy(update={"plan": plan, "schedule": schedule})
        refused = bool(find_conflicts(config.model_copy(update={"diffusion": diffusion})))
        if refused:
            with pytest.raises(ConfigError):
                NoisePlan(4, schedule=schedule, clip_range=clip_range, resample=resample)
        else:
            NoisePlan(4, schedule=schedule, clip_range=clip_range, resample=resample)


@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 16])
def test_resampling_is_refused_exactly_where_no_count_lies_in_the_range(block_size: int) -> None:
    # Bounds midway between two shares and on the shares themselves; the brute force looks at every count.
    shares = [k / block_size for k in range(block_size + 1)]
    edges = sorted({*shares, *((low + high) / 2 for low, high in pairwise(shares)), 0.3, 0.45})
    config = load(f"diffusion.block_size={block_size}").config
    for beta in edges:
        for omega in (edge for edge in edges if edge > beta):
            plan = config.diffusion.plan.model_copy(update={"clip_range": (beta, omega), "resample": True})
            diffusion = config.diffusion.model_copy(update={"plan": plan})
            found = [p.message for p in find_conflicts(config.model_copy(update={"diffusion": diffusion}))]
            if any(beta <= k / block_size <= omega for k in range(1, block_size + 1)):
                assert found == []
            else:
                assert len(found) == 1
                assert "infeasible" in found[0]


def test_an_infeasible_resampling_range_is_refused_when_the_config_is_read() -> None:
    problem = only_problem(
        "diffusion.plan={clip_range: [0.3, 0.4], resample: true}", "diffusion.block_size=4"
    )
    assert "no k of 1..4 (diffusion.block_size) has k/4 in it; raise omega to at least 2/4" in problem


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["diffusion.algo=ar", "diffusion.plan.clip_range=[0.3,0.8]"], "diffusion.plan.clip_range"),
        (["diffusion.algo=ar", "diffusion.plan.kind=count"], "diffusion.plan.kind"),
        (["diffusion.algo=ar", "diffusion.plan.resample=false"], "diffusion.plan.resample"),
        (["diffusion.algo=ar", "diffusion.noise_copies=2"], "diffusion.noise_copies"),
        (["diffusion.algo=ar", "diffusion.schedule=linear"], "diffusion.schedule"),
        (["diffusion.algo=ar", "validation.sample_method=ancestral"], "validation.sample_method"),
        (
            ["diffusion.plan.clip_range=[1,1]", "diffusion.plan.kind=bernoulli"],
            "diffusion.plan.kind",
        ),
        (["data.path=x"], "data.path"),
        (["data.window_shards=4"], "data.window_shards"),
        (["data.kind=corpus", "data.path=x", "data.synthetic_tokens=4096"], "data.synthetic_tokens"),
        (["data.kind=corpus", "data.path=x", "data.synthetic_vocab_size=64"], "data.synthetic_vocab_size"),
        (["optim.decay_steps=5"], "optim.decay_steps"),
        (["optim.min_lr_ratio=0.0"], "optim.min_lr_ratio"),
        (["optim.schedule=cosine", "optim.decay_steps=5"], "optim.decay_steps"),
        (["validation.sample_method=first_hitting", "validation.sample_steps=4"], "validation.sample_steps"),
        (["parallel.sequence_parallel=true"], "parallel.sequence_parallel"),
        (["tracking.mlflow=false", "tracking.mlflow_uri=http://127.0.0.1:5000"], "tracking.mlflow_uri"),
        (["tracking.mlflow=false", "tracking.experiment=x"], "tracking.experiment"),
        (["tracking.mlflow=false", "tracking.drain_timeout_s=5"], "tracking.drain_timeout_s"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(overrides: list[str], key: str) -> None:
    problem = only_problem(*overrides)
    assert problem.startswith(f"{key} would be ignored: ")
    # The advice of the message works.
    load(*(f"{key}=null" if text.startswith(f"{key}=") else text for text in overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["diffusion.algo=ar"],
        ["diffusion.algo=mdlm", "diffusion.plan.clip_range=[0.3,0.8]"],
        ["data.kind=corpus", "data.path=x", "optim.schedule=wsd", "optim.decay_steps=10"],
        ["optim.schedule=cosine", "optim.min_lr_ratio=0.1", "validation.sample_method=confidence"],
        ["parallel={tp: 2, sequence_parallel: true}", "checkpoint={every_steps: 5, keep_every_tokens: 1000}"],
        [
            "tracking.mlflow=false",
            "optim.groups=[{match: '^emb', lr_scale: 0}, {match: x, weight_decay: 0.1}]",
        ],
        ["model.shape=bd3lm", "diffusion.plan={clip_range: [0.1, 0.30000000000000004], resample: true}"],
    ],
)
def test_a_dumped_configuration_loads_to_the_same(tmp_path: Path, overrides: list[str]) -> None:
    config = load(*overrides).config
    file = tmp_path / "resolved.yaml"
    file.write_text(dump_resolved(config), encoding="utf-8")
    again = load_config([file]).config
    assert again == config
    assert dump_resolved(again) == dump_resolved(config)


def test_settings_without_effect_are_settings() -> None:
    from bdtrain.config.problems import known_keys

    for overrides in (
        [],
        ["diffusion.algo=ar"],
        ["data.kind=corpus", "data.path=x", "optim.schedule=cosine"],
    ):
        table = without_effect(load(*overrides).config)
        assert set(table) | {reason.switch for reason in table.values()} <= set(known_keys())


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("3", "optim.groups=3; it must be a list of {match: ..., lr_scale: ..., weight_decay: ...}"),
        ("{match: x}", "it must be a list of {match: "),
        ("[3]", "optim.groups[0]=3; it must be {match: ..., lr_scale: ..., weight_decay: ...}"),
        ("[{lr_scale: 2}]", "optim.groups[0].match is required"),
        ("[{match: '', lr_scale: 2}]", "optim.groups[0].match=''; it must not be empty"),
        ("[{match: '(', lr_scale: 2}]", "optim.groups[0].match='('; it is not a regular expression"),
        ("[{match: x}]", "it changes nothing; give lr_scale or weight_decay"),
        ("[{match: x, lr_scale: 1}, {match: y, lr_scale: -1}]", "optim.groups[1].lr_scale=-1; it must be at"),
        ("[{match: x, weight_decay: -1}]", "optim.groups[0].weight_decay=-1; it must be at least 0"),
        ("[{match: x, lr_scale: big}]", "optim.groups[0].lr_scale='big'; it must be a number"),
        (
            "[{match: x, lr: 2, lr_scale: 2}]",
            "optim.groups[0].lr is not a setting; choose from match, lr_scale, weight_decay",
        ),
        ("[{match: x, lr_scal: 2, weight_decay: 0}]", "is not a setting; did you mean lr_scale?"),
    ],
)
def test_a_parameter_group_that_cannot_be_is_refused_with_its_place(groups: str, expected: str) -> None:
    assert expected in only_problem(f"optim.groups={groups}")


def test_parameter_groups_keep_their_order_and_fill_in_what_is_left_out() -> None:
    groups = load(
        "optim.groups=[{match: 'a=b$', lr_scale: 2}, {match: '.', weight_decay: 0}]"
    ).config.optim.groups
    assert [(g.match, g.lr_scale, g.weight_decay) for g in groups] == [("a=b$", 2.0, None), (".", 1.0, 0.0)]


def test_a_wrong_group_does_not_hide_problems_of_other_settings() -> None:
    lines = problems("optim.groups=[{match: '('}]", "optim.warmup_steps=101", "optim.lr=0")
    assert len(lines) == 3


def test_a_missing_corpus_is_named_with_the_command_that_makes_one(tmp_path: Path) -> None:
    check_paths(load().config)
    folder = tmp_path / "corpus"
    config = load("data.kind=corpus", f"data.path={folder}").config
    with pytest.raises(ConfigError, match=rf"data.path={folder} does not exist.*tools/preprocess.py"):
        check_paths(config)
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"holds no index.json.*tools/preprocess.py"):
        check_paths(config)
    (folder / "index.json").write_text("{}")
    check_paths(config)
