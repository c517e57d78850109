"""The pass of a re-fit on the training ranks: what goes wrong in it, on one rank and on one of several."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from bdtrain.config import RunConfig
from bdtrain.data.loader import ValidationSet
from bdtrain.data.synthetic import SyntheticSource
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.diffusion.variance import BlockRecords
from bdtrain.errors import DataError, RankError, RefitError
from bdtrain.refit import inline_backend
from bdtrain.refit.inline_backend import RowsInMemory, is_out_of_memory, measure_together, refit_inline
from bdtrain.testing import tiny_model_config
from tests.unit.checkpoint.layouts import ThreadRank

HUGE = 10**15


def fail(error):
    raise error


def allocate():
    """What PyTorch really says when a machine has no room."""
    return torch.empty(HUGE)


MEMORY = {
    "of PyTorch": allocate,
    "of Python": lambda: bytearray(1 << 60),
    "of a GPU": lambda: fail(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
}


@pytest.mark.parametrize("take", MEMORY.values(), ids=MEMORY)
def test_memory_that_is_not_enough_costs_a_single_rank_the_re_fit_alone(take):
    with pytest.raises(RefitError) as found:
        measure_together(take, batch_sequences=32, ranks=1)
    assert not isinstance(found.value, RankError)
    said = str(found.value)
    assert "ran out of memory" in said and "lower refit.batch_sequences (now 32)" in said
    assert "refit.placement=process or ray" in said and "\n" not in said


@pytest.mark.parametrize("take", MEMORY.values(), ids=MEMORY)
def test_one_of_several_ranks_that_runs_out_of_memory_ends_the_run_with_what_to_do(take):
    with pytest.raises(RankError, match="the others wait for it") as found:
        measure_together(take, batch_sequences=32, ranks=4)
    assert "lower refit.batch_sequences (now 32)" in str(found.value)


def test_what_a_failed_pass_took_is_free_when_the_run_goes_on():
    """The next step needs it."""
    taken = []

    def measure():
        activations = torch.zeros(1000)
        taken.append(weakref.ref(activations))
        allocate()

    gc.disable()
    try:
        with pytest.raises(RefitError) as found:
            measure_together(measure, batch_sequences=1, ranks=1)
        assert taken[0]() is None
    finally:
        gc.enable()
    assert found.value.__context__ is None and found.value.__cause__ is None


@pytest.mark.parametrize("error", [ValueError("a shape"), RuntimeError("an index"), ZeroDivisionError()])
def test_anything_else_costs_a_single_rank_the_re_fit_and_several_their_run(error):
    with pytest.raises(RefitError, match=f"the pass of the re-fit failed .{type(error).__name__}: "):
        measure_together(lambda: fail(error), batch_sequences=1, ranks=1)
    with pytest.raises(type(error)):
        measure_together(lambda: fail(error), batch_sequences=1, ranks=2)


def test_errors_of_ours_are_those_of_all_ranks_and_a_disk_is_that_of_one():
    """A ``DataError`` would be taken for one that this rank met alone."""
    for ranks in (1, 2):
        with pytest.raises(RefitError, match="too few") as found:
            measure_together(lambda: fail(DataError("too few")), batch_sequences=1, ranks=ranks)
        assert type(found.value) is RefitError
    with pytest.raises(RankError, match="Stale"):
        measure_together(lambda: fail(OSError(116, "Stale file handle")), batch_sequences=1, ranks=2)


def test_records_are_handed_on():
    records = {4: object()}
    assert measure_together(lambda: records, batch_sequences=1, ranks=2) is records


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_the_libraries_of_a_gpu_have_words_of_their_own_for_it(said):
    with pytest.raises(RankError, match=r"ran out of memory.*lower refit\.batch_sequences"):
        measure_together(lambda: fail(RuntimeError(said)), batch_sequences=8, ranks=2)


def test_other_errors_are_none_of_memory():
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))
    assert not is_out_of_memory(ValueError("not enough memory"))


def rows():
    return SyntheticSource(split="valid", seq_len=32, seed=5, vocab_size=50, tokens=40 * 32)


class Refusing(SyntheticSource):
    """A split of which a disk does not give one row, from the second time on or at once."""

    def __init__(self, error, given=0):
        super().__init__(split="valid", seq_len=32, seed=5, vocab_size=50, tokens=40 * 32)
        self.error, self.given = error, given

    def row(self, number):
        if number == 3:
            self.given -= 1
            if self.given < 0:
                raise self.error
        return super().row(number)


def refit(folder, source, communicator):
    config = RunConfig.model_validate(
        {
            "model": tiny_model_config(),
            "data": {"kind": "synthetic", "seq_len": 32},
            "diffusion": {"block_size": 4},
            "train": {"steps": 1, "global_batch_size": 8},
            "refit": {"mode": "clip", "placement": "inline", "bootstrap_draws": 50},
        }
    )
    refit_inline(
        None,
        config,
        source,
        NoisePlan(4),
        folder=folder,
        run_uid="u",
        step=5,
        version=1,
        device=torch.device("cpu"),
        communicator=communicator,
    )


def on_each(world, do):
    """What each rank raised, or None; the ranks are threads."""
    shared = {"barrier": threading.Barrier(world)}
    with ThreadPoolExecutor(world) as pool:
        ranks = [pool.submit(do, ThreadRank(rank, world, shared)) for rank in range(world)]
        return [rank.exception(timeout=60) for rank in ranks]


@pytest.fixture
def passes(monkeypatch):
    """The rows of each pass; the pass itself is left out, and its records are of no interest."""
    found = []

    def measure_blocks(model, objective, held_out, *, batch_size, **_):
        list(held_out.batches(batch_size, dp_rank=1, dp_size=2))
        batches = list(held_out.batches(batch_size))
        found.append(torch.cat([batch.tokens for batch in batches]))
        count = 8 * len(held_out.numbers)
        masked = np.tile([1, 2, 3, 4], count // 4)
        return BlockRecords(np.repeat(held_out.numbers, 8), np.full(count, 4), masked, 2.0 * masked)

    monkeypatch.setattr(inline_backend, "measure_blocks", measure_blocks)
    return found


@pytest.mark.parametrize(
    "error", [DataError("shard 7 has another checksum"), OSError(116, "Stale file handle"), MemoryError()]
)
@pytest.mark.parametrize("where", [0, 1])
def test_a_row_that_one_rank_cannot_read_costs_all_ranks_the_re_fit_and_none_its_run(
    tmp_path, passes, error, where
):
    """None is in the pass, where the others would wait for it."""
    sources = [Refusing(error) if rank == where else rows() for rank in range(2)]
    raised = on_each(2, lambda rank: refit(tmp_path, sources[rank.rank], rank))
    assert [type(one) for one in raised] == [RefitError, RefitError] and str(raised[0]) == str(raised[1])
    assert f"rank {where} could not read" in str(raised[0]) and type(error).__name__ in str(raised[0])
    assert passes == [] and list(tmp_path.iterdir()) == []


def test_the_pass_reads_no_disk_and_has_the_rows_that_are_on_it(tmp_path, passes):
    """Each row is given once: what is asked for again would be refused."""
    wanted = torch.cat([batch.tokens for batch in ValidationSet(rows()).batches(8)])
    raised = on_each(2, lambda rank: refit(tmp_path, Refusing(DataError("gone"), given=1), rank))
    assert raised == [None, None] and len(passes) == 2
    assert all(torch.equal(one, wanted) for one in passes)
    assert (tmp_path / "schedule.json").exists()


def test_rows_in_memory_are_no_views_of_a_file_that_may_go():
    class Mapped(SyntheticSource):
        kept = np.arange(32)

        def row(self, number):
            return self.kept

    source = Mapped(split="valid", seq_len=32, seed=5, vocab_size=50, tokens=40 * 32)
    read = RowsInMemory(source, [2])
    source.kept[:] = 0
    assert read.row(2).tolist() == list(range(32))


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("judge", DataError("too few blocks"), "the search failed .DataError: too few blocks"),
        ("publish", OSError(28, "No space left on device"), "could not be written .*No space left"),
    ],
)
def test_what_the_first_rank_meets_after_the_pass_is_a_failed_re_fit(
    tmp_path, passes, monkeypatch, name, error, said
):
    """Of several ranks only such an error gives the weights back, as the others do then."""
    monkeypatch.setattr(inline_backend, name, lambda *_, **__: fail(error))
    first, second = on_each(2, lambda rank: refit(tmp_path, rows(), rank))
    assert type(first) is RefitError and second is None
    with pytest.raises(RefitError, match=said):
        raise first
