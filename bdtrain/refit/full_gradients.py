"""Variance of the whole gradient of a checkpoint under given noise plans: the training step, not updated.

The rows are the same for every plan, and so are the keys of the noise. Strata lie over the batch, as in
training, so the numbers belong to one batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bdtrain.checkpoint.weights import SavedModel
from bdtrain.data.build import build_source
from bdtrain.data.loader import Batch, make_batch, split_rows
from bdtrain.data.source import Source
from bdtrain.diffusion.build import build_objective
from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.micro_batch import corrupt_rows
from bdtrain.diffusion.objectives.base import Objective
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.errors import ConfigError, RefitError
from bdtrain.model.forward import forward_losses
from bdtrain.refit.gradient_sums import SKETCH, GradientSums, PlanVariance, name_plan
from bdtrain.refit.job import plan_in_use
from bdtrain.refit.schedule_file import read_schedule
from bdtrain.refit.search import plain_values
from bdtrain.refit.snapshot import data_section
from bdtrain.validation.evaluate import load_saved

FORMAT = "bdtrain-gradient-variance/1"

PLAN_FORMS = "full, clip:LOW,HIGH, bernoulli, bernoulli:LOW,HIGH, current, or schedule:FILE"


def parse_plan(text: str, current: NoisePlan) -> NoisePlan:
    """A plan from a few words.

    Args:
        text: ``full``: counts over the full range; ``clip:LOW,HIGH``: counts over a clip range;
            ``bernoulli`` or ``bernoulli:LOW,HIGH``: the same with a time per block; ``current``: as it is;
            ``schedule:FILE``: what a re-fit's schedule.json decided for the block size. All but the last two
            take the rest, such as the weighting, from the current plan.
        current: the checkpoint's plan.

    Raises:
        RefitError: if the words are unknown, or the file holds no plan of the block size.
        ConfigError: if such a plan cannot be drawn.
    """
    word, _, rest = text.partition(":")
    if text == "current":
        return current
    if word == "schedule" and rest:
        decisions = read_schedule(Path(rest)).decisions
        if current.block_size not in decisions:
            raise RefitError(
                f"{rest} decides for block sizes {', '.join(map(str, sorted(decisions)))}; the checkpoint "
                f"has {current.block_size}"
            )
        return decisions[current.block_size].plan
    clip_range = None
    if word in ("clip", "bernoulli") and rest:
        try:
            low, high = (float(part) for part in rest.split(","))
        except ValueError as error:
            raise RefitError(f"--plan {text}: a range is two numbers, for example {word}:0.3,0.8") from error
        clip_range = (low, high)
    if not (text in ("full", "bernoulli") or (word in ("clip", "bernoulli") and clip_range)):
        raise RefitError(f"--plan {text} is unknown; give {PLAN_FORMS}")
    return replace(
        current,
        kind="bernoulli" if word == "bernoulli" else "count",
        clip_range=clip_range,
        density=None,
        resample=current.resample and clip_range not in (None, (1.0, 1.0)),
    )


def take_batches(source: Source, *, batches: int, batch_size: int) -> list[Batch]:
    """Batches as training would take them from the start of a split, without a row twice.

    Raises:
        RefitError: if the split has too few rows.
    """
    if batches < 2 or batch_size < 1:
        raise RefitError(
            f"--batches {batches} --batch-size {batch_size}: a variance needs 2 batches of 1 row"
        )
    if batches * batch_size > source.num_samples:
        raise RefitError(
            f"--batches {batches} of {batch_size} rows need {batches * batch_size} rows, and the split has "
            f"{source.num_samples}; a row taken twice would make the variance too small: choose fewer or "
            "--split train"
        )
    indices = range(batch_size)
    return [
        make_batch([source.sample(p) for p in positions], source.tokenizer_info, positions, indices)
        for start in range(0, batches * batch_size, batch_size)
        for positions in [range(start, start + batch_size)]
    ]


def measure_plan(
    model: nn.Module,
    objective: Objective,
    plan: NoisePlan,
    batches: Iterable[Batch],
    *,
    draws: int,
    seed: int,
    noise_copies: int,
    micro_batch_size: int,
    device: torch.device,
    width: int = SKETCH,
) -> PlanVariance:
    """Gradients of the training loss under one plan. The parameters' gradients are None afterwards.

    Args:
        model: the whole model.
        objective: of the plan.
        plan: the plan.
        batches: the rows, all batches of one size.
        draws: of the noise for each batch.
        seed: of the noise; draw d of batch m has the key of training step m * draws + d.
        noise_copies: noisy copies of each row.
        micro_batch_size: rows of a forward pass.
        device: where the model is.
        width: numbers of a sketch.

    Raises:
        RefitError: for fewer than 1 draw or 2 batches.
        NonFiniteError: if a loss or gradient is not finite.
    """
    if draws < 1:
        raise RefitError(f"--draws {draws}; it must be at least 1, and 2 for the variance given the data")
    sums = GradientSums(dict(model.named_parameters()), width=width)
    for number, batch in enumerate(batches):
        for draw in range(draws):
            key = NoiseKey(seed=seed, purpose=Purpose.TRAIN, step=number * draws + draw)
            micro_batches = [
                corrupt_rows(
                    objective,
                    rows,
                    key=key,
                    global_batch_size=len(batch.tokens),
                    copies=noise_copies,
                    device=device,
                )
                for rows in split_rows(batch, micro_batch_size)
            ]
            counted = sum(int(one.corrupted.counted.sum()) for one in micro_batches)
            loss = 0.0
            for micro_batch in micro_batches:
                part = forward_losses(model, objective, micro_batch).sum() / max(counted * noise_copies, 1)
                part.backward()
                loss += float(part.detach())
            sums.add(loss)
            model.zero_grad(set_to_none=True)
        sums.end_batch()
    return sums.result(plan)


@dataclass(frozen=True)
class GradientVariance:
    """Variances of some plans on one checkpoint.

    Attributes:
        results: in the order that was asked for.
        settings: what was measured, plain values.
    """

    results: tuple[PlanVariance, ...]
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with ratios to the first plan."""
        first = self.results[0]
        draws = self.settings["draws"]
        records = []
        for one in self.results:
            ratios: dict[str, Any] = {}
            for which, name in enumerate(("total", "given_data")[: min(draws, 2)]):
                ratio, error = one.ratio_to(first, which)
                ratios[name] = {"ratio": ratio, "error": error}
            records.append({**one.to_dict(), "versus_first": plain_values(ratios)})
        return {"format": FORMAT, **self.settings, "plans": records}

    def lines(self) -> list[str]:
        """A table for people."""
        settings, first = self.settings, self.results[0]
        width = max(len(one.name) for one in self.results) + 2
        lines = [
            "{checkpoint} (step {step}): {batches} batches of {batch_size} rows of {split}, {draws} draws of "
            "the noise each".format(**settings),
            f"{'plan':<{width}}{'loss':>8}{'var loss':>10}{'noise':>10}{'var grad':>10}{'+-':>9}{'noise':>10}"
            f"{'+-':>9}{'|mean|^2':>10}{'+-':>9}{'total/':>8}{'noise/':>8}   "
            f"total and noise against {first.name}",
        ]
        for one in self.results:
            gradient, s = one.gradient, one.scale**2
            ratios = [_pair(*one.ratio_to(first, which)) for which in range(min(settings["draws"], 2))]
            lines.append(
                f"{one.name:<{width}}{one.loss * one.scale:>8.3f}{_cell(one.losses.total, s):>10}"
                f"{_cell(one.losses.given_data, s):>10}{_cell(gradient.total, s):>10}"
                f"{_cell(gradient.total_error, s):>9}{_cell(gradient.given_data, s):>10}"
                f"{_cell(gradient.given_data_error, s):>9}{_cell(gradient.mean_square, s):>10}"
                f"{_cell(gradient.mean_square_error, s):>9}{_cell(gradient.relative):>8}"
                f"{_cell(gradient.relative_given_data):>8}   {'  '.join(ratios)}"
            )
        lines.append("of that, noise given the data by parameters (total where there is one draw):")
        for one in self.results:
            parts = [
                f"{name} {_cell(value.total if value.given_data is None else value.given_data, one.scale**2)}"
                for name, value in one.groups.items()
            ]
            lines.append(f"{one.name:<{width}}{'  '.join(parts)}")
        lines.append(
            "Losses and variances are at the scale of weighting reference (an average over the range), so "
            "that plans compare; the JSON has them as training weighs them, with the factor. total/ and "
            "noise/ are over |mean|^2, and known no better than it is."
        )
        return lines


