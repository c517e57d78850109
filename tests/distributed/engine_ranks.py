"""What ranks compute for the engine's tests: the same few steps under some layout, told by serial tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from plain_twin import Plain

BOS, EOS, PAD, MASK, FIRST, VOCAB = 1, 2, 0, 4, 6, 29
SEQ, BLOCK, ROWS, MICRO, SEED = 16, 4, 8, 2, 11
LR, BETAS, EPSILON, DECAY, CLIP, EMA_DECAY = 3e-4, (0.9, 0.95), 1e-6, 0.1, 0.5, 0.3
RULES = [
    {"match": r"layers\.1\.", "lr_scale": 0.5},
    {"match": "embedding", "lr_scale": 2.0, "weight_decay": 0.0},
    {"match": "layernorm", "weight_decay": 0.3},
]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A layout, and what is trained under it."""

    tp: int = 1
    pp: int = 1
    sp: bool = False
    zero: int = 1
    shape: str = "qwen3"
    copies: int = 1
    rows: int = ROWS
    micro: int = MICRO
    precision: str = "fp32"
    recompute: str = "none"
    rules: bool = False
    lr: float = LR
    clip: float | None = CLIP
    ema: float = EMA_DECAY
    persistent: bool = False

    @property
    def layout(self) -> str:
        """Its name."""
        axes = [f"{axis}2" for axis in ("tp", "pp") if getattr(self, axis) > 1] or ["dp2"]
        return " ".join([*axes, *(["sp"] if self.sp else []), f"zero{self.zero}"])

    @property
    def data(self) -> tuple[Any, ...]:
        """What decides the result: all but the layout."""
        return self.shape, self.copies, self.rows, self.rules


class RaggedRows:
    """Short documents, some that begin with BOS, and rows that end in padding; a ``Source``."""

    def __init__(self) -> None:
        from bdtrain.data.tokenizer import TokenizerInfo

        self.seq_len, self.num_samples, self.fingerprint = SEQ, 21, {}
        self.tokenizer_info = TokenizerInfo(VOCAB, "0" * 64)
        self.byte_lengths = np.ones(VOCAB, dtype=np.int64)

    def sample(self, position: int) -> np.ndarray:
        generator = np.random.default_rng(position)
        tokens = generator.integers(FIRST, VOCAB, SEQ)
        tokens[generator.random(SEQ) < 0.1] = EOS
        if generator.random() < 0.3:
            tokens[0] = BOS
        if generator.random() < 0.3:
            tokens[-int(generator.integers(1, 7)) :] = PAD
        return tokens

    def row(self, number: int) -> np.ndarray:
        return self.sample(10**6 + number)


def start() -> Any:
    """Join the world.

    Returns:
        Process groups of this rank by itself, for the serial twin.
    """
    from bdtrain.parallel.cpu import install_cpu_shim
    from bdtrain.parallel.groups import init_process_group, prepare_deepspeed, read_launch
    from bdtrain.parallel.libraries import prepare_libraries

    prepare_libraries()
    torch.set_num_threads(1)
    install_cpu_shim()
    prepare_deepspeed()
    from megatron.core.process_groups_config import ProcessGroupCollection

    init_process_group(read_launch(os.environ))
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    alone = ProcessGroupCollection()
    for name in ("tp", "pp", "cp", "dp", "dp_cp", "embd", "pos_embd", "mp", "tp_cp"):
        setattr(alone, name, groups[dist.get_rank()])
    return alone


def make_grid(case: Case) -> Any:
    """Megatron's grid anew. DeepSpeed asks it each time an engine is made."""
    from megatron.core import parallel_state

    from bdtrain.parallel.groups import init_groups

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return init_groups(tp=case.tp, pp=case.pp)


def make_config(case: Case, **sections: Any) -> Any:
    from bdtrain.config import RunConfig
    from bdtrain.testing import tiny_model_config

    return RunConfig.model_validate(
        {
            "run": {"seed": SEED},
            "model": tiny_model_config(case.shape),
            "data": {"kind": "synthetic", "seq_len": SEQ, "synthetic_vocab_size": VOCAB},
            "diffusion": {"algo": "block_diffusion", "block_size": BLOCK, "noise_copies": case.copies},
            "optim": {
                "lr": case.lr,
                "betas": BETAS,
                "epsilon": EPSILON,
                "weight_decay": DECAY,
                "grad_clip_norm": case.clip,
                "ema_decay": case.ema,
                "groups": RULES if case.rules else [],
            },
            "train": {
                "steps": 1,
                "global_batch_size": case.rows,
                "micro_batch_size": case.micro,
                "precision": case.precision,
                "recompute": case.recompute,
            },
            "parallel": {
                "tp": case.tp,
                "pp": case.pp,
                "sequence_parallel": case.sp,
                "zero_stage": case.zero,
            },
            **sections,
        }
    )


