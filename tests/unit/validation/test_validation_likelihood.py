"""The reported likelihood: exact values where theory gives them, errors against repeated measurement."""

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from bdtrain.data.loader import FILLER_INDEX, Batch
from bdtrain.diffusion.objectives.build import make_objective
from bdtrain.diffusion.plan import evaluation_plan
from bdtrain.errors import DataError
from bdtrain.model.build import build_model
from bdtrain.testing import single_process_groups, tiny_model_config
from bdtrain.validation.likelihood import _Sums, evaluate_likelihood

MASK, EOS, VOCAB, SEQ = 4, 2, 29, 16


@pytest.fixture(scope="module")
def groups():
    with single_process_groups() as collection:
        yield collection


def stream_batches(documents, *, seq=SEQ, batch_size=3):
    """Rows cut from a stream of documents, each ended by EOS, as the data room cuts them."""
    stream = list(itertools.chain.from_iterable([*d, EOS] for d in documents))
    stream += [0] * (-len(stream) % seq)
    tokens = torch.tensor(stream).view(-1, seq)
    numbers = torch.zeros_like(tokens, dtype=torch.int32)
    for row, target in zip(tokens.tolist(), numbers, strict=True):
        number = 0
        for i, token in enumerate(row):
            target[i] = number if token else -1
            number += token == EOS
    index = torch.arange(len(tokens))
    parts = [slice(s, s + batch_size) for s in range(0, len(tokens), batch_size)]
    return [Batch(tokens[p], numbers[p], tokens[p] != 0, index[p], index[: len(tokens[p])]) for p in parts]


