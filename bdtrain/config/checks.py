"""Rules that join settings. Each returns every breach it finds, so that a user sees all of them at once.

Two kinds: values that do not fit each other (``find_conflicts``), and values that were given but would have
no effect (``find_ignored``): nothing a user writes is skipped in silence. An off switch is no breach
(``validation.sample_tokens=0`` leaves the other sample settings dormant).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bdtrain.config.problems import Problem, divisors_text, section_type
from bdtrain.config.refit_rules import refit_conflicts, refit_without_effect
from bdtrain.config.schema import DiffusionConfig, RunConfig, Section
from bdtrain.config.schema.validation import HeldOutSet
from bdtrain.errors import ConfigError

SHARE_TOLERANCE = 1e-9
"""Slack when k / block_size is compared with a bound: 0.3 * 10 is not 3 in binary."""


def find_conflicts(config: RunConfig) -> list[Problem]:
    """Breaches of the rules between settings, all of them."""
    rules = (_model, _data, _blocks, _clip_range, _optim, _batches, _sample, _sets, _profile, refit_conflicts)
    return [problem for rule in rules for problem in rule(config)]


def find_ignored(config: RunConfig) -> list[Problem]:
    """Settings that were given although the rest of the configuration leaves them without effect."""
    problems = []
    for key, reason in without_effect(config).items():
        owner, name = _owner(config, key)
        # null gives nothing, so nothing is ignored.
        if name in owner.model_fields_set and getattr(owner, name) is not None:
            message = f"{key} would be ignored: {reason.text}; remove it, or take it back with {key}=null"
            problems.append(Problem((key, reason.switch), message))
    return problems


@dataclass(frozen=True)
class Reason:
    """Why a setting has no effect.

    Attributes:
        switch: dotted key of the setting that decides it.
        text: for the user.
    """

    switch: str
    text: str


def without_effect(config: RunConfig) -> dict[str, Reason]:
    """Settings that have no effect in this configuration, with the reason.

    ``dump_resolved`` leaves them out, so that a dumped configuration loads again.
    """
    data, diffusion, optim, validation = config.data, config.diffusion, config.optim, config.validation
    parallel, tracking = config.parallel, config.tracking
    table: dict[str, Reason] = {}

    def ignore(switch: str, text: str, *keys: str) -> None:
        for key in keys:
            table.setdefault(key, Reason(switch, f"{switch} is {text}"))

    if data.kind == "corpus":
        ignore("data.kind", "corpus", "data.synthetic_vocab_size", "data.synthetic_tokens")
    else:
        ignore("data.kind", "synthetic", "data.path", "data.window_shards", "data.lanes")
    if diffusion.algo == "ar":
        plan = [f"diffusion.plan.{name}" for name in type(diffusion.plan).model_fields]
        noise = ["diffusion.schedule", "diffusion.noise_copies", *plan]
        ignore("diffusion.algo", "ar, which draws no noise", *noise)
        sampler = ["validation.sample_method", "validation.sample_steps"]
        ignore("diffusion.algo", "ar, which samples token by token", *sampler)
    elif diffusion.plan.clip_range == (1.0, 1.0):
        masks_all = "[1, 1], which masks every token"
        ignore("diffusion.plan.clip_range", masks_all, "diffusion.plan.kind", "diffusion.plan.strata")
    if optim.schedule == "constant":
        ignore("optim.schedule", "constant", "optim.decay_steps", "optim.min_lr_ratio")
    elif optim.schedule == "cosine":
        ignore("optim.schedule", "cosine, which decays over all steps after the warm-up", "optim.decay_steps")
    if validation.sample_method in ("first_hitting", "confidence"):
        ignore("validation.sample_method", validation.sample_method, "validation.sample_steps")
    if parallel.tp == 1 and parallel.sequence_parallel:
        ignore("parallel.tp", "1, which leaves nothing to split", "parallel.sequence_parallel")
    if not tracking.mlflow:
        ignore("tracking.mlflow", "false", "tracking.mlflow_uri")
        if not (tracking.tensorboard or tracking.wandb):
            words = "false, and so are the other writers"
            ignore("tracking.mlflow", words, "tracking.experiment", "tracking.drain_timeout_s")
    for switch, text, keys in refit_without_effect(config):
        ignore(switch, text, *keys)
    if config.profile.steps is None:
        ignore("profile.steps", "null, which traces nothing", "profile.ranks", "profile.stacks")
    return table


def check_paths(config: RunConfig) -> None:
    """Check that the files a run reads are there.

    Separate from validation, because a configuration may be checked on another machine.

    Raises:
        ConfigError: if the corpus or a text of ``validation.sets`` is missing.
    """
    if config.data.kind == "corpus" and config.data.path is not None:
        _check_corpus(Path(config.data.path))
    _check_sets(config.validation.sets)
    start = config.train.init_from
    begun = any((Path(config.run.folder) / "checkpoints").glob("step-*"))
    if start is not None and not begun and not (Path(start) / "MANIFEST.json").is_file():
        raise ConfigError(
            f"train.init_from={start} is no model folder or checkpoint (working directory {Path.cwd()}); "
            "give a folder with a MANIFEST.json, for example RUN/checkpoint, or train.init_from=null"
        )


def _check_corpus(folder: Path) -> None:
    make_it = (
        f"make it with: python tools/preprocess.py --input TEXT --tokenizer TOKENIZER.model --out {folder}"
    )
    if not folder.exists():
        raise ConfigError(f"data.path={folder} does not exist (working directory {Path.cwd()}); {make_it}")
    if not (folder / "index.json").is_file():
        raise ConfigError(
            f"data.path={folder} holds no index.json, so it is not a finished corpus; {make_it}"
        )


def _check_sets(sets: Iterable[HeldOutSet]) -> None:
    problems = [problem for entry in sets if (problem := _path_problem(entry)) is not None]
    if problems:
        raise ConfigError("\n".join(problems))


def _set_key(entry: HeldOutSet) -> str:
    return f"validation.sets, {entry.name}: path={entry.path}"


def _path_problem(entry: HeldOutSet) -> str | None:
    path, key = Path(entry.path), _set_key(entry)
    wanted = "give a UTF-8 text file, or a corpus folder that tools/preprocess.py wrote"
    if not path.exists():
        return f"{key} does not exist (working directory {Path.cwd()}); {wanted}"
    if path.is_dir() and not (path / "index.json").is_file():
        return f"{key} holds no index.json, so it is not a finished corpus; {wanted}"
    if not path.is_dir() and entry.split is not None:
        return f"{key} is a file, and split={entry.split} would be ignored; remove it"
    return None


def absent_paths(config: RunConfig) -> list[str]:
    """Notes on files of another machine, for a plan: what is here must be right, what is not is not checked.

    Raises:
        ConfigError: if something is here, but is not what it must be.
    """
    absent = []
    path = config.data.path
    if config.data.kind == "corpus" and path is not None:
        if Path(path).exists():
            _check_corpus(Path(path))
        else:
            absent.append(f"data.path={path}")
    sets = config.validation.sets
    _check_sets(entry for entry in sets if Path(entry.path).exists())
    absent += [_set_key(entry) for entry in sets if not Path(entry.path).exists()]
    return [f"{what} is not on this machine: not checked" for what in absent]


def _owner(config: RunConfig, key: str) -> tuple[Section, str]:
    """The section that holds a dotted key, and the key's last word."""
    *path, name = key.split(".")
    owner: Section = config
    for part in path:
        owner = getattr(owner, part)
        assert section_type(type(owner)), key
    return owner, name


