"""Re-fits of a rank that are forked rather than started: the same program without seconds of imports.

``fork_refits`` leaves a process behind that has imported everything and forks the rank's re-fits. A re-fit is
a process of its own, in a group of its own, and outlives a rank that is killed, as a started one does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from types import SimpleNamespace
from typing import Any

FORK = "BDTRAIN_TEST_FORK_REFITS"
"""Environment variable of a rank: its re-fits are forked."""


def fork_refits() -> None:
    """Let the re-fits of this process be forked; call it while it has one thread."""
    questions, answers = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(questions[1])
        os.close(answers[0])
        serve(questions[0], answers[1])
        os._exit(0)
    os.close(questions[0])
    os.close(answers[1])
    line = SimpleNamespace(ask=os.fdopen(questions[1], "w"), answer=os.fdopen(answers[0]))
    import bdtrain.train.refit_child as refit_child

    refit_child.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=lambda command, **how: ForkedProcess(line, command, **how),
        DEVNULL=subprocess.DEVNULL,
        TimeoutExpired=subprocess.TimeoutExpired,
    )


class ForkedProcess:
    """What the trainer uses of ``subprocess.Popen``."""

    def __init__(
        self, line: Any, command: list[str], *, env: dict[str, str], stdout: Any, **how: Any
    ) -> None:
        assert command[1:4] == ["-P", "-m", "bdtrain.refit"] and how["start_new_session"]
        self._line, self._code = line, None
        self.pid: int = self._ask(words=command[4:], environment=env, log=stdout.name)

    def _ask(self, **question: Any) -> Any:
        self._line.ask.write(json.dumps(question) + "\n")
        self._line.ask.flush()
        return json.loads(self._line.answer.readline())

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        if self._code is None:
            self._code = self._ask(poll=self.pid)
        return self._code

    def wait(self, timeout: float) -> int:
        """Exit code, when it has ended."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked re-fit", timeout)
            time.sleep(0.005)
        return code


def serve(questions: int, answers: int) -> None:
    """Fork on request until the rank is gone."""
    with os.fdopen(questions) as lines, os.fdopen(answers, "w") as out:
        for line in lines:
            question = json.loads(line)
            answer: int | None = None
            if "poll" in question:
                pid, status = os.waitpid(question["poll"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            else:
                pid = os.fork()
                if pid == 0:
                    lines.close()
                    be_refit(**question)
                # Here as well as there: whoever asks next may kill the group.
                os.setpgid(pid, pid)
                answer = pid
            out.write(json.dumps(answer) + "\n")
            out.flush()


def be_refit(words: list[str], environment: dict[str, str], log: str) -> None:
    """What the forked process does; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, file in ((0, nothing), (1, output), (2, output)):
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(environment)
        from bdtrain.refit.command import main

        code = main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
