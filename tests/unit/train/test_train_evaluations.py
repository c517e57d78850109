"""What the loop keeps of a validation when the disk refuses."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

from bdtrain.tracking.console import Console
from bdtrain.train.loop import Trainer
from bdtrain.validation.generation import SampledText


def test_a_disk_that_refuses_evaluations_and_samples_costs_two_lines_and_not_the_run(tmp_path: Path) -> None:
    said = io.StringIO()
    trainer = SimpleNamespace(
        metrics=object(),
        progress=SimpleNamespace(step=3),
        folder=SimpleNamespace(path=tmp_path / "gone", attempt=1),
        parts=SimpleNamespace(evaluators=()),
        console=Console(stream=said),
    )
    Trainer.keep(trainer, {}, SampledText("", "text", [1], 1, "length"), averaged=False)
    assert said.getvalue().splitlines() == [
        "the evaluations were not written: No such file or directory",
        "the sample was not written: No such file or directory",
    ]
