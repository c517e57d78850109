"""The whole training step of a preset against the same model with FlexAttention and the loss over full rows.

``train_step.py --device cuda`` measures this, ``train_step.py --tiny`` tries the same code on a CPU.

Both sides share weights, batch and noise. The baseline makes the logits of every noisy row and takes torch's
cross-entropy of them, and its attention is compiled FlexAttention (on a CPU, where that has no backward, the
dense form). A step is noise, forward, backward and torch's fused AdamW on float32 weights, one micro-batch.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdtrain.config import RunConfig
from bdtrain.data.loader import Batch
from bdtrain.diffusion.build import training_plan
from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.micro_batch import MicroBatch, corrupt_rows
from bdtrain.diffusion.objectives.build import make_objective
from bdtrain.model.build import build_model
from bdtrain.model.flops import count_step_flops, useful_pairs
from bdtrain.model.forward import forward_losses
from bdtrain.model.transformer import TwoStreamTransformer, assemble_streams
from bdtrain_kernels import block_attention, prepare
from tools.bench.bench_meters import (
    Marks,
    failure_of,
    forget_compiled,
    forget_failure,
    peak_bytes,
    time_call,
)
from tools.bench.presets import PRESETS
from tools.bench.training_passes import attention_backend

OURS, BASELINE = "bdtrain", "flex + full rows"
COPIES = (1, 2, 4)


@dataclass(frozen=True)
class Side:
    """One of the two things compared.

    Attributes:
        name: in tables.
        backend: of attention.
        full_rows: logits of every noisy row.
    """

    name: str
    backend: str
    full_rows: bool


def sides_of(device: torch.device) -> tuple[Side, Side]:
    """Ours and the baseline; FlexAttention has no backward on a CPU, where the dense form stands for it."""
    if device.type == "cuda":
        return Side(OURS, "auto", False), Side(BASELINE, "flex", True)
    return Side(OURS, "auto", False), Side("dense + full rows", "dense", True)


class MasterAdamW:
    """torch's fused AdamW; 16-bit parameters have float32 weights behind them, as in training.

    Args:
        model: its parameters are updated.
        lr: learning rate.
    """

    def __init__(self, model: torch.nn.Module, lr: float = 1e-4) -> None:
        """See the class."""
        self.parameters = list(model.parameters())
        self.masters = [
            p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float()) for p in self.parameters
        ]
        self._adamw = torch.optim.AdamW(self.masters, lr=lr, fused=True)

    def step(self) -> None:
        """Update, and forget the gradients."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if master is not parameter:
                master.grad, parameter.grad = parameter.grad, None
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        copied = [(p, m.detach()) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        if copied:
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in copied], [m for _, m in copied])

    def state_bytes(self) -> int:
        """Bytes that live between steps: weights, their float32 originals, moments."""
        kept: dict[int, Tensor] = {id(t): t for t in (*self.parameters, *self.masters)}
        for state in self._adamw.state.values():
            kept |= {id(t): t for t in state.values() if isinstance(t, Tensor)}
        return sum(t.numel() * t.element_size() for t in kept.values())


@dataclass
class Measured:
    """What timed steps of one side gave.

    Attributes:
        parts: seconds of each part, one entry per step.
        selected: masked rows of each step.
    """

    parts: list[dict[str, float]] = field(default_factory=list)
    selected: list[int] = field(default_factory=list)

    @property
    def totals(self) -> list[float]:
        """Seconds of each step."""
        return [sum(parts.values()) for parts in self.parts]


