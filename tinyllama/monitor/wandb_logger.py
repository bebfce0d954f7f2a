"""Weights & Biases logging: one run id across restarts, each step sent once, failures never stop training.

It is fed with finished rows of metrics.csv and remembers in ``out_dir/wandb.json`` which it has sent. A resumed run
does some steps again. With the settings of before it does them exactly as before, so what is in the history may stand;
with others, a new run of wandb's continues from there and says so. (wandb can also rewind a run, by ``resume_from``,
but only for accounts that have been given it, and not offline.)
"""

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from typing import Any

from tinyllama import atomic
from tinyllama.checkpoint import reader, resume
from tinyllama.train.run import Run

INIT_TIMEOUT, FINISH_TIMEOUT = 60, 15
"""Seconds that wandb may hold up the run, at its start and at its end: then a signal's grace may be running out."""

NO_KEY_HINT = (
    "set WANDB_API_KEY, or give --log.wandb offline and `wandb sync` later; the next start sends what it missed"
)

IRRELEVANT = {
    *("resume", "max_time", "start_timeout", "timeout", "max_skips"),
    *("micro_batch_size", "compile", "activation_checkpointing"),
}
"""Settings of ``train`` that leave the steps as they are, but for their rounding."""


class Tracker:
    """Sends rows to the wandb run of ``run`` after ``step`` (-1: all); ``say`` is called once, with why it gave up.

    ``problem`` is what it said then, for the summary at the end.
    """

    def __init__(self, run: Run, step: int, say: Callable[[str], None]) -> None:
        self._say = say
        self.problem: str | None = None
        self._file = run.out_dir / "wandb.json"
        known = self._known()
        self.id: str = known.get("id") or saved_id(run) or secrets.token_hex(4)
        self._sent: int = known.get("step", -1)
        self._continues: str | None = known.get("continues")
        self._settings = settings_digest(run)  # those of all that was sent after the step ``since``
        self._since: int = known.get("since", -1)
        if known.get("settings", self._settings) != self._settings:
            self._since = self._sent
        if step < self._since:
            self._continues = f"{self.id} from step {step + 1}"
            self.id, self._sent, self._since = secrets.token_hex(4), step, step
            say(f"wandb: steps are done again with other settings: run {self.id} continues {self._continues}")
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
            notes=self._continues and f"continues {self._continues}",
            dir=run.out_dir,
            config=run.resolved(),
            settings=wandb.Settings(console="off", init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT),
        )

    def send(self, row: dict[str, Any]) -> None:
        """Add a row to the history, if its step is not in it yet."""
        step = int(row["step"])
        if self._run is None or step <= self._sent:
            return
        numbers = {name: float(value) for name, value in row.items() if value is not None}
        self._guarded(lambda: self._log(numbers, step))

    def _log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)
        self._sent = step
        self._remember()

    def _known(self) -> dict[str, Any]:
        """Return what wandb.json says; {} if there is none, or if any of it was damaged."""
        kinds = {"id": str, "step": int, "settings": str, "since": int, "continues": str}
        try:
            known = json.loads(self._file.read_bytes()) if self._file.is_file() else {}
            complete = all(isinstance(known[name], kinds[name]) for name in known) and is_id(known.get("id"))
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            complete = False
        return known if complete else {}

    def _remember(self) -> None:
        known: dict[str, Any] = {"id": self.id, "step": self._sent, "settings": self._settings, "since": self._since}
        if self._continues:
            known["continues"] = self._continues
        atomic.write(self._file, json.dumps(known).encode())

    def finish(self) -> None:
        """Hand over what is left, for at most FINISH_TIMEOUT seconds."""
        if self._run is not None:
            self._guarded(lambda: self._run.finish())

    def _guarded(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # whatever it is, it must not cost the run
            self._run = None
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            hint = NO_KEY_HINT if "API key" in reason else "the next start sends what it missed"
            self.problem = f"wandb is off from here, metrics.csv continues: {reason} ({hint})"
            self._say(self.problem)


def saved_id(run: Run) -> str | None:
    """Return the id in the checkpoint that ``run`` resumes from; a branch off another folder's has its own."""
    if run.resume is None or run.out_dir.resolve() not in run.resume.resolve().parents:
        return None
    saved = reader.read_state(run.resume).get("wandb_id")
    return saved if is_id(saved) else None


def is_id(value: Any) -> bool:
    """Return whether ``value`` can be a run's id, which wandb uses in URLs and in names of files."""
    return isinstance(value, str) and re.fullmatch(r"[\w-]{1,64}", value, re.ASCII) is not None


def settings_digest(run: Run) -> str:
    """Return a digest of the settings of ``run`` that change what its steps come to; of data, not of their paths."""
    settings = {group: run.resolved()[group] for group in ("model", "data", "optim", "train")}
    settings["data"] |= run.data_metadata()
    settings["train"] |= resume.origin(run.out_dir, run.resume, settings["train"])  # a resume may leave init_from out
    settings["train"] = {name: value for name, value in settings["train"].items() if name not in IRRELEVANT}
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
