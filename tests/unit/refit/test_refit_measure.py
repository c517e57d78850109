"""One pass over held-out rows: every block's record against a direct computation from full logits."""

import numpy as np
import pytest
import torch

from bdtrain.data.loader import FILLER_INDEX, Batch, ValidationSet, make_batch
from bdtrain.data.tokenizer import TokenizerInfo
from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.objectives.build import make_objective
from bdtrain.diffusion.plan import evaluation_plan
from bdtrain.diffusion.variance import BlockRecords
from bdtrain.model.build import build_model
from bdtrain.refit.measure import measure_blocks, read_blocks
from bdtrain.testing import single_process_groups, tiny_model_config
from bdtrain.validation.likelihood import evaluate_likelihood

PAD, BOS, EOS, MASK, FIRST, VOCAB, SEQ, SEED = 0, 1, 2, 4, 6, 29, 16, 5
CPU = torch.device("cpu")


class RaggedRows:
    """Short documents, some that begin with BOS, and rows that end in padding; a ``Source``."""

    def __init__(self, rows):
        self.seq_len, self.num_samples, self.fingerprint = SEQ, rows, {}
        self.tokenizer_info = TokenizerInfo(VOCAB, "0" * 64)
        self.byte_lengths = np.ones(VOCAB, dtype=np.int64)

    def row(self, number):
        generator = np.random.default_rng(number)
        tokens = generator.integers(FIRST, VOCAB, SEQ)
        tokens[generator.random(SEQ) < 0.1] = EOS
        if number % 3 == 0:
            tokens[0] = BOS
        if number % 4 == 0:
            tokens[-(1 + number % 7) :] = PAD
        return tokens


@pytest.fixture(scope="module")
def model():
    with single_process_groups() as groups:
        yield build_model(tiny_model_config(), pg_collection=groups, mask_id=MASK)


def objective_of(block_size):
    plan = evaluation_plan(block_size)
    return make_objective("block_diffusion", plan=plan, mask_id=MASK, vocab_size=VOCAB, seq_len=SEQ)


def measured(model, rows, *, block_size=4, batch_size=3, seed=SEED, part=None):
    return measure_blocks(
        model,
        objective_of(block_size),
        ValidationSet(RaggedRows(rows), part=part),
        batch_size=batch_size,
        seed=seed,
        device=CPU,
    )


@torch.no_grad()
def direct_records(model, rows, *, block_size, batch_size):
    """(row, n, k, g) of every block: the logits of all positions, and sums token by token."""
    source, objective = RaggedRows(rows), objective_of(block_size)
    found = []
    for start in range(0, rows, batch_size):
        numbers = list(range(start, min(start + batch_size, rows)))
        batch = make_batch(
            [source.row(number) for number in numbers], source.tokenizer_info, numbers, range(len(numbers))
        )
        layout = objective.layout(batch.documents)
        corrupted = objective.corrupt(
            batch.tokens,
            layout,
            batch.counted,
            key=NoiseKey(SEED, Purpose.REFIT),
            sample_index=batch.sample_index,
            batch_index=batch.batch_index,
            global_batch=batch_size,
            copies=1,
        )
        streams = torch.cat([corrupted.noisy.flatten(1), corrupted.clean], dim=1)
        everything = torch.ones_like(corrupted.rows)
        logits = model(streams, layout, noisy_copies=1, clean=True, rows=everything).logits()[:, :VOCAB]
        chances = logits.double().index_fill(1, torch.tensor([MASK]), float("-inf")).log_softmax(1)
        chances = chances.view(len(numbers), SEQ, VOCAB)
        for index, number in enumerate(numbers):
            for begin, end in sorted(
                set(zip(layout.block_start[index].tolist(), layout.block_end[index].tolist(), strict=True))
            ):
                block = range(begin, end)
                maskable = [place for place in block if bool(batch.counted[index, place])]
                hidden = [place for place in block if int(corrupted.noisy[index, 0, place]) == MASK]
                if hidden:
                    assert set(hidden) <= set(maskable)
                    nll = -sum(float(chances[index, p, int(batch.tokens[index, p])]) for p in hidden)
                    found.append((number, len(maskable), len(hidden), nll))
                else:
                    assert not maskable
    return found


@pytest.mark.parametrize("block_size", [1, 4, SEQ])
def test_every_record_is_the_sum_over_the_masked_tokens_of_its_block(model, block_size):
    found = measured(model, 13, block_size=block_size)
    wanted = direct_records(model, 13, block_size=block_size, batch_size=3)
    columns = list(zip(*wanted, strict=True))
    assert tuple(found.sequence.tolist()) == columns[0]
    assert tuple(found.maskable.tolist()) == columns[1]
    assert tuple(found.masked.tolist()) == columns[2]
    np.testing.assert_allclose(found.nll, columns[3], rtol=2e-6)
    # What makes the rows ragged is in them: short blocks, and rows without a full one at the end.
    assert found.sequences == 13 and (block_size == 1 or found.maskable.min() < found.maskable.max())