class ModelStep:
    """Training steps of one preset on random tokens.

    Args:
        groups: process groups of size 1.
        config: the run; its ``model``, ``diffusion``, ``data.seq_len`` and ``train`` are read.
        device: where.
        dtype: of the parameters.
        documents: documents of a row, of random lengths.
    """

    def __init__(
        self, groups: Any, config: RunConfig, *, device: torch.device, dtype: torch.dtype, documents: int
    ) -> None:
        """See the class."""
        self.config, self.device, self.documents = config, device, documents
        self.seq = config.data.seq_len
        self.vocab: int = config.model.vocab_size or 0
        self.model: TwoStreamTransformer = build_model(
            config.model,
            pg_collection=groups,
            mask_id=self.vocab - 1,
            dtype=dtype,
            device=device,
            recompute=config.train.recompute,
        )
        self.objective = make_objective(
            "block_diffusion",
            plan=training_plan(config.diffusion),
            mask_id=self.vocab - 1,
            vocab_size=self.vocab,
            seq_len=self.seq,
            isolate_documents=config.data.documents == "isolate",
        )
        self.optimizer = MasterAdamW(self.model)

    def batch(self, rows: int, number: int) -> Batch:
        """Random rows on the device; ``number`` keys their tokens, the same for both sides."""
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, self.vocab - 1, (rows, self.seq), generator=generator)
        starts = torch.zeros(rows, self.seq, dtype=torch.int32)
        for row in starts:
            row[torch.randperm(self.seq - 1, generator=generator)[: self.documents - 1] + 1] = 1
        index = torch.arange(rows, device=self.device)
        return Batch(
            tokens=tokens.to(self.device),
            documents=starts.cumsum(1, dtype=torch.int32).to(self.device),
            counted=torch.ones(rows, self.seq, dtype=torch.bool, device=self.device),
            sample_index=index,
            batch_index=index,
        )

    def corrupt(self, batch: Batch, number: int, copies: int = 1) -> MicroBatch:
        """Noise it; ``number`` keys the draw."""
        return corrupt_rows(
            self.objective,
            batch,
            key=NoiseKey(0, Purpose.TRAIN, number),
            global_batch_size=batch.tokens.shape[0],
            copies=copies,
            device=self.device,
        )

    def losses(self, side: Side, micro_batch: MicroBatch) -> Tensor:
        """Weighted losses of a side, one per row that it computed."""
        if side.full_rows:
            return full_row_losses(self.model, micro_batch)
        return forward_losses(self.model, self.objective, micro_batch)

    def step(self, side: Side, rows: int, number: int, copies: int = 1) -> tuple[dict[str, float], int]:
        """One whole step.

        Returns:
            Seconds of its parts, and the masked rows.
        """
        marks = Marks(self.device)
        batch = self.batch(rows, number)

        def after_layers(module: torch.nn.Module, arguments: Any, hidden: Tensor) -> None:
            marks.mark("layers, forward")
            # Called when the gradient of the layers' output is whole: the head's backward has ended.
            hidden.register_hook(lambda grad: marks.mark("head and loss"))

        hook = self.model.decoder.register_forward_hook(after_layers)
        try:
            with attention_backend(self.model, side.backend):
                marks.mark("start")
                micro_batch = self.corrupt(batch, number, copies)
                marks.mark("noise")
                loss = self.losses(side, micro_batch).sum() / (copies * rows * self.seq)
                marks.mark("head and loss")
                loss.backward()
                marks.mark("layers, backward")
                self.optimizer.step()
                marks.mark("optimizer")
        finally:
            hook.remove()
        return marks.seconds(), int(micro_batch.corrupted.rows.sum())

    def fit_rows(self, sides: tuple[Side, ...], failed: dict[str, str]) -> int:
        """The preset's micro-batch, halved until a step of every side fits the device; warms them up.

        Args:
            sides: what is compared.
            failed: takes name -> why of sides that cannot run at all; the others go on without them.
        """
        rows = self.config.train.micro_batch_size or 1
        while not all(self._fits(side, rows, failed) for side in sides if side.name not in failed):
            rows //= 2
        return rows

    def _fits(self, side: Side, rows: int, failed: dict[str, str]) -> bool:
        """Whether there is memory for a side; True as well where it failed for good."""
        forget_compiled(side.backend)
        fits = True
        try:
            for number in range(3):
                self.step(side, rows, number)
            return True
        except Exception as error:
            fits = rows == 1 or not isinstance(error, torch.cuda.OutOfMemoryError)
            if fits:
                failed[side.name] = failure_of(error)
        forget_failure(self.model, self.device)
        return fits

    def loss_difference(self, sides: tuple[Side, ...], rows: int) -> float:
        """Largest relative distance of the sides' losses from the first one's, same noise."""
        totals = []
        for side in sides:
            forget_compiled(side.backend)
            with torch.no_grad(), attention_backend(self.model, side.backend):
                totals.append(self.losses(side, self.corrupt(self.batch(rows, 0), 0)).double().sum().item())
        return max(abs(total / totals[0] - 1) for total in totals)

    def flops(self, rows: int, selected: int) -> int:
        """Useful operations of a step, forward and backward (``bdtrain.model.flops``)."""
        layout = self.objective.layout(self.batch(rows, 0).documents)
        return count_step_flops(
            self.model.config,
            rows=rows,
            seq=self.seq,
            noisy_copies=1,
            clean=True,
            selected=selected,
            pairs=useful_pairs(layout, noisy_copies=1, clean=True),
            last_layer_pairs=useful_pairs(layout, noisy_copies=1, clean=True, queries="noisy"),
        ).total

    def attention(self, backend: str, rows: int) -> Callable[[], None]:
        """Attention of all layers alone, forward and backward, masks and tiles of the layout included."""
        config = self.model.config
        layout = self.objective.layout(self.batch(rows, 0).documents)
        dim, dtype = config.kv_channels, config.params_dtype

        def tensor(heads: int) -> Tensor:
            shape = (rows, heads, 2 * self.seq, dim)
            return torch.randn(shape, device=self.device, dtype=dtype, requires_grad=True)

        q = tensor(config.num_attention_heads)
        k, v = (tensor(config.num_query_groups) for _ in range(2))
        grad = torch.randn_like(q)

        def run() -> None:
            prepared = prepare(layout, noisy_copies=1, clean=True, backend=backend)
            for number in range(config.num_layers):
                last = number == config.num_layers - 1
                asking = q[:, :, : self.seq] if last else q
                out = block_attention(
                    asking, k, v, prepared, noisy_copies=1, queries="noisy" if last else "all"
                )
                torch.autograd.grad(out, (q, k, v), grad[:, :, : asking.shape[2]])

        return run


