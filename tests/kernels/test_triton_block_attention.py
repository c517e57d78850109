"""The Triton kernels of block_attention against explicit softmax in float64.

On a CPU they run under Triton's interpreter, which multiplies bfloat16 wrongly: float32 and float16 there.
On a GPU the same tests run compiled, bfloat16 too.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from kernel_cases import (
    DEVICE,
    DOCUMENTS,
    DTYPES,
    HandLayout,
    hand_layout,
    inputs,
    relative_error,
    row_layout,
)

from bdtrain_kernels import BackendUnavailableError, block_attention, dense_mask, prepare
from bdtrain_kernels.block_attention import triton_backend, triton_gradients, triton_kernels
from bdtrain_kernels.block_attention.reference import reference_attention

LENGTHS = (16, 50, 64, 77, 128, 256)
STREAMS = (  # copies, clean, queries
    (1, True, "all"),
    (1, True, "noisy"),
    (2, True, "all"),
    (0, True, "all"),
    (1, False, "all"),
    (2, False, "noisy"),
    (3, True, "noisy"),
)
HEADS = ((1, 1), (2, 2), (4, 2), (8, 1))
HEAD_DIMS = (16, 32, 64, 128, 24, 96, 256)
# Out and gradients. Rounding of float32 itself is 3e-7 here; on a GPU float32 products are exact ones.
TOLERANCE = {
    torch.float32: (2e-6, 2e-6),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (8e-3, 1.5e-2),
}


def block_sizes(seq: int) -> tuple[int, ...]:
    return (1, 3, 4, 7, 16, 64, seq, seq + 5)


def on_device(layout: HandLayout) -> HandLayout:
    vectors = (layout.block_start, layout.block_end, layout.doc_start, layout.doc_end)
    return HandLayout(*(x.to(DEVICE) for x in vectors), layout.block_size, layout.single_document)


def check(
    layout: HandLayout,
    streams: tuple[int, bool, str] = (1, True, "all"),
    *,
    tile: int | None = 32,
    dtype: torch.dtype = torch.float32,
    **case,
) -> None:
    """Output and gradients within the tolerance of float64 on the same rounded inputs."""
    copies, clean, queries = streams
    case.setdefault("heads", (1, 1))
    made = inputs(layout, copies=copies, clean=clean, queries=queries, **case)
    q, k, v, grad = (x.detach().to(DEVICE, dtype) for x in made)
    if case.get("sequence_first"):  # .to(dtype) keeps the order of axes but not the holes between heads
        q, k, v = (torch.cat((x, x), dim=-1)[..., : x.shape[3]] for x in (q, k, v))
    for x in (q, k, v):
        x.requires_grad_()
    prepared = prepare(on_device(layout), noisy_copies=copies, clean=clean, backend="triton", tile=tile)
    out = block_attention(q, k, v, prepared, noisy_copies=copies, clean=clean, queries=queries)
    found = (out, *torch.autograd.grad(out, (q, k, v), grad))
    doubles = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    mask = dense_mask(layout, noisy_copies=copies, clean=clean, queries=queries)
    expected = reference_attention(*doubles, mask)
    expected = (expected, *torch.autograd.grad(expected, doubles, grad.cpu().double()))
    assert out.shape == q.shape
    assert out.dtype == dtype
    # Where a row sees one key alone its gradient is 0: rounding is measured by what cancels.
    least = 0.1 * grad.float().norm().item()
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        error = relative_error(a, b, least)
        assert error <= TOLERANCE[dtype][name != "out"], f"{name}: {error:.1e}"  # NaN fails too


@pytest.mark.parametrize("seq", LENGTHS)
def test_output_and_gradients_equal_float64_at_every_length_and_block_size(seq):
    # Every block size at two lengths at least; the whole product is the test below.
    place = LENGTHS.index(seq)
    sizes = [size for i, size in enumerate(block_sizes(seq)) if (i + place) % 2 == 0]
    others = itertools.islice(zip(itertools.cycle(STREAMS), itertools.cycle(HEAD_DIMS)), place, None)
    for block_size in sizes:
        streams, head_dim = next(others)
        check(
            row_layout(1, seq, block_size),
            streams,
            tile=16 if seq < 50 else 32 if seq < 100 else 64,
            head_dim=head_dim,
        )


@pytest.mark.gpu  # an hour and more for the interpreter
@pytest.mark.parametrize("seq", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_matrix_of_lengths_block_sizes_streams_heads_and_head_sizes(seq, dtype):
    others = itertools.cycle(itertools.product(HEADS, HEAD_DIMS))
    for block_size, streams in itertools.product(block_sizes(seq), STREAMS):
        heads, head_dim = next(others)
        layout = row_layout(1, seq, block_size)
        check(layout, streams, tile=32, dtype=dtype, heads=heads, head_dim=head_dim)
    for documents, block_size, streams in itertools.product(DOCUMENTS.values(), (1, 4, 16, 90), STREAMS):
        heads, head_dim = next(others)
        layout = hand_layout(documents(seq), block_size)
        check(layout, streams, tile=16, dtype=dtype, heads=heads, head_dim=head_dim)


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_output_and_gradients_equal_float64_with_documents(documents):
    for block_size, streams in zip((1, 4, 16, 90), itertools.cycle(STREAMS[:3]), strict=False):
        check(hand_layout(DOCUMENTS[documents](50), block_size), streams, tile=16, heads=(1, 1))
    check(hand_layout(DOCUMENTS[documents](50), 4), (0, True, "all"), tile=16, heads=(1, 1))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision_is_right_to_its_rounding(dtype):
    check(row_layout(1, 64, 4), dtype=dtype, head_dim=64)
    check(row_layout(1, 72, 24), (2, True, "noisy"), dtype=dtype, head_dim=32)
    check(hand_layout([[40, 20, 4]], 8), dtype=dtype, heads=(4, 2), tile=16)


@pytest.mark.parametrize("heads", HEADS)
def test_query_heads_share_key_heads(heads):
    check(row_layout(2, 32, 4), heads=heads, tile=16)


def test_any_strides_are_taken():
    for streams in STREAMS[:3]:
        check(hand_layout([[20, 13], [31, 2]], 4), streams, sequence_first=True, tile=16)


def test_tiles_chosen_for_a_device_are_right():
    """The shapes that run on a GPU, more rows than one tile."""
    for dtype, head_dim in ((torch.float32, 32), (torch.float16, 64), (torch.float16, 128)):
        check(row_layout(1, 150, 16), tile=None, dtype=dtype, head_dim=head_dim, heads=(1, 1))


def test_output_and_gradient_do_not_depend_on_what_memory_held():
    """A row that no program writes would keep the poison."""
    layout = on_device(row_layout(1, 50, 7))
    made = inputs(layout, copies=2, clean=True, queries="all")
    q, k, v, grad = (x.detach().to(DEVICE) for x in made)
    vectors = vectors_of(layout)
    poison = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        torch.utils.deterministic.fill_uninitialized_memory = True  # empty() is NaN
        case = (2, True, True, 0.25, 16)
        out, lse = torch.ops.bdtrain_kernels.block_attention(q, k, v, *vectors, *case)
        grads = torch.ops.bdtrain_kernels.block_attention_backward(grad, q, k, v, out, lse, *vectors, *case)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = poison
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in (out, lse, *grads))


def test_lse_is_the_log_of_the_sum_over_the_seen_keys():
    layout = on_device(hand_layout([[20, 30]], 4))
    q, k, v, _ = (x.detach().to(DEVICE) for x in inputs(layout, copies=1, clean=True, queries="all"))
    vectors = vectors_of(layout)
    _, lse = torch.ops.bdtrain_kernels.block_attention(q, k, v, *vectors, 1, True, True, 0.25, 16)
    keys = k.double().repeat_interleave(2, dim=1)
    scores = torch.einsum("bhqd,bhkd->bhqk", q.double(), keys) * 0.25
    mask = dense_mask(layout, noisy_copies=1, clean=True)
    expected = scores.masked_fill(~mask, -torch.inf).logsumexp(-1) / torch.tensor(2.0).log()
    assert relative_error(lse, expected) < 1e-6


def test_no_position_sees_its_answer_not_even_in_one_bit():
    block_size, seq, changed = 4, 48, 14
    for documents in ([[48]], [[9, 22, 17]]):
        layout = hand_layout(documents, block_size)
        made = inputs(layout, copies=1, clean=True, queries="all", heads=(1, 1))
        q, k, v, grad = (x.detach().to(DEVICE) for x in made)
        start, doc = int(layout.block_start[0, changed]), int(layout.doc_start[0, changed])
        positions = torch.arange(seq)
        other = (layout.doc_start[0] != doc).repeat(2)
        before = torch.cat((positions < layout.block_end[0, changed], positions < start))
        blind = (other | before).to(DEVICE)
        prepared = prepare(on_device(layout), noisy_copies=1, backend="triton", tile=16)
        results = []
        for scale in (1.0, -30.0):
            moved = [x.clone() for x in (q, k, v)]
            for x in moved:
                x[:, :, seq + changed] *= scale
                x.requires_grad_()
            out = block_attention(*moved, prepared, noisy_copies=1)
            gradients = torch.autograd.grad(out, moved, grad * blind.view(1, 1, -1, 1))
            results.append((out.detach(), gradients))
        (out, gradients), (out_moved, gradients_moved) = results
        rows = blind.clone()
        rows[seq + changed] = False  # its own query was changed too
        assert torch.equal(out[:, :, rows], out_moved[:, :, rows])
        assert not torch.equal(out, out_moved)
        untouched = torch.arange(2 * seq, device=DEVICE) != seq + changed
        for a, b in zip(gradients, gradients_moved, strict=True):
            assert torch.equal(a[:, :, untouched], b[:, :, untouched])
        for gradient in gradients[1:]:
            assert not gradient[:, :, seq + changed].any()


def test_two_runs_are_equal_bit_for_bit_and_queries_noisy_is_a_part_of_all():
    layout = on_device(hand_layout([[30, 20]], 4))
    made = inputs(layout, copies=1, clean=True, queries="all")
    q, k, v, grad = (x.detach().to(DEVICE).requires_grad_() for x in made)
    runs = []
    for _ in range(2):
        out = block_attention(q, k, v, layout, noisy_copies=1, backend="triton")
        runs.append((out, *torch.autograd.grad(out, (q, k, v), grad.detach())))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    noisy = block_attention(q[:, :, :50], k, v, layout, noisy_copies=1, queries="noisy", backend="triton")
    assert torch.equal(noisy, runs[0][0][:, :, :50])


def test_scores_far_apart_stay_finite_and_right():
    layout = hand_layout([[20, 30]], 4)
    made = inputs(layout, copies=1, clean=True, queries="all")
    q, k, v, _ = (40.0 * x.detach().to(DEVICE) for x in made)
    out = block_attention(q, k, v, on_device(layout), noisy_copies=1, backend="triton")
    mask = dense_mask(layout, noisy_copies=1, clean=True)
    expected = reference_attention(q.cpu().double(), k.cpu().double(), v.cpu().double(), mask)
    # Scores of thousands: float32 rounding of a score moves a probability by 1e-4.
    assert relative_error(out, expected) < 1e-3


def vectors_of(layout: HandLayout) -> tuple[torch.Tensor, ...]:
    return tuple(
        x.contiguous() for x in (layout.block_start, layout.block_end, layout.doc_start, layout.doc_end)
    )


def odd_inputs(how: str) -> tuple[torch.Tensor, ...]:
    """q, k, v, grad of [2, 2, 64, 16] with strides that no allocation has."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    shape = (2, 2, 64, 16)
    if how == "expanded over the batch":
        return draw(*shape), draw(1, 2, 64, 16).expand(shape), draw(1, 2, 64, 16).expand(shape), draw(*shape)
    if how == "expanded over heads":
        return draw(2, 1, 64, 16).expand(shape), draw(2, 1, 64, 16).expand(shape), draw(*shape), draw(*shape)
    if how == "channels not last":
        return tuple(draw(2, 2, 16, 64).transpose(2, 3) for _ in range(4))
    return draw(*shape), draw(*shape), draw(*shape), draw(1, 1, 1, 1).expand(shape)  # of a sum()


