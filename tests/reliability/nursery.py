"""A process that has imported everything and forks a rank in milliseconds.

Nearly all the time of a tiny run is imports. A rank forked here is a process of its own: own environment, own
session, own signals, and ``kill -9`` ends it as it would any other. The imports start no thread, so a fork
loses nothing.

``python nursery.py`` is the process; ``Nursery`` talks to it. When the test process dies, the ranks die.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forked_refits import FORK, fork_refits

ROOT = Path(__file__).resolve().parents[2]
RECORD = "BDTRAIN_TEST_RECORD"
"""Environment variable of a rank: where it writes a digest of every row that it trained on."""

READY = "ready\n"

SAVE_TO = "BDTRAIN_TEST_SAVE_TO"
"""Environment variable of a rank: folder for training checkpoints in place of the run's own."""


class Nursery:
    """The process, from the side of the test; ``with`` it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "passive",
                "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Nursery:
        # The imports are this call's time, not that of the first rank.
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == READY, "the nursery died; its traceback is on stderr"
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(self, command: Sequence[str], *, environment: Mapping[str, str], log: Path) -> NurseryRank:
        """Fork a rank.

        Args:
            command: a launcher's path and its arguments.
            environment: all of it.
            log: where its output goes.
        """
        answer = self._ask(command=list(command), environment=dict(environment), log=str(log))
        return NurseryRank(self, answer["pid"])

    def poll(self, pid: int) -> int | None:
        """Exit code of a rank, as ``subprocess.Popen`` has it; None while it runs."""
        code: int | None = self._ask(poll=pid)["code"]
        return code

    def _ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the nursery died; its traceback is on stderr"
        answer: dict[str, Any] = json.loads(line)
        return answer


class NurseryRank:
    """A forked rank, with the methods of ``subprocess.Popen`` that the tests use."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery = nursery
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, None while it runs. Unreaped until this is asked, so its number stays taken."""
        if self.returncode is None:
            self.returncode = self._nursery.poll(self.pid)
        return self.returncode

    def wait(self) -> int:
        """Exit code, when it has ended."""
        while (code := self.poll()) is None:
            threading.Event().wait(0.005)
        return code


def main() -> None:
    """Import, then fork on request until the other side closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What the imports print is no answer.
    launchers = import_everything()
    assert threading.active_count() == 1, "a fork would lose a thread"
    answers.write(READY)
    answers.flush()
    running: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            if pid:
                running.discard(pid)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            pid = os.fork()
            if pid == 0:
                answers.close()
                be_rank(launchers, **question)
            running.add(pid)
            answer = {"pid": pid}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    # Nothing here needs the seconds of an orderly end.
    os._exit(0)


def import_everything() -> dict[str, Any]:
    """The launchers' modules by their path, all that a run imports being there."""
    import importlib.util

    from bdtrain.parallel.libraries import prepare_libraries

    prepare_libraries()
    from bdtrain.parallel.groups import prepare_deepspeed

    prepare_deepspeed()
    import megatron.core.pipeline_parallel.schedules  # noqa: F401
    import torch._dynamo  # noqa: F401

    import bdtrain.refit.worker
    import bdtrain.train.launch  # noqa: F401

    launchers = {}
    for name in ("pretrain", "evaluate_checkpoint", "sample_text", "refit_schedule"):
        path = f"launchers/{name}.py"
        spec = importlib.util.spec_from_file_location(f"launcher_{Path(path).stem}", ROOT / path)
        assert spec is not None and spec.loader is not None
        launchers[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(launchers[path])
    return launchers


def be_rank(
    launchers: Mapping[str, Any], *, command: list[str], environment: dict[str, str], log: str
) -> None:
    """What the forked process does; never returns."""
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, file in ((0, nothing), (1, output), (2, output)):
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = command
        if RECORD in environment:
            record_rows(Path(environment[RECORD]))
        if SAVE_TO in environment:
            save_elsewhere(Path(environment[SAVE_TO]))
        if FORK in environment:
            fork_refits()
        code = launchers[command[0]].main(command[1:])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def record_rows(path: Path) -> None:
    """Write a digest of every row as training sees it: its tokens, and its noise bit for bit."""
    import bdtrain.train.step as step

    corrupt_rows = step.corrupt_rows

    def recorded(objective: Any, rows: Any, *, key: Any, **settings: Any) -> Any:
        micro_batch = corrupt_rows(objective, rows, key=key, **settings)
        corrupted = micro_batch.corrupted
        with path.open("a", encoding="utf-8") as file:
            for number, position in enumerate(rows.sample_index.tolist()):
                data = digest(rows.tokens[number], rows.documents[number], rows.counted[number])
                draw = (corrupted.noisy, corrupted.rows, corrupted.weight)
                noise = digest(*(part[number] for part in draw if part is not None))
                file.write(json.dumps([key.step, position, data, noise]) + "\n")
        return micro_batch

    step.corrupt_rows = recorded


def save_elsewhere(root: Path) -> None:
    """Save into another folder: beside the checkpoint that was loaded nothing would be written again."""
    import bdtrain.train.loop as loop

    save_training_state = loop.save_training_state

    def saved(_: Path, **settings: Any) -> Any:
        return save_training_state(root, **settings)

    loop.save_training_state = saved


def digest(*tensors: Any) -> str:
    """Of shapes, types and bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.contiguous().cpu().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()