def _cell(value: float | None, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:.3g}"


def _pair(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} +- {error:.3f}"


def measure_saved(
    checkpoint: Path,
    plans: Sequence[str],
    *,
    batches: int,
    batch_size: int,
    draws: int = 2,
    seed: int | None = None,
    split: str = "valid",
    data: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> GradientVariance:
    """Gradient variance of a saved model under some plans, in this process, in float32.

    The weights are those that evaluation takes: averaged where the run averages them.

    Args:
        checkpoint: model folder or training checkpoint.
        plans: words for ``parse_plan``, at least one.
        batches: of rows.
        batch_size: rows of a batch.
        draws: of the noise for each batch.
        seed: of the noise and of the order of the rows; the run's if None.
        split: ``valid`` or ``train``.
        data: corpus in place of the run's.
        log: told about progress.

    Raises:
        BdtrainError: for a damaged checkpoint or corpus, an unknown plan, or too few rows.
    """
    saved, model = load_saved(checkpoint)
    config = saved.config
    current = plan_in_use(saved)
    wanted = [parse_plan(text, current) for text in plans]
    if not wanted:
        raise RefitError(f"no plan is given; add --plan with {PLAN_FORMS}")
    wrong = [plan for plan in wanted if plan.block_size != current.block_size]
    if wrong:
        raise ConfigError(f"{name_plan(wrong[0])} has another block size than the checkpoint")
    seed = config.run.seed if seed is None else seed
    section = data_section(config, data)
    source = build_source(section, split=split, seed=seed)
    _check_tokenizer(saved, source, section.path)
    rows = take_batches(source, batches=batches, batch_size=batch_size)
    results = []
    for plan in wanted:
        log(f"{name_plan(plan)}: {batches * draws} gradients")
        results.append(
            measure_plan(
                model,
                build_objective(config.diffusion, section, source.tokenizer_info, plan),
                plan,
                rows,
                draws=draws,
                seed=seed,
                noise_copies=config.diffusion.noise_copies,
                micro_batch_size=min(config.train.micro_batch_size or batch_size, batch_size),
                device=next(model.parameters()).device,
            )
        )
    settings = {
        "checkpoint": str(checkpoint),
        "step": saved.facts.get("step"),
        "averaged": bool(saved.facts.get("averaged")),
        "split": split,
        "batches": batches,
        "batch_size": batch_size,
        "draws": draws,
        "seed": seed,
        "noise_copies": config.diffusion.noise_copies,
    }
    return GradientVariance(tuple(results), settings)


def _check_tokenizer(saved: SavedModel, source: Source, path: str | None) -> None:
    """Refuse rows of another tokenizer.

    Raises:
        RefitError: naming the corpus.
    """
    if str(source.tokenizer_info.sha256) != str(saved.facts["tokenizer"]["sha256"]):
        raise RefitError(f"{path} was made with another tokenizer than {saved.folder} was trained with")