def make_model(case: Case, groups: Any) -> Any:
    from bdtrain.model.build import build_model
    from bdtrain.train.setup import DTYPES

    return build_model(
        make_config(case).model,
        pg_collection=groups,
        mask_id=MASK,
        seed=SEED,
        dtype=DTYPES[case.precision],
        recompute=case.recompute,
        sequence_parallel=case.sp,
    )


class Recorder:
    """An objective that keeps what each row was given, as sha256 by (step, position in the data)."""

    def __init__(self, objective: Any) -> None:
        self._objective = objective
        self.digests: dict[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def corrupt(self, x0: Tensor, layout: Any, counted: Tensor, **how: Any) -> Any:
        corrupted = self._objective.corrupt(x0, layout, counted, **how)
        for number, sample in enumerate(how["sample_index"].tolist()):
            values = [x0, layout.block_start, layout.doc_start, corrupted.counted]
            values += [corrupted.noisy, corrupted.weight, corrupted.rows, corrupted.targets]
            content = b"".join(value[number].contiguous().numpy().tobytes() for value in values)
            self.digests[f"{how['key'].step}/{sample}"] = hashlib.sha256(content).hexdigest()
        return corrupted


def make_objective(case: Case) -> Any:
    from bdtrain.diffusion.build import build_objective, training_plan

    config = make_config(case)
    return build_objective(
        config.diffusion, config.data, RaggedRows().tokenizer_info, training_plan(config.diffusion)
    )


@dataclass
class Run:
    """What the steps of a layout gave.

    Attributes:
        engine: after the last step.
        objective: with the digests of the noise.
        results: of the steps.
        gradients: of the first step, before clipping: this rank's stretch by global name.
    """

    engine: Any
    objective: Recorder
    results: list[Any] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def begin(case: Case, groups: Any) -> Run:
    from bdtrain.config.layout import resolve_layout
    from bdtrain.train import setup

    config = make_config(case)
    layout = resolve_layout(config, dist.get_world_size())
    ours = setup.deepspeed_settings
    if not case.persistent:
        setup.deepspeed_settings = lambda **how: _gather_all(ours(**how))
    try:
        engine = setup.build_engine(config, layout, make_model(case, groups))
    finally:
        setup.deepspeed_settings = ours
    return Run(engine, Recorder(make_objective(case)))


def _gather_all(settings: dict[str, Any]) -> dict[str, Any]:
    """Stage 3 without its exception for small parameters, which is all that a tiny model has."""
    return {
        **settings,
        "zero_optimization": {**settings["zero_optimization"], "stage3_param_persistence_threshold": 0},
    }


@contextmanager
def training(case: Case, groups: Any, steps: int, *, source: Any = None, seed: int = SEED) -> Iterator[Run]:
    """Some steps by the real step function on the real loader's rows; the engine is closed afterwards."""
    run = begin(case, groups)
    keep_gradients(run)
    try:
        for step in range(steps):
            take_step(run, case, groups, step, source=source, seed=seed)
        yield run
    finally:
        run.engine.close()


def keep_gradients(run: Run) -> None:
    """Copy the reduced gradients of the first step on their way to the update."""
    update = run.engine.step

    def step(*, lr: float) -> Any:
        if not run.gradients:
            gradients = run.engine.reduced_gradients()
            run.gradients = {name: value.detach().clone() for name, value in gradients.items()}
        return update(lr=lr)

    run.engine.step = step


def take_step(
    run: Run, case: Case, groups: Any, step: int, *, spoil: bool = False, seed: int = SEED, source: Any = None
) -> Any:
    from bdtrain.data.loader import Loader
    from bdtrain.train.step import train_step

    with Loader(
        source or RaggedRows(),
        global_batch_size=case.rows,
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        prefetch_batches=0,
    ) as loader:
        batch = loader.batch(step * case.rows)
    result = train_step(
        run.engine,
        run.objective,
        batch,
        seed=seed,
        step=step,
        lr=case.lr,
        global_batch_size=case.rows,
        micro_batch_size=case.micro,
        noise_copies=case.copies,
        device=CPU,
        spoil=spoil,
    )
    run.results.append(result)
    return result


def stretch(full: Tensor, fragment: Any) -> Tensor:
    """The elements of a serial tensor that a fragment stands for, flat."""
    dim, size, stride = fragment.partition_dim, fragment.tp_size, fragment.partition_stride
    local = full
    if dim is not None:
        # The cut dimension counts (matrix of the stack, rank, position): keep this rank's positions.
        shape = full.shape
        view = full.reshape(*shape[:dim], stride, size, -1, *shape[dim + 1 :])
        local = view.select(dim + 1, fragment.tp_rank)
    return local.reshape(-1)[fragment.start : fragment.start + fragment.count]


def assemble(run: Run, kind: str = "master") -> dict[str, Tensor]:
    """The serial tensors of all ranks' fragments, on every rank."""
    mine = [
        (f.name, f.full_shape, stretch(_places(f), f), f.tensors[kind].clone())
        for f in run.engine.fragments()
    ]
    state: dict[str, Tensor] = {}
    for name, shape, places, values in [one for part in gather(mine) for one in part]:
        state.setdefault(name, torch.full(shape, float("nan"))).view(-1)[places] = values
    return state


def _places(fragment: Any) -> Tensor:
    shape = torch.Size(fragment.full_shape)
    return torch.arange(shape.numel()).view(shape)


def _whole(fragment: Any) -> Any:
    """The shard that a fragment is a stretch of."""
    return replace(fragment, start=0, count=torch.Size(fragment.full_shape).numel())


def snapshot(run: Run) -> dict[str, Tensor]:
    """Copies of all that a step changes on this rank."""
    kept = {
        f"{kind} {f.name}": value.clone() for f in run.engine.fragments() for kind, value in f.tensors.items()
    }
    for name, parameter in run.engine.module.named_parameters():
        # Stage 3 leaves a parameter its own part.
        kept[f"weight {name}"] = getattr(parameter, "ds_tensor", parameter).detach().clone()
    for number, state in enumerate(run.engine._client_optimizer.state.values()):
        kept[f"adam step {number}"] = state["step"].clone()
    return kept


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def squares(value: Tensor, wanted: Tensor) -> list[float]:
    """Squared norms of the difference and of what was wanted; sums of them over ranks make an error."""
    value, wanted = value.double(), wanted.double()
    return [(value - wanted).square().sum().item(), wanted.square().sum().item()]


def gather(value: Any) -> list[Any]:
    """The values of all ranks, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def relative_errors(parts: dict[str, list[float]]) -> dict[str, float]:
    """Relative L2 error of each whole tensor, from the ``squares`` of all ranks' stretches."""
    sums: dict[str, list[float]] = {}
    for name, (difference, size) in [item for part in gather(parts) for item in part.items()]:
        total = sums.setdefault(name, [0.0, 0.0])
        total[0] += difference
        total[1] += size
    return {name: (difference / size) ** 0.5 for name, (difference, size) in sums.items()}


def compare(run: Run, plain: Plain) -> dict[str, Any]:
    """How far a layout is from plain torch. State is compared where both took the same number of steps."""
    fragments, steps = run.engine.fragments(), len(run.results)
    parts = {
        f"gradient {f.name}": squares(run.gradients[f.name][: f.count], stretch(plain.gradients[f.name], f))
        for f in fragments
    }
    for f in fragments if steps == len(plain.losses) else []:
        for kind, values in plain.state.items():
            parts[f"{kind} {f.name}"] = squares(f.tensors[kind], stretch(values[f.name], f))
    return {
        "errors": relative_errors(parts),
        "tensors": len(plain.gradients),
        "losses": [result.loss for result in run.results],
        "norms": [result.grad_norm for result in run.results],
        "plain_losses": plain.losses[:steps],
        "plain_norms": plain.norms[:steps],
        "rows": sorted(run.objective.digests),
        "all_rows": sorted(key for key in plain.digests if int(key.split("/")[0]) < steps),
        "same_rows": all(plain.digests[key] == value for key, value in run.objective.digests.items()),
        "owned_once": owned_once(run),
        "gathered": [getattr(p, "ds_persist", True) for p in run.engine.module.parameters()].count(False),
    }


def owned_once(run: Run) -> bool:
    """Whether the fragments of all ranks tell every element of every shard exactly once."""
    owned: dict[tuple[str, int], list[tuple[int, int]]] = {}
    sizes: dict[str, int] = {}
    mine = [
        ((f.name, f.tp_rank), (f.start, f.count), stretch(_places(f), _whole(f)).numel())
        for f in run.engine.fragments()
    ]
    for key, part, size in [one for rank in gather(mine) for one in rank]:
        owned.setdefault(key, []).append(part)
        sizes[key[0]] = size
    for (name, _), parts in owned.items():
        end = 0
        for first, count in sorted(parts):
            if first != end or count < 1:
                return False
            end += count
        if end != sizes[name]:
            return False
    return True


def cases_from(listed: Sequence[dict[str, Any]]) -> list[Case]:
    return [Case(**one) for one in listed]