def full_row_losses(model: TwoStreamTransformer, micro_batch: MicroBatch) -> Tensor:
    """The usual way: logits of every noisy row, torch's cross-entropy, a weight of 0 where nothing is masked.

    Args:
        model: the model.
        micro_batch: with noisy copies and a clean stream.

    Returns:
        Weighted nats, float32 [batch * copies * seq].
    """
    corrupted = micro_batch.corrupted
    tokens = assemble_streams(corrupted.noisy, corrupted.clean)
    copies = corrupted.rows.shape[1]
    hidden = model(tokens, micro_batch.layout, noisy_copies=copies, clean=True)
    logits = model.output_layer(hidden.flatten(0, 2)).float()
    nll = F.cross_entropy(logits, corrupted.targets.flatten(), reduction="none")
    return nll * corrupted.weight.flatten()


def measure_peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square matrix product: the roof that utilisation is measured by."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        torch.matmul(a, b)
    seconds = [time_call(lambda: torch.matmul(a, b), device) for _ in range(10)]
    return 2 * size**3 / statistics.median(seconds) / 1e12


def measure_preset(
    groups: Any,
    name: str,
    config: RunConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
    documents: int,
) -> dict[str, Any]:
    """Everything of one preset.

    Args:
        groups: process groups of size 1.
        name: key of ``tools.bench.presets.PRESETS``.
        config: of ``tools.bench.presets.preset_config``.
        device: where.
        dtype: of the parameters.
        steps: timed steps of each side.
        documents: documents of a row.
    """
    job = ModelStep(groups, config, device=device, dtype=dtype, documents=documents)
    sides = sides_of(device)
    failed: dict[str, str] = {}
    rows = job.fit_rows(sides, failed)
    facts = _time_sides(job, sides, rows, steps, failed)
    compared = tuple(side for side in sides if side.name in facts)
    difference = None
    if len(compared) > 1:
        difference = _try(job, failed, "losses", partial(job.loss_difference, compared, rows))
    result: dict[str, Any] = {
        "preset": name,
        "config": PRESETS[name][0],
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "seq": job.seq,
        "block_size": config.diffusion.block_size,
        "rows": rows,
        "wanted_rows": config.train.micro_batch_size,
        "recompute": config.train.recompute,
        "documents": documents,
        "state_bytes": job.optimizer.state_bytes(),
        "loss_difference": difference,
        "names": [side.name for side in sides],
        "sides": facts,
        "failed": failed,
    }
    copies = None
    if sides[0].name in facts:
        copies = _try(job, failed, "noise copies", partial(_copies, job, sides[0], rows, steps))
    result["noise_copies"] = copies or {}
    del job
    gc.collect()
    return result


