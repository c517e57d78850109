"""Files, bases, overrides: precedence, provenance, and what cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdtrain.config import LoadedConfig
from tests.unit.config.helpers import MINIMAL, load, only_problem, problems

SIZES = """\
model: {num_layers: 2, hidden_size: 64, num_heads: 4}
train: {steps: 100, global_batch_size: 8}
data: {kind: synthetic}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def values(loaded: LoadedConfig) -> tuple[float, int, str]:
    return loaded.config.optim.lr, loaded.config.optim.warmup_steps, loaded.config.run.name


def test_precedence_is_defaults_bases_file_later_files_overrides(tmp_path: Path) -> None:
    write(
        tmp_path, "a.yaml", SIZES + "optim: {lr: 1.0, warmup_steps: 1, weight_decay: 0.1}\nrun: {name: a}\n"
    )
    write(tmp_path, "b.yaml", "optim: {lr: 2.0, warmup_steps: 2}\n")
    first = write(tmp_path, "sub/first.yaml", "base: [../a.yaml, ../b.yaml]\noptim: {lr: 3.0}\n")
    second = write(tmp_path, "second.yaml", "optim: {lr: 4.0}\n")
    assert values(load(files=(first,))) == (3.0, 2, "a")
    assert values(load(files=(first, second))) == (4.0, 2, "a")
    loaded = load("optim.lr=5e-1", files=(first, second))
    assert values(loaded) == (0.5, 2, "a")
    assert loaded.config.optim.weight_decay == 0.1
    assert loaded.config.optim.epsilon == 1e-8


