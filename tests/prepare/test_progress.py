import io
import sys
import time

import pytest

from tinyllama import InputError
from tinyllama.prepare import progress
from tinyllama.prepare.inputs import Input

INFOS = [
    {
        "documents": 3,
        "tokens": 1200,
        "repaired": 1000,
        "dropped": {"RedPajamaGithub": 7, "fraction": 2000},
        "subsets": {
            "C4": {"documents": 2, "tokens": 1000, "bytes": 4000},
            "Book": {"documents": 1, "tokens": 200, "bytes": 900},
        },
    },
    {
        "documents": 1000,
        "tokens": 5000,
        "repaired": 34,
        "dropped": {"fraction": 5},
        "subsets": {"C4": {"documents": 1000, "tokens": 5000, "bytes": 21000}},
    },
]


def test_subsets_and_what_was_left_out_over_all_shards():
    found = progress.total(INFOS)
    assert found == {
        "documents": 1003,
        "tokens": 6200,
        "repaired": 1034,
        "dropped": {"RedPajamaGithub": 7, "fraction": 2005},
        "subsets": {
            "Book": {"documents": 1, "tokens": 200, "bytes": 900},
            "C4": {"documents": 1002, "tokens": 6000, "bytes": 25000},
        },
    }
    assert list(found["subsets"]) == ["Book", "C4"]
    assert list(progress.total(INFOS[::-1])["dropped"]) == ["RedPajamaGithub", "fraction"]
    nothing = {"documents": 0, "tokens": 0, "repaired": 0, "dropped": {}, "subsets": {}}
    assert progress.total([]) == nothing


def test_names_from_files_are_printed_in_one_line(capsys):
    figures = {"documents": 1, "tokens": 2, "bytes": 3}
    info = {"documents": 1, "tokens": 2, "repaired": 0, "dropped": {"b\nc": 4}, "subsets": {"a\x1b[2J": figures}}
    assert [line.split()[0] for line in progress.table(info).splitlines()] == ["subset", r"a\x1b[2J", "all", "of"]
    assert progress.counts(info) == r"1 document (4 of b\nc left out), 2 tokens"
    one = Input("/in", "a\n\x1b[2J.txt", 5)
    progress.Progress([one]).add(one, info)
    assert capsys.readouterr().err.startswith(r"[1/1] a\n\x1b[2J.txt: 1 document ")


def test_counts_in_words():
    noted = "7 of RedPajamaGithub left out, 2,005 not drawn, 1,034 with lone surrogates replaced"
    assert progress.counts(progress.total(INFOS)) == f"1,003 documents ({noted}), 6,200 tokens"
    plain = INFOS[0] | {"dropped": {}, "repaired": 0}
    assert progress.counts(plain) == "3 documents, 1,200 tokens"
    assert progress.counts(plain | {"documents": 1, "dropped": {"fraction": 0}}) == "1 document, 1,200 tokens"


def test_table():
    rows = [line.split() for line in progress.table(progress.total(INFOS)).splitlines()]
    assert rows == [
        ["subset", "documents", "tokens", "bytes"],
        ["Book", "1", "200", "900"],
        ["C4", "1,002", "6,000", "25,000"],
        ["all", "1,003", "6,200", "25,900"],
        ["of", "RedPajamaGithub", "left", "out", "7"],
        ["not", "drawn", "2,005"],
    ]
    lines = progress.table(progress.total(INFOS)).splitlines()
    name = len("of RedPajamaGithub left out")  # the longest
    assert [len(line) for line in lines] == [name + 3 * 22] * 4 + [name + 22] * 2
    assert lines[3].startswith("all ")


def test_a_table_of_files_that_are_in_no_folder_has_no_subsets():
    figures = {"documents": 2, "tokens": 10, "bytes": 40}
    info = {"dropped": {}, "subsets": {".": figures}}
    assert [line.split() for line in progress.table(info).splitlines()] == [
        ["subset", "documents", "tokens", "bytes"],
        ["all", "2", "10", "40"],
    ]
    both = info | {"subsets": {".": figures, "Book": figures}}
    assert [line.split()[0] for line in progress.table(both).splitlines()] == ["subset", ".", "Book", "all"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands where it is put."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_progress_is_a_line_for_each_shard(clock, capsys):
    inputs = [Input(f"/in/{name}", name, size) for name, size in (("a", 100), ("b", 300), ("c", 0))]
    bar = progress.Progress(inputs)
    clock[0] = 102.0
    bar.add(inputs[0], INFOS[0])
    clock[0] = 110.0
    bar.add(inputs[1], InputError("no text"))
    bar.add(inputs[2], INFOS[0] | {"tokens": 300, "dropped": {}, "repaired": 0})
    bar.close()
    out, err = capsys.readouterr()
    assert out == ""
    noted = "7 of RedPajamaGithub left out, 2,000 not drawn, 1,000 with lone surrogates replaced"
    assert err.splitlines() == [
        f"[1/3] a: 3 documents ({noted}), 1,200 tokens; 600 tokens/s, 6s left",  # 100 bytes took 2 s, and 300 are left
        "[2/3] b: not packed; 120 tokens/s, 0s left",
        "[3/3] c: 3 documents, 300 tokens; 150 tokens/s, 0s left",
    ]


def test_progress_of_many_small_files_is_a_line_every_few_seconds(clock, capsys):
    inputs = [Input(f"/in/{i}", str(i), 100) for i in range(progress.FEW + 1)]
    info = {"documents": 1, "tokens": 10, "repaired": 0, "dropped": {}}
    bar = progress.Progress(inputs)
    for i, one in enumerate(inputs):
        clock[0] = 101.0 + i / 10  # 10 files a second
        bar.add(one, InputError("no text") if i == 7 else info)
    bar.close()
    shown = [int(line.split("/")[0][1:]) for line in capsys.readouterr().err.splitlines()]
    assert (progress.INTERVAL, shown) == (5.0, [1, 8, 58, 101])  # the eighth was not packed; then 5 s; the last


def test_progress_is_a_bar_on_a_terminal(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    inputs = [Input(f"/in/{name}", name, 1000) for name in "ab"]
    bar = progress.Progress(inputs)
    clock[0] = 102.0
    for one in inputs:
        bar.add(one, INFOS[0])
    assert not sys.stderr.getvalue().endswith("\n")
    bar.close()
    said = sys.stderr.getvalue()
    assert said.endswith("\n")
    assert "100%" in said
    assert "2.00k/2.00k " in said
    assert "2/2 shards, 2,400 tokens, 1,200 tokens/s" in said
    assert "documents" not in said
