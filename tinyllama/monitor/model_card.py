"""Write what a model is into README.md, as the Hugging Face Hub shows it: sizes, data, recipe, loss and scores.

Everything is from the files of the checkpoint and its run; what they do not say is left out. The text around it is
model_card.md.
"""

import contextlib
import csv
import html
import importlib.resources
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tinyllama import InputError, __version__, printable
from tinyllama.checkpoint import reader
from tinyllama.checkpoint.names import run_dir
from tinyllama.checkpoint.resume import origin_of
from tinyllama.checkpoint.state import is_count
from tinyllama.convert.weights import Weights
from tinyllama.monitor.rows import Row, is_finite
from tinyllama.monitor.run_files import complete_rows, read_json_lines, read_metrics, source_columns

CURVES = {"loss": ("training (mean)", "#4477cc"), "val_loss": ("validation", "#dd7733")}
POINTS = 200  # most of them in the curve of the training loss


def model_card(weights: Weights, title: str, model: str, license_id: str | None = None) -> dict[str, str]:
    """Return README.md, and loss.svg if the run's metrics.csv is there, by name.

    ``model`` is what a reader gives to load it: a repository on the Hub, or ``.`` for the folder of README.md. Raises
    InputError for a ``license_id`` that is not an identifier of the Hub.
    """
    if license_id is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,60}", license_id):
        raise InputError(
            f"--license {printable(license_id, 80)} is not a license identifier of the Hub: give one such as apache-2.0"
        )
    config, metadata = weights.config, weights.metadata
    run, settings, state = _run_of(weights)
    rows = [row for row in read_metrics(run / "metrics.csv") if row["step"] <= (metadata["step"] or 0)] if run else []
    starts = [
        event
        for event in (read_json_lines(run / "events.jsonl") if run else ())
        if event.get("event") == "start" and is_count(event.get("step")) and event["step"] <= (metadata["step"] or 0)
    ]
    is_older = bool(rows) and rows[-1]["step"] < metadata["step"] and len(_of(settings, "data", "sources") or ()) > 1
    drawn = f"tokens by step {rows[-1]['step']:,}" if is_older else "tokens"
    curve = _curve(rows)
    sizes = {
        "layers, width, MLP": f"{config.n_layer}, {config.n_embd:,}, {config.intermediate_size:,}",
        "query heads, key-value heads": f"{config.n_head}, {config.n_query_groups}",
        "context": f"{config.block_size:,} tokens",
        "vocabulary": f"{config.vocab_size:,} pieces"
        + (f" in {config.padded_vocab_size:,} rows" if config.padded_vocab_size > config.vocab_size else ""),
        "weights": str(weights.dtype).removeprefix("torch."),
    }
    if steps := metadata.get("averaged_steps"):
        sizes["weights"] += f", the mean of steps {', '.join(map(str, steps))}"
    trained = f"exported by TinyLlama {__version__}"
    if metadata["tokens"] and _of(settings, "train"):
        how = "pretrained further" if settings["train"].get("init_from") else "pretrained from scratch"
        trained = f"{how} on {metadata['tokens']:,} tokens ({metadata['step']:,} steps) with TinyLlama {__version__}"
    contents = {
        "LICENSE": f"license: {license_id}\n" if license_id else "",
        "TITLE": _cell(title),
        "MODEL": printable(model),
        "PLACE": "`.` is the folder of this file: work in it, or give its path instead.\n\n" if model == "." else "",
        "PARAMETERS": f"{config.num_params():,}",
        "TRAINED": trained,
        "SIZES": _table(("size", "value"), list(sizes.items())),
        "DATA": _section("Data", ("source", "share of the samples", drawn), _data(settings, state, rows)),
        "RECIPE": _section("Recipe", ("setting", "value"), _recipe(settings, config.block_size, starts)),
        "LOSS": _loss(rows) if curve else "",
        "SCORES": _scores(run / "eval.csv" if run else None, metadata["step"]),
    }
    template = importlib.resources.files("tinyllama.monitor").joinpath("model_card.md").read_text("utf-8")
    text = re.sub("@([A-Z]+)@", lambda mark: contents[mark[1]], template)  # at once: a name may hold a mark
    return {"README.md": text} | ({"loss.svg": curve} if curve else {})


