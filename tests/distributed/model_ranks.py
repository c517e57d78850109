"""What two ranks compute for test_model_layouts.py: split models beside their serial twins."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

MASK, VOCAB, SEQ, BLOCK, BATCH = 4, 29, 16, 4, 2
CPU = torch.device("cpu")
RAGGED = [[0] * 5 + [1] * 9 + [2] * 2, [0] * 3 + [1] * 13]
"""Documents whose last blocks are short; none begins where the ranks' halves meet."""
OBJECTIVES = {"block_diffusion": 1, "block_diffusion_2": 2, "mdlm": 2, "ar": 1}
SHAPES = ("qwen3", "bd3lm")
RECOMPUTE = ("none", "core_attn", "full")


def start() -> list[dist.ProcessGroup]:
    """Join the world; a group of one for each rank."""
    from bdtrain.parallel.cpu import install_cpu_shim
    from bdtrain.parallel.libraries import prepare_libraries

    prepare_libraries()
    torch.set_num_threads(1)
    install_cpu_shim()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ["BDTRAIN_RENDEZVOUS"], rank=rank, world_size=world)
    return [dist.new_group([r]) for r in range(world)]


def make_grid(tp: int, pp: int):
    """Megatron's grid anew, as a collection."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    return ProcessGroupCollection.use_mpu_process_groups()


def alone(group: dist.ProcessGroup):
    """A collection for one rank by itself."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    names = ("tp", "pp", "cp", "dp", "dp_cp", "embd", "pos_embd", "mp", "tp_cp")
    collection = ProcessGroupCollection()
    for name in names:
        setattr(collection, name, group)
    return collection


def make_objective_of(name: str):
    from bdtrain.diffusion.objectives.build import make_objective
    from bdtrain.diffusion.plan import NoisePlan

    return make_objective(
        name.removesuffix("_2"), plan=NoisePlan(BLOCK), mask_id=MASK, vocab_size=VOCAB, seq_len=SEQ
    )


def make_micro_batch(name: str, *, seed: int = 0, dtype=torch.float64):
    """Corrupted rows of the objective, the same on every rank; weights in the type of the losses."""
    from bdtrain.diffusion.keyed import NoiseKey, Purpose
    from bdtrain.diffusion.micro_batch import corrupt_rows

    generator = torch.Generator().manual_seed(seed)
    rows = SimpleNamespace(
        tokens=torch.randint(MASK + 1, VOCAB, (BATCH, SEQ), generator=generator),
        documents=torch.tensor(RAGGED, dtype=torch.int32),
        counted=torch.ones(BATCH, SEQ, dtype=torch.bool),
        sample_index=torch.arange(BATCH) + 10 * seed,
        batch_index=torch.arange(BATCH),
    )
    micro_batch = corrupt_rows(
        make_objective_of(name),
        rows,
        key=NoiseKey(3, Purpose.TRAIN, seed),
        global_batch_size=BATCH,
        copies=OBJECTIVES[name],
        device=CPU,
    )
    corrupted = replace(micro_batch.corrupted, weight=micro_batch.corrupted.weight.to(dtype))
    return replace(micro_batch, corrupted=corrupted)


def build_pair(shape: str, serial_groups, groups, *, dtype=torch.float64, serial_dtype=None, **layout):
    """A serial model and this rank's part of the same one; norms and biases away from 1 and 0."""
    from bdtrain.model.build import build_model
    from bdtrain.model.weights import full_state, load_full_state
    from bdtrain.testing import tiny_model_config

    section = tiny_model_config(shape, num_layers=4)
    serial = build_model(section, pg_collection=serial_groups, mask_id=MASK, dtype=serial_dtype or dtype)
    split = build_model(section, pg_collection=groups, mask_id=MASK, dtype=dtype, **layout)
    state = full_state(serial)
    for number, (name, value) in enumerate(state.items()):
        if "layernorm" in name or name.endswith("bias"):
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
            state[name] = (value + 0.3 * noise).to(dtype)
    load_full_state(serial, state)
    load_full_state(split, state)
    return serial, split


def run_stage(model, name: str, micro_batches) -> Tensor | None:
    """Forward and backward through Megatron's schedule; the summed loss on the last stage."""
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from bdtrain.model.forward import forward_stage, stream_rows
    from bdtrain.parallel.cpu import schedule_device_context

    objective = make_objective_of(name)

    def step(batches, module):
        output = forward_stage(module, objective, next(batches))

        def reduce(losses):
            return losses.sum(), torch.zeros((), dtype=torch.int), losses.detach().sum()

        return output, reduce

    with schedule_device_context():
        sums = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(micro_batches),
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=stream_rows(micro_batches[0]),
            micro_batch_size=BATCH,
            forward_only=False,
        )
    return torch.stack(sums).sum() if sums else None


