"""Processes that have imported what a rank needs: importing it takes seconds of CPU, forking one that has it none.

`fork` is Popen for a Python script, or `-c` and code, in a fork of such a process. It differs from a fresh start in
what is imported and in what Python and libraries read from the environment when they are: what a test says of starting
itself needs Popen.
"""

import atexit
import contextlib
import errno
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
_started: list[subprocess.Popen[bytes]] = []
"""warm processes that this one has started: they end by themselves"""


class Forked:
    """What tests use of Popen, for a process that is a grandchild: another one reaps it and reports its end."""

    def __init__(self, args: list[str], stdin: IO[str], stdout: IO[str], report: int) -> None:
        self.args, self.stdin, self.stdout, self._report = args, stdin, stdout, report
        pid = os.read(report, 4)  # once it can be killed with all that it starts
        if not pid:
            raise ConnectionResetError("the warm process has ended; its stderr is that of the tests")
        self.pid = int.from_bytes(pid)
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns its exit code, or minus the number of the signal that killed it."""
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            status = os.read(self._report, 4)  # nothing if who reports it was killed too, as when memory runs out
            self.returncode = int.from_bytes(status, signed=True) if status else -signal.SIGKILL
            os.close(self._report)
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(timeout=0)
        return None


@functools.cache
def _server(number: int) -> socket.socket:
    """A connection to a warm process, which serves all workers of these tests and ends with the last of them.

    Each has its own hash seed, so ranks of two do not agree on the order of a set.
    """
    name = f"\0warm {number} of {os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    while ours.connect_ex(name):  # nobody has begun it, or somebody just does
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as theirs:
            try:
                theirs.bind(name)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                time.sleep(0.01)
            else:
                theirs.listen()
                ours.connect(name)  # before it is started, which then ends with this process whenever that is killed
                env = os.environ | {"OMP_NUM_THREADS": "1"}
                command = [sys.executable, __file__, str(theirs.fileno())]
                quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "start_new_session": True}
                _started.append(subprocess.Popen(command, env=env, cwd=ROOT, pass_fds=[theirs.fileno()], **quiet))
                break
    if not _of_this_user(ours):
        raise PermissionError(f"another user has {name[1:]}")
    atexit.register(ours.close)
    return ours


def fork(command: list[str], *, stderr: int, server: int, env: Any = None, cwd: Any = None) -> Forked:
    """Start a Python script, or ``-c`` and code, in a session of its own; its stdin and stdout are pipes."""
    how: dict[str, Any] = {"stderr": stderr, "server": server, "env": env, "cwd": cwd}
    try:
        return _fork(command, **how)
    except ConnectionError:  # the warm process was killed, or has just ended with the last of the other workers
        _server.cache_clear()
        return _fork(command, **how)


def _fork(command: list[str], *, stderr: int, server: int, env: Any, cwd: Any) -> Forked:
    (stdin, to_stdin), (from_stdout, stdout), (report, reporter) = os.pipe(), os.pipe(), os.pipe()
    request = {"argv": command[1:], "env": dict(os.environ if env is None else env), "cwd": str(cwd or os.getcwd())}
    try:
        socket.send_fds(_server(server), [json.dumps(request).encode()], [stdin, stdout, stderr, reporter])
    finally:
        for fd in (stdin, stdout, reporter):
            os.close(fd)
    return Forked(command, os.fdopen(to_stdin, "w"), os.fdopen(from_stdout), report)


def _of_this_user(connection: socket.socket) -> bool:
    """Whether the other end is a process of this user: names of sockets that are no files have no permissions."""
    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1] == os.geteuid()


def _serve(listening: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for each request, until nobody is left to make one; returns in the forks, with the request and its files."""
    sockets = [listening]
    while True:
        ready, _, _ = select.select(sockets, [], [])
        if listening in ready:
            connection, _ = listening.accept()
            if _of_this_user(connection):  # anybody else could run what they like as this one
                sockets.append(connection)
            else:
                connection.close()
            continue
        message, fds, _, _ = socket.recv_fds(ready[0], 1 << 20, 4)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that have reported
                pass
        if not message:
            sockets.remove(ready[0])
            ready[0].close()
            if sockets == [listening]:
                os._exit(0)
            continue
        if os.fork() == 0:
            break
        for fd in fds:
            os.close(fd)
    for one in sockets:
        one.close()
    *files, report = fds
    pid = os.fork()
    if pid:
        for fd in files:
            os.close(fd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(BrokenPipeError):
            os.write(report, status.to_bytes(4, signed=True))
        os._exit(0)
    os.setsid()
    os.write(report, os.getpid().to_bytes(4))
    os.close(report)
    return json.loads(message), files


def main() -> None:
    """Import everything; in a fork, run what was asked for as Python would, and end as Python does."""
    sys.path.insert(0, str(ROOT / "pretrain"))
    importlib.import_module("train")
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    gc.freeze()  # its end would else look at, and so copy, every object of the imports
    request, files = _serve(socket.socket(fileno=int(sys.argv[1])))
    for number, fd in enumerate(files):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    tempfile.tempdir = None  # an import has looked at TMPDIR, that of the warm process
    sys.path.remove(str(ROOT / "pretrain"))
    first, *rest = request["argv"]
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).absolute().parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main()