def _run_of(weights: Weights) -> tuple[Path | None, dict[str, Any], dict[str, Any]]:
    """Return the folder, the settings and the state of the run that saved ``weights``; nothing for others' weights.

    Its train.init_from is that of its first start, which a later one need not give again.
    """
    if not (weights.path / "state.json").is_file():
        return None, {}, {}
    settings = reader.read_settings(weights.path)
    if train := settings.get("train"):
        train["init_from"] = origin_of(weights.path)["init_from"]
    return run_dir(weights.path), settings, reader.read_state(weights.path)


def _data(settings: Mapping[str, Any], state: Mapping[str, Any], rows: list[Row]) -> list[tuple[str, ...]]:
    sources = _of(settings, "data", "sources") or []
    weights = [float(source["weight"]) for source in sources]
    columns = source_columns([source["path"] for source in sources])
    found: list[tuple[str, ...]] = []
    for source, weight, column in zip(sources, weights, columns, strict=True):
        name = Path(source["path"]).name
        drawn = state.get("tokens") if len(sources) == 1 else None
        if drawn is None and rows:
            drawn = rows[-1].get(column)
        changes = source.get("final_weight") not in (None, source["weight"])
        share = "changes in the run" if changes else f"{weight / sum(weights):.4%}"
        found.append((f"`{_cell(name)}`", share, "" if drawn is None else f"{drawn:,.0f}"))
    return found


