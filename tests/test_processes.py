"""A test whose process is stuck fails, and shows what the process said."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from processes import Group, Process
from warm import Forked

RANK = """
import sys, time
print("said", sys.argv[1], file=sys.stderr, flush=True)
for line in sys.stdin:
    if "sleep" in line and sys.argv[1] == "1":
        time.sleep(1000)
    print('{"result": ' + sys.argv[1] + "}", flush=True)
    print(f"and {line.strip()}", file=sys.stderr, flush=True)
sys.exit(3)
"""


def test_a_rank_that_does_not_answer_fails_the_test_and_ends_with_its_group() -> None:
    group = Group([Process(sys.executable, "-S", "-c", RANK, rank) for rank in range(2)])
    try:
        assert group.ask("go") == [{"result": 0}, {"result": 1}]
        assert group.alive()
        with pytest.raises(AssertionError) as error:
            group.ask("sleep", limit=0.5)
        assert f"to sleep there were the answers [{ {'result': 0} }, None]" in str(error.value)
        assert 'rank 1: exit code -9, on stderr:\nsaid 1\nand "go"\n' in str(error.value)
        assert not group.alive()
        with pytest.raises(AssertionError, match="there were the answers .None, None"):
            group.ask("go")
    finally:
        group.kill()


def test_the_end_of_a_process_has_its_last_words() -> None:
    process = Process(sys.executable, "-S", "-c", RANK, 5)
    process.tell("one")
    assert json.loads(process.line()) == {"result": 5}
    process.tell("two")
    process.close()
    assert process.end() == (3, '{"result": 5}\n', "said 5\nand one\nand two\n")
    with pytest.raises(AssertionError, match="gave no line; exit code 3, on stderr:\nsaid 5"):
        process.line()


CODE = """
import atexit, os, signal, sys, threading
from pathlib import Path
print(__name__, sys.argv, sys.path[0], Path.cwd(), os.environ["WORD"], os.getsid(0) == os.getpid(), input())
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, sorted(os.listdir("/proc/self/fd"))[:3])
atexit.register(print, "at the end")
match sys.argv[1]:
    case "exit": threading.Timer(0.1, print, ["a thread"]).start(); sys.exit(7)
    case "raise": raise ValueError("broken")
    case "signal": sys.stdout.flush(); os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("how", ["exit", "raise", "signal", "return"])
@pytest.mark.parametrize("as_file", [False, True])
def test_a_warm_process_does_as_a_fresh_one(how: str, as_file: bool, tmp_path: Path) -> None:
    ends = []
    (tmp_path / "code.py").write_text(CODE)
    command = [sys.executable, tmp_path / "code.py"] if as_file else [sys.executable, "-c", CODE]
    for warm in (None, 0):
        process = Process(*command, how, warm=warm, env=os.environ | {"WORD": "a word"}, cwd=tmp_path)
        process.tell("a line")
        code, said, errors = process.end()
        assert process.popen.poll() == code
        ends.append((code, said, errors.splitlines()[-1:]))
    assert ends[1] == ends[0]
    assert "a word True a line" in ends[0][1]
    assert ends[0][0] == {"exit": 7, "raise": 1, "signal": -15, "return": 0}[how]


def test_ranks_that_are_warm_do_not_share_the_order_of_sets_and_can_be_killed() -> None:
    code = "import sys; print(hash('a'), flush=True); sys.stdin.read()"
    ranks = [Process(sys.executable, "-c", code, warm=rank) for rank in (0, 1)]
    assert ranks[0].line() != ranks[1].line()
    for rank in ranks:
        assert rank.popen.poll() is None
        rank.kill()
        assert rank.popen.poll() == -9


def test_a_process_that_was_not_begun_has_no_number_and_an_end_nobody_reports_is_no_success() -> None:
    report, reporter = os.pipe()
    os.close(reporter)
    with pytest.raises(ConnectionResetError, match="the warm process has ended"):
        Forked(["a"], sys.stdin, sys.stdin, report)
    report, reporter = os.pipe()
    os.write(reporter, (7).to_bytes(4))
    os.close(reporter)
    forked = Forked(["a"], sys.stdin, sys.stdin, report)
    assert (forked.pid, forked.wait()) == (7, -9)


@pytest.mark.slow  # it imports twice what warm processes have
def test_a_warm_process_that_was_killed_is_replaced_and_none_is_left() -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent / "helpers")!r})
import warm
for number in range(2):
    forked = warm.fork([sys.executable, "-c", "print('said')"], stderr=2, server=0)
    print(forked.stdout.read().strip(), forked.wait(), flush=True)
    if number == 0:
        warm._started[0].kill()
        warm._started[0].wait()
print(warm._started[1].pid, flush=True)
os.kill(os.getpid(), 9)
"""
    alone = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_TESTRUNUID"}
    process = Process(sys.executable, "-c", code, env=alone)
    assert [process.line(), process.line()] == ["said 0\n", "said 0\n"]
    warm = Path(f"/proc/{process.line().strip()}")
    process.end()
    while warm.exists() and "State:\tZ" not in (warm / "status").read_text():
        time.sleep(0.01)
