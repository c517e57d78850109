"""Section ``refit``: what a run may ask for, and what is refused before it starts."""

import pytest

from bdtrain.config import load_config
from bdtrain.config.problems import known_keys
from bdtrain.config.resume import changed_settings, fixed_settings
from bdtrain.errors import ConfigError

TINY = """\
model: {num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, vocab_multiple: 16}
data: {kind: synthetic, seq_len: 32}
diffusion: {block_size: 4}
train: {steps: 20, global_batch_size: 8}
"""


ON_RAY = ["refit.mode=clip", "refit.placement=ray"]


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(TINY)

    def load(*overrides):
        return load_config([path], overrides).config

    return load


def refusal(load, *overrides):
    with pytest.raises(ConfigError) as found:
        load(*overrides)
    return str(found.value)


def test_nothing_is_fitted_unless_it_is_asked_for(load):
    refit = load().refit
    assert refit.mode == "off" and refit.placement == "auto" and refit.replay == "history"
    # An off switch leaves the rest dormant, so that a preset may hold it.
    assert load("refit.workers=4", "refit.lag_steps=0", "refit.worker_gpus=1").refit.workers == 4


def test_what_the_paper_does_can_be_asked_for(load):
    refit = load("refit.mode=clip", "refit.lag_steps=0", "refit.wait=true").refit
    assert (refit.every_tokens, refit.wait, refit.lag_steps) == (None, True, 0)
    assert refit.widths == (0.5, 0.6, 0.7, 0.8, 0.9) and refit.start_step == 0.05


def test_one_number_is_no_list(load):
    assert 'refit.widths=0.5; it must be a list, written "refit.widths=[A]" or [A,B]' in refusal(
        load, "refit.widths=0.5"
    )


def test_what_fits_is_taken(load):
    refit = load(*ON_RAY, "refit.worker_tp=2", "refit.worker_gpus=1", "refit.workers=3").refit
    assert (refit.worker_tp, refit.workers, refit.worker_gpus) == (2, 3, 1.0)
    assert load("refit.mode=clip", "refit.ray_address=auto", "refit.worker_tp=2").refit.worker_tp == 2
    for placement in ("auto", "process"):
        refit = load("refit.mode=clip", "refit.gpu=7", f"refit.placement={placement}").refit
        assert refit.gpu == 7
    # A process with GPUs of its own has the weights of all ranks.
    stage_3 = ["refit.gradient_variance=true", "parallel.zero_stage=3"]
    assert load("refit.mode=clip", "refit.gpu=7", *stage_3).refit.gradient_variance
    assert "parallel.zero_stage=3" in refusal(load, "refit.mode=clip", *stage_3)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["refit.mode=clip", "diffusion.algo=ar"], "diffusion.algo=ar, which draws no noise"),
        (["refit.mode=clip", "diffusion.schedule=cosine"], "refit.mode=clip with diffusion.schedule=cosine"),
        (
            ["refit.mode=clip", "diffusion.plan.clip_range=[1,1]"],
            "clip_range=[1, 1], which masks every token",
        ),
        (["refit.mode=counts", "diffusion.plan.kind=bernoulli"], "needs kind=count without resample"),
        (
            ["refit.mode=counts", "diffusion.plan.resample=true", "diffusion.plan.clip_range=[0.3,0.8]"],
            "diffusion.plan.resample=true",
        ),
        (["refit.mode=counts", "diffusion.block_size=1"], "diffusion.block_size=1"),
        (["refit.mode=clip", "refit.widths=[]"], "refit.widths=[]; give at least one"),
        (["refit.mode=clip", "refit.widths=[0.5,1.0]"], "each above 0 and below 1"),
        (["refit.mode=clip", "refit.widths=[0.5,0.5]"], "names a width twice"),
        (["refit.mode=clip", "refit.lag_steps=0", "refit.placement=process"], "would always come too late"),
        (["refit.mode=clip", "refit.lag_steps=0", "refit.placement=external"], "would always come too late"),
        (
            ["refit.mode=clip", "refit.wait=true", "refit.placement=external"],
            "nobody may be there to wait for",
        ),
        (["refit.mode=clip", "refit.worker_gpus=1", "refit.placement=process"], "GPUs are reserved by Ray"),
        (["refit.mode=clip", "refit.worker_gpus=0.5", "refit.placement=inline"], "GPUs are reserved by Ray"),
        (
            ["refit.mode=clip", "refit.worker_tp=2"],
            "refit.worker_tp=2 with refit.placement=auto; only workers",
        ),
        (["refit.mode=clip", "refit.worker_tp=2", "refit.placement=inline"], "only workers on Ray share"),
        (
            [*ON_RAY, "refit.worker_tp=3"],
            "refit.worker_tp=3 cuts the model as parallel.tp: tp=3 does not divide num_heads=4",
        ),
        ([*ON_RAY, "refit.worker_tp=4"], "tp=4 does not divide num_kv_heads=2"),
        (
            [*ON_RAY, "refit.worker_tp=2", "data.synthetic_vocab_size=31", "model.vocab_multiple=1"],
            "tp=2 does not divide the padded vocabulary of 31",
        ),
        ([*ON_RAY, "refit.worker_tp=2", "refit.worker_gpus=0.5"], "have a GPU each: use 1, or 0 for CPUs"),
        ([*ON_RAY, "refit.worker_tp=2", "refit.gradient_variance=true"], "which needs the whole model"),
        (
            [*ON_RAY, "refit.gpu=3"],
            "refit.gpu=3 with refit.placement=ray; it is for a process",
        ),
        (["refit.mode=clip", "refit.gpu=3", "refit.placement=inline"], "with refit.placement=inline"),
        (["refit.mode=clip", "refit.gpu=3", "refit.placement=external"], "use placement=process"),
        (
            ["refit.mode=clip", "refit.gpu=3", "refit.ray_address=head:6379"],
            "with refit.placement=auto, which takes the cluster of refit.ray_address=head:6379",
        ),
        (["refit.mode=clip", "refit.gpu=3", "refit.worker_gpus=1"], "GPUs are reserved by Ray"),
        # What auto comes to is judged as if it were said.
        (["refit.mode=clip", "refit.gpu=3", "refit.lag_steps=0"], "would always come too late"),
        (["refit.mode=clip", "refit.ray_address=auto", "refit.lag_steps=0"], "would always come too late"),
    ],
)
def test_what_cannot_be_done_is_refused(load, overrides, said):
    assert said in refusal(load, *overrides)