ODD = ("expanded over the batch", "expanded over heads", "channels not last", "an expanded gradient")


@pytest.mark.parametrize("how", ODD)
def test_views_that_no_allocation_has_are_taken(how):
    layout = row_layout(2, 32, 4)
    q, k, v, grad = odd_inputs(how)
    for x in (leaves := [x.detach().requires_grad_() for x in (q, k, v)]):
        assert x.shape == (2, 2, 64, 16)
    out = block_attention(*leaves, on_device(layout), noisy_copies=1, backend="triton")
    found = (out, *torch.autograd.grad(out, leaves, grad))
    doubles = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    expected = reference_attention(*doubles, dense_mask(layout, noisy_copies=1, clean=True))
    expected = (expected, *torch.autograd.grad(expected, doubles, grad.cpu().double()))
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) <= 2e-6


@pytest.mark.parametrize("how", ODD[:3])
def test_the_operators_say_the_shapes_and_strides_that_they_return(how):
    layout = on_device(row_layout(2, 32, 4))
    q, k, v, grad = odd_inputs(how)
    case = (1, True, True, 0.25, 16)
    operators = torch.ops.bdtrain_kernels
    prepare(layout, noisy_copies=1, backend="triton")
    block_attention(q, k, v, layout, noisy_copies=1, backend="triton")  # registers them
    out, lse = operators.block_attention(q, k, v, *vectors_of(layout), *case)
    forward = (*(x.detach().requires_grad_() for x in (q, k, v)), *vectors_of(layout), *case)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.block_attention, forward, test_utils=tests)
    backward = (grad, q, k, v, out, lse, *vectors_of(layout), *case)
    torch.library.opcheck(
        operators.block_attention_backward, backward, test_utils=("test_schema", "test_faketensor")
    )


