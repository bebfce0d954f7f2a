"""Processes that tests talk to in lines, and the end of a test whose process does not answer any more."""

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from warm import Forked, fork

LIMIT = 300.0
"""seconds that an answer may take, on a machine that has much else to do"""
GRACE = 60.0
"""seconds for the others of a group once one of them has failed: they may wait for it for ever"""


class Process:
    """A process in a session of its own, so that what it forks is killed with it.

    ``warm`` is for a Python that would import torch first: a rank's number, or 0 for any other, as warm.py says.
    """

    def __init__(self, *command: object, warm: int | None = None, **how: Any) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        words = [str(word) for word in command]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self.popen: subprocess.Popen[str] | Forked
        if warm is None:
            self.popen = subprocess.Popen(words, **pipes, text=True, start_new_session=True, **how)
        else:
            assert words[0] == sys.executable
            self.popen = fork(words, stderr=self._errors.fileno(), server=warm % 2, **how)
        self.pid = self.popen.pid

    def tell(self, line: str) -> None:
        """Give it a line."""
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # that it gives no answer tells more
            self.popen.stdin.write(f"{line}\n")
            self.popen.stdin.flush()

    def close(self) -> None:
        """Tell it that there will be no more lines."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()

    def line(self, limit: float = LIMIT) -> str:
        """Its next line; the test fails when there is none."""
        (line,) = _read([self], _line, limit)
        assert line, f"{self} gave no line; {self.said()}"
        return line

    def end(self, limit: float = LIMIT) -> tuple[int, str, str]:
        """Wait for its end; gives its exit code, what is left of its stdout, and its stderr."""
        (rest,) = _read([self], _rest, limit)
        return self.popen.wait(), rest, self.errors()

    def errors(self) -> str:
        """What it has said on stderr so far."""
        return os.pread(self._errors.fileno(), os.fstat(self._errors.fileno()).st_size, 0).decode(errors="replace")

    def said(self) -> str:
        """How it ended, for the message of a test that fails, and the end of its stderr."""
        return f"exit code {self.popen.poll()}, on stderr:\n{self.errors()[-4000:]}"

    def kill(self) -> None:
        """Kill it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait()

    def __str__(self) -> str:
        return f"process {self.pid} ({' '.join(map(str, self.popen.args))})"


class Group:
    """Processes that work on the same commands together, each a line of JSON, and answer each with one."""

    def __init__(self, processes: list[Process]) -> None:
        self.processes = processes

    def ask(self, command: Any, limit: float = LIMIT) -> list[dict[str, Any]]:
        """Give ``command`` to all; gives their answers. The test fails when one does not answer, or with a defect."""
        for process in self.processes:
            process.tell(json.dumps(command))
        lines = _read(self.processes, _line, limit)
        answers = [json.loads(line) if line else None for line in lines]
        if None in answers:
            said = [f"rank {rank}: {process.said()}" for rank, process in enumerate(self.processes)]
            raise AssertionError("\n".join([f"to {command} there were the answers {answers}", *said]))
        for answer in answers:
            assert "defect" not in answer, answer["defect"]
        return answers

    def alive(self) -> bool:
        """Whether all are there to be asked."""
        return all(process.popen.poll() is None for process in self.processes)

    def end(self) -> None:
        """Let all come to their end, with which coverage saves what it has measured, and kill those that do not."""
        for process in self.processes:
            process.close()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(GRACE)
        self.kill()

    def kill(self) -> None:
        """End all at once."""
        for process in self.processes:
            process.kill()


def _line(process: Process) -> str:
    assert process.popen.stdout is not None
    return process.popen.stdout.readline()


def _rest(process: Process) -> str:
    assert process.popen.stdout is not None
    rest = process.popen.stdout.read()
    process.popen.wait()
    return rest


def _read(processes: list[Process], read: Callable[[Process], str], limit: float) -> list[str]:
    """What ``read`` gives of each, at once; all are killed when one has not come to its end within ``limit``."""
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        late = {pool.submit(read, process): process for process in processes}
        found: dict[int, str] = {}
        until = time.monotonic() + limit
        while late:
            left = max(until - time.monotonic(), 0)
            done, _ = concurrent.futures.wait(late, left, concurrent.futures.FIRST_COMPLETED)
            if not done:
                for process in processes:  # and their reads come to an end
                    process.kill()
                until = time.monotonic() + GRACE
            for future in done:
                found[late.pop(future).pid] = line = future.result()
                if not line or '"result"' not in line:
                    until = min(until, time.monotonic() + GRACE)
    return [found[process.pid] for process in processes]
