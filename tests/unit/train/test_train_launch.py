"""How an attempt ends: what is written last, and what cannot change it."""

import importlib.util
import io
import json
import re
from types import SimpleNamespace

import pytest

from bdtrain import errors
from bdtrain.config import load_config
from bdtrain.errors import CheckpointError, ConfigError, NonFiniteError
from bdtrain.tracking.console import Console
from bdtrain.tracking.names import run_name
from bdtrain.tracking.run_files import EXIT_FILE
from bdtrain.train.launch import run_attempt
from bdtrain.train.loop import RunSummary, Stopped


def summary():
    """Of a finished run; the numbers are of no interest."""
    activities = "training setup validation data_wait checkpoint refit lost down".split()
    goodput = {"goodput": 0.5, **{f"{name}_seconds": 1.0 for name in activities}}
    after = SimpleNamespace(to_dict=lambda: {"nelbo": 1.0})
    return RunSummary(5, 40, None, after, {}, 8.0, 5.0, 6.0, None, goodput, 0, 1)


def raising(error):
    """A loop that fails."""

    def run():
        raise error

    return run


ENDS = {
    "finished": lambda folder: summary,
    "SIGTERM": lambda folder: lambda: Stopped("SIGTERM", 5, folder / "checkpoints" / "step-000000005"),
    "nonfinite": lambda folder: raising(NonFiniteError("loss is nan")),
    "error": lambda folder: raising(CheckpointError("no room")),
}


def end(folder, how, *, first=True):
    """Let an attempt end somehow.

    Returns:
        What came out (a result, or an error), what EXIT.json says, and the console's lines.
    """
    folder.mkdir(exist_ok=True)
    stream = io.StringIO()
    trainer = SimpleNamespace(
        folder=SimpleNamespace(path=folder),
        console=Console(enabled=first, stream=stream),
        metrics=None,
        shipper=None,
        progress=SimpleNamespace(step=5),
        config=SimpleNamespace(tracking=SimpleNamespace(drain_timeout_s=1.0)),
        run=ENDS[how](folder),
    )
    try:
        outcome = run_attempt(trainer, first=first)
    except (NonFiniteError, CheckpointError) as error:
        outcome = error
    left = json.loads((folder / EXIT_FILE).read_text()) if (folder / EXIT_FILE).exists() else None
    if left is not None:
        del left["time"]
    return outcome, left, stream.getvalue().splitlines()


@pytest.fixture
def written(monkeypatch):
    """Folders of which a report was written, and whether EXIT.json was there then."""
    folders = []

    def write_report(folder):
        folders.append((folder, (folder / EXIT_FILE).exists()))
        return folder / "report.html"

    monkeypatch.setattr("bdtrain.tracking.report.write_report", write_report)
    return folders


@pytest.mark.parametrize("how", ENDS)
def test_every_end_is_written_down_and_then_reported(tmp_path, written, how):
    _, left, lines = end(tmp_path, how)
    assert left["reason"] == how
    assert written == [(tmp_path, True)]
    told = [line for line in lines if "report" in line]
    assert told == ([f"report: {tmp_path / 'report.html'}"] if how == "finished" else [])


def test_only_the_first_rank_writes(tmp_path, written):
    _, left, lines = end(tmp_path, "finished", first=False)
    assert (left, written, lines, list(tmp_path.iterdir())) == (None, [], [], [])


@pytest.mark.parametrize(
    "failure",
    [
        OSError(28, "No space left on device"),
        ValueError("out of range\nin two lines"),
        KeyError("step"),
        ConfigError("holds no run"),
        ZeroDivisionError(),
    ],
    ids=lambda failure: type(failure).__name__,
)
@pytest.mark.parametrize("how", ENDS)
def test_a_report_that_fails_changes_nothing_but_one_line(tmp_path, monkeypatch, written, how, failure):
    wanted, left, lines = end(tmp_path / "wanted", how)
    monkeypatch.setattr("bdtrain.tracking.report.write_report", lambda folder: raising(failure)())
    found, left_now, lines_now = end(tmp_path / "found", how)
    assert left_now == left
    assert type(found) is type(wanted)
    if isinstance(wanted, Exception):
        assert (str(found), found.exit_code, found.__context__) == (str(wanted), wanted.exit_code, None)
    told = [line for line in lines_now if line.startswith("no report could be written: ")]
    assert len(told) == 1
    others = [line.replace("/found/", "/wanted/") for line in lines_now if line not in told]
    assert others == [line for line in lines if not line.startswith("report: ")]


def test_what_is_shipped_later_has_the_trainers_name(tmp_path):
    from bdtrain.config import dump_resolved
    from tools.mlflow_sync import _read_config, name_of_run

    config = load_config(["configs/run/tiny_synthetic.yaml"], ["run.seed=3", "model.vocab_size=64"]).config
    path = tmp_path / "config.yaml"
    path.write_text(dump_resolved(config))
    assert name_of_run(tmp_path, _read_config(path)) == run_name(config)
    assert run_name(config).startswith("tiny_synthetic-block_diffusion-L4-")
    assert run_name(config).endswith("-s3")


@pytest.mark.parametrize(
    ("text", "name"),
    [("run: {name: mine}\nold_section: {}\n", "mine"), ("run: 7\n", "folder"), ("", "folder")],
)
def test_a_run_whose_configuration_is_unknown_has_at_least_a_name(tmp_path, text, name):
    from tools.mlflow_sync import _read_config, name_of_run

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.yaml").write_text(text)
    assert name_of_run(folder, _read_config(folder / "config.yaml")) == name


def test_the_launcher_names_every_exit_code(repository):
    path = repository / "launchers" / "pretrain.py"
    spec = importlib.util.spec_from_file_location("pretrain_launcher", path)
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    # 1 is what any program that breaks returns.
    codes = {kind.exit_code for kind in kinds} - {1}
    (told,) = re.findall(r"The exit code: (.*)", launcher.main.__doc__, re.DOTALL)
    assert codes == {int(code) for code in re.findall(r"(?:^|[,;:] )(\d+) ", " ".join(told.split()))} - {
        0,
        130,
    }