def test_head_sizes_and_types_without_a_kernel_are_refused():
    layout = on_device(row_layout(1, 16, 4))
    for change, text in (
        (lambda x: x[..., :12], "head_dim=12"),
        (lambda x: x.double(), "float64"),
    ):
        made = inputs(layout, copies=1, clean=True, queries="all")
        q, k, v, _ = (change(x.detach().to(DEVICE)) for x in made)
        with pytest.raises(BackendUnavailableError, match=text):
            block_attention(q, k, v, layout, noisy_copies=1, backend="triton")


def test_no_constant_of_the_kernels_depends_on_blocks_documents_or_length():
    """What Triton compiles again for; that nothing is compiled again is counted on a GPU, below."""
    kernels = (triton_kernels.forward, triton_gradients.backward_rows, triton_gradients.backward_keys)
    for kernel in kernels:
        names = kernel.arg_names
        assert not any("block_size" in name or "document" in name for name in names)
        unspecialised = _unspecialised(kernel)
        assert {"seq", "heads", "group", "copies", "row_streams"} <= unspecialised
    assert set(_constants()) == {"D", "PAD", "PRECISION"}


def _unspecialised(kernel) -> set[str]:
    found = getattr(kernel, "do_not_specialize", None) or kernel.kwargs["do_not_specialize"]
    return {name if isinstance(name, str) else kernel.arg_names[name] for name in found}


