"""The events of a run, the clocks of its waits, its time left, and what its end is said to be."""

import importlib.metadata
import json
import resource
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tinyllama.checkpoint.state import TrainState
from tinyllama.config.model import ModelConfig
from tinyllama.model import GPT
from tinyllama.monitor.metrics import RunLog, max_memory_gb
from tinyllama.train.anomaly import StepResult
from tinyllama.train.run import Run


def test_events_are_kept_and_other_ranks_are_silent(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    RunLog(run, None, is_rank_zero=True).event("start", "here we go", step=0)
    RunLog(run, 5, is_rank_zero=True).stop(step=7, reason="a spike")
    events = [json.loads(line) for line in (run.out_dir / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("start", 0), ("stop", 7)]
    assert json.loads((run.out_dir / "STOPPED").read_text()) == {"step": 7, "reason": "a spike"}
    said = capsys.readouterr().out
    assert said.startswith("here we go\n")
    silent = RunLog(run, 5, is_rank_zero=False)
    silent.row({"step": 6, "tokens": 1})
    silent.event("start", "nobody hears this")
    silent.stop(step=1)
    assert capsys.readouterr().out == ""
    assert len((run.out_dir / "events.jsonl").read_text().splitlines()) == 2


def test_a_start_records_what_the_run_was_started_by_and_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain/train.py", "--out_dir", "a b"])
    RunLog(run, None, is_rank_zero=True).start(3)
    RunLog(run, None, is_rank_zero=False).start(4)
    assert capsys.readouterr().out == "start    a new run at step 3\n"
    (event,) = [json.loads(line) for line in (run.out_dir / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["step"], event["max_steps"], event["nodes"]) == ("start", 3, 9, 1)
    assert event["command"] == "python pretrain/train.py --out_dir 'a b'"
    assert event["versions"]["torch"] == importlib.metadata.version("torch")  # without a local part, as "+cpu"
    assert event.keys() >= {"device", "commit"}


def test_a_start_after_failed_saves_says_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    full = "checkpoints/step-00000004 is not saved: No space left on device"
    failed = ("checkpoint_failed", {"error": full, "step": 4})
    gave_up = ("stop", {"by": "checkpoint.on_failure", "step": 4})
    for events, is_told in (
        ([failed, gave_up], True),
        ([failed], True),  # and killed
        ([("checkpoint", {"step": 4}), failed, gave_up, ("metrics_damaged", {})], True),
        ([failed, ("checkpoint", {"step": 8})], False),
        ([failed, gave_up, ("start", {"step": 0}), ("stop", {"by": "SIGTERM", "step": 3})], False),
        ([("stop", {"reason": "a spike"})], False),
        ([], False),
    ):
        log = RunLog(run, None, is_rank_zero=True)
        (run.out_dir / "events.jsonl").unlink(missing_ok=True)
        for name, details in events:
            log.event(name, **details)
        RunLog(run, None, is_rank_zero=True).start(3)
        hint = f"check that {run.out_dir} has room"
        before = [f"before   the last save failed ({full}): {hint}"] if is_told else []
        assert capsys.readouterr().out.splitlines() == ["start    a new run at step 3", *before], events


@pytest.mark.parametrize("fatal", [False, True])
def test_what_was_skipped_is_told_and_may_stop_the_run(
    run: Run, fatal: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = StepResult(4, (24, 31), 2.5, 1.0, finite=True, skipped=False, fatal=False, ranks=[])
    spike = StepResult(5, (32, 39), 9.5, 80.0, finite=True, skipped=True, fatal=False, ranks=[])
    broken = StepResult(6, (40, 47), float("inf"), 1.0, finite=False, skipped=True, fatal=fatal, ranks=[1])
    after = StepResult(7, (48, 55), 9.5, 80.0, finite=True, skipped=True, fatal=False, ranks=[])
    with RunLog(run, None, is_rank_zero=True) as log:
        assert log.record_skips([fine, spike]) is False
        assert log.record_skips([broken, after]) is fatal
        assert RunLog(run, None, is_rank_zero=False).record_skips([broken]) is fatal
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "skipped step 5, samples 32 to 39: loss 9.5000, grad_norm 80.000: a spike"
    assert said[1] == "skipped step 6, samples 40 to 47: loss inf, grad_norm 1.000: not finite on rank 1"
    events = [json.loads(line) for line in (run.out_dir / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["skip", "skip", "stop" if fatal else "skip"]
    assert {key: value for key, value in events[0].items() if key != "time"} == {
        **{"event": "skip", "step": 5, "samples": [32, 39], "loss": 9.5, "grad_norm": 80.0},
        **{"finite": True, "skipped": True, "fatal": False, "ranks": []},
    }
    if not fatal:
        assert not (run.out_dir / "STOPPED").exists()
        return
    reason = {"step": 6, "samples": 48, "reason": "not finite on rank 1: step 6, samples 40 to 47"}
    assert json.loads((run.out_dir / "STOPPED").read_text()) == reason
    assert {key: events[2][key] for key in reason} == reason
    assert said[2].startswith(f"stopped for good, see {run.out_dir / 'STOPPED'}: fix the cause and delete the file")


def test_the_clocks_count_and_a_checkpoint_is_an_event(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with RunLog(run, None, is_rank_zero=True) as log:
        for what, step, seconds in (("validation", 2, 3.0), ("checkpoints", 2, 1.23456), ("checkpoints", 4, 2.0)):
            with log.time_spent(what, step):
                now[0] += seconds
            now[0] += 10.0
        log.end(TrainState(step=4, tokens=128), "SIGTERM")
    events = [json.loads(line) for line in (run.out_dir / "events.jsonl").read_text().splitlines()]
    saves = [(event["event"], event["step"], event["seconds"]) for event in events[:2]]
    assert saves == [("checkpoint", 2, 1.235), ("checkpoint", 4, 2.0)]
    assert (events[2]["event"], events[2]["by"], events[2]["step"]) == ("stop", "SIGTERM", 4)
    assert events[2]["seconds"] == pytest.approx({"training": 30.0, "validation": 3.0, "checkpoints": 3.23456})
    assert abs(events[0]["time"] - time.time()) < 600


def test_the_waits_are_those_since_the_row_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with RunLog(run, None, is_rank_zero=True) as log:
        for saves, validations in ((3.0, 5.0), (0.0, 0.0), (1.5, 0.0)):
            for what, seconds in (("checkpoints", saves), ("validation", validations)):
                with log.time_spent(what, 2):
                    now[0] += seconds
            assert log.waits() == {"save_seconds": saves, "validation_seconds": validations}


def test_a_planned_stop_says_how_to_resume(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (run.out_dir / "checkpoints/step-00000004").mkdir(parents=True)
    with RunLog(run, None, is_rank_zero=True) as log:
        log.end(TrainState(step=4, tokens=128), "SIGTERM")
    said = capsys.readouterr().out
    assert said.endswith("stopped by SIGTERM at step 4; the same command resumes from there\n")
    assert "# resumes from there" in said
    assert not (run.out_dir / "STOPPED").exists()


@pytest.mark.parametrize("by", ["SIGTERM", "SIGUSR1", "train.max_time"])
def test_in_a_batch_job_the_job_is_what_resumes(
    run: Run, by: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SLURM_JOB_ID": "1234", "ENVIRONMENT": "BATCH"}.items():  # as sbatch sets them
        monkeypatch.setenv(name, value)
    (run.out_dir / "checkpoints/step-00000004").mkdir(parents=True)
    with RunLog(run, None, is_rank_zero=True) as log:
        log.end(TrainState(step=4, tokens=128), by)
    said = capsys.readouterr().out
    again = "unless Slurm requeues the job, sbatch of the same script resumes from there"
    assert said.endswith(f"stopped by {by} at step 4; {again}\n")
    assert "next     sbatch ...    # the script of job 1234, unless Slurm requeues it: resumes from there\n" in said
    monkeypatch.delenv("ENVIRONMENT")  # in a shell of salloc's or srun's
    with RunLog(run, None, is_rank_zero=True) as log:
        log.end(TrainState(step=4, tokens=128), by)
    assert "sbatch" not in capsys.readouterr().out


def test_what_is_shown_of_an_event_is_a_line_each(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(run, None, is_rank_zero=True)
    log.event("start", "start\x1b[2J of\nall", "changed \u202ex", step=0, run="\x1b\n\udcff")
    log.event("checkpoint_failed", f"error: {'x' * 10**7}: make room", step=1)
    first, second, third = capsys.readouterr().out.splitlines()
    assert (first, second) == ("start\\x1b[2J of\\nall", "changed \\u202ex")
    assert third.startswith("error: xxx")
    assert third.endswith("x: make room")
    assert len(third) < 2100
    events = [json.loads(line) for line in (run.out_dir / "events.jsonl").read_text().splitlines()]
    assert events[0]["run"] == "\x1b\n\udcff"


def test_events_that_cannot_be_written_are_shown(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(run, None, is_rank_zero=True)
    (run.out_dir / "events.jsonl").mkdir()
    log.event("start", "here we go", step=0)
    assert capsys.readouterr().out == "here we go\n"


def test_memory_is_told_in_units_of_a_thousand_million_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {resource.RUSAGE_SELF: 2_000_000, resource.RUSAGE_CHILDREN: 7_000_000}
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=peaks[who]))
    for system, peak in (("linux", 2.048), ("darwin", 0.002)):  # the one counts in KiB, the other in bytes
        monkeypatch.setattr(sys, "platform", system)
        assert max_memory_gb(torch.device("cpu")) == peak, system
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {3: 5e9}[device.index])
    assert max_memory_gb(torch.device("cuda", 3)) == 5.0


def test_a_gpu_that_has_no_more_memory_is_explained(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [{"filename": "/repo/tinyllama/ops/swiglu.py", "line": 40, "name": "reference"}]
    block = {"address": 0, "size": 7 * 10**9, "state": "active_allocated", "frames": frames}
    snapshot = {"segments": [{"total_size": 8 * 10**9, "blocks": [block]}], "device_traces": []}
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: snapshot)
    model = GPT(ModelConfig("tiny", block_size=2, vocab_size=8, n_layer=1, n_head=2, n_embd=4, n_query_groups=1))
    log = RunLog(run, None, is_rank_zero=True)
    log.watch_memory(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(torch.OutOfMemoryError) as caught, log:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    (note,) = caught.value.__notes__
    assert note.startswith(
        "error: rank 0 is out of GPU memory, with 7.00 of 8.00 GB in use: 7.00 GB activations of ops/swiglu.py:40 "
        "reference: lower train.micro_batch_size"
    )
    assert (run.out_dir / "memory" / "rank-00000.pickle").exists()
    (event,) = [json.loads(line) for line in (run.out_dir / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["text"]) == ("out_of_memory", note.removeprefix("error: "))
