"""Score a checkpoint with lm-eval, show published scores beside its own, and store the scores in eval.csv."""

import csv
import importlib.resources
import io
import json
import os
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tinyllama import InputError, atomic, printable
from tinyllama.checkpoint import reader
from tinyllama.checkpoint.names import run_dir, step_dirs
from tinyllama.checkpoint.resume import stopped_file
from tinyllama.convert import hf_folder
from tinyllama.convert.tokenizer_files import separator
from tinyllama.convert.weights import Weights
from tinyllama.tokenizer import Tokenizer


class Task(NamedTuple):
    """A task of lm-eval, and how the paper scores it; None: as lm-eval does."""

    name: str
    shots: int | None = None
    metric: str | None = None


SUITES = {
    # arXiv:2401.02385, table 2: zero-shot, normalized accuracy where the task has it
    "commonsense": [
        Task("hellaswag", 0, "acc_norm"),
        Task("openbookqa", 0, "acc_norm"),
        Task("winogrande", 0, "acc"),
        Task("arc_challenge", 0, "acc_norm"),
        Task("arc_easy", 0, "acc_norm"),
        Task("boolq", 0, "acc"),
        Task("piqa", 0, "acc_norm"),
    ],
    # arXiv:2401.02385, table 3; bbh answered directly, without a chain of thought, as InstructEval does
    "problem_solving": [
        Task("mmlu", 5, "acc"),
        Task("bbh_fewshot", 3, "exact_match"),
        Task("humaneval", 0, "pass@1"),
        Task("drop", 3, "f1"),
    ],
}
EXECUTES = ("humaneval",)  # tasks that run code that the model wrote
ALIASES = {"bbh": "bbh_fewshot"}


@dataclass(frozen=True)
class Score:
    """A row of eval.csv; values are fractions of 1, as lm-eval returns them, not percent."""

    step: int | None
    tokens: int | None
    task: str
    metric: str
    value: float
    shots: int | None


COLUMNS = [field.name for field in fields(Score)]


def resolve(names: Sequence[str], allow_code: bool) -> tuple[list[Task], list[str]]:
    """Resolve ``names`` of suites and tasks to tasks, and return also the tasks left out because they execute code.

    Raises InputError if ``names`` has such a task itself.
    """
    tasks: list[Task] = []
    for name in names:
        name = ALIASES.get(name, name)
        if name in EXECUTES and not allow_code:
            raise InputError(f"task {name} runs code that the model writes: give --allow_code_execution to allow it")
        known = [task for suite in SUITES.values() for task in suite if task.name == name]
        tasks += SUITES.get(name) or known or [Task(name)]
    left_out = [] if allow_code else [task.name for task in tasks if task.name in EXECUTES]
    return [task for task in tasks if task.name not in left_out], left_out


def evaluate(
    weights: Weights,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    include_path: Path | None = None,
    batch_size: int = 16,
    allow_code: bool = False,
) -> list[Score]:
    """Run ``tasks`` on a temporary export of ``weights``; tasks of the paper return the paper's metric only.

    Raises InputError when lm-eval is not installed or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"evaluation needs {error.name}: pip install -e '.[eval]'") from None
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    if unknown := [task.name for task in tasks if not manager.match_tasks([task.name])]:
        raise InputError(
            f"lm-eval knows no task {', '.join(unknown)}: see lm-eval ls tasks, or give --include_path DIR"
        )
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric that runs the code requires it
    scores: list[Score] = []
    groups: dict[int | str, list[Task]] = {}  # tasks of no suite run alone, because results do not name a tag
    for task in tasks:
        groups.setdefault(task.name if task.shots is None else task.shots, []).append(task)
    with tempfile.TemporaryDirectory() as folder:
        hf_folder.write(Path(folder) / "hf", weights, tokenizer)
        model = HFLM(
            pretrained=f"{folder}/hf",
            dtype="float32",
            batch_size=batch_size,
            max_length=weights.config.block_size,
            prefix_token_id=prefix_token(weights, tokenizer),
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        for group in groups.values():
            try:
                found = simple_evaluate(
                    model=model,
                    tasks=manager.match_tasks([task.name for task in group]),
                    num_fewshot=group[0].shots,
                    task_manager=manager,
                    log_samples=False,
                    bootstrap_iters=0,
                    confirm_run_unsafe_code=allow_code,
                )
            except ConnectionError as error:
                raise InputError(f"the data of a task cannot be had ({error}): run it once with a network") from None
            assert found is not None  # it is None on other ranks only
            for task in group:
                scores += _scores(weights, found, task)
    return scores


def prefix_token(weights: Weights, tokenizer: Tokenizer) -> int | None:
    """Return the token that precedes a document in the training data.

    Ids that the weights have recorded take precedence over the tokenizer's.
    """
    bos_id, eos_id = weights.metadata["bos_id"], weights.metadata["eos_id"]
    bos_id = tokenizer.bos_id if bos_id is None else bos_id
    eos_id = tokenizer.eos_id if eos_id is None else eos_id
    return separator(weights.metadata["bos"], bos_id, eos_id)


def _scores(weights: Weights, found: dict[str, Any], task: Task) -> Iterator[Score]:
    """Yield the scores of a task or group; for a tag or a pattern, those of every task in it."""
    step, tokens = weights.metadata["step"], weights.metadata["tokens"]
    results = {**found["results"], **found.get("groups", {})}
    for name in [task.name] if task.name in results else results:
        shots = found.get("n-shot", {}).get(name) if task.shots is None else task.shots
        for key, value in results[name].items():
            metric, _, chosen = key.partition(",")  # "acc_norm,none": the second part names a filter
            is_score = chosen and isinstance(value, int | float) and "stderr" not in metric
            if is_score and task.metric in (None, metric):
                yield Score(step, tokens, name, metric, float(value), shots)


def scored_names(tasks: Sequence[Task], include_path: Path | None = None) -> set[str]:
    """Return the names that the scores of ``tasks`` have in eval.csv: for a tag or a pattern, those of all its tasks.

    A task that lm-eval does not know, and each where lm-eval is not installed, keeps its name: ``evaluate`` reports it.
    """
    names = {task.name for task in tasks}
    others = [task.name for task in tasks if task.shots is None]  # a suite has no tag and no pattern
    if not others:
        return names
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        return names
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    names.difference_update(others)
    for other in others:
        for name in manager.match_tasks([other]) or [other]:
            if name in manager.all_tags:
                tag = manager.task_index[name]
                names.update(tag["task"] if isinstance(tag, dict) else tag.tags)  # a dict before lm-eval 0.4.12
            else:
                names.add(name)
    return names


def csv_of(weights: Weights) -> Path:
    """Return the path for a checkpoint's scores: eval.csv in its run's folder, or beside the checkpoint."""
    return run_dir(weights.path) / "eval.csv"


def read_scores(path: Path) -> list[dict[str, str]]:
    """Read the rows of an eval.csv; [] when it does not exist. Raises InputError for a file of another kind."""
    rows = []
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a table of scores (it is not a file): move it away")
    reason = f"its first line is not {','.join(COLUMNS)}"
    try:
        lines = csv.reader(io.StringIO(path.read_text("utf-8") if path.exists() else ""))
        if next(lines, COLUMNS) == COLUMNS:
            for cells in filter(None, lines):
                reason = f"its line {lines.line_num} is not a row of {','.join(COLUMNS)}"
                row = dict(zip(COLUMNS, cells, strict=True))
                float(row["value"]), int(row["step"] or 0), int(row["tokens"] or 0)
                rows.append(row)
            return rows
    except (OSError, csv.Error) as error:
        reason = str(error)
    except ValueError:  # invalid UTF-8, cells that are not numbers, or too many cells
        pass
    raise InputError(f"{path} is not a table of scores ({reason}): move it away")


def append(path: Path, scores: Sequence[Score]) -> None:
    """Add ``scores`` to an eval.csv; a reader sees all of them or none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*read_scores(path), *map(asdict, scores)])
    try:
        atomic.write(path, text.getvalue().encode(errors="backslashreplace"))  # a folder's name may not be UTF-8
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): the scores are only those shown above") from None


