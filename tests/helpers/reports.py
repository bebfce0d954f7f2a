"""What a report page holds, to compare with what its run has."""

import base64
import csv
import gzip
import json
import math
from pathlib import Path
from typing import Any

from tinyllama.monitor.run_files import COLUMNS

STEPS = 40
TOKENS = 16 * 256  # a step


def six_digits(number: float) -> float:
    """The number as a page has it, whose points no screen tells apart by more digits."""
    return float(f"{number:.6g}")


def data_of(page: Path) -> dict[str, Any]:
    """What the page's script reads."""
    packed = page.read_text().partition('<script id="data" type="text/plain">')[2].partition("</script>")[0]
    return json.loads(gzip.decompress(base64.b85decode(packed.replace(",", "<"))))


HOSTILE = ["<b>x</b>", "a<br>b", "<img src=x onerror=alert(1)>", "&lt;&amp;", "$x_1$", "%{y}", "<extra>e</extra>"]
HOSTILE += [
    "__proto__",
    "constructor",
    "toString",
    "@DATA@",
    "@PLOTLY@ @TITLE@",
    "</script>",
    "学习",
    "\u202eabc",
    "a\nb\x1b",
]
SIZES = [1e-30, 1e300, 1.7e308, 5e-324, 0.0, -1e300, -1.7e308, 2.5, math.inf, -math.inf, math.nan]


def hostile_run(run: Path) -> Path:
    """Put names and texts of every kind, and losses of every size, wherever a file of ``run`` may hold them."""
    columns = [*COLUMNS, *(f"tokens_{name}" for name in HOSTILE if name.isprintable())]
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for step, size in enumerate(SIZES, 1):
            row = dict.fromkeys(columns, size) | {"step": step, "tokens": step * TOKENS}
            writer.writerow(row | {name: step * TOKENS for name in columns if name not in COLUMNS})
    with (run / "events.jsonl").open("w") as file:
        for step, text in enumerate([*HOSTILE, "x" * 10**7, "start", "start"], 1):
            file.write(json.dumps({"event": text, "time": 60 * step, "step": step, text: text, "more": [text]}) + "\n")
    with (run / "eval.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "tokens", "task", "metric", "value"])
        for text in HOSTILE:
            writer.writerow([1, TOKENS, text.replace("\n", ""), text.replace("\n", ""), 0.5])
            writer.writerow([2, 2 * TOKENS, text.replace("\n", ""), "acc", 1e300])
    return run
