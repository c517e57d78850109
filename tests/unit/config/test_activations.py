"""Activations, disk and operations by arithmetic, against what autograd keeps and sums by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bdtrain.config import RunConfig, resolve_layout
from bdtrain.config.activations import ActivationEstimate, estimate_activations
from bdtrain.config.estimate import checkpoint_bytes, counted_attention, estimate_step_operations
from bdtrain.config.summary import format_duration, summarise, summarise_layout, summarise_time
from tests.unit.config.helpers import load

SIZES = (
    "model.hidden_size=64",
    "model.num_heads=4",
    "model.ffn_size=192",
    "model.attention_backend=dense",
    "data.seq_len=64",
    "data.synthetic_vocab_size=250",
    "train.steps=10",
    "train.global_batch_size=4",
    "diffusion.block_size=8",
)


@pytest.fixture(scope="module", autouse=True)
def one_world() -> Iterator[None]:
    """One set of process groups for all: what autograd keeps holds on to them, and each has threads."""
    from bdtrain.testing import single_process_groups

    with single_process_groups():
        yield


def run(*overrides: str) -> RunConfig:
    """A small run; an override replaces the value above of its key."""
    given = {text.partition("=")[0] for text in overrides}
    return load(*[text for text in SIZES if text.partition("=")[0] not in given], *overrides).config


def kept_bytes(config: RunConfig) -> int:
    """What autograd keeps after the forward pass of one micro-batch, weights aside; each memory once."""
    from bdtrain.data.build import build_loader
    from bdtrain.diffusion.build import build_objective, training_plan
    from bdtrain.diffusion.keyed import NoiseKey, Purpose
    from bdtrain.diffusion.micro_batch import corrupt_rows
    from bdtrain.model.build import build_model
    from bdtrain.model.forward import forward_losses
    from bdtrain.testing import single_process_groups

    rows = config.train.global_batch_size
    with (
        build_loader(config.data, seed=1, global_batch_size=rows) as loader,
        single_process_groups() as groups,
    ):
        info = loader.tokenizer_info
        model = build_model(
            config.model,
            pg_collection=groups,
            mask_id=info.mask_id,
            vocab_size=info.vocab_size,
            recompute=config.train.recompute,
        ).train()
        objective = build_objective(config.diffusion, config.data, info, training_plan(config.diffusion))
        micro = corrupt_rows(
            objective,
            loader.batch(0),
            key=NoiseKey(seed=1, purpose=Purpose.TRAIN, step=0),
            global_batch_size=rows,
            copies=config.diffusion.noise_copies,
            device=torch.device("cpu"),
        )
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            # Held, so that no later tensor takes its address.
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = forward_losses(model, objective, micro).sum()
        total = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
        del loss
    return total


@pytest.mark.parametrize("attention", ["dense", "triton"])
@pytest.mark.parametrize("recompute", ["none", "core_attn", "full"])
@pytest.mark.parametrize(
    "model",
    [
        ("model.num_kv_heads=2",),
        ("model.num_kv_heads=1",),
        ("model.num_kv_heads=4",),
        ("model.shape=bd3lm",),
        ("model.num_kv_heads=2", "diffusion.noise_copies=2", "data.documents=ignore"),
        ("model.num_kv_heads=2", "diffusion.algo=ar", "diffusion.block_size=null", "data.documents=ignore"),
    ],
    ids=["grouped", "one key head", "all heads", "bd3lm", "two copies of whole rows", "no mask"],
)
def test_a_layer_keeps_what_the_formula_says(
    model: tuple[str, ...], recompute: str, attention: str, request: pytest.FixtureRequest
) -> None:
    if attention == "triton":
        request.getfixturevalue("interpreted")
    measured, by_formula = [], []
    for layers in (1, 2):
        config = run(
            *model,
            f"model.num_layers={layers}",
            f"train.recompute={recompute}",
            f"model.attention_backend={attention}",
            # Few short rows: the kernels are interpreted here.
            "data.seq_len=16",
            "train.global_batch_size=2",
        )
        assert counted_attention(config) == attention
        measured.append(kept_bytes(config))
        by_formula.append(estimate_activations(config, resolve_layout(config, 1)).layers_bytes)
    # A recomputed layer keeps an empty tensor or two.
    assert measured[1] - measured[0] == pytest.approx(by_formula[1] - by_formula[0], rel=1e-3)


def test_the_whole_model_keeps_at_most_what_is_estimated() -> None:
    config = run("model.num_layers=8", "model.num_kv_heads=2")
    measured = kept_bytes(config)
    estimated = estimate_activations(config, resolve_layout(config, 1)).total_bytes
    # The last layer keeps little of the clean stream: half a layer of eight.
    assert 0.9 * estimated < measured < estimated


# fp32, 2 streams of 64 tokens, micro-batches of 1 row: R = 128 rows. Without a mask and without tp a row of a
# layer keeps 4 * 64 around the norms, 64 + 2 * 64 of the joint projection, rotated 64 + 64, result and copy
# 2 * 64, and 3 * 192 of the feed-forward part: 1280 numbers, 2 + 4 + 4 of norms and 4 sums. Masks: 64 * 128 +
# 64 * 64 = 12288.
ROW, MASKS = 4 * (1280 + 14), 4 * 12288
LAYER = 128 * ROW + MASKS
INPUT = 128 * 64 * 4


@pytest.mark.parametrize(
    ("backend", "changes", "expected"),
    [
        ("auto", (), "triton"),
        ("triton", ("diffusion.algo=mdlm", "diffusion.block_size=null", "data.documents=ignore"), "triton"),
        ("auto", ("diffusion.algo=mdlm", "diffusion.block_size=null", "data.documents=ignore"), "dense"),
        ("auto", ("diffusion.algo=ar", "diffusion.block_size=null", "data.documents=ignore"), "dense"),
        ("auto", ("diffusion.algo=ar", "diffusion.block_size=null", "data.documents=isolate"), "triton"),
        ("auto", ("model.head_dim=8",), "dense"),
        ("auto", ("model.head_dim=264",), "dense"),
        ("auto", ("model.head_dim=256",), "triton"),
        ("tree", (), "dense"),
        ("flex", (), "dense"),
    ],
)
def test_auto_is_counted_as_what_a_gpu_takes(backend: str, changes: tuple[str, ...], expected: str) -> None:
    assert counted_attention(run(f"model.attention_backend={backend}", *changes)) == expected


def test_the_head_sizes_counted_are_those_of_the_kernels(interpreted: None) -> None:
    from bdtrain.config.estimate import TRITON_HEAD_DIMS
    from bdtrain_kernels.block_attention.support import backend_reasons

    device = torch.device("cpu")  # interpreted here
    for head_dim in range(2, 300, 2):
        refused = bool(backend_reasons(device, head_dim=head_dim)["triton"])
        assert refused == (head_dim not in TRITON_HEAD_DIMS), head_dim


@pytest.mark.parametrize(
    ("ranks", "changes", "expected"),
    [
        (1, (), (1, 4 * LAYER)),
        # Without masks, and the result in one memory instead of two.
        (1, ("model.attention_backend=triton",), (1, 4 * 128 * (ROW - 4 * 64))),
        # Under sequence parallelism the result is reordered: two memories again.
        (
            2,
            ("model.attention_backend=triton", "parallel.tp=2", "parallel.sequence_parallel=true"),
            (1, 4 * 128 * 4 * (1280 // 2 + 2 + 4 + 2)),
        ),
        (
            1,
            ("model.attention_backend=triton", "train.recompute=full"),
            (1, 4 * INPUT + 128 * (ROW - 4 * 64) - INPUT),
        ),
        # Half of the norms' rows; half of projection, heads and feed-forward part; masks whole.
        (
            2,
            ("parallel.tp=2", "parallel.sequence_parallel=true"),
            (1, 4 * (128 * 4 * (1280 // 2 + 2 + 4 + 2) + MASKS)),
        ),
        (2, ("parallel.tp=2",), (1, 4 * (128 * 4 * (256 + 1024 // 2 + 2 + 4 + 2) + MASKS))),
        # The first of two stages holds two micro-batches of two layers.
        (2, ("parallel.pp=2",), (2, 2 * 2 * LAYER)),
        # With one micro-batch there is no second one to hold.
        (2, ("parallel.pp=2", "train.global_batch_size=1"), (1, 2 * LAYER)),
        # Inputs of four layers, and one layer made again.
        (1, ("train.recompute=full",), (1, 4 * INPUT + LAYER - INPUT)),
    ],
    ids=[
        "whole",
        "triton",
        "triton, sequence parallel",
        "triton, recomputed",
        "sequence parallel",
        "tp",
        "pp",
        "pp, one micro-batch",
        "recomputed",
    ],
)
def test_activations_follow_the_layout(
    ranks: int, changes: tuple[str, ...], expected: tuple[int, int]
) -> None:
    config = run("model.num_layers=4", "train.micro_batch_size=1", *changes)
    found = estimate_activations(config, resolve_layout(config, ranks))
    assert (found.micro_batches, found.layers_bytes) == expected


def test_the_last_stage_counts_where_its_head_is_the_largest_part() -> None:
    config = run(
        "model.num_layers=2", "train.micro_batch_size=1", "parallel.pp=2", "data.synthetic_vocab_size=100000"
    )
    # 32 of 64 tokens masked: picked rows, their norm, its gradient; the gradient of 100,096 rows of the head,
    # and all logits, which are less than a chunk may have.
    head = 3 * 32 * 64 * 4 + 100_096 * 64 * 4 + 32 * 100_096 * 4
    assert estimate_activations(config, resolve_layout(config, 2)) == ActivationEstimate(1, LAYER, head)


def test_logits_of_the_head_take_a_quarter_of_a_gib_at_most() -> None:
    config = run(
        "model.num_layers=2",
        "train.micro_batch_size=1",
        "data.synthetic_vocab_size=100000",
        "data.seq_len=4096",
    )
    found = estimate_activations(config, resolve_layout(config, 1)).head_bytes
    # 2048 rows; 670 of them have 256 MiB of logits, less a part of a row.
    assert found == 3 * 2048 * 64 * 4 + 100_096 * 64 * 4 + 670 * 100_096 * 4
    assert 2**28 - 100_096 * 4 < 670 * 100_096 * 4 <= 2**28


def test_ranks_that_share_the_head_keep_the_gradient_of_their_part() -> None:
    config = run("model.num_layers=2", "train.micro_batch_size=1", "parallel.tp=2", "train.precision=bf16")
    found = estimate_activations(config, resolve_layout(config, 2))
    # 250 tokens are padded to 256, 128 a rank. The weight's gradient in float32 and rounded, that of the
    # picked rows as it is made and as it leaves.
    assert found.head_bytes == 4 * 32 * 64 * 2 + 128 * 64 * (4 + 2)


def test_a_run_without_a_known_vocabulary_says_what_is_left_out(tmp_path) -> None:
    config = load(
        *(text for text in SIZES if "synthetic" not in text), "data.kind=corpus", f"data.path={tmp_path}"
    ).config
    layout = resolve_layout(config, 1)
    assert estimate_activations(config, layout).head_bytes == 0
    assert "left out: embedding and head" in summarise_layout(config, layout)
    assert "without the head" in summarise_time(config, layout)
    assert "a checkpoint without embedding and head" in summarise(config)


def test_a_checkpoint_has_weights_moments_and_average() -> None:
    assert checkpoint_bytes(1000, averaged=True) == 16_000
    assert checkpoint_bytes(1000, averaged=False) == 12_000


def test_disk_counts_the_checkpoint_that_is_being_written_and_those_kept_for_good() -> None:
    # 10 steps of 4 rows of 64 tokens: 2560 tokens, so two multiples of 1000.
    config = run("checkpoint={every_steps: 2, keep_last: 3, keep_every_tokens: 1000}", "optim.ema_decay=null")
    from bdtrain.config import count_parameters
    from bdtrain.config.summary import format_bytes

    size = 12 * count_parameters(config.model, 250).total
    assert (
        f"{format_bytes(size)} a checkpoint every 2 steps, {format_bytes(4 * size)} while 4 are there, "
        f"{format_bytes(2 * size)} for the 2 kept for good"
    ) in summarise(config)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("diffusion.noise_copies=3",),
        ("model.shape=bd3lm",),
        ("diffusion.algo=mdlm", "diffusion.block_size=null"),
        ("diffusion.algo=ar", "diffusion.block_size=null"),
    ],
    ids=["block diffusion", "copies", "bd3lm", "mdlm", "ar"],
)
def test_operations_are_those_of_the_model_with_every_pair_of_the_dense_form(
    changes: tuple[str, ...],
) -> None:
    from bdtrain.model.config import build_transformer_config
    from bdtrain.model.flops import count_step_flops

    config = run(*changes, "model.attention_backend=dense")
    noisy = 0 if config.diffusion.algo == "ar" else config.diffusion.noise_copies
    clean = config.diffusion.algo != "mdlm"
    ours = estimate_step_operations(config)
    of_noisy, of_clean = noisy * 64 * 64 * (1 + clean), clean * 64 * 64
    counted = count_step_flops(
        build_transformer_config(config.model, vocab_size=250, mask_id=4),
        rows=4,
        seq=64,
        noisy_copies=noisy,
        clean=clean,
        selected=4 * 64 * noisy // 2 or 4 * 64,
        pairs=4 * (of_noisy + of_clean),
        last_layer_pairs=4 * (of_noisy or of_clean),
    )
    assert (ours.linear, ours.attention, ours.head) == (counted.linear, counted.attention, counted.head)


def test_recomputation_costs_a_forward_pass() -> None:
    none, attention, full = (
        estimate_step_operations(run(f"train.recompute={mode}", "model.attention_backend=dense"))
        for mode in ("none", "core_attn", "full")
    )
    assert (attention.linear, 3 * attention.attention) == (none.linear, 4 * none.attention)
    assert (3 * full.linear, 3 * full.attention, full.head) == (
        4 * none.linear,
        4 * none.attention,
        none.head,
    )


@pytest.mark.parametrize("copies", [1, 3])
def test_operations_of_the_kernels_are_those_of_the_pairs_that_are_seen(copies: int) -> None:
    from bdtrain.diffusion.visibility import build_layout
    from bdtrain_kernels import dense_mask

    changes = ("data.documents=ignore", f"diffusion.noise_copies={copies}", "model.attention_backend=triton")
    config = run(*changes)
    layout = build_layout(torch.zeros(1, 64, dtype=torch.int32), config.diffusion.block_size, isolate=False)
    seen = [
        int(dense_mask(layout, noisy_copies=copies, clean=True, queries=queries).sum())
        for queries in ("all", "noisy")
    ]
    layers, queries = config.model.num_layers, config.model.num_heads * config.model.head_dim
    pairs = 4 * (seen[0] * (layers - 1) + seen[1])  # rows of a step
    # Two products forward, seven backward, each a multiplication and an addition.
    assert estimate_step_operations(config).attention == pairs * queries * 2 * (2 + 7)
    again = estimate_step_operations(run(*changes, "train.recompute=core_attn")).attention
    assert again == pairs * queries * 2 * (2 + 2 + 7)


def test_a_clip_range_changes_how_many_rows_reach_the_head() -> None:
    low = estimate_step_operations(run()).head
    high = estimate_step_operations(run("diffusion.plan.clip_range=[0.5,1]")).head
    assert high == pytest.approx(1.5 * low)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.5, "1.5 seconds"),
        (150, "2.5 minutes"),
        (7200, "2.0 hours"),
        (86400, "24.0 hours"),
        (864000, "10.0 days"),
    ],
)
def test_times_are_shown_in_the_largest_unit_they_fill_twice(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
