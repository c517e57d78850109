"""Held-out sets: which rows they are, what they are refused for, and what is kept of their numbers."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bdtrain.config import RunConfig, load_config
from bdtrain.data.preprocess import PreprocessOptions, preprocess
from bdtrain.data.source import TokenSource
from bdtrain.data.tokenizer import Tokenizer, train_tokenizer
from bdtrain.errors import DataError, TokenizerError
from bdtrain.validation.evaluate import Evaluator
from bdtrain.validation.held_out import Trained, open_held_out, open_text
from bdtrain.validation.likelihood import Likelihood
from bdtrain.validation.record import evaluation_line, evaluation_manifest, set_metrics

SEQ = 16
WORDS = "the old sea took one small boat and gave back two long oars".split()
SMALL = PreprocessOptions(valid_fraction=0.2, row_length=32, member_rows=4)
LIKELIHOOD = Likelihood(
    nelbo=2.0,
    nelbo_noise_error=0.1,
    nelbo_text_error=None,
    ppl=7.4,
    ppl_error=None,
    bpb=None,
    bpb_error=None,
    tokens=48,
    text_bytes=None,
    sequences=3,
    text_units=1,
    text_unit="row",
    replicates=2,
    exact=False,
    seconds=0.5,
)


def lines(seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 30))) for _ in range(80)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora ``mine``, ``whole`` (no valid split) and ``other`` (another tokenizer), and ``zero.txt``."""
    folder = tmp_path_factory.mktemp("texts")
    for seed in (1, 2):
        (folder / f"{seed}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines(seed)))
    for name, size in (("t1", 290), ("t2", 285)):
        train_tokenizer(lines(1), vocab_size=size).save(folder / f"{name}.model")
    for name, text, tokenizer, share in (
        ("mine", 1, "t1", 0.2),
        ("whole", 2, "t1", 0),
        ("other", 2, "t2", 0),
    ):
        options = replace(SMALL, valid_fraction=share)
        preprocess(
            [str(folder / f"{text}.jsonl")], folder / f"{tokenizer}.model", folder / name, options=options
        )
    (folder / "zero.txt").write_text("a small boat \u2013 two oars\n" * 9, encoding="utf-8")
    return folder


def config_of(texts: Path, *sets: str, **more: object) -> RunConfig:
    given = [
        "model={num_layers: 1, hidden_size: 32, num_heads: 2}",
        "train={steps: 1, global_batch_size: 2}",
        f"data={{path: {texts / 'mine'}, seq_len: {SEQ}}}",
        f"diffusion.block_size={more.pop('block_size', 4)}",
        f"validation.sets=[{', '.join(sets)}]",
        *(f"{key}={value}" for key, value in more.items()),
    ]
    return load_config([], given).config


def test_a_run_measures_its_own_rows_first_and_then_its_sets_in_order(texts: Path) -> None:
    sets = (
        f"{{name: zero, path: {texts / 'zero.txt'}, sequences: 2}}",
        f"{{name: mine_train, path: {texts / 'mine'}, split: train}}",
        f"{{name: mine_valid, path: {texts / 'mine'}}}",
        f"{{name: whole, path: {texts / 'whole'}}}",
    )
    config = config_of(texts, *sets, **{"validation.sequences": 5})
    found = open_held_out(config)
    assert [(one.name, one.split, one.sequences) for one in found] == [
        ("valid", "valid", 5),
        ("zero", "text", 2),
        ("mine_train", "train", None),
        ("mine_valid", "valid", None),
        ("whole", "train", None),
    ]
    evaluators = [Evaluator(config, one, device=torch.device("cpu")) for one in found]
    assert [len(one.row_numbers) for one in evaluators[:2]] == [5, 2]

    # The same rows have the same digest whoever reads them, and it is that of their tokens.
    own, zero, train, valid, _ = evaluators
    assert train.held_out.split_sha256 != valid.held_out.split_sha256 == own.held_out.split_sha256
    assert len({one.rows_sha256 for one in evaluators}) == 5
    source = TokenSource(texts / "mine", split="valid", seq_len=SEQ, seed=7)
    rows = np.stack([source.row(number) for number in range(source.num_samples)]).astype("<i8")
    assert valid.rows_sha256 == hashlib.sha256(rows.tobytes()).hexdigest()
    tokenizer = Tokenizer.load(texts / "mine" / "tokenizer.model")
    text = (texts / "zero.txt").read_bytes()
    assert zero.held_out.split_sha256 == hashlib.sha256(text).hexdigest()
    ids = [*tokenizer.encode(text.decode()).tolist(), tokenizer.eos_id]
    ids += [tokenizer.pad_id] * (-len(ids) % SEQ)
    middle = len(ids) // SEQ // 2  # two rows, spread evenly: the first and the one in the middle
    chosen = [*ids[:SEQ], *ids[middle * SEQ : (middle + 1) * SEQ]]
    assert zero.rows_sha256 == hashlib.sha256(np.array(chosen, dtype="<i8").tobytes()).hexdigest()


def test_a_corpus_of_another_tokenizer_is_refused(texts: Path) -> None:
    config = config_of(texts, f"{{name: other, path: {texts / 'other'}}}")
    with pytest.raises(TokenizerError) as caught:
        open_held_out(config)
    said = str(caught.value)
    assert said.startswith(f"{texts / 'other'} was made with another tokenizer (sha256 ")
    assert f"than that of data.path={texts / 'mine'}" in said
    assert said.endswith(f"tools/preprocess.py --tokenizer {texts / 'mine' / 'tokenizer.model'}")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("path: {0}/whole, split: valid", "has no split 'valid', only train"),
        ("path: {0}/no.txt", "no.txt cannot be read"),
        ("path: {0}/latin.txt", "latin.txt is not UTF-8 at byte 1"),
        ("path: {0}/empty.txt", "empty.txt is empty"),
    ],
)
def test_a_set_that_cannot_be_read_is_refused_in_one_sentence(texts: Path, entry: str, said: str) -> None:
    (texts / "latin.txt").write_bytes(b"a\xe9b")
    (texts / "empty.txt").write_bytes(b"")
    config = config_of(texts, f"{{name: a, {entry.format(texts)}}}")
    with pytest.raises(DataError, match=said):
        open_held_out(config)


