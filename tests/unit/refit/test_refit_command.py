"""The command of a re-fit: what it refuses, and with which exit code."""

import shutil

import pytest

import bdtrain.checkpoint.manifest as manifest
import bdtrain.refit.backends as backends
import bdtrain.refit.job as job
from bdtrain.checkpoint.files import hash_file
from bdtrain.checkpoint.manifest import commit_folder
from bdtrain.config import dump_resolved, load_config
from bdtrain.config.loader import value_of
from bdtrain.errors import ConfigError
from bdtrain.refit.backends import choose_measure
from bdtrain.refit.command import _configured, main
from bdtrain.refit.job import measure_here


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --run RUN or --checkpoint FOLDER"),
        (["--run", "r", "--checkpoint", "c", "--out", "o"], "give either --run RUN or --checkpoint FOLDER"),
        (["--checkpoint", "c"], "--out says where the results of --checkpoint go"),
        (["--run", "r", "--out", "o"], "--out says where the results of --checkpoint go"),
        (["--checkpoint", "c", "--out", "o", "--watch"], "--watch and --step belong to --run"),
        (["--checkpoint", "c", "--out", "o", "--step", "3"], "--watch and --step belong to --run"),
        (["--run", "r", "--watch", "--step", "3"], "--watch takes every snapshot"),
        (["--run", "r", "train.steps=3"], "train.steps=3: only settings of the section refit"),
        (["--run", "r", "refit.gpu=7"], "CUDA_VISIBLE_DEVICES in the environment, and --device cuda"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(capsys, arguments, message):
    assert main(arguments) == 8
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and message in said


def test_a_run_without_a_snapshot_is_told_what_writes_one(capsys, tmp_path):
    assert main(["--run", str(tmp_path)]) == 8
    said = capsys.readouterr().err
    assert "holds no snapshot" in said and "refit.mode=clip" in said


@pytest.mark.parametrize(
    "arguments", [["--run", "RUN", "--step", "5"], ["--checkpoint", "RUN", "--out", "RUN/out"]]
)
def test_a_snapshot_that_is_not_there_is_a_damaged_one(capsys, tmp_path, arguments):
    assert main([word.replace("RUN", str(tmp_path)) for word in arguments]) == 7
    assert "is not a folder" in (said := capsys.readouterr().err) or "MANIFEST.json" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["--step", "0"], ["--step", "two"], ["--device", "tpu"], ["--nice", "x"]]
)
def test_what_no_argument_can_be_is_refused_by_the_parser(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(["--run", "r", *arguments])
    assert end.value.code == 2 and arguments[0] in capsys.readouterr().err


RUN = """\
model: {num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, vocab_multiple: 16}
data: {kind: synthetic, seq_len: 32}
diffusion: {block_size: 4}
train: {steps: 20, global_batch_size: 8}
"""


@pytest.fixture
def resolved(tmp_path):
    """``resolved(overrides)``: the configuration that such a run saves with its snapshots."""

    def make(*overrides):
        source, path = tmp_path / "run.yaml", tmp_path / "config.yaml"
        source.write_text(RUN)
        path.write_text(dump_resolved(load_config([source], overrides).config))
        return path

    return make


@pytest.mark.parametrize(
    ("run", "given"),
    [
        ((), ()),
        ((), ("refit.mode=counts",)),
        (("refit.mode=counts", "refit.uniform_share=0.1"), ("refit.mode=clip", "refit.widths=[0.5]")),
        (("refit.mode=clip", "refit.start_step=0.1"), ("refit.mode=counts", "refit.uniform_share=0.1")),
        (
            ("refit.mode=clip", "refit.ray_address=auto", "refit.workers=4", "refit.quorum=0.5"),
            ("refit.placement=process",),
        ),
        (
            ("refit.mode=clip", "refit.placement=inline"),
            ("refit.placement=ray", "refit.ray_address=auto", "refit.workers=4"),
        ),
        (("refit.mode=clip", "refit.placement=process", "refit.wait=true"), ("refit.placement=inline",)),
    ],
)
def test_settings_of_the_run_that_the_given_ones_leave_idle_are_dropped(resolved, run, given):
    found = _configured(resolved(*run), given)
    assert all(
        str(value_of(found, text.partition("=")[0])) in text.replace("[0.5]", "(0.5,)") for text in given
    )
    rest = {"diffusion.block_size": 4, "data.seq_len": 32, "train.global_batch_size": 8}
    assert {key: value_of(found, key) for key in rest} == rest


@pytest.mark.parametrize("own", ["inline", "auto"])
@pytest.mark.parametrize("given", [["refit.placement=ray"], ["refit.placement=process"], []])
def test_a_saved_model_of_a_run_without_a_lag_can_be_measured_anywhere(resolved, monkeypatch, own, given):
    """On the training ranks such a plan is in time; elsewhere it is not, and here nobody waits."""
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    path = resolved("refit.mode=clip", f"refit.placement={own}", "refit.lag_steps=0")
    config = _configured(path, given)
    on_ray = given == ["refit.placement=ray"]
    assert (choose_measure(config) is measure_here) is not on_ray
    assert config.refit.mode == "clip"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["refit.mode=clip", "refit.uniform_share=0.1"], "refit.uniform_share would be ignored"),
        (["refit.mode=clip", "refit.placement=process", "refit.workers=2"], "refit.workers would be ignored"),
        (["refit.blocks=1"], "refit.blocks"),
        (["refit.block=300"], "did you mean refit.blocks"),
        (["refit.blocks=300", "refit.blocks=400"], "given twice"),
        (["refit.mode=clip", "refit.lag_steps=0", "refit.placement=process"], "would always come too late"),
        # A run without re-fits is searched as with mode=clip, and all rules of that hold.
        (["refit.worker_tp=4"], "refit.worker_tp=4 with refit.placement=auto; only workers on Ray share"),
        (["refit.mode=off", "refit.worker_tp=4"], "refit.worker_tp=4 with refit.placement=auto"),
        (["refit.placement=ray", "refit.worker_tp=3"], "tp=3 does not divide num_heads=4"),
        (
            ["refit.placement=ray", "refit.worker_tp=2", "refit.gradient_variance=true"],
            "gradients are measured in the re-fit's own process",
        ),
        (["refit.placement=ray", "refit.worker_tp=2", "refit.worker_gpus=0.5"], "have a GPU each: use 1"),
        (["refit.worker_gpus=1"], "GPUs are reserved by Ray"),
        (["refit.uniform_share=0.1"], "refit.uniform_share would be ignored"),
        (["refit.workers=4"], "refit.workers would be ignored"),
        (["refit.workers=4"], "searched as with refit.mode=clip; the other choice is refit.mode=counts"),
    ],
)
def test_a_setting_that_is_given_must_be_right_and_have_an_effect(resolved, given, said):
    with pytest.raises(ConfigError) as found:
        _configured(resolved(), given)
    assert said in str(found.value)