def _recipe(settings: Mapping[str, Any], block_size: int, starts: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the recipe as it is in ``settings``, and what a resumed run has changed of its learning rate."""
    optim, train = _of(settings, "optim") or {}, _of(settings, "train") or {}
    if not ({"lr", "min_lr", "warmup_steps", "weight_decay"} <= optim.keys() and "global_batch_size" in train):
        return []
    batch = train["global_batch_size"]
    decay = f"{optim.get('schedule', 'cosine')} from a peak of {optim['lr']:g} to {optim['min_lr']:g}"
    if optim.get("schedule") == "constant":
        decay = f"constant at {optim['lr']:g}"
    changes = {start["step"]: _of(start, "changed", "optim.lr") for start in starts}
    peaks = [
        f"{change[0]:g} before step {step:,}"
        for step, change in changes.items()
        if isinstance(change, list) and change and is_finite(change[0])
    ]
    before = f"; peak {', '.join(peaks)}" if peaks else ""
    found: list[tuple[str, ...]] = [
        ("optimizer", f"{optim.get('name', 'adamw')}, betas {optim.get('beta1')} and {optim.get('beta2')}"),
        ("learning rate", f"{decay}, {optim['warmup_steps']:,} steps of warm-up{before}"),
        ("weight decay, clipping", f"{optim['weight_decay']:g}, {optim.get('max_norm', 1):g}"),
        ("batch", f"{batch:,} samples, {batch * block_size:,} tokens"),
        ("precision", str(train.get("precision", ""))),
    ]
    if train.get("init_from"):
        found.insert(0, ("starts from", f"`{Path(train['init_from']).name}`"))
    return [tuple(map(_cell, row)) for row in found]


def _loss(rows: list[Row]) -> str:
    text = "\n## Loss\n\n![Training and validation loss over tokens](loss.svg)\n"
    validated = [row for row in rows if is_finite(row.get("val_loss"))]
    if validated:
        last = validated[-1]
        text += f"\nValidation loss {last['val_loss']:.4f} at step {last['step']:,}"
        bits = last.get("val_bpb")
        text += f", {bits:.4f} bits per byte of text.\n" if is_finite(bits) else ".\n"
    return text


def _scores(file: Path | None, step: int | None) -> str:
    """Return a table of the scores of ``step``, beside the published ones of the same tasks and metrics."""
    ours: dict[tuple[str, str], float] = {}
    theirs: dict[str, dict[tuple[str, str], float]] = {}
    published = importlib.resources.files("tinyllama.eval").joinpath("published_scores.csv").read_text("utf-8")
    for row in complete_rows(file.read_text("utf-8", "replace")) if file and file.is_file() else []:
        with contextlib.suppress(KeyError, ValueError):
            if row["step"] == str(step) and is_finite(value := float(row["value"])):
                ours[row["task"], row["metric"]] = value
    for row in csv.DictReader(published.splitlines()):
        theirs.setdefault(row["model"], {})[row["task"], row["metric"]] = float(row["value"])
    theirs = {model: scores for model, scores in theirs.items() if scores.keys() & ours.keys()}
    header = ("task", "metric", "this model", *theirs)
    shown = [
        (*map(_cell, key), f"{value:.4f}", *(f"{found[key]:.4f}" if key in found else "" for found in theirs.values()))
        for key, value in ours.items()
    ]
    return _section("Scores", header, shown)


def _section(title: str, header: Iterable[str], rows: list[tuple[str, ...]]) -> str:
    """Format a heading and a table; "" without rows."""
    return f"\n## {title}\n\n{_table(header, rows)}" if rows else ""


def _table(header: Iterable[str], rows: list[tuple[str, ...]]) -> str:
    lines = [tuple(map(_cell, header)), ("---",) * len(rows[0]), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _curve(rows: list[Row], width: int = 720, height: int = 320) -> str:
    """Draw the losses over the tokens as an SVG that is legible on light and on dark; "" without two points."""
    points = {name: [(row["tokens"], row[name]) for row in rows if is_finite(row.get(name))] for name in CURVES}
    size = -(-len(points["loss"]) // POINTS) or 1
    buckets = [points["loss"][first : first + size] for first in range(0, len(points["loss"]), size)]
    points["loss"] = [(bucket[-1][0], sum(loss / len(bucket) for _, loss in bucket)) for bucket in buckets]
    losses = [loss for curve in points.values() for _, loss in curve]
    if max(map(len, points.values())) < 2:
        return ""
    low, high, right = min(losses), max(losses), max(tokens for curve in points.values() for tokens, _ in curve) or 1
    scale = max(abs(low), abs(high)) or 1  # a difference of the largest numbers could overflow
    span = high / scale - low / scale or 1
    parts = [
        '<text x="60" y="13">nats a token</text>',
        f'<text x="60" y="{height - 8}">0</text>',
        f'<text x="{width - 10}" y="{height - 8}" text-anchor="end">{right:,} tokens</text>',
    ]
    for loss, y in ((high, 20), (low, height - 30)):
        parts.append(f'<text x="52" y="{y + 4}" text-anchor="end">{loss:.4g}</text>')
        parts.append(f'<path d="M60 {y}H{width - 10}" stroke="#888" stroke-opacity=".4"/>')
    for place, (name, (label, color)) in enumerate(CURVES.items()):
        at = [
            f"{60 + (width - 70) * tokens / right:.1f},{20 + (height - 50) * (high / scale - loss / scale) / span:.1f}"
            for tokens, loss in points[name]
        ]
        if at:
            parts.append(f'<polyline points="{" ".join(at)}" fill="none" stroke="{color}" stroke-width="2"/>')
            parts.append(
                f'<text x="{width - 10}" y="{38 + 18 * place}" text-anchor="end" style="fill:{color}">'
                f"{html.escape(label)}</text>"
            )
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    style = "<style>text{font:13px sans-serif;fill:#888}</style>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{style}{"".join(parts)}</svg>\n'


def _of(settings: Mapping[str, Any], *keys: str) -> Any:
    found: Any = settings
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _cell(text: object) -> str:
    """Return ``text`` as it may stand in a cell of a table in Markdown."""
    return printable(text, 200).replace("|", "\\|").replace("<", "&lt;")