def test_a_model_of_synthetic_data_reads_no_text(texts: Path) -> None:
    with pytest.raises(DataError, match=r"RUN was trained on synthetic data and has no tokenizer to read"):
        open_text(texts / "zero.txt", Trained("RUN", "x", None), seq_len=SEQ, name="valid")


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({}, "count"),
        # Of the reported bound, whatever training draws.
        ({"diffusion.plan": "{kind: bernoulli, clip_range: [0.3, 0.8]}"}, "count"),
        ({"diffusion.algo": "ar", "block_size": "null"}, None),
    ],
)
def test_a_manifest_says_what_it_takes_to_repeat_the_number(
    texts: Path, settings: dict[str, object], mode: str | None
) -> None:
    config = config_of(texts, f"{{name: zero, path: {texts / 'zero.txt'}}}", **settings)
    zero = Evaluator(config, open_held_out(config)[1], device=torch.device("cpu"))
    manifest = evaluation_manifest(zero, LIKELIHOOD, step=7, averaged=True)
    assert manifest["mask_mode"] == mode
    if mode is None:
        assert manifest["noise_plan"] is None
    else:
        plan = manifest["noise_plan"]
        assert (plan["clip_range"], plan["weighting"], plan["block_size"]) == (None, "elbo", 4)
    sha256 = hashlib.sha256((texts / "mine" / "tokenizer.model").read_bytes()).hexdigest()
    assert manifest["tokenizer_sha256"] == sha256
    expected = {"step": 7, "averaged_weights": True, "checkpoint": None, "text": str(texts / "zero.txt")}
    expected |= {"split": "text", "seq_len": SEQ, "documents": "isolate", "eos_counted": True}
    expected |= {"seed": config.run.seed, "replicates": 2, "sequences": 3, "noise_algorithm": "philox/1"}
    expected |= {"rows_sha256": zero.rows_sha256, "split_sha256": zero.held_out.split_sha256}
    assert {name: manifest[name] for name in expected} == expected


def test_a_line_is_strict_json_even_for_a_model_that_burst(texts: Path) -> None:
    config = config_of(texts)
    own = Evaluator(config, open_held_out(config)[0], device=torch.device("cpu"))
    burst = replace(LIKELIHOOD, nelbo=float("nan"), bpb=float("inf"))
    line = evaluation_line(own, burst, step=3, attempt=2, averaged=False)
    assert "\n" not in line

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads(line, parse_constant=refuse)
    assert (found["step"], found["attempt"], found["set"]) == (3, 2, "valid")
    assert (found["result"]["nelbo"], found["result"]["bpb"]) == ("nan", "inf")
    assert found["result"]["tokens"] == 48
    assert found["manifest"]["step"] == 3


def test_metrics_leave_out_what_is_not_known() -> None:
    assert set_metrics("ptb", LIKELIHOOD) == {
        "val_ptb/nelbo": 2.0,
        "val_ptb/nelbo_noise_error": 0.1,
        "val_ptb/ppl": 7.4,
        "val_ptb/tokens": 48,
        "val_ptb/seconds": 0.5,
    }
    assert "val/nelbo_text_error" in set_metrics("valid", replace(LIKELIHOOD, nelbo_text_error=0.2))
