"""What rows of metrics.csv say in words."""

import math

from tinyllama.monitor.rows import FORMATS, by_source, console_line, is_finite, mean_speed, numbers


def test_a_console_line() -> None:
    row: dict[str, float | None] = {"step": 10, "loss": 2.34567, "lr": 4e-4, "grad_norm": 1.25, "mfu": None}
    row |= {"tokens_per_second": 24000.4, "max_memory_gb": 37.123, "skipped": 0}
    line = "loss 2.3457  lr 4.000e-04  grad_norm 1.250  24,000 tokens/s  memory 37.12 GB  1d 02h left"
    assert console_line(row, 1430512, 93784.0) == f"step      10/1430512  {line}"
    assert console_line({"step": 10, "mfu": 0.561, "skipped": 3}, 20, None) == "step 10/20  mfu 56.1%  skipped 3"


def test_a_cell_may_hold_a_number_that_is_none() -> None:
    assert all(map(is_finite, (0, -2.5, 2**62)))
    assert not any(map(is_finite, (None, "", "2.5", math.nan, math.inf, -math.inf, 10**400)))


def test_numbers_have_their_units() -> None:
    row = {"loss": 1.23456, "val_loss": 2.34567, "val_bpb": 0.98765, "lr": 4e-4, "grad_norm": 1.23456}
    row |= {"tokens_per_second": 12345.6, "mfu": 0.5678, "max_memory_gb": 12.346, "skipped": 2}
    assert numbers(row) == [
        *("loss 1.2346", "val_loss 2.3457", "val_bpb 0.9877", "lr 4.000e-04", "grad_norm 1.235"),
        *("12,346 tokens/s", "mfu 56.8%", "memory 12.35 GB", "skipped 2"),
    ]
    assert numbers({"loss": 0.0, "mfu": None, "skipped": 0}) == ["loss 0.0000"]
    times = {"step_seconds": 2.5, "data_seconds": 0.04, "save_seconds": 3.25, "validation_seconds": 12.0}
    times |= {"forward_seconds_median": 0.5, "forward_seconds_slowest": 0.55, "slowest_rank": 3}
    assert numbers(times) == ["waited 3.2 s for checkpoints, 12.0 s for validation"]
    assert numbers(times | {"forward_seconds_slowest": 0.625})[0] == "rank 3 25% slower"
    assert numbers({"forward_seconds_median": 0.0, "forward_seconds_slowest": 0.0, "slowest_rank": 0}) == []
    assert list(FORMATS) == [key for key in row if key != "skipped"]


def test_several_validation_sources_are_told_apart() -> None:
    row = {"val_loss": 2.0, "val_loss/web, 7": 1.5, "val_bpb/web, 7": 0.5, "val_loss/code": 2.5, "val_bpb/code": None}
    assert by_source(row | {"val_loss/none": None}) == ["web, 7 1.5000 (0.5000 bpb)", "code 2.5000"]
    assert by_source({"val_loss": 2.0, "val_loss/web": 2.0, "val_bpb/web": 1.0}) == []  # which says the same again
    assert by_source({"loss": 2.0}) == []


def test_a_mean_speed_weighs_rows_by_their_tokens() -> None:
    rows = [{"tokens": 100, "tokens_per_second": 10}, {"tokens": 150, "tokens_per_second": None}]
    rows += [{"tokens": 550, "tokens_per_second": 40}, {"tokens": 650, "tokens_per_second": 0}]
    assert mean_speed(rows) == 500 / 20  # 10 s for the first 100 tokens, 10 s for 400
    assert mean_speed(rows[1:2]) == mean_speed([]) == 0.0
    assert mean_speed(rows, tokens_before=60) == 440 / 14  # of a branch: 4 s for the first 40 tokens
    spoken = [{"tokens": 100, "tokens_per_second": 10.0}, {"tokens": 200, "tokens_per_second": 40.0}]
    assert mean_speed(spoken) == 200 / 12.5
    silent = [{"tokens": 300, "tokens_per_second": None}, {"tokens": 400, "tokens_per_second": 50.0}]
    assert mean_speed([*spoken, *silent]) == 300 / 14.5  # of the tokens from 200 to 300 nobody knows the time
    assert mean_speed(silent[:1]) == 0
