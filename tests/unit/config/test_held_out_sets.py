"""``validation.sets``: what is refused, and when; what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdtrain.config import check_paths, dump_resolved, load_config
from bdtrain.config.checks import absent_paths
from bdtrain.config.resume import changed_settings, fixed_settings
from bdtrain.errors import ConfigError
from tests.unit.config.helpers import load, only_problem

CORPUS = ("data.kind=corpus", "data.path=corpus")


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ("ptb.txt", "validation.sets='ptb.txt'; it must be a list of {name: ..., path: ..., split: "),
        ("{ptb: ptb.txt}", "it must be a list of {name: ..., path: ..., split: ..., sequences: ...}"),
        ("[{path: a}]", "validation.sets[0].name is required"),
        ("[{name: a}]", "validation.sets[0].path is required"),
        ("[{name: a, path: ''}]", "validation.sets[0].path=''; it must not be empty"),
        ("[{name: Ptb, path: a}]", "validation.sets[0].name='Ptb'; it is part of the names of metrics"),
        ("[{name: p-b, path: a}]", "1 to 40 lower case letters, digits and underscores"),
        ("[{name: '', path: a}]", "1 to 40 lower case letters, digits and underscores"),
        (f"[{{name: {'x' * 41}, path: a}}]", "1 to 40 lower case letters"),
        ("[{name: a/b, path: a}]", "1 to 40 lower case letters"),
        ("[{name: 2024, path: a}]", "validation.sets[0].name=2024; it must be text"),
        ("[{name: valid, path: a}]", "validation.sets[0].name='valid'; that is the name of the run's own"),
        ("[{name: a, path: b}, {name: a, path: c}]", "two sets have the name a; give each a name of its own"),
        ("[{name: a, path: b, sequences: 0}]", "validation.sets[0].sequences=0; it must be at least 1"),
        ("[{name: a, path: b, split: test}]", "validation.sets[0].split='test'; choose from train, valid"),
        ("[{name: a, path: b, rows: 3}]", "validation.sets[0].rows is not a setting; choose from name, path"),
    ],
)
def test_a_set_that_cannot_be_is_refused_with_its_place(sets: str, expected: str) -> None:
    assert expected in only_problem(*CORPUS, f"validation.sets={sets}")


def test_synthetic_data_have_no_tokenizer_to_read_a_set_with() -> None:
    said = only_problem("validation.sets=[{name: a, path: b}]")
    assert said.startswith("validation.sets with data.kind=synthetic, which has no tokenizer")
    load("validation.sets=[]")


def test_sets_keep_their_order_and_survive_a_dump(tmp_path: Path) -> None:
    given = "validation.sets=[{name: z_1, path: b, split: train}, {name: a, path: c, sequences: 1e2}]"
    config = load(*CORPUS, given).config
    found = [(entry.name, entry.path, entry.split, entry.sequences) for entry in config.validation.sets]
    assert found == [("z_1", "b", "train", None), ("a", "c", None, 100)]
    file = tmp_path / "resolved.yaml"
    file.write_text(dump_resolved(config), encoding="utf-8")
    assert load_config([file]).config == config


def test_another_set_is_a_change_of_the_same_run() -> None:
    before, now = load(*CORPUS).config, load(*CORPUS, "validation.sets=[{name: a, path: b}]").config
    assert fixed_settings(before) == fixed_settings(now)
    assert [key for key, _, _ in changed_settings(before, now)] == ["validation.sets"]


def test_missing_texts_are_named_all_at_once_before_a_run_and_noted_in_a_plan(tmp_path: Path) -> None:
    corpus, half, text = tmp_path / "corpus", tmp_path / "half", tmp_path / "a.txt"
    corpus.mkdir()
    half.mkdir()
    (corpus / "index.json").write_text("{}")
    text.write_text("words")

    def config(*sets: str):
        return load("data.kind=corpus", f"data.path={corpus}", f"validation.sets=[{', '.join(sets)}]").config

    good = (f"{{name: a, path: {text}, sequences: 3}}", f"{{name: b, path: {corpus}, split: train}}")
    check_paths(config(*good))
    assert absent_paths(config(*good)) == []

    gone, unfinished = f"{{name: gone, path: {tmp_path}/no.txt}}", f"{{name: half, path: {half}}}"
    with pytest.raises(ConfigError) as caught:
        check_paths(config(*good, gone, unfinished))
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"validation.sets, gone: path={tmp_path}/no.txt does not exist")
    assert second.startswith(f"validation.sets, half: path={half} holds no index.json")
    assert absent_paths(config(gone)) == [
        f"validation.sets, gone: path={tmp_path}/no.txt is not on this machine: not checked"
    ]
    with pytest.raises(ConfigError, match=r"half: .* holds no index.json"):
        absent_paths(config(gone, unfinished))
    with pytest.raises(ConfigError, match=r"a.txt is a file, and split=valid would be ignored; remove it"):
        check_paths(config(f"{{name: a, path: {text}, split: valid}}"))
