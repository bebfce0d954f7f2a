"""What is read of the files that a run has written."""

import json
from pathlib import Path

from tinyllama.monitor.run_files import read_events


def test_an_event_without_a_step_is_at_that_of_the_one_before(tmp_path: Path) -> None:
    lines = [
        {"time": 5, "event": "start", "step": 3, "ops": {}, "changed": [], "note": None, "world_size": 2, "skipped": 0},
        {"time": 6, "event": "checkpoint_failed", "error": "disk full"},
        {"time": 7, "event": "start", "step": 0},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_events(tmp_path / "events.jsonl", {0: 0, 10: 100}) == [
        {"kind": "start", "step": 3, "tokens": 30, "time": 5.0, "details": "world_size 2, skipped 0"},
        {"kind": "checkpoint_failed", "step": 3, "tokens": 30, "time": 6.0, "details": "error disk full"},
        {"kind": "restart", "step": 0, "tokens": 0, "time": 7.0, "details": ""},
    ]
    assert read_events(tmp_path / "none", {0: 0}) == []