def _model(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    if "head_dim" not in model.model_fields_set and model.hidden_size % model.num_heads:
        yield Problem(
            ("model.num_heads", "model.hidden_size"),
            f"model.num_heads={model.num_heads} does not divide model.hidden_size={model.hidden_size}; "
            f"choose num_heads from {divisors_text(model.hidden_size)} or give model.head_dim",
        )
    elif model.head_dim % 2:
        yield Problem(
            ("model.head_dim", "model.num_heads", "model.hidden_size"),
            f"model.head_dim={model.head_dim} is odd; rotary positions turn pairs of channels, so it must "
            f"be even",
        )
    if model.num_heads % model.num_kv_heads:
        yield Problem(
            ("model.num_kv_heads", "model.num_heads"),
            f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}; "
            f"choose it from {divisors_text(model.num_heads)}",
        )
    if model.shape == "bd3lm" and model.num_kv_heads != model.num_heads:
        yield Problem(
            ("model.num_kv_heads", "model.num_heads", "model.shape"),
            f"model.num_kv_heads={model.num_kv_heads} with model.shape=bd3lm; that shape has multi-head "
            f"attention: leave num_kv_heads out, or choose model.shape=qwen3",
        )
    if model.shape == "bd3lm" and model.head_dim * model.num_heads != model.hidden_size:
        yield Problem(
            ("model.head_dim", "model.num_heads", "model.hidden_size", "model.shape"),
            f"model.head_dim={model.head_dim} times model.num_heads={model.num_heads} is not "
            f"model.hidden_size={model.hidden_size}, which model.shape=bd3lm needs; leave head_dim out",
        )


