"""A model shared by two processes of a re-fit gives the blocks of the whole one, whichever two they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdtrain.testing import run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the workers told."""
    processes = Path(__file__).with_name("refit_group_ranks.py")
    place = tmp_path_factory.mktemp("model")
    told: dict[str, Any] = run_ranks(f"{processes}:measure_all", 1, place, timeout_s=300)[0]
    return told


def test_processes_that_share_a_model_measure_what_one_process_does(found):
    assert len(found["single"]) == len(found["first"]) == found["shards"] == 7
    losses = []
    for alone, shared in zip(found["single"], found["first"], strict=True):
        assert alone.keys() == shared.keys() and len(alone) == 1
        for size in alone:
            for name in ("sequence", "maskable", "masked"):
                assert alone[size][name] == shared[size][name], name
            losses += list(zip(alone[size]["nll"], shared[size]["nll"], strict=True))
    alone, shared = np.array(losses).T
    assert len(alone) > 100 and alone.min() > 0.1
    np.testing.assert_allclose(shared, alone, rtol=1e-5)


def test_two_such_workers_give_the_same_bits(found):
    # Floats of JSON are those that were written.
    assert found["first"] == found["second"]


def test_they_listen_on_loopback_alone(found):
    assert {host for _, host in found["sockets"]} <= {"127.0.0.1", "::1"}
    # gloo listens in each of the five, alone or not.
    assert len({pid for pid, _ in found["sockets"]}) == 5
