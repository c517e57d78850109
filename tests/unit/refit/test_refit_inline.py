"""The pass of a re-fit on the training ranks: what goes wrong in it, on one rank and on one of several."""

import gc
import weakref

import pytest
import torch

from bdtrain.errors import DataError, RankError, RefitError
from bdtrain.refit.inline_backend import is_out_of_memory, measure_together

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
    for ranks in (1, 2):
        with pytest.raises(DataError, match="too few"):
            measure_together(lambda: fail(DataError("too few")), batch_sequences=1, ranks=ranks)
    with pytest.raises(RankError, match="Stale"):
        measure_together(lambda: fail(OSError(116, "Stale file handle")), batch_sequences=1, ranks=2)


def test_records_are_handed_on():
    records = {4: object()}
    assert measure_together(lambda: records, batch_sequences=1, ranks=2) is records


def test_other_errors_are_none_of_memory():
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))
    assert not is_out_of_memory(ValueError("not enough memory"))
