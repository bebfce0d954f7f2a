"""A test whose process is stuck fails, and shows what the process said."""

import json
import sys

import pytest
from processes import Group, Process

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