def watch(run: Path, names: Collection[str], seconds: float) -> Iterator[Path]:
    """Yield each complete step of ``run`` that lacks scores for some of ``names``, oldest first, as it appears.

    It polls every ``seconds``, and ends when the run has reached its last step or has a STOPPED file. An interrupted
    run may be resumed, so it keeps waiting for that. A damaged step is passed over with a line; a run that resumes may
    replace it. Raises InputError when there is no such run.
    """
    if not ((run / "checkpoints").is_dir() or (run / "events.jsonl").is_file()):
        raise InputError(f"{run} is not a run: give the out_dir of one that has begun")
    scored: dict[str, set[str]] = {}
    for row in read_scores(run / "eval.csv"):
        scored.setdefault(row["step"], set()).add(row["task"])
    seen = {int(step) for step, tasks in scored.items() if step and tasks.issuperset(names)}
    problems: dict[int, str] = {}  # of each step at its last look
    told: set[tuple[int, str]] = set()
    while True:
        over = _is_over(run)  # checked before listing the steps, so that the last one is not missed
        for step, path in step_dirs(run / "checkpoints"):
            if step in seen:
                continue
            if (why := reader.problem(path)) is None:
                seen.add(step)
                yield path
            elif (step, why) not in told and (over or problems.get(step) == why):  # its run may be removing it
                told.add((step, why))
                print(f"passed over: {printable(path)} is damaged ({why})", flush=True)
            else:
                problems[step] = why
        if over:
            return
        time.sleep(seconds)


def _is_over(run: Path) -> bool:
    if stopped_file(run).exists():
        return True
    try:
        return json.loads((run / "events.jsonl").read_text("utf-8").splitlines()[-1])["event"] == "done"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # not started, or the line is being written
        return False


def published() -> list[dict[str, str]]:
    """Read published_scores.csv: model, tokens, task, metric, value (a fraction of 1) and source.

    It has only scores that a public source confirms. Therefore it omits some of the paper's (arXiv:2401.02385, tables 2
    and 3): OPT-1.3B, and the problem-solving scores of Pythia-1.4B and of TinyLlama's last step.
    """
    text = importlib.resources.files("tinyllama.eval").joinpath("published_scores.csv").read_text("utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def table(scores: Sequence[Score]) -> str:
    """Format ``scores`` for the terminal, in percent, with published scores of the same tasks and metrics."""
    shown = {(printable(score.task, 80), printable(score.metric, 80)): score.value for score in scores}
    rows: dict[str, dict[tuple[str, str], float]] = {}
    for row in published():
        if (row["task"], row["metric"]) in shown:
            rows.setdefault(row["model"], {})[row["task"], row["metric"]] = float(row["value"])
    if not rows:
        return "\n".join(f"{task:30} {metric:20} {value:.4f}" for (task, metric), value in shown.items())
    lines = [f"{'':32}" + "".join(f"{task[:13]:>14}" for task, _ in shown) + "   (percent)"]
    for model, values in {**rows, "this checkpoint": shown}.items():
        cells = (f"{100 * values[key]:14.2f}" if key in values else f"{'':14}" for key in shown)
        lines.append(f"{model:32}" + "".join(cells))
    return "\n".join(lines)
