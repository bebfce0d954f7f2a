"""Run a user's command at the events of a run (log.on_event); whatever it does, the run is not harmed."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from tinyllama import printable

LIMIT = 10.0  # seconds until a command is killed: at the run's end, a signal's grace may be running out


class Hook:
    """Runs ``command`` in a shell, in the background, one at a time; ``say`` is called with the reason if it fails.

    Its environment has TINYLLAMA_EVENT (started, stopped, failed, finished or anomaly), TINYLLAMA_OUT_DIR and
    TINYLLAMA_MESSAGE, and its output is added to ``out_dir/on_event.log``.
    """

    def __init__(self, command: str, out_dir: Path, say: Callable[[str], None]) -> None:
        self._command, self._out_dir, self._say = command, out_dir, say
        self._thread: threading.Thread | None = None

    def __call__(self, event: str, message: str) -> None:
        """Run the command for ``event``; an anomaly during the last event's command is left out."""
        if self._thread and self._thread.is_alive() and event == "anomaly":
            return
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(event, message), name="on_event", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the command has ended or its time is over."""
        if self._thread:
            self._thread.join(LIMIT + 1)

    def _run(self, event: str, message: str) -> None:
        env = os.environ | {"TINYLLAMA_EVENT": event, "TINYLLAMA_OUT_DIR": str(self._out_dir.absolute())}
        env["TINYLLAMA_MESSAGE"] = printable(message)
        try:
            with (self._out_dir / "on_event.log").open("ab") as log:
                process = subprocess.Popen(
                    self._command,
                    shell=True,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            try:
                code = process.wait(LIMIT)
                problem = f"exit status {code}" if code else None
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
                process.wait()
                problem = f"killed after {LIMIT:g} s"
        except Exception as error:  # whatever it is, it must not cost the run
            problem = f"{type(error).__name__}: {error}"
        if problem:
            self._say(f"log.on_event failed for {event!r}: {problem}; see {self._out_dir / 'on_event.log'}")
