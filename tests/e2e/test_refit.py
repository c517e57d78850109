"""Re-fits through the commands that people type: the paper's procedure in a run, and any saved model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bdtrain.diffusion.plan import NoisePlan
from bdtrain.refit.schedule_file import read_schedule
from tests.reliability.launched import Launched

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "run" / "tiny_synthetic.yaml"
REFIT = (
    "refit.mode=counts",
    # One at the end of step 4, and its plan from step 5 on.
    "refit.every_tokens=1024",
    "refit.lag_steps=0",
    "refit.wait=true",
    "refit.min_gain=0",
    "refit.blocks=1024",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of six steps with a re-fit, started by the deepspeed command, and what it printed."""
    folder = tmp_path_factory.mktemp("refit")
    settings = [f"run.folder={folder / 'run'}", "train.steps=6", "train.log_every_steps=1", *REFIT]
    command = ["deepspeed", "--num_gpus", 1, "launchers/pretrain.py", "--config", TINY, *settings]
    with Launched(command, folder / "log") as run:
        assert run.wait() == 0, run.text()[-3000:]
        return folder / "run", run.text()


def test_a_run_fits_its_plan_in_a_process_beside_it(trained):
    folder, said = trained
    assert "re-fit of the noise plan: counts, every 1,024 tokens, process (" in said
    (line,) = (json.loads(text) for text in (folder / "refit" / "history.jsonl").read_text().splitlines())
    assert (line["snapshot_step"], line["adopt_step"], line["outcome"]) == (4, 4, "adopted")
    assert f"re-fit of step 4: adopted: {line['reason']}" in said
    plan = NoisePlan.from_dict(line["plan"])
    assert plan.density is not None and plan.block_size == 4
    results = folder / "refit" / "step-000000004"
    schedule = read_schedule(results / "schedule.json")
    assert schedule.decisions[4].plan == plan and schedule.version == 1
    report = json.loads((results / "report.json").read_text())
    # All 102 held-out rows of the synthetic split: 8 blocks each, more where a document ends.
    assert report["request"]["sequences"] == [102] and report["results"]["4"]["blocks"] >= 102 * 8
    assert "wrote" in (results / "log.txt").read_text()
    metrics = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [found for found in metrics if "sched/version" in found]
    assert [(found["step"], found["sched/version"]) for found in told] == [(4, 1)]
    assert json.loads((folder / "summary.json").read_text())["goodput"]["refit_seconds"] > 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<figcaption>How often mask counts are drawn, block size 4 ") == 1
    assert "fitted (better)" in page and "uniform = in use before" in page
    facts = json.loads((folder / "checkpoint" / "facts.json").read_text())
    assert facts["noise_plan"] == line["plan"]


def test_any_saved_model_can_be_fitted_for_several_block_sizes(trained, tmp_path):
    folder, _ = trained
    out = tmp_path / "ranges"
    command = ["launchers/refit_schedule.py", "--checkpoint", folder / "checkpoint", "--out", out]
    more = ["--block-sizes", "4,16", "refit.mode=clip", "refit.widths=[0.5]", "refit.bootstrap_draws=50"]
    done = subprocess.run(
        [sys.executable, *map(str, [*command, *more])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "block size 4: " in done.stdout and "block size 16: " in done.stdout
    schedule = read_schedule(out / "schedule.json")
    assert sorted(schedule.decisions) == [4, 16] and schedule.snapshot_step == 6
    assert all(made.plan.block_size == size for size, made in schedule.decisions.items())
    report = json.loads((out / "report.json").read_text())
    # The full range, and width 0.5 at starts 0, 0.05 and so on to 0.5, besides the plan of the run.
    names = [row["name"] for row in report["results"]["16"]["candidates"]]
    assert len(names) == len(set(names)) == 1 + 1 + 11