def _data(config: RunConfig) -> Iterator[Problem]:
    data, vocab_size = config.data, config.model.vocab_size
    if data.kind == "corpus" and data.path is None:
        yield Problem(
            ("data.path", "data.kind"),
            "data.path is missing; give the corpus folder (python tools/preprocess.py makes one), or "
            "data.kind=synthetic",
        )
    if data.kind == "synthetic" and vocab_size not in (None, data.synthetic_vocab_size):
        yield Problem(
            ("model.vocab_size", "data.synthetic_vocab_size"),
            f"model.vocab_size={vocab_size} is not data.synthetic_vocab_size={data.synthetic_vocab_size}; "
            f"leave model.vocab_size out, it follows the data",
        )
    if data.kind == "synthetic" and data.synthetic_tokens < data.seq_len:
        yield Problem(
            ("data.synthetic_tokens", "data.seq_len"),
            f"data.synthetic_tokens={data.synthetic_tokens} is less than one row of "
            f"data.seq_len={data.seq_len}",
        )
    if data.epoch_tokens is not None and data.epoch_tokens < data.seq_len:
        yield Problem(
            ("data.epoch_tokens", "data.seq_len"),
            f"data.epoch_tokens={data.epoch_tokens} is less than one row of data.seq_len={data.seq_len}",
        )


def _blocks(config: RunConfig) -> Iterator[Problem]:
    algo, block_size, seq_len = config.diffusion.algo, config.diffusion.block_size, config.data.seq_len
    keys = ("diffusion.block_size", "diffusion.algo", "data.seq_len")
    if algo == "block_diffusion" and seq_len % block_size:
        yield Problem(
            keys,
            f"diffusion.block_size={block_size} does not divide data.seq_len={seq_len}; choose it from "
            f"{divisors_text(seq_len)}",
        )
    if algo == "mdlm" and block_size != seq_len:
        yield Problem(
            keys,
            f"diffusion.block_size={block_size} with diffusion.algo=mdlm, whose block is the row of "
            f"data.seq_len={seq_len}; remove it (or diffusion.block_size=null), or choose "
            f"algo=block_diffusion",
        )
    if algo == "ar" and block_size != 1:
        yield Problem(
            keys,
            f"diffusion.block_size={block_size} with diffusion.algo=ar, which has no blocks; remove it "
            f"(or diffusion.block_size=null)",
        )


def _clip_range(config: RunConfig) -> Iterator[Problem]:
    diffusion, plan = config.diffusion, config.diffusion.plan
    keys = ("diffusion.plan.clip_range",)
    if diffusion.algo == "ar":
        return  # the whole plan is reported as ignored
    if plan.clip_range is None:
        if plan.resample:
            yield Problem(
                (*keys, "diffusion.plan.resample"),
                "diffusion.plan.resample=true without diffusion.plan.clip_range has nothing to hold blocks "
                "to; give a range or remove resample",
            )
        return
    beta, omega = plan.clip_range
    if not (0 <= beta <= 1 and 0 <= omega <= 1):
        yield Problem(
            keys, f"diffusion.plan.clip_range=[{beta}, {omega}] leaves [0, 1]; it bounds a probability"
        )
        return
    if beta > omega or (beta == omega and beta != 1):
        yield Problem(
            keys,
            f"diffusion.plan.clip_range=[{beta}, {omega}] is empty; beta must be below omega (only [1, 1], "
            f"full masking, may be a point)",
        )
        return
    if diffusion.schedule != "linear" and not diffusion.schedule.startswith("reference_"):
        yield Problem(
            (*keys, "diffusion.schedule"),
            f"diffusion.plan.clip_range with diffusion.schedule={diffusion.schedule}; a range of the masking "
            f"probability is defined for schedule=linear: use that, or clip_range=null",
        )
    if plan.resample:
        yield from _resample(diffusion)