def test_counts_are_uniform_for_every_size_of_a_block(model):
    found = measured(model, 160, batch_size=16)
    for n in (3, 4):
        counts = np.bincount(found.masked[found.maskable == n], minlength=n + 1)
        assert counts[0] == 0 and len(counts) == n + 1
        expected = counts.sum() / n
        # Three standard deviations of independent draws; strata spread less.
        assert abs(counts[1:] - expected).max() < 3 * expected**0.5


def test_shards_of_whole_batches_add_up_to_the_same_bits(model):
    whole = measured(model, 20)
    shards = [measured(model, 20, part=part) for part in ((0, 6), (6, 15), (15, 20))]
    joined = BlockRecords.concatenate([shards[2], shards[0], shards[1]])
    for name, column in whole.to_arrays().items():
        np.testing.assert_array_equal(joined.to_arrays()[name], column)
    again = measured(model, 20)
    np.testing.assert_array_equal(again.nll, whole.nll)
    assert (measured(model, 20, seed=SEED + 1).masked != whole.masked).any()


def test_the_records_add_up_to_the_reported_bound(model):
    """Other draws of the same bound: equal within their noise."""
    rows = 60
    likelihood = evaluate_likelihood(
        model,
        objective_of(4),
        ValidationSet(RaggedRows(rows)),
        batch_size=12,
        seed=SEED,
        replicates=8,
        device=CPU,
        token_bytes=None,
        exact=False,
    )
    found = measured(model, rows, batch_size=12)
    assert found.maskable.sum() == likelihood.tokens
    bound = float((found.nll * found.maskable / found.masked).sum()) / likelihood.tokens
    # The eight draws' error is that of their mean: one draw has sqrt(8) of it.
    one_draw = likelihood.nelbo_noise_error * 8**0.5
    assert abs(bound - likelihood.nelbo) < 4 * (one_draw + likelihood.nelbo_noise_error)
    assert one_draw < 0.05 * likelihood.nelbo


def test_the_exact_loss_needs_no_noise_at_block_size_1(model):
    likelihood = evaluate_likelihood(
        model,
        objective_of(1),
        ValidationSet(RaggedRows(9)),
        batch_size=3,
        seed=SEED,
        replicates=1,
        device=CPU,
        token_bytes=None,
        exact=True,
    )
    found = measured(model, 9, block_size=1)
    assert set(found.maskable) == set(found.masked) == {1}
    assert float(found.nll.sum()) / found.blocks == pytest.approx(likelihood.nelbo, rel=1e-6)


def test_the_model_is_as_it_was_afterwards(model):
    for training in (True, False):
        model.train(training)
        measured(model, 3)
        assert model.training is training


def brute_blocks(sample_index, table):
    """(row, n, k, g): one token after the other."""
    found = []
    for row, number in enumerate(sample_index):
        blocks = {}
        for place in range(table.shape[2]):
            loss, masked, maskable, start = table[row, :, place]
            sums = blocks.setdefault(int(start), [0, 0, 0.0])
            sums[0] += int(maskable)
            sums[1] += int(masked)
            sums[2] += loss
        found += [(number, n, k, loss * k / n) for _, (n, k, loss) in sorted(blocks.items()) if k]
    return found


@pytest.mark.parametrize("seed", range(4))
def test_tables_are_summed_to_blocks_as_a_loop_does_it(seed):
    generator = np.random.default_rng(seed)
    rows, seq = 5, 12
    table = np.zeros((rows, 4, seq))
    for row in range(rows):
        cuts = np.unique(np.append(generator.integers(1, seq, 3), 0))
        table[row, 3] = cuts[np.searchsorted(cuts, np.arange(seq), side="right") - 1]
    table[:, 2] = generator.random((rows, seq)) < 0.8
    table[:, 1] = table[:, 2] * (generator.random((rows, seq)) < 0.5)
    table[:, 0] = table[:, 1] * generator.random((rows, seq))
    # The last row only fills up a batch: nothing in it can be masked.
    table[-1, :3] = 0
    index = torch.tensor([3, 5, 6, 40, FILLER_INDEX])
    empty = torch.zeros(rows, seq, dtype=torch.int64)
    found = read_blocks(Batch(empty, empty.int(), empty.bool(), index, index), table)
    wanted = list(zip(*brute_blocks(index.tolist(), table), strict=True))
    assert found.sequence.tolist() == list(wanted[0]) and FILLER_INDEX not in found.sequence
    assert found.maskable.tolist() == list(wanted[1])
    assert found.masked.tolist() == list(wanted[2])
    np.testing.assert_allclose(found.nll, wanted[3], rtol=1e-12)
