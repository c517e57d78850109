"""Plans whose variance is measured are given in a few words, and read as they are meant."""

from dataclasses import replace

import pytest

from bdtrain.diffusion.plan import NoisePlan
from bdtrain.errors import RefitError
from bdtrain.refit.full_gradients import parse_plan
from bdtrain.refit.gradient_sums import name_plan
from bdtrain.refit.schedule_file import Decision, Schedule, write_schedule

BLOCK = 4


def test_plans_are_read_from_words(tmp_path):
    current = NoisePlan(BLOCK, clip_range=(0.4, 0.9), weighting="flat", resample=True, strata="independent")
    assert parse_plan("current", current) is current
    plain = replace(current, clip_range=None, resample=False)
    assert parse_plan("full", current) == plain
    assert parse_plan("bernoulli", current) == replace(plain, kind="bernoulli")
    assert parse_plan("clip:0.3,0.8", current) == replace(current, clip_range=(0.3, 0.8))
    assert parse_plan("bernoulli:0.3,1", current) == replace(current, kind="bernoulli", clip_range=(0.3, 1.0))
    assert parse_plan("clip:1,1", current) == replace(plain, clip_range=(1.0, 1.0))
    assert name_plan(parse_plan("bernoulli:0.3,0.8", current)) == "clip 0.3-0.8, bernoulli"
    fitted = NoisePlan(BLOCK, density=(1.0, 2.0))
    decisions = {BLOCK: Decision(fitted, True, "less"), 8: Decision(NoisePlan(8), False, "same")}
    path = write_schedule(tmp_path, Schedule("uid", 10, "", "", 1, decisions))
    assert parse_plan(f"schedule:{path}", current) == fitted
    with pytest.raises(RefitError, match=r"4, 8; the checkpoint has 2"):
        parse_plan(f"schedule:{path}", NoisePlan(2))
    for words in ("fuller", "clip", "clip:", "full:0.3,0.8", "schedule:"):
        with pytest.raises(RefitError, match="is unknown"):
            parse_plan(words, current)
    with pytest.raises(RefitError, match="a range is two numbers"):
        parse_plan("clip:0.3", current)
