"""Resume policy: which step a run resumes from, and which settings may differ from the checkpoint's."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllama import InputError, atomic
from tinyllama.checkpoint import names
from tinyllama.checkpoint.reader import newest, read_settings, read_state, resolve, say_passed_over

ORIGINS = ("resume", "init_from")
"""settings of train that say what a run begins from"""


def stopped_file(out_dir: Path) -> Path:
    """Return the path of STOPPED: while it exists, the run waits for a person to read and delete it."""
    return out_dir / "STOPPED"


def write_stopped(out_dir: Path, reason: dict[str, Any]) -> None:
    """Write why a run must not be started again as it is."""
    atomic.write(stopped_file(out_dir), (json.dumps(reason) + "\n").encode())


def to_resume(out_dir: Path, how: str, say: Callable[[str], None] = print) -> Path | None:
    """Return the step directory that ``train.resume`` calls for; None for a fresh start.

    A requeued branch is started with the same path again and must resume, so the newest step in ``out_dir`` wins if its
    run began from that path, even if the checkpoint there is gone. ``say`` gets a line for each damaged step that is
    passed over. Raises InputError when what is in ``out_dir`` allows neither.
    """
    if os.path.lexists(out_dir) and not out_dir.is_dir():
        raise InputError(f"out_dir {out_dir} is not a folder: give another")
    stopped = stopped_file(out_dir)
    if stopped.exists():
        why = stopped.read_text(encoding="utf-8", errors="replace").strip()
        raise InputError(
            f"{stopped} says why this run ended: {why}; to go on, delete the file, and give "
            "--train.on_nonfinite skip, a lower optim.lr, or a branch from an older step"
        )
    latest, passed_over = newest(out_dir / "checkpoints")
    if how == "auto":
        if passed_over and latest is None:
            hint = f"move {out_dir / 'checkpoints'} away to start anew"
            raise InputError(f"{passed_over[0]}, and no step before it is complete: {hint}")
        say_passed_over(passed_over, say)
        return latest
    if how == "never":
        if latest is not None:
            raise InputError(f"{latest} exists and train.resume is never: give another out_dir, or resume: auto")
        return None
    is_own = is_in_run(out_dir, Path(how))
    if latest is not None and not is_own and _began_from(latest, Path(how)):
        say_passed_over(passed_over, say)
        return latest
    chosen = resolve(how, say)
    if latest is not None and latest.resolve() != chosen.resolve():
        problem = f"is newer than train.resume {chosen}" if is_own else f"did not branch off from train.resume {how}"
        raise InputError(f"{latest} {problem}: give another out_dir to branch off there")
    return chosen


def is_in_run(out_dir: Path, path: Path) -> bool:
    """Return whether ``path`` is ``out_dir``, its folder of checkpoints or a step in that."""
    path = path.resolve()
    return (out_dir / "checkpoints").resolve() in (path, path.parent, (path / "checkpoints").resolve())


def _began_from(step_dir: Path, path: Path) -> bool:
    """Return whether ``path`` is the step that the branch of ``step_dir`` began from, its folder or that of its run."""
    recorded = origin_of(step_dir)["resume"]
    if recorded is None:
        return False
    began, path = Path(recorded), path.resolve()
    is_step = names.step_of(began) is not None  # earlier versions recorded the path as it was given
    return path == began or (is_step and began.parent in (path, (path / "checkpoints").resolve()))


def origin_of(step_dir: Path) -> dict[str, str | None]:
    """Return what the run of ``step_dir`` began from at its first start: the absolute path in each of ORIGINS, if any.

    Versions that did not record it saved the settings of the last start only.
    """
    train = read_settings(step_dir).get("train", {})
    return _given(train) | read_state(step_dir).get("origin", {})


def origin(out_dir: Path, step_dir: Path | None, train: dict[str, Any]) -> dict[str, str | None]:
    """Return what the run in ``out_dir`` first began from, for its checkpoints to record (see ``origin_of``).

    ``step_dir`` is the checkpoint that it resumes from now, if any, and ``train`` its present settings. A branch
    records the checkpoint that it branched off from, and the initial weights of the run that it continues.
    """
    if step_dir is None:
        return _given(train)
    began = origin_of(step_dir)
    return began if is_in_run(out_dir, step_dir) else began | {"resume": str(step_dir.resolve())}


def _given(train: dict[str, Any]) -> dict[str, str | None]:
    paths = {key: train.get(key) for key in ORIGINS}
    is_path = {key: isinstance(path, str) and path not in ("auto", "never") for key, path in paths.items()}
    return {key: str(Path(str(path)).resolve()) if is_path[key] else None for key, path in paths.items()}


def refuse_changes(step_dir: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError that names every value that is not what it was when ``step_dir`` was saved."""
    if not any(saved.values()):  # what convert_hf_checkpoint.py writes
        raise InputError(f"{step_dir} holds weights and no run to resume: give it as train.init_from")
    then, today = leaves(saved), leaves(now)
    changes = [
        f"{key} was {then.get(key, 'absent')} and is {today.get(key, 'absent')}"
        + " (other packed data than the run's)" * key.endswith(".fingerprint")
        for key in {**then, **today}
        if then.get(key) != today.get(key)
    ]
    if changes:
        raise InputError(
            f"cannot resume from {step_dir}: {'; '.join(changes)}; put it back, or start a new run in another --out_dir"
        )


def changed(step_dir: Path, now: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the settings that have changed since ``step_dir`` was saved: [then, now] by key."""
    then, today = (leaves(settings, lists=False) for settings in (read_settings(step_dir), now))
    keys = [key for key in today if key in then and key not in ("out_dir", "train.resume", "dry_run")]
    return {key: [then[key], today[key]] for key in keys if then[key] != today[key]}


def leaves(tree: Any, prefix: str = "", lists: bool = True) -> dict[str, Any]:
    """Return the values in ``tree`` by dotted keys; without ``lists``, a list is one value."""
    if isinstance(tree, dict):
        children = {f"{prefix}.{key}".lstrip("."): child for key, child in tree.items()}
    elif isinstance(tree, list) and lists:
        children = {f"{prefix}[{i}]": child for i, child in enumerate(tree)}
    else:
        return {prefix: tree}
    return {key: value for name, child in children.items() for key, value in leaves(child, name, lists).items()}
