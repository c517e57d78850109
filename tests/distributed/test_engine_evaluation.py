"""Likelihood of the averaged weights, blocks of a re-fit, and samples are the serial model's everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bdtrain.testing import run_ranks

CASES: list[dict[str, Any]] = [
    {},
    {"zero": 3},
    {"tp": 2},
    {"tp": 2, "sp": True, "zero": 2},
    {"tp": 2, "zero": 3},
    {"pp": 2},
]


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """Of each rank."""
    worker = Path(__file__).with_name("engine_evaluation_ranks.py")
    return run_ranks(f"{worker}:evaluate", 2, CASES, timeout_s=400)


@pytest.fixture(params=range(len(CASES)), ids=[str(case) for case in CASES])
def ranks(request: pytest.FixtureRequest, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the ranks told of one case."""
    return [{**CASES[request.param], **rank["cases"][request.param]} for rank in found]


@pytest.mark.parametrize("weights", ["ema", "master"])
def test_serial_evaluation_is_the_plain_mean_over_all_counted_tokens(found, weights):
    for rank in found:
        assert rank[f"serial {weights}"]["nelbo"] == pytest.approx(rank[f"plain {weights}"], rel=1e-6)


def test_likelihood_equals_the_serial_one_on_every_rank(ranks, found):
    for weights in ("ema", "master"):
        wanted = found[0][f"serial {weights}"]
        for told in ranks:
            assert told[weights].keys() == wanted.keys()
            for name, value in told[weights].items():
                exact = isinstance(value, str | bool)
                assert value == (wanted[name] if exact else pytest.approx(wanted[name], rel=1e-5)), name
    assert ranks[0]["ema"] == ranks[1]["ema"]


def test_blocks_of_a_re_fit_equal_the_serial_ones_on_every_rank(ranks, found):
    wanted = found[0]["serial blocks"]
    # 21 rows in batches of 4: the last one is not whole, and two ranks must fill it up.
    assert set(wanted["sequence"]) == set(range(21)) and len(wanted["nll"]) > 60
    for told in ranks:
        for name in ("sequence", "maskable", "masked"):
            assert told["blocks"][name] == wanted[name], name
        assert told["blocks"]["nll"] == pytest.approx(wanted["nll"], rel=1e-5)
    assert ranks[0]["blocks"] == ranks[1]["blocks"]


def test_averaged_weights_are_others_and_only_for_the_time_of_the_block(ranks, found):
    assert found[0]["plain ema"] != pytest.approx(found[0]["plain master"], rel=1e-4)
    for told in ranks:
        assert told["averaged"] and told["restored"]


def test_samples_equal_the_serial_ones(ranks):
    """Three draws; with stages the first one writes the text and the others nothing."""
    for rank, told in enumerate(ranks):
        writes = rank == 0 or "pp" not in told
        assert told["sample"] == (told["serial_sample"] if writes else [None] * 3)
        assert max(len(tokens) for tokens in told["serial_sample"]) > 6
        assert told["untouched"]