def _resample(diffusion: DiffusionConfig) -> Iterator[Problem]:
    """With resampling some count k of 1..block_size must have its share in the range."""
    block_size, plan = diffusion.block_size, diffusion.plan
    assert plan.clip_range is not None
    beta, omega = plan.clip_range
    keys = ("diffusion.plan.clip_range", "diffusion.plan.resample")
    if beta == 1:
        yield Problem(
            keys,
            "diffusion.plan.resample=true with clip_range=[1, 1], which masks every token anyway; "
            "remove resample",
        )
        return
    if diffusion.schedule.startswith("reference_") and diffusion.schedule != "reference_linear":
        yield Problem(
            (*keys, "diffusion.schedule"),
            f"diffusion.plan.resample=true with diffusion.schedule={diffusion.schedule}; the range of masked "
            f"shares is defined for linear and reference_linear: use one of them, or remove resample",
        )
    lowest = max(1, math.ceil(block_size * (beta - SHARE_TOLERANCE)))
    if lowest > block_size * (omega + SHARE_TOLERANCE):
        yield Problem(
            (*keys, "diffusion.block_size"),
            f"diffusion.plan.clip_range=[{beta}, {omega}] is infeasible with resample: no k of "
            f"1..{block_size} (diffusion.block_size) has k/{block_size} in it; raise omega to at least "
            f"{lowest}/{block_size}, or resample=false",
        )


def _optim(config: RunConfig) -> Iterator[Problem]:
    optim, steps = config.optim, config.train.steps
    if not all(0 <= beta < 1 for beta in optim.betas):
        yield Problem(
            ("optim.betas",), f"optim.betas={list(optim.betas)}; both must be at least 0 and below 1"
        )
    decay = optim.decay_steps or 0
    if optim.schedule == "wsd" and not decay:
        yield Problem(
            ("optim.decay_steps", "optim.schedule"),
            f"optim.decay_steps is missing; schedule=wsd needs its length (a tenth to a fifth of "
            f"train.steps={steps} is usual)",
        )
    if optim.schedule != "wsd":
        decay = 0
    if optim.warmup_steps + decay > steps:
        parts = f"optim.warmup_steps={optim.warmup_steps}" + (
            f" plus optim.decay_steps={decay}" if decay else ""
        )
        yield Problem(
            ("optim.warmup_steps", "optim.decay_steps", "optim.schedule", "train.steps"),
            f"{parts} is more than train.steps={steps}; train longer, or shorten it: "
            f"optim.warmup_steps={steps // 10}"
            + (f" optim.decay_steps={max(steps // 4, 1)}" if decay else ""),
        )


def _batches(config: RunConfig) -> Iterator[Problem]:
    train = config.train
    # Against the rows of one rank the layout checks it, when the number of ranks is known.
    if train.micro_batch_size is not None and train.global_batch_size % train.micro_batch_size:
        yield Problem(
            ("train.micro_batch_size", "train.global_batch_size"),
            f"train.micro_batch_size={train.micro_batch_size} does not divide train.global_batch_size="
            f"{train.global_batch_size}; choose it from {divisors_text(train.global_batch_size)}",
        )


def _sample(config: RunConfig) -> Iterator[Problem]:
    data, sample = config.data, config.validation
    if data.kind == "synthetic" and sample.sample_prompt:
        yield Problem(
            ("validation.sample_prompt", "data.kind"),
            f"validation.sample_prompt={sample.sample_prompt!r} with data.kind=synthetic, which has no "
            f"tokenizer to read it with; remove it, or train on a corpus",
        )
    if config.diffusion.algo == "mdlm" and sample.sample_tokens > data.seq_len:
        yield Problem(
            ("validation.sample_tokens", "data.seq_len", "diffusion.algo"),
            f"validation.sample_tokens={sample.sample_tokens} is more than the one row of "
            f"data.seq_len={data.seq_len} that diffusion.algo=mdlm learns to fill; choose at most "
            f"{data.seq_len} (0 writes no sample)",
        )


def _sets(config: RunConfig) -> Iterator[Problem]:
    if config.validation.sets and config.data.kind == "synthetic":
        yield Problem(
            ("validation.sets", "data.kind"),
            "validation.sets with data.kind=synthetic, which has no tokenizer to read a text with; remove "
            "them, or train on a corpus",
        )


def _profile(config: RunConfig) -> Iterator[Problem]:
    traced, steps = config.profile.traced_steps, config.train.steps
    if traced and traced[-1] > steps:
        length = min(len(traced), steps)
        yield Problem(
            ("profile.steps", "train.steps"),
            f"profile.steps={config.profile.steps} is past the last step, train.steps={steps}; choose "
            f"profile.steps={steps + 1 - length}:{steps + 1} or an earlier range, or train longer",
        )
