"""Ranks for tests: results come back, the first failure is the one shown, nothing stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bdtrain.testing import RankFailure, run_ranks


def meet_through_a_file(rank, world_size, factor):
    import torch
    import torch.distributed as dist

    assert "MASTER_ADDR" not in os.environ
    assert "MASTER_PORT" not in os.environ
    dist.init_process_group(
        "gloo", init_method=os.environ["BDTRAIN_RENDEZVOUS"], rank=rank, world_size=world_size
    )
    total = torch.tensor([float(rank + 1) * factor])
    dist.all_reduce(total)
    return {"total": total, "rank": rank, "local": int(os.environ["LOCAL_RANK"])}


def say(rank, world_size, *arguments):
    return [rank, world_size, float("inf") if rank else 0.1, *arguments]


def keys_that_json_would_change(rank, world_size):
    return {0: (rank, "a")}


def raise_late_in_one(rank, world_size, folder):
    if rank == 1:
        print("about to fail")
        (Path(folder) / "failing").touch()
        raise ValueError("the cause")
    assert wait_for(Path(folder) / "failing", 30)
    time.sleep(0.3)
    raise RuntimeError("seen later")


def clean_up_slower_than_the_peer_notices(rank, world_size):
    if rank == 0:
        time.sleep(0.1)
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    try:
        raise ValueError("the cause")
    finally:
        time.sleep(0.5)


def die_without_a_word(rank, world_size, folder):
    if rank == 0:
        assert wait_for(Path(folder) / "dying", 30)
        time.sleep(0.5)
        raise RuntimeError("noticed")
    (Path(folder) / "dying").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def leave_with_code_0(rank, world_size, folder):
    if rank == 1:
        os._exit(0)
    time.sleep(60)


def start_a_child_and_hang_in_one(rank, world_size, folder):
    child = subprocess.Popen(["sleep", "120"])
    new = Path(folder) / f"new-{rank}"
    new.write_text(str(child.pid))
    new.rename(Path(folder) / f"child-{rank}")
    if rank == 1:
        wait_in_a_function_of_this_name()


def wait_in_a_function_of_this_name():
    time.sleep(120)


def wait_for(path, seconds):
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    return path.exists()


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_ranks_meet_without_a_port_and_return_tensors_by_rank():
    results = run_ranks(meet_through_a_file, 2, 10)
    assert [result["rank"] for result in results] == [0, 1]
    assert [result["local"] for result in results] == [0, 1]
    assert [result["total"].item() for result in results] == [30.0, 30.0]


def test_values_come_back_as_they_were(tmp_path):
    target = f"{__file__}:say"
    assert run_ranks(target, 2, [1, None], tmp_path) == [
        [0, 2, 0.1, [1, None], str(tmp_path)],
        [1, 2, float("inf"), [1, None], str(tmp_path)],
    ]
    assert run_ranks(keys_that_json_would_change, 1) == [{0: (0, "a")}]


def test_first_failure_is_shown_with_its_traceback_and_output(tmp_path):
    with pytest.raises(RankFailure, match="the cause") as caught:
        run_ranks(raise_late_in_one, 2, tmp_path)
    assert caught.value.rank == 1
    assert "raise_late_in_one" in caught.value.report
    assert "about to fail" in caught.value.report


def test_cause_is_shown_although_the_peer_speaks_first():
    with pytest.raises(RankFailure, match="the cause") as caught:
        run_ranks(clean_up_slower_than_the_peer_notices, 2)
    assert caught.value.rank == 1


@pytest.mark.parametrize(
    ("function", "how"), [(die_without_a_word, "SIGKILL"), (leave_with_code_0, "exit code 0")]
)
def test_rank_that_dies_without_a_word_is_named(tmp_path, function, how):
    start = time.monotonic()
    with pytest.raises(RankFailure, match=how) as caught:
        run_ranks(function, 2, tmp_path)
    assert caught.value.rank == 1
    assert time.monotonic() - start < 30


def test_ranks_that_hang_say_where_and_leave_nothing(tmp_path):
    with pytest.raises(RankFailure, match="not finished after 8 s") as caught:
        run_ranks(start_a_child_and_hang_in_one, 2, tmp_path, timeout_s=8)
    assert "wait_in_a_function_of_this_name" in str(caught.value)
    assert caught.value.rank == 1
    children = [int((tmp_path / f"child-{rank}").read_text()) for rank in range(2)]
    # They are killed by now; a busy machine takes a moment to bury them.
    end = time.monotonic() + 20
    while any(is_alive(pid) for pid in children) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in children)


def test_ranks_end_when_their_parent_is_killed(tmp_path):
    code = (
        "import sys; from bdtrain.testing import run_ranks; "
        f"run_ranks({__file__ + ':start_a_child_and_hang_in_one'!r}, 2, sys.argv[1])"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert wait_for(tmp_path / "child-1", 30)
    finally:
        parent.kill()
        parent.wait()
    child = int((tmp_path / "child-1").read_text())
    end = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_alive(child)


def test_arguments_that_json_cannot_carry_are_refused():
    with pytest.raises(TypeError):
        run_ranks(say, 1, object())


def test_testing_is_light_to_import():
    code = "import sys, bdtrain.testing; assert not {'torch', 'megatron', 'numpy'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
