"""Generation's keys and values: cached logits equal the uncached ones, in fp32 and whatever the batch."""

import pytest
import torch

from bdtrain.errors import ShapeError
from bdtrain.model.cache import as_denoiser
from bdtrain.model.transformer import assemble_streams

ORDINARY = torch.tensor([i for i in range(29) if i != 4])


def two_stream_logits(model, case, *, copies=1, clean=True):
    tokens = assemble_streams(case.xt if copies else None, case.x0 if clean else None)
    rows = torch.ones(case.batch, copies or 1, case.seq, dtype=torch.bool)
    view = model(tokens, case.layout, noisy_copies=copies, clean=clean, rows=rows)
    return view.logits().detach()[:, :29].unflatten(0, (case.batch, copies or 1, case.seq))


@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_blocks_denoised_from_the_cache_equal_the_training_pass(build, make_case, shape, block_size):
    case = make_case(block_size=block_size)
    model = build(shape, dtype=torch.float32)
    wanted = two_stream_logits(model, case)[:, 0]
    denoiser = as_denoiser(model)
    cache = denoiser.start(case.batch, case.seq)
    for start in range(0, case.seq, block_size):
        place = slice(start, start + block_size)
        positions = torch.arange(start, start + block_size).expand(case.batch, -1)
        for _ in range(2):  # asking twice changes nothing: only `store` appends
            logits = denoiser.logits(case.xt[:, 0, place], positions, cache, False)
            assert logits.dtype == torch.float32
            torch.testing.assert_close(
                logits[..., ORDINARY], wanted[:, place][..., ORDINARY], rtol=1e-4, atol=2e-5
            )
        assert (logits[..., 4] == -torch.inf).all()
        denoiser.logits(case.x0[:, place], positions, cache, True)
        assert cache.lengths.tolist() == [start + block_size] * case.batch


def test_autoregression_token_by_token_equals_the_causal_pass(build, make_case):
    case = make_case(block_size=1)
    model = build(dtype=torch.float32)
    wanted = two_stream_logits(model, case, copies=0)[:, 0]
    denoiser = as_denoiser(model)
    cache = denoiser.start(case.batch, case.seq)
    for i in range(case.seq):
        logits = denoiser.logits(case.x0[:, i : i + 1], torch.full((2, 1), i), cache, True)
        torch.testing.assert_close(logits[:, 0, ORDINARY], wanted[:, i][:, ORDINARY], rtol=1e-4, atol=2e-5)


def test_the_whole_sequence_with_nothing_stored_is_mdlm(build, make_case):
    case = make_case(block_size=16)
    model = build(dtype=torch.float32)
    wanted = two_stream_logits(model, case, clean=False)[:, 0]
    denoiser = as_denoiser(model)
    positions = torch.arange(16).expand(2, -1)
    logits = denoiser.logits(case.xt[:, 0], positions, denoiser.start(2, 16), False)
    torch.testing.assert_close(logits[..., ORDINARY], wanted[..., ORDINARY], rtol=1e-4, atol=2e-5)


def test_rows_of_different_lengths_do_not_touch_each_other(build, make_case):
    """Row 0 stores 3 tokens, row 1 stores 8, row 2 none; each equals the same calls made alone."""
    case = make_case(batch=3)
    model = build()
    denoiser = as_denoiser(model)
    counts = [3, 8, 0]
    together = denoiser.start(3, 16)
    tokens = case.x0[:, :8]
    active = torch.arange(8) < torch.tensor(counts)[:, None]
    positions = torch.arange(8).expand(3, -1)
    denoiser.logits(tokens, positions, together, True, active)
    assert together.lengths.tolist() == counts
    place = torch.tensor(counts)[:, None] + torch.arange(4)
    noisy = torch.full((3, 4), 4)
    logits = denoiser.logits(noisy, place, together, False)
    for row, count in enumerate(counts):
        alone = denoiser.start(1, 16)
        if count:
            denoiser.logits(tokens[row : row + 1, :count], positions[:1, :count], alone, True)
        wanted = denoiser.logits(noisy[:1], place[row : row + 1], alone, False)
        torch.testing.assert_close(logits[row], wanted[0], rtol=1e-5, atol=1e-5)


def test_active_tokens_need_not_stand_at_the_left(build):
    denoiser = as_denoiser(build())
    active = torch.tensor([[False, True, False, True]])
    tokens, positions = torch.tensor([[9, 7, 9, 8]]), torch.tensor([[0, 0, 0, 1]])
    cache = denoiser.start(1, 8)
    logits = denoiser.logits(tokens, positions, cache, True, active)
    wanted = denoiser.logits(torch.tensor([[7, 8]]), torch.tensor([[0, 1]]), denoiser.start(1, 8), False)
    torch.testing.assert_close(logits[:, [1, 3]], wanted)
    assert cache.lengths.tolist() == [2]


def test_a_full_cache_and_wrong_shapes_are_refused(build):
    denoiser = as_denoiser(build())
    cache = denoiser.start(2, 4)
    tokens = torch.full((2, 5), 6)
    with pytest.raises(ShapeError, match="max_len=5"):
        denoiser.logits(tokens, torch.arange(5).expand(2, -1), cache, False)
    with pytest.raises(ShapeError, match="one shape"):
        denoiser.logits(tokens, torch.arange(5), cache, False)
    with pytest.raises(ShapeError, match="cache of 2"):
        denoiser.logits(tokens[:1], torch.arange(5)[None], cache, False)


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_sample_from_the_model_does_not_depend_on_its_batch(build, block_size):
    """Prompts of different lengths side by side and alone: the sampler over the real cache."""
    from bdtrain.diffusion.keyed import NoiseKey, Purpose
    from bdtrain.diffusion.sampler import generate

    denoiser = as_denoiser(build(mask_id=4))
    prompts = [[7, 8, 9, 10, 11], [12], [13, 14, 15, 16]]

    def run(some):
        return generate(
            denoiser,
            some,
            block_size=block_size,
            max_tokens=12,
            mask_id=4,
            eos_id=2,
            method="static",
            steps=2,
            temperature=0.0,
            key=NoiseKey(seed=1, purpose=Purpose.SAMPLE),
        )

    together = [sample.tokens for sample in run(prompts)]
    assert together == [run([prompt])[0].tokens for prompt in prompts]
    assert all(0 < len(tokens) <= 12 and 4 not in tokens for tokens in together)
