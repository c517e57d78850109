"""Faults on request: the right one, on the right rank, once."""

import errno
import signal
import subprocess
import sys
import time

import pytest

from bdtrain.errors import ConfigError
from bdtrain.train.faults import Faults


def faults(text, rank=0):
    return Faults.from_environment({"BDTRAIN_FAULT": text}, rank)


def test_nothing_happens_without_the_variable():
    none = Faults.from_environment({}, 0)
    assert not any(none.at(phase, step) for phase in ("data", "forward", "save") for step in range(3))


def test_fault_happens_once_on_its_rank_in_its_phase_and_step():
    ours = faults("1:3:forward:nan_loss; 0:3:forward:nan_loss", rank=1)
    asked = [(step, phase) for step in (2, 3, 3, 4) for phase in ("data", "forward")]
    assert [ours.at(phase, step) for step, phase in asked] == [
        False,
        False,
        False,
        True,
        False,
        False,
        False,
        False,
    ]
    assert not faults("1:3:forward:nan_loss", rank=0).at("forward", 3)
    assert faults("*:3:forward:nan_loss", rank=7).at("forward", 3)


def test_full_disk_and_exception_are_raised():
    ours = faults("0:1:save:enospc;0:2:step:exception")
    with pytest.raises(OSError) as caught:
        ours.at("save", 1)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="in step of step 2"):
        ours.at("step", 2)


def test_slow_step_takes_a_second():
    start = time.monotonic()
    assert faults("0:1:step:slow").at("step", 1) is False
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize(("kind", "number"), [("kill", signal.SIGKILL), ("term", signal.SIGTERM)])
def test_process_is_signalled(kind, number):
    code = (
        "from bdtrain.train.faults import Faults\n"
        f"faults = Faults.from_environment({{'BDTRAIN_FAULT': '0:2:data:{kind}'}}, 0)\n"
        "faults.at('data', 1); print('one', flush=True); faults.at('data', 2); print('two', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-number, "one\n")


@pytest.mark.parametrize(
    "text",
    [
        "kill",
        "0:1:forward",
        "0:x:forward:kill",
        "a:1:data:kill",
        "0:1:lunch:kill",
        "0:1:data:killl",
        "0:1:save:nan_loss",
    ],
)
def test_fault_that_would_never_happen_is_refused(text):
    with pytest.raises(ConfigError, match="BDTRAIN_FAULT"):
        faults(text)
