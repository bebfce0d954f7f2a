"""Write report_page.html with the data of a report in it, in place of an earlier report and of nothing else."""

import base64
import functools
import gzip
import html
import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

from tinyllama import InputError, __version__, atomic

MARK = b" run report</title>"
"""The end of a page's title, by which a report is known from other files."""
HEAD = 16_384
"""Bytes at the beginning of a page in which its title ends, however long the name of its run is."""


def write(output: Path, title: str, data: dict[str, Any]) -> None:
    """Write the page of ``data``; raises InputError where it cannot be written or a file that is no report is there."""
    page = (importlib.resources.files("tinyllama.monitor") / "report_page.html").read_text("utf-8")
    contents = {
        "TITLE": html.escape(title),
        "VERSION": __version__,
        "DATA": compressed(json.dumps(data, allow_nan=False)),
        "PLOTLY": plotly(),
    }
    page = re.sub("@([A-Z]+)@", lambda mark: contents[mark[1]], page)  # at once: a name may hold a mark
    try:
        if _is_foreign(output):
            raise InputError(f"{output} is there and is no report, and is left as it is: give another --output")
        atomic.write(atomic.behind_link(output), page.encode(errors="replace"))
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}): give another --output") from error


def _is_foreign(output: Path) -> bool:
    """Return whether ``output`` is a file with content that is no report."""
    if not output.is_file():
        return False
    with output.open("rb") as file:
        head = file.read(HEAD)
    return bool(head) and MARK not in head


@functools.cache
def plotly() -> str:
    """Return plotly.js for the page."""
    from plotly.offline import get_plotlyjs

    return compressed(get_plotlyjs())


def compressed(text: str) -> str:
    """Return ``text`` gzipped and as base85 with a comma for ``<``, so that it cannot end a script element."""
    payload = gzip.compress(text.encode(), mtime=0)
    return base64.b85encode(payload).decode().replace("<", ",")