def run_serial(model, name: str, micro_batches) -> Tensor:
    """The same without a schedule."""
    from bdtrain.model.forward import forward_losses

    objective = make_objective_of(name)
    losses = [forward_losses(model, objective, micro_batch).sum() for micro_batch in micro_batches]
    torch.stack(losses).sum().backward()
    return torch.stack(losses).sum().detach()


def gradient_errors(serial, split, group) -> dict[str, float]:
    """Largest difference of each gradient from the serial one's part, relative to its largest entry."""
    from bdtrain.model.init import global_parameters, take_shard

    wanted = {name: p.grad for name, p in global_parameters(serial)}
    errors = {}
    for name, parameter in global_parameters(split):
        if wanted[name] is None or parameter.grad is None:
            assert wanted[name] is None and parameter.grad is None, name
            continue
        part = take_shard(wanted[name], parameter, group.rank(), group.size())
        scale = wanted[name].abs().max().clamp(min=1e-300)
        errors[name] = ((parameter.grad - part).abs().max() / scale).item()
    return errors


def sum_partial_gradients(model, group) -> None:
    from bdtrain.model.gradients import partial_gradient_parameters

    for parameter in partial_gradient_parameters(model):
        dist.all_reduce(parameter.grad, group=group)


def compare_layouts(rank: int, world: int, layouts: list[list[int]]) -> dict:
    """Every objective and shape, and all recomputations, under some layouts [tp, pp, sequence parallelism].

    Returns:
        By layout: "cases" with the errors of each, and what else that layout was asked.
    """
    solo = alone(start()[rank])
    results = {}
    for tp, pp, sequence in layouts:
        groups = make_grid(tp, pp)
        told = results[f"tp{tp} pp{pp} sp{sequence}"] = {"cases": []}
        for number, (shape, name) in enumerate(itertools.product(SHAPES, OBJECTIVES)):
            # Each kind of recomputation meets each shape, and its objectives change from shape to shape.
            recompute = RECOMPUTE[number % len(RECOMPUTE)]
            layout = {"sequence_parallel": bool(sequence), "recompute": recompute}
            told["cases"].append(
                {"case": f"{shape} {name} {recompute}", **compare(shape, name, solo, groups, layout)}
            )
        told["bf16"] = [compare_bf16(s, solo, groups, bool(sequence)) for s in SHAPES]
        if sequence:
            told["refused"] = refusals(solo, groups)
        if pp == 1 and not sequence:
            told["view"] = compare_views(solo, groups)
            told["denoiser"] = max(compare_denoisers(shape, solo, groups) for shape in SHAPES)
    return results


def compare(shape: str, name: str, solo, groups, layout: dict) -> dict:
    """One case: errors of the loss and of the gradients, before and after the sum of the partial ones."""
    from bdtrain.model.init import global_parameters

    serial, split = build_pair(shape, solo, groups, **layout)
    micro_batches = [make_micro_batch(name, seed=seed) for seed in (1, 2, 3)]
    wanted = run_serial(serial, name, micro_batches)
    loss = run_stage(split, name, micro_batches)
    before = gradient_errors(serial, split, groups.tp)
    sum_partial_gradients(split, groups.tp)
    after = gradient_errors(serial, split, groups.tp)
    marked = [n for n, p in global_parameters(split) if getattr(p, "partial_gradient", False)]
    return {
        "loss": None if loss is None else ((loss - wanted).abs() / wanted.abs()).item(),
        "gradient": max(after.values()),
        "compared": len(after),
        "parameters": sum(1 for _ in split.parameters()),
        "partial": {n: before[n] for n in marked if n in before},
        "marked": len(marked),
        "whole": max(error for n, error in before.items() if n not in marked),
    }