def _constants() -> dict:
    return triton_backend._constants(torch.zeros(1, 1, 1, 64))


@pytest.mark.gpu
def test_nothing_is_compiled_again_when_block_size_documents_or_length_change():
    def run(layout: HandLayout) -> None:
        made = inputs(layout, copies=1, clean=True, queries="all", heads=(2, 2), head_dim=64)
        q, k, v = (x.detach().cuda().requires_grad_() for x in made[:3])
        block_attention(q, k, v, on_device(layout), noisy_copies=1, backend="triton").sum().backward()

    kernels = (triton_kernels.forward, triton_gradients.backward_rows, triton_gradients.backward_keys)
    run(row_layout(1, 256, 4))
    compiled = [_compiled_forms(kernel) for kernel in kernels]
    assert min(compiled) > 0
    layouts = (row_layout(1, 256, 7), row_layout(1, 256, 256), hand_layout([[3, 200, 53]], 16))
    for layout in (*layouts, row_layout(1, 512, 16)):
        run(layout)
    assert [_compiled_forms(kernel) for kernel in kernels] == compiled


def _compiled_forms(kernel) -> int:
    return sum(len(cache[0]) for cache in kernel.device_caches.values())


@pytest.mark.gpu
@pytest.mark.parametrize("seq,block_size", ((1000, 16), (4096, 4), (4096, 1024)))
def test_long_rows_on_a_gpu_equal_float32_with_a_mask(seq, block_size):
    layout = on_device(row_layout(1, seq, block_size))
    made = inputs(layout, copies=1, clean=True, queries="all", heads=(4, 2), head_dim=128)
    q, k, v, grad = (x.detach().cuda().bfloat16().requires_grad_() for x in made)
    out = block_attention(q, k, v, layout, noisy_copies=1, backend="triton")
    found = (out, *torch.autograd.grad(out, (q, k, v), grad.detach()))
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    mask = dense_mask(layout, noisy_copies=1, clean=True)
    expected = reference_attention(*doubles, mask)
    expected = (expected, *torch.autograd.grad(expected, doubles, grad.detach().double()))
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert relative_error(a, b) <= TOLERANCE[torch.bfloat16][name != "out"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("flash", "flex"))
def test_the_other_backends_on_a_gpu_equal_float64(backend):
    for layout, streams in itertools.product(
        (row_layout(2, 256, 16), hand_layout([[100, 156]], 16)), STREAMS[:3]
    ):
        copies, clean, queries = streams
        made = inputs(layout, copies=copies, clean=clean, queries=queries, head_dim=64)
        q, k, v, grad = (x.detach().cuda().bfloat16().requires_grad_() for x in made)
        how = {"noisy_copies": copies, "clean": clean, "queries": queries}
        out = block_attention(q, k, v, on_device(layout), backend=backend, **how)
        found = (out, *torch.autograd.grad(out, (q, k, v), grad.detach()))
        doubles = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
        expected = reference_attention(*doubles, dense_mask(layout, **how))
        expected = (expected, *torch.autograd.grad(expected, doubles, grad.detach().cpu().double()))
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            assert relative_error(a, b) <= TOLERANCE[torch.bfloat16][name != "out"], name