def random_documents(count, seed=0, longest=40):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(6, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@dataclass
class Rows:
    """Batches in the place of a validation set."""

    stored: list
    tokenizer_info = SimpleNamespace(eos_id=EOS)

    def batches(self, batch_size, *, dp_rank=0, dp_size=1):
        return self.stored


def measure(model, batches, *, algo="block_diffusion", block_size=4, seed=0, replicates=2, token_bytes=None):
    plan = None if algo == "ar" else evaluation_plan(block_size)
    objective = make_objective(algo, plan=plan, mask_id=MASK, vocab_size=VOCAB, seq_len=SEQ)
    return evaluate_likelihood(
        model,
        objective,
        Rows(batches),
        batch_size=3,
        seed=seed,
        replicates=replicates,
        device=torch.device("cpu"),
        token_bytes=token_bytes,
        exact=algo == "ar" or block_size == 1,
    )


@pytest.mark.parametrize(
    ("algo", "block_size"), [("block_diffusion", 4), ("block_diffusion", 1), ("mdlm", SEQ), ("ar", 1)]
)
def test_uniform_model_costs_the_logarithm_of_what_it_may_predict(groups, algo, block_size):
    model = build_model(tiny_model_config(), pg_collection=groups, mask_id=MASK)
    torch.nn.init.zeros_(model.output_layer.weight)
    batches = stream_batches(random_documents(12))
    bytes_each = torch.full((VOCAB,), 3)
    bytes_each[EOS] = 0
    found = measure(model, batches, algo=algo, block_size=block_size, token_bytes=bytes_each)
    assert found.nelbo == pytest.approx(math.log(VOCAB - 1), rel=1e-5)
    assert found.nelbo_noise_error == pytest.approx(0, abs=1e-6)
    assert found.nelbo_text_error == pytest.approx(0, abs=1e-5)
    assert found.ppl == pytest.approx(VOCAB - 1, rel=1e-4)
    assert found.bpb == pytest.approx(math.log2(VOCAB - 1) * found.tokens / found.text_bytes, rel=1e-5)
    if algo != "ar":
        assert found.tokens == sum(int(b.counted.sum()) for b in batches)
        assert found.text_units == 12


def test_result_does_not_depend_on_the_batch(groups):
    model = build_model(tiny_model_config(), pg_collection=groups, mask_id=MASK)
    documents = random_documents(15)
    one = measure(model, stream_batches(documents, batch_size=1))
    many = measure(model, stream_batches(documents, batch_size=7))
    assert many.nelbo == pytest.approx(one.nelbo, rel=1e-6)
    assert many.nelbo_noise_error == pytest.approx(one.nelbo_noise_error, rel=1e-4)
    assert many.nelbo_text_error == pytest.approx(one.nelbo_text_error, rel=1e-4)


def test_noise_error_covers_the_spread_over_seeds(groups):
    model = build_model(tiny_model_config(), pg_collection=groups, mask_id=MASK)
    batches = stream_batches(random_documents(15), batch_size=8)
    found = [measure(model, batches, seed=seed) for seed in range(24)]
    values = torch.tensor([f.nelbo for f in found])
    claimed = sum(f.nelbo_noise_error**2 for f in found) / len(found)
    # Strata make the true spread smaller than what rows taken as independent claim, never much larger.
    assert float(values.var()) < 1.6 * claimed
    assert float(values.var()) > 0.05 * claimed


def test_documents_are_numbered_through_the_whole_text():
    documents = random_documents(20, seed=4)
    documents[3] = documents[3][:1] * (
        2 * SEQ - 1 - sum(len(d) + 1 for d in documents[:3]) % SEQ
    )  # EOS ends a row
    batches = stream_batches(documents, batch_size=2)
    sums = _Sums(1, EOS)
    numbers = torch.cat([sums._number_documents(b).flatten() for b in batches])
    wanted = [n for n, d in enumerate(documents) for _ in range(len(d) + 1)]
    assert numbers[: len(wanted)].tolist() == wanted
    assert (numbers[len(wanted) :] == -1).all()


def test_a_row_that_was_left_out_parts_the_text(groups):
    (row,) = stream_batches([[7] * (6 * SEQ)], batch_size=6)[:1]
    kept = [row.tokens[[0, 1, 4]], row.documents[[0, 1, 4]], row.counted[[0, 1, 4]]]
    batch = Batch(*kept, row.sample_index[[0, 1, 4]], row.batch_index[:3])
    numbers = _Sums(1, EOS)._number_documents(batch)
    # Neighbours stay one part of the document; what follows the gap is another.
    assert numbers[0].unique().tolist() == numbers[1].unique().tolist() != numbers[2].unique().tolist()
    # A row of padding, as shards end with, is no gap; neither is what fills up a batch.
    padded = Batch(
        *(x[[0, 1, 2]].clone() for x in (row.tokens, row.documents, row.counted)), *([batch.sample_index] * 2)
    )
    padded.sample_index[:] = torch.tensor([0, 1, 2])
    padded.documents[1] = -1
    sums = _Sums(1, EOS)
    sums._number_documents(padded)
    assert not sums._gaps
    padded.sample_index[:] = torch.tensor([3, FILLER_INDEX, 4])
    sums._number_documents(padded)
    assert not sums._gaps
    model = build_model(tiny_model_config(), pg_collection=groups, mask_id=MASK)
    (rows,) = stream_batches([[7] * (40 * SEQ - 1)], batch_size=40)
    spread = torch.arange(0, 40, 3)
    sparse = Batch(
        *(x[spread] for x in (rows.tokens, rows.documents, rows.counted, rows.sample_index)), spread
    )
    found = measure(model, [sparse])
    assert (found.text_units, found.text_unit) == (14, "part")


def test_text_without_a_token_is_refused(groups):
    model = build_model(tiny_model_config(), pg_collection=groups, mask_id=MASK)
    empty = Batch(
        torch.zeros(1, SEQ, dtype=torch.int64),
        torch.full((1, SEQ), -1, dtype=torch.int32),
        torch.zeros(1, SEQ, dtype=torch.bool),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
    )
    with pytest.raises(DataError, match="no token to score"):
        measure(model, [empty])