@pytest.mark.parametrize(
    "override",
    [
        "refit.lag_steps=-1",
        "refit.blocks=255",
        "refit.quorum=0",
        "refit.quorum=1.1",
        "refit.min_gain=1",
        "refit.bootstrap_draws=49",
        "refit.deadline_s=0",
        "refit.every_tokens=0",
        "refit.batch_sequences=0",
        "refit.uniform_share=0",
        "refit.start_step=0.6",
        "refit.workers=0",
        "refit.worker_tp=0",
        "refit.gpu=-1",
        "refit.gpu=0.5",
        "refit.gpu=[7]",
        "refit.worker_cpus=0",
        "refit.worker_gpus=-1",
        "refit.mode=always",
        "refit.criterion=best",
        "refit.placement=here",
        "refit.replay=never",
    ],
)
def test_values_out_of_range_are_refused_by_their_key(load, override):
    assert override.partition("=")[0] in refusal(load, override)


@pytest.mark.parametrize(
    ("overrides", "ignored"),
    [
        (["refit.mode=counts", "refit.widths=[0.4]"], "refit.widths"),
        (["refit.mode=counts", "refit.start_step=0.1"], "refit.start_step"),
        (["refit.mode=clip", "refit.uniform_share=0.1"], "refit.uniform_share"),
        (["refit.mode=clip", "refit.placement=process", "refit.workers=2"], "refit.workers"),
        (["refit.mode=clip", "refit.placement=process", "refit.quorum=0.5"], "refit.quorum"),
        (["refit.mode=clip", "refit.placement=inline", "refit.ray_address=auto"], "refit.ray_address"),
        (["refit.mode=clip", "refit.placement=inline", "refit.worker_cpus=2"], "refit.worker_cpus"),
        (["refit.mode=clip", "refit.placement=external", "refit.worker_cpus=2"], "refit.worker_cpus"),
        (["refit.mode=clip", "refit.placement=inline", "refit.wait=true"], "refit.wait"),
        (["refit.mode=clip", "refit.placement=inline", "refit.deadline_s=5"], "refit.deadline_s"),
        # auto never takes Ray where no cluster is named, nor threads where it has GPUs.
        (["refit.mode=clip", "refit.workers=2"], "refit.workers"),
        (["refit.mode=clip", "refit.quorum=0.5"], "refit.quorum"),
        (["refit.mode=clip", "refit.gpu=3", "refit.quorum=0.5"], "refit.quorum"),
        (["refit.mode=clip", "refit.gpu=3", "refit.worker_cpus=2"], "refit.worker_cpus"),
    ],
)
def test_a_setting_without_effect_is_refused(load, overrides, ignored):
    assert f"{ignored} would be ignored" in refusal(load, *overrides)


def test_auto_keeps_what_it_may_come_to_use(load):
    for override in (
        "refit.worker_cpus=2",
        "refit.wait=true",
        "refit.deadline_s=5",
        "refit.ray_address=local",
    ):
        load("refit.mode=clip", override)
    refit = load("refit.mode=clip", "refit.ray_address=auto", "refit.workers=2", "refit.quorum=0.5").refit
    assert (refit.workers, refit.quorum) == (2, 0.5)
    load("refit.mode=clip", "refit.gpu=3", "refit.ray_address=local")
    said = refusal(load, "refit.mode=clip", "refit.workers=2")
    assert "refit.placement is auto, and refit.ray_address names no cluster" in said


def test_the_resolved_configuration_of_a_run_serves_its_re_fits(load, tmp_path):
    """The child reads the snapshot's configuration; what ``auto`` left unused must not stop it."""
    from bdtrain.config import dump_resolved

    path = tmp_path / "resolved.yaml"
    for overrides in (
        ["refit.mode=clip"],
        ["refit.mode=clip", "refit.ray_address=auto", "refit.workers=2", "refit.quorum=0.5"],
        ["refit.mode=clip", "refit.placement=ray", "refit.worker_tp=2"],
        ["refit.mode=clip", "refit.gpu=5"],
        ["refit.mode=clip", "refit.placement=process", "refit.wait=true"],
        ["refit.mode=counts", "refit.uniform_share=0.1", "refit.placement=external"],
    ):
        config = load(*overrides)
        path.write_text(dump_resolved(config))
        assert load_config([path], []).config.refit == config.refit


def test_re_fits_may_change_when_a_run_goes_on(load):
    before, now = load(), load("refit.mode=clip", "refit.lag_steps=7")
    assert not any(key.startswith("refit.") for key in fixed_settings(now))
    assert ("refit.mode", "off", "clip") in changed_settings(before, now)
    assert {key for key in known_keys() if key.startswith("refit.")} > {"refit.mode", "refit.replay"}


def test_the_word_off_can_be_given_where_yaml_reads_it_as_false(load):
    assert load("refit.mode=clip").refit.mode == "clip"
    assert load("refit.mode=off").refit.mode == "off"
    assert "choose from off, clip, counts" in refusal(load, "refit.mode=true")
