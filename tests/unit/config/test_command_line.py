"""The arguments of a launcher, ``--check``, ``--explain``, and the generated documents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bdtrain.config import config_sha256, explain, load_config, parse_command_line
from bdtrain.config.problems import known_keys, known_sections
from bdtrain.config.reference import reference_text, schema_text
from bdtrain.errors import ConfigError
from tests.unit.config.helpers import load

TINY = "configs/run/tiny_synthetic.yaml"


@pytest.fixture(autouse=True)
def _from_the_root(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def run_files() -> list[Path]:
    return sorted((Path(__file__).parents[3] / "configs" / "run").glob("*.yaml"))


def test_a_run_is_loaded_with_overrides_before_and_after_options() -> None:
    command = parse_command_line(
        ["optim.lr=1.0", "--config", TINY, "train.steps=40", "--local_rank=3"], "Train."
    )
    assert not command.finished
    assert (command.config.optim.lr, command.config.train.steps) == (1.0, 40)


def test_several_files_are_merged_in_order(tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("train: {steps: 41}\n")
    assert parse_command_line(["--config", TINY, "--config", str(more)], "").config.train.steps == 41


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "add --config FILE"),
        (["train.steps=3"], "add --config FILE"),
        (["--config"], "expected one argument"),
        (["--config", TINY, "--chek"], "--chek is not an option; did you mean --check?"),
        (["--config", TINY, "--train.steps=3"], "settings are given without dashes: train.steps=3"),
        (["--config", TINY, "--train.steps", "3"], "settings are given without dashes: train.steps=VALUE"),
        (["--config", TINY, "--conf"], "--conf is not an option; did you mean --config?"),
        (["--config", TINY, "--local_rank", "x"], "invalid int value"),
        (["--config", TINY, "--check", "--nodes", "0"], "--nodes: 0 is less than 1"),
        (["--config", TINY, "--check", "--gpus", "x"], "--gpus"),
        (["--config", TINY, "--nodes", "2"], "--nodes is for --check only"),
        (["--config", TINY, "--gpus", "2", "--explain", "optim"], "--gpus is for --check only"),
        (["--config", TINY, "--check", "--gpus", "3"], "dp=3 does not divide global_batch_size=8"),
        (["--config", TINY, "train.step=3"], "did you mean train.steps?"),
        (["--explain", "train.step"], "did you mean train.steps?"),
    ],
)
def test_a_wrong_command_line_is_one_clear_error(arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command_line(arguments, "Train.")
    assert expected in str(caught.value)
    assert caught.value.exit_code == 3


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_command_line(["--help"], "Train a model.").finished
    text = capsys.readouterr().out
    for expected in ("Train a model.", "--explain optim.lr", "--check", "examples:", "configs/reference.md"):
        assert expected in text
    assert "local_rank" not in text


def test_check_prints_the_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    command = parse_command_line(["--config", TINY, "train.steps=100", "--check"], "")
    assert command.finished
    text = capsys.readouterr().out
    # 8 rows of 32 tokens, 100 steps.
    assert "256 tokens" in text
    assert "25,600 tokens" in text
    assert config_sha256(command.config)[:12] in text
    assert "1 rank = tp 1 x pp 1 x dp 1, ZeRO 1" in text
    assert "2 micro-batches of 4 rows" in text


def test_check_lays_the_run_out_on_the_nodes_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["parallel={tp: 2, pp: 2, zero_stage: 2}", "train.precision=bf16", "optim.ema_decay=null"]
    parse_command_line(["--config", TINY, *layout, "--check", "--nodes", "2", "--gpus", "4"], "")
    text = capsys.readouterr().out
    assert "8 ranks = tp 2 x pp 2 x dp 2, ZeRO 2" in text
    assert "1 micro-batch of 4 rows" in text
    # The last stage of two: one layer, of which tp cuts the attention (32 * (32 + 16 + 16) + 32 * 32) and
    # the feed-forward part (3 * 32 * 128) but not the norms (32 + 32 + 8 + 8); the head of 64 rows, cut; the
    # final norm.
    held = (3072 + 12288) // 2 + 80 + 64 * 32 // 2 + 32
    assert f"{held:,} parameters" in text
    kib = {
        name: f"{size * held / 1024:.2f} KiB" for name, size in (("w", 2), ("g", 2), ("o", 6), ("all", 10))
    }
    assert f"bf16 weights {kib['w']}, gradients {kib['g']}" in text
    assert f"optimizer (fp32 weights, moments) {kib['o']}" in text
    assert f"{kib['all']} on the fullest rank" in text


def test_check_takes_one_node_or_one_rank_where_only_the_other_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # What is asked for counts, not what was started.
    monkeypatch.setenv("WORLD_SIZE", "3")
    for option in ("--nodes", "--gpus"):
        parse_command_line(["--config", TINY, "--check", option, "2"], "")
        assert "2 ranks = tp 1 x pp 1 x dp 2" in capsys.readouterr().out


def test_check_says_that_the_vocabulary_is_the_corpus_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index.json").write_text("{}")
    parse_command_line(
        ["--config", "configs/run/quickstart.yaml", f"data.path={tmp_path}", "--check", "--gpus", "2"], ""
    )
    assert "parameters without embedding and head" in capsys.readouterr().out


def test_check_finds_a_missing_corpus_and_a_layout_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        parse_command_line(["--config", "configs/run/quickstart.yaml", "data.path=/nowhere", "--check"], "")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="world_size=2 is not a multiple"):
        parse_command_line(["--config", TINY, "--check", "parallel.pp=4"], "")


def test_only_the_first_rank_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    for request in (["--help"], ["--explain", "optim.lr"], ["--config", TINY, "--check"]):
        assert parse_command_line(request, "").finished
    assert capsys.readouterr().out == ""


def test_a_launcher_may_say_rank_and_world_size_itself(capsys: pytest.CaptureFixture[str]) -> None:
    parse_command_line(["--config", TINY, "--check"], "", rank=1, world_size=2)
    assert capsys.readouterr().out == ""
    parse_command_line(["--config", TINY, "--check"], "", rank=0, world_size=2)
    assert "2 ranks = tp 1 x pp 1 x dp 2" in capsys.readouterr().out


def test_check_and_explain_import_nothing_heavy(repository: Path) -> None:
    code = (
        "import sys; from bdtrain.config import parse_command_line\n"
        f"parse_command_line(['--config', {TINY!r}, '--check'], '')\n"
        f"parse_command_line(['--config', {TINY!r}, '--explain', 'optim'], '')\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'megatron', 'ray', 'mlflow', 'transformers'} & "
        "set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_explain_says_value_origin_and_what_was_overridden() -> None:
    loaded = load_config([TINY], ["optim.lr=0.5"])
    text = explain("optim.lr", loaded)
    assert "Peak learning rate." in text
    assert "default: 0.0003" in text
    assert "value: 0.5   from: command line" in text
    assert f"overrides: 0.003   from: {TINY}:" in text
    assert "from: default" in explain("optim.epsilon", loaded)
    assert "unit: tokens" in explain("data.seq_len", loaded)
    assert "without effect here: data.kind is synthetic" in explain("data.window_shards", loaded)
    assert "choice" in explain("diffusion.algo", None)


def test_explain_of_a_section_lists_its_settings() -> None:
    for section in known_sections():
        text = explain(section, None)
        assert all(key in text for key in known_keys() if key.startswith(f"{section}."))


def test_the_digest_depends_on_every_effective_setting_and_on_nothing_else() -> None:
    digest = config_sha256(load().config)
    assert config_sha256(load("optim.lr=3e-4", "model.head_dim=16").config) == digest
    assert config_sha256(load("optim.lr=3.1e-4").config) != digest
    assert config_sha256(load("diffusion.plan.clip_range=[0.3,0.8]").config) != digest


@pytest.mark.parametrize("name, text", [("schema.json", schema_text()), ("reference.md", reference_text())])
def test_committed_documents_are_fresh(repository: Path, name: str, text: str) -> None:
    path = repository / "configs" / name
    assert path.read_text(encoding="utf-8") == text, "run: python tools/config_reference.py"


def test_the_freshness_check_fails_on_a_stale_file(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tools/config_reference.py", "--folder", str(tmp_path)]

    def run(*more: str) -> int:
        return subprocess.run([*command, *more], cwd=repository, capture_output=True, check=False).returncode

    assert run("--check") == 1
    assert run() == 0
    assert run("--check") == 0
    (tmp_path / "reference.md").write_text("old")
    assert run("--check") == 1


def test_the_reference_has_a_row_for_every_setting() -> None:
    text = reference_text()
    for key in known_keys():
        assert text.count(f"| `{key}` |") == 1


def _resolve(schema: dict, node: dict) -> dict:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def test_the_json_schema_knows_the_same_keys_and_closes_every_section() -> None:
    schema = json.loads(schema_text())

    def keys(node: dict, prefix: str = "") -> list[str]:
        node = _resolve(schema, node)
        assert node["additionalProperties"] is False
        assert "required" not in node, "a base file may give it"
        found = []
        for name, child in node["properties"].items():
            inner = _resolve(schema, child)
            found += keys(inner, f"{prefix}{name}.") if "properties" in inner else [prefix + name]
        return found

    assert sorted(keys(schema)) == sorted([*known_keys(), "base"])


@pytest.mark.parametrize("path", run_files(), ids=lambda path: path.name)
def test_run_files_load_and_open_with_what_a_reader_needs(path: Path) -> None:
    load_config([path])
    header = path.read_text(encoding="utf-8").split("base:")[0]
    assert header.startswith("# yaml-language-server: $schema=../schema.json\n")
    for word in ("# What ", "# Hardware ", "# Time ", "# Reaches ", "# Command "):
        assert word in header, f"{path.name} has no {word}"


def test_every_yaml_file_names_the_schema(repository: Path) -> None:
    files = [
        path for folder in ("model", "data", "run") for path in (repository / "configs" / folder).glob("*")
    ]
    assert len(files) >= 9
    for path in files:
        assert path.read_text(encoding="utf-8").startswith(
            "# yaml-language-server: $schema=../schema.json\n"
        ), path
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path


@pytest.mark.parametrize(
    ("name", "low", "high"),
    # Parameters without embedding, in millions; small is the paper's, the last two carry their size in their
    # name.
    [("quickstart", 0.7, 1), ("small", 84, 111), ("1b", 900, 1300), ("7b", 6500, 7500)],
)
def test_model_presets_have_the_size_of_their_name(
    repository: Path, name: str, low: float, high: float
) -> None:
    from bdtrain.config import count_parameters

    minimal = ["data.kind=synthetic", "train.steps=1", "train.global_batch_size=1"]
    config = load_config([repository / "configs" / "model" / f"{name}.yaml"], minimal).config
    assert low <= count_parameters(config.model, 32000).layers / 1e6 <= high