def compare_bf16(shape: str, solo, groups, sequence: bool) -> dict:
    """A bfloat16 part beside the serial model with the same weights in float32."""
    errors = {"finite": True, "loss": 0.0, "gradient": 0.0, "dtypes": []}
    for name, recompute in (("block_diffusion_2", "full"), ("ar", "core_attn"), ("mdlm", "none")):
        serial, split = build_pair(
            shape,
            solo,
            groups,
            dtype=torch.bfloat16,
            serial_dtype=torch.float32,
            sequence_parallel=sequence,
            recompute=recompute,
        )
        batches = [make_micro_batch(name, dtype=torch.float32)]
        wanted, loss = run_serial(serial, name, batches), run_stage(split, name, batches)
        if loss is None:  # an earlier stage
            loss = wanted
        sum_partial_gradients(split, groups.tp)
        gradients = [p.grad for p in split.parameters() if p.grad is not None]
        errors["finite"] &= all(bool(g.isfinite().all()) for g in gradients) and bool(loss.isfinite())
        errors["loss"] = max(errors["loss"], ((loss - wanted).abs() / wanted.abs()).item())
        errors["gradient"] = max(errors["gradient"], overall_error(serial, split, groups.tp))
        errors["dtypes"] = sorted({*errors["dtypes"], *(str(g.dtype) for g in gradients), str(loss.dtype)})
    return errors


def refusals(solo, groups) -> list[str]:
    """What a model that splits sequences says to what it cannot do."""
    from bdtrain.diffusion.visibility import build_layout
    from bdtrain.errors import ShapeError
    from bdtrain.model.cache import as_denoiser

    _, split = build_pair("qwen3", solo, groups, sequence_parallel=True)
    layout = build_layout(torch.zeros(1, 7, dtype=torch.int32), BLOCK, isolate=True)
    tokens = torch.full((1, 14), 5)
    told = []
    for ask in (
        lambda: split(tokens, layout, noisy_copies=1, clean=True),
        lambda: as_denoiser(split),
    ):
        try:
            ask()
        except ShapeError as error:
            told.append(str(error))
    return told


def overall_error(serial, split, group) -> float:
    """Relative L2 difference of all gradients of this rank together."""
    from bdtrain.model.init import global_parameters, take_shard

    wanted = {name: p.grad for name, p in global_parameters(serial)}
    difference, size = 0.0, 0.0
    for name, parameter in global_parameters(split):
        if parameter.grad is None:
            continue
        part = take_shard(wanted[name], parameter, group.rank(), group.size()).double()
        difference += (parameter.grad.double() - part).square().sum().item()
        size += part.square().sum().item()
    return (difference / size) ** 0.5


def compare_views(solo, groups) -> dict[str, float]:
    """Each method of the view over a split vocabulary, values and gradients of the hidden states."""
    from bdtrain.model.head import ParallelVocabView

    serial, split = build_pair("bd3lm", solo, groups)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(7, 32, dtype=torch.float64, generator=generator)
    ids = torch.tensor([0, 5, 13, 15, 16, 17, 28])  # on both sides of the cut at 16
    weight = torch.randn(7, dtype=torch.float64, generator=generator)
    questions = {
        "nll": lambda view: view.nll(ids),
        "logsumexp": lambda view: view.logsumexp(),
        "values_at": lambda view: view.values_at(ids),
        "maximum": lambda view: view.maximum(),
        "sum_over_vocab": lambda view: view.sum_over_vocab((view.logits() / 3).exp()),
    }
    errors = {}
    for name, ask in questions.items():
        answers = []
        for model in (serial, split):
            given = hidden.clone().requires_grad_()
            answer = ask(ParallelVocabView(given, model.output_layer))
            if answer.requires_grad:
                (answer * weight).sum().backward()
            answers.append((answer.detach(), given.grad))
        (a, grad_a), (b, grad_b) = answers
        errors[name] = ((a - b).abs().max() / a.abs().max()).item()
        if grad_a is not None:
            errors[f"{name} gradient"] = ((grad_a - grad_b).abs().max() / grad_a.abs().max()).item()
    return errors


def compare_denoisers(shape: str, solo, groups) -> float:
    """Logits of a stored block, then of a ragged one on top: largest difference."""
    from bdtrain.model.cache import as_denoiser

    pair = build_pair(shape, solo, groups)
    tokens = make_micro_batch("ar").corrupted.clean
    assert tokens is not None
    answers = []
    for denoiser in map(as_denoiser, pair):
        cache = denoiser.start(BATCH, 12)
        first = denoiser.logits(tokens[:, :4], torch.arange(4).expand(BATCH, -1), cache, True)
        active = torch.tensor([[True] * 4, [True, True, False, False]])
        denoiser.logits(tokens[:, 4:8], torch.arange(4, 8).expand(BATCH, -1), cache, True, active)
        last = denoiser.logits(tokens[:, 8:10], cache.lengths[:, None] + torch.arange(2), cache, False)
        answers.append(torch.cat((first, last), 1))
    serial, split = answers
    assert serial.isfinite().equal(split.isfinite())
    keep = serial.isfinite()
    return ((serial - split)[keep].abs().max() / serial[keep].abs().max()).item()