def _try(job: ModelStep, failed: dict[str, str], name: str, run: Callable[[], Any]) -> Any:
    """What a call gives; None if it fails, with the reason in ``failed``: what was measured stays."""
    try:
        return run()
    except Exception as error:
        failed[name] = failure_of(error)
    forget_failure(job.model, job.device)
    return None


def _time_sides(
    job: ModelStep, sides: tuple[Side, ...], rows: int, steps: int, failed: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Time steps of the sides in turns; facts of those that did not fail."""
    measured = {side.name: Measured() for side in sides}
    for number in range(steps):
        for side in sides if number % 2 == 0 else sides[::-1]:
            if side.name in failed:
                continue
            timed = _try(job, failed, side.name, partial(job.step, side, rows, number))
            if timed is not None:
                measured[side.name].parts.append(timed[0])
                measured[side.name].selected.append(timed[1])
    facts = {}
    for side in sides:
        if side.name not in failed:
            found = _try(job, failed, side.name, partial(_facts, job, side, rows, measured[side.name]))
            facts |= {} if found is None else {side.name: found}
    return facts


def _facts(job: ModelStep, side: Side, rows: int, measured: Measured) -> dict[str, Any]:
    """Medians, memory and attention alone of one side."""
    seconds = statistics.median(measured.totals)
    selected = round(statistics.mean(measured.selected))
    above = peak_bytes(lambda: job.step(side, rows, 0), job.device)
    # After the peak, which what is compiled here would be part of.
    forget_compiled(side.backend)
    attention = job.attention(side.backend, rows)
    attention()
    alone = [time_call(attention, job.device) for _ in range(3)]
    return {
        "backend": side.backend,
        "full_rows": side.full_rows,
        "seconds": seconds,
        "raw": measured.totals,
        "tokens_per_second": rows * job.seq / seconds,
        "selected": selected,
        "useful_flops": job.flops(rows, selected),
        "peak_bytes": job.optimizer.state_bytes() + above,
        "parts": {
            part: statistics.median(parts[part] for parts in measured.parts) for part in measured.parts[0]
        },
        "attention_alone_seconds": statistics.median(alone),
    }


def _copies(job: ModelStep, side: Side, rows: int, steps: int) -> dict[str, Any]:
    """Seconds of a step per noisy token, for several noisy copies over one clean stream; None: no memory."""
    times: dict[int, list[float]] = {}
    for copies in COPIES:
        try:
            job.step(side, rows, 0, copies)
            times[copies] = []
        except torch.cuda.OutOfMemoryError:
            pass
    forget_failure(job.model, job.device)
    for number in range(max(3, steps // 2)):
        for copies, values in times.items():
            values.append(sum(job.step(side, rows, number, copies)[0].values()))
    return {
        str(copies): _per_token(times[copies], rows * job.seq * copies) if copies in times else None
        for copies in COPIES
    }


def _per_token(times: list[float], tokens: int) -> dict[str, Any]:
    seconds = statistics.median(times)
    return {"seconds": seconds, "seconds_per_noisy_token": seconds / tokens, "raw": times}
