"""Weights & Biases logging: one run id across restarts, each step sent once, failures never stop training.

It is fed with finished rows of metrics.csv and remembers in ``out_dir/wandb.json`` which it has sent. A resumed run
does some steps again; as it does them exactly as before, what is in the history already may stand.
"""

import json
import secrets
from collections.abc import Callable
from typing import Any

from tinyllama import atomic
from tinyllama.checkpoint import reader
from tinyllama.train.run import Run

INIT_TIMEOUT, FINISH_TIMEOUT = 60, 15
"""Seconds that wandb may hold up the run, at its start and at its end: then a signal's grace may be running out."""


class Tracker:
    """Send rows to the wandb run of ``run``; ``say`` hears, once, why it had to give up."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._say = say
        self._file = run.out_dir / "wandb.json"
        try:
            known = dict(json.loads(self._file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # there is none, or it was damaged: the checkpoint has the id, too
            known = {}
        self.id: str = known.get("id") or saved_id(run) or secrets.token_hex(4)
        self._sent: int = known.get("step", -1)
        self._run: Any = None
        self._guarded(lambda: self._start(run))

    def _start(self, run: Run) -> None:
        import wandb

        self._remember()
        self._run = wandb.init(
            id=self.id,
            resume="allow",
            mode="offline" if run.args.log.wandb == "offline" else "online",
            project=run.args.log.wandb_project,
            entity=run.args.log.wandb_entity,
            name=run.out_dir.name,
            dir=run.out_dir,
            config=run.resolved(),
            settings=wandb.Settings(console="off", init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT),
        )

    def send(self, row: dict[str, Any]) -> None:
        """Add a row to the history, if its step is not in it yet."""
        step = int(row["step"])
        if self._run is None or step <= self._sent:
            return
        numbers = {name: float(value) for name, value in row.items() if value not in (None, "")}
        self._guarded(lambda: self._log(numbers, step))

    def _log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)
        self._sent = step
        self._remember()

    def _remember(self) -> None:
        atomic.write(self._file, json.dumps({"id": self.id, "step": self._sent}).encode())

    def finish(self) -> None:
        """Hand over what is left, for at most FINISH_TIMEOUT seconds."""
        if self._run is not None:
            self._guarded(lambda: self._run.finish())

    def _guarded(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # whatever it is, it must not cost the run
            self._run = None
            reason = next(iter(str(error).splitlines()), "")
            self._say(f"wandb is off from here, metrics.csv continues: {type(error).__name__}: {reason}")


def saved_id(run: Run) -> str | None:
    """Return the id in the checkpoint that ``run`` resumes from; a branch off another folder's has its own."""
    if run.resume is None or run.out_dir.resolve() not in run.resume.resolve().parents:
        return None
    return reader.read_state(run.resume).get("wandb_id")