@pytest.mark.parametrize("mode", ["off", "clip"])
@pytest.mark.parametrize(
    ("run", "given", "expected"),
    [
        # Which GPU a process has is the trainer's business, or that of CUDA_VISIBLE_DEVICES.
        (["refit.gpu=1"], ["refit.placement=ray"], {"gpu": None}),
        (["refit.gpu=1"], ["refit.ray_address=auto"], {"gpu": None}),
        (["refit.gpu=1"], ["refit.placement=inline"], {"gpu": None}),
        (["refit.gpu=1"], ["refit.gpu=null"], {"gpu": None}),
        (["refit.gpu=1"], [], {}),
        *(
            (["refit.placement=ray", "refit.worker_tp=2", "refit.worker_gpus=1"], [where], rest)
            for where, rest in (
                ("refit.placement=process", {"worker_tp": 1, "worker_gpus": 0}),
                ("refit.placement=inline", {"worker_tp": 1, "worker_gpus": 0}),
                ("refit.placement=auto", {"worker_tp": 1, "worker_gpus": 0}),
                ("refit.ray_address=auto", {"worker_tp": 2, "worker_gpus": 1}),
            )
        ),
    ],
)
def test_processes_and_gpus_of_the_run_are_dropped_where_another_placement_is_given(
    resolved, mode, run, given, expected
):
    found = _configured(resolved(f"refit.mode={mode}", *run), given).refit
    assert {name: getattr(found, name) for name in expected} == expected
    for text in given:
        key, _, value = text.partition("=")
        assert value == "null" or str(getattr(found, key.removeprefix("refit."))) == value


def test_what_nothing_checked_in_a_run_without_re_fits_is_dropped(resolved):
    """A preset may hold settings of workers for a run that later goes to Ray."""
    path = resolved("refit.mode=off", "refit.worker_tp=2", "refit.worker_gpus=1")
    found = _configured(path, []).refit
    assert (found.placement, found.worker_tp, found.worker_gpus) == ("auto", 1, 0)
    found = _configured(path, ["refit.placement=ray"]).refit
    assert (found.worker_tp, found.worker_gpus) == (2, 1)


def test_a_run_that_draws_no_noise_is_left_to_who_reads_its_plan(resolved):
    assert _configured(resolved("diffusion.algo=ar", "diffusion.block_size=null"), []).refit.mode == "off"


def test_the_settings_of_a_snapshot_are_compared_with_its_manifest_and_the_weights_left_to_their_reader(
    capsys, tmp_path, resolved, monkeypatch
):
    """Hashed here too, the weights of a large model would be read once more for nothing."""
    with commit_folder(tmp_path / "snapshot") as folder:
        shutil.copy(resolved("refit.placement=process", "refit.mode=clip"), folder / "config.yaml")
        (folder / "weights").write_bytes(b"1" * 1000)
    read, asked = [], []
    monkeypatch.setattr(manifest, "hash_file", lambda path: read.append(path.name) or hash_file(path))
    monkeypatch.setattr(job, "run_refit", lambda snapshot, *_, **__: asked.append(snapshot))
    words = ["--one-of-sweep", "--checkpoint", str(tmp_path / "snapshot"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert read == ["config.yaml"] and asked == [tmp_path / "snapshot"]
    with (tmp_path / "snapshot" / "config.yaml").open("a") as file:
        file.write(" ")
    assert main(words) == 7 and "config.yaml has" in capsys.readouterr().err
