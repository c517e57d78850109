"""Limits of time inside each other, and a re-fit that takes too long: first an error, then the end."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

import bdtrain.refit.deadline as limits
from bdtrain.errors import RefitError
from bdtrain.refit.apart import GRACE_S
from bdtrain.refit.deadline import END_S, deadline, time_limit

LONG_S = 60.0


class InnerError(Exception):
    pass


class OuterError(Exception):
    pass


def timers():
    return signal.getitimer(signal.ITIMER_REAL)[0], signal.getsignal(signal.SIGALRM)


@pytest.fixture(autouse=True)
def _as_it_was():
    before = timers()
    yield
    assert timers() == before


def test_what_takes_too_long_is_interrupted():
    began = time.monotonic()
    with pytest.raises(InnerError), time_limit(0.05, InnerError):
        time.sleep(LONG_S)
    with time_limit(LONG_S, InnerError):
        pass
    assert time.monotonic() - began < LONG_S / 2


@pytest.mark.parametrize("inner_s", [0.02, LONG_S])
def test_each_of_two_limits_raises_its_own_error(inner_s):
    """Also after the inner one has rung, or ended: a limit inside another one does not take it back."""
    with pytest.raises(OuterError), time_limit(0.2, OuterError):
        with time_limit(LONG_S, InnerError):
            pass
        try:
            with time_limit(inner_s, InnerError):
                time.sleep(LONG_S)
        except InnerError:
            assert inner_s < LONG_S
        time.sleep(LONG_S)


def test_an_outer_limit_that_has_rung_does_not_ring_again():
    seen = []
    with time_limit(0.05, OuterError):
        try:
            with time_limit(LONG_S, InnerError):
                time.sleep(LONG_S)
        except OuterError:
            seen.append(timers()[0])
        # Its clean-up may take long.
        with time_limit(LONG_S, InnerError):
            time.sleep(0.1)
        time.sleep(0.1)
    assert seen == [0.0]


def test_a_thread_is_not_interrupted():
    done = []

    def work():
        with time_limit(0.01, InnerError):
            time.sleep(0.05)
        done.append(timers()[0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [0.0]


@pytest.fixture
def ends(monkeypatch):
    """Exit codes with which the process would have ended itself."""
    codes = []
    monkeypatch.setattr(limits, "os", SimpleNamespace(_exit=codes.append))
    return codes


def publish(folder):
    (folder / "new").write_text("{}")
    os.replace(folder / "new", folder / "schedule.json")


def test_a_re_fit_that_hangs_is_told_by_an_error(tmp_path, ends):
    # Of an earlier re-fit: nothing was written by this one.
    publish(tmp_path)
    with pytest.raises(RefitError) as found, deadline(0.05, tmp_path, alone=True):
        threading.Event().wait(LONG_S)
    assert str(found.value) == "the re-fit took longer than refit.deadline_s=0.05; nothing was written"
    assert not ends and END_S < GRACE_S


@pytest.mark.parametrize("before", [False, True])
def test_what_comes_after_the_schedule_is_left_out_when_it_takes_too_long(tmp_path, ends, capsys, before):
    if before:
        publish(tmp_path)
    with deadline(0.1, tmp_path, alone=True):
        publish(tmp_path)
        time.sleep(LONG_S)
    said = "the re-fit took longer than refit.deadline_s=0.1; its schedule is there, gradients are left out"
    assert capsys.readouterr().err == f"warning: {said}\n" and not ends


def test_an_error_of_the_re_fit_stays_what_it_is(tmp_path):
    with pytest.raises(RefitError, match="no room"), deadline(LONG_S, tmp_path, alone=True):
        publish(tmp_path)
        raise RefitError("no room")


@pytest.mark.parametrize(
    ("published", "alone", "code"), [(False, True, 8), (True, True, 0), (False, False, 8), (True, False, 8)]
)
def test_what_does_not_hear_an_error_ends_with_the_process(tmp_path, ends, capsys, published, alone, code):
    """Not well, where other checkpoints of a sweep were still to come."""
    with deadline(0.02, tmp_path, alone=alone, grace_s=0.05):
        if published:
            publish(tmp_path)
        began = time.monotonic()
        while not ends and time.monotonic() - began < LONG_S:
            try:
                time.sleep(0.01)
            except RefitError:
                continue
    assert ends == [code]
    left = "its schedule is there, gradients are left out" if published else "nothing was written"
    word = "warning" if code == 0 else "error"
    assert capsys.readouterr().err == f"{word}: the re-fit took longer than refit.deadline_s=0.02; {left}\n"