def test_provenance_names_file_and_line_and_keeps_what_was_overridden(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", SIZES + "optim:\n  lr: 1.0\n")
    file = write(tmp_path, "run.yaml", "base: [base.yaml]\n# a comment\noptim:\n  lr: 2.0\n")
    loaded = load("optim.lr=3.0", files=(file,))
    assert loaded.source("optim.lr") == "command line"
    assert loaded.source("train.steps") == f"{base}:2"
    assert loaded.source("optim.epsilon") == "default"
    assert [(o.value, o.source) for o in loaded.provenance["optim.lr"]] == [
        (1.0, f"{base}:5"),
        (2.0, f"{file}:4"),
        (3.0, "command line"),
    ]


def test_lists_are_replaced_not_merged(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", SIZES + "diffusion: {plan: {clip_range: [0.1, 0.9], weighting: flat}}\n")
    file = write(tmp_path, "run.yaml", "base: [base.yaml]\ndiffusion: {plan: {clip_range: [0.3, 0.8]}}\n")
    plan = load(files=(file,)).config.diffusion.plan
    assert plan.clip_range == (0.3, 0.8)
    assert plan.weighting == "flat"


def test_a_null_section_takes_back_what_bases_gave(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", SIZES + "diffusion: {plan: {clip_range: [0.1, 0.9], weighting: flat}}\n")
    file = write(tmp_path, "run.yaml", "base: [base.yaml]\ndiffusion: {plan: null}\n")
    assert load(files=(file,)).config.diffusion.plan == load().config.diffusion.plan


def test_null_takes_a_setting_back_where_it_is_no_value() -> None:
    config = load(
        "optim.lr=null", "diffusion.noise_copies=null", "model.head_dim=null", "optim.ema_decay=null"
    ).config
    assert (config.optim.lr, config.diffusion.noise_copies, config.model.head_dim) == (3e-4, 1, 16)
    assert config.optim.ema_decay is None
    assert only_problem("train.steps=null").startswith("train.steps is required")


def test_a_base_reached_twice_is_no_circle(tmp_path: Path) -> None:
    write(tmp_path, "root.yaml", SIZES)
    write(tmp_path, "a.yaml", "base: [root.yaml]\noptim: {lr: 1.0}\n")
    write(tmp_path, "b.yaml", "base: [root.yaml]\noptim: {warmup_steps: 7}\n")
    file = write(tmp_path, "run.yaml", "base: [a.yaml, b.yaml]\n")
    assert values(load(files=(file,)))[:2] == (1.0, 7)


def test_a_circle_of_bases_is_refused_with_its_path(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "base: [b.yaml]\n")
    write(tmp_path, "b.yaml", "base: [a.yaml]\n")
    assert "a.yaml -> b.yaml -> a.yaml" in only_problem(files=(tmp_path / "a.yaml",))


@pytest.mark.parametrize("base", ["base: a.yaml", "base: 3", "base: [1]", "base: {a: b}", "base: ['']"])
def test_base_must_be_a_list_of_paths(tmp_path: Path, base: str) -> None:
    file = write(tmp_path, "run.yaml", f"{base}\n{SIZES}")
    assert "must be a list of paths" in only_problem(files=(file,))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {lr: 1.0}\noptim: {lr: 2.0}\n", "duplicate"),
        ("optim:\n  lr: 1.0\n  lr: 2.0\n", "duplicate"),
        ("optim: [\n", "cannot be read as YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("optim: &x {lr: 1.0}\nrun: *x\n", "alias"),
        ("a: !!python/object/apply:os.system ['true']\n", "cannot be read as YAML"),
        ("1: 2\n", "is not text"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_name(
    tmp_path: Path, text: str, expected: str
) -> None:
    file = write(tmp_path, "run.yaml", text)
    problem = only_problem(files=(file,))
    assert str(file) in problem
    assert expected in problem


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, "quickstart.yaml", SIZES)
    problem = only_problem(files=(tmp_path / "quikstart.yaml",))
    assert "does not exist" in problem
    assert f"did you mean {tmp_path / 'quickstart.yaml'}?" in problem


def test_a_file_that_is_not_utf8_or_too_large_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"run: {name: caf\xe9}\n")
    assert "not UTF-8" in only_problem(files=(file,))
    file.write_bytes(b"#" * (2**20 + 1))
    assert "1048577 bytes" in only_problem(files=(file,))


def test_an_empty_section_is_no_mistake(tmp_path: Path) -> None:
    assert load(files=(write(tmp_path, "run.yaml", SIZES + "optim:\n"),)).config == load().config


@pytest.mark.parametrize("value", ["${optim.epsilon}", "${oc.env:HOME}", "a${b}c"])
def test_interpolation_is_refused(tmp_path: Path, value: str) -> None:
    file = write(tmp_path, "run.yaml", f"{SIZES}run: {{name: '{value}'}}\n")
    assert "interpolation" in only_problem(files=(file,))
    assert "interpolation" in only_problem(f"run.name='{value}'")


def test_numbers_in_scientific_notation_are_numbers() -> None:
    config = load("optim.lr=3e-4", "train.steps=1e3").config
    assert config.optim.lr == 0.0003
    assert config.train.steps == 1000
    assert isinstance(config.train.steps, int)


def test_an_override_may_give_a_whole_section() -> None:
    plan = load("diffusion.plan={kind: bernoulli, clip_range: [0.3, 0.8]}").config.diffusion.plan
    assert (plan.kind, plan.clip_range) == ("bernoulli", (0.3, 0.8))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr", "write key=value, as in optim.lr=..."),
        ("=3", "write key=value"),
        ("optim.betas.0=0.8", "set the whole list"),
        ("optim.betas[0]=0.8", "set the whole list"),
        ("base=[x.yaml]", "--config"),
        ("optim.lr=[", "cannot be read"),
        ("optim=3", "optim is a section"),
        ("model.num_layers=???", "give a value"),
    ],
)
def test_an_override_that_cannot_be_read_is_refused(override: str, expected: str) -> None:
    lines = problems(override)
    assert any(expected in line for line in lines), lines


def test_an_override_given_twice_is_refused() -> None:
    assert only_problem(*MINIMAL[:-1], "data.kind=synthetic", "optim.lr=1", "optim.lr=2") == (
        "optim.lr is given twice on the command line; give it once"
    )
