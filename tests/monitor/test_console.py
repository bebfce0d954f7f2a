"""What a person is shown of a run, word by word."""

import math
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import full_disk

from tinyllama.checkpoint.state import TrainState
from tinyllama.config.args import (
    CheckpointArgs,
    DataArgs,
    ModelArgs,
    OptimArgs,
    ParallelArgs,
    PretrainArgs,
    Source,
    TrainArgs,
    ValidationSource,
)
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import open_packed
from tinyllama.monitor.console import (
    Console,
    changes_in_words,
    end_summary,
    same_command,
    show_summary,
    start_summary,
)
from tinyllama.train.launch import World, find_world
from tinyllama.train.run import Run


@pytest.fixture
def run(packed_folder: Any, tmp_path: Path) -> Run:
    """10 steps of 4 samples of 8 tokens, from two sources of 11 blocks and 4."""
    folders = [packed_folder([[[3] * count]], name=name, eos=False) for name, count in (("up", 99), ("down", 36))]
    sources = [open_packed(folder) for folder in folders]
    args = PretrainArgs(
        out_dir=str(tmp_path / "out"),
        model=ModelArgs(block_size=8),
        data=DataArgs(
            sources=[Source(str(folder), weight) for folder, weight in zip(folders, (3, 1), strict=True)],
            validation=[ValidationSource(str(folders[0]))],
        ),
        optim=OptimArgs(lr=1.0, min_lr=0.5, warmup_steps=4),
        train=TrainArgs(max_steps=10, global_batch_size=4, micro_batch_size=1),
    )
    mixture = Mixture([11, 4], [3, 1], 0, [source.fingerprint for source in sources])
    return Run(
        args, args.model.resolve(), World(2, 2, 2), sources, sources[:1], mixture, 2, {"attention": "sdpa"}, None
    )


def test_the_start_summary_line_by_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 5 * 10**12))
    up, down = (source.path for source in run.sources)
    tokens = [source.tokens for source in run.sources]
    drawn = run.mixture.samples_by_source(40)
    summary = list(start_summary(run, "all fp32", ["here: ranks 0 1", "there: ranks 2 3"]))
    assert summary == [
        ("model", "tinyllama_1.1b: 1,100,048,384 parameters, context 8"),
        ("ranks", "here: ranks 0 1"),
        ("ranks", "there: ranks 2 3"),
        ("weights", "2 copies, each sharded over 2 ranks"),
        ("dtypes", "all fp32"),
        ("slow", "bf16 is made for GPUs; on a CPU --train.precision fp32 can be ten times as fast"),
        ("ops", "attention sdpa, blocks not compiled"),
        ("batch", "4 samples a step = 4 ranks x 2 micro-batches x 1 sample, 32 tokens"),
        ("length", f"10 steps, 40 samples, 320 tokens, {40 / 15:.2f} epochs"),
        ("data", f"{up}: {tokens[0]:,} tokens, {drawn[0] / 40:.2%} of the samples, {drawn[0] / 11:.2f} epochs"),
        ("data", f"{down}: {tokens[1]:,} tokens, {drawn[1] / 40:.2%} of the samples, {drawn[1] / 4:.2f} epochs"),
        ("held out", f"{up}: {tokens[0]:,} tokens, every 1,000 steps"),
        ("lr", "start (step 0) 2.500e-01  warm (step 3) 1.000e+00  half (step 5) 9.523e-01  end (step 9) 5.000e-01"),
        (
            "saves",
            "every 5,000 steps, on a signal and at the end, in the background; the newest 3 and every 50,000th step "
            f"kept; 13.2 GB each, 5.00 TB free in {run.args.out_dir}",
        ),
    ]


def test_only_the_summary_of_a_dry_run_says_what_it_starts_from_which_a_run_logs(run: Run) -> None:
    assert "start" not in dict(start_summary(run, "all fp32", []))
    planned = replace(run, args=replace(run.args, dry_run=True))
    assert dict(start_summary(planned, "all fp32", []))["start"] == "a new run at step 0"


@pytest.mark.parametrize(
    ("world", "expected"),
    [
        (World(1, 1, 1), "1 copy on 1 rank"),
        (World(2, 8, 16), "1 copy, sharded over 16 ranks"),
        (World(1, 8, 1), "8 copies, one on each rank"),
        (World(2, 8, 8), "2 copies, each sharded over 8 ranks"),
    ],
)
def test_the_start_summary_says_how_the_weights_lie_on_the_ranks(run: Run, world: World, expected: str) -> None:
    assert dict(start_summary(replace(run, world=world), "all fp32", []))["weights"] == expected


def test_the_start_summary_of_one_rank_speaks_of_one(run: Run) -> None:
    alone = replace(run, world=World(1, 1, 1), accumulation=4)
    assert dict(start_summary(alone, "", []))["batch"] == (
        "4 samples a step = 1 rank x 4 micro-batches x 1 sample, 32 tokens"
    )


def test_changed_settings_are_written_as_in_a_yaml() -> None:
    changes = {
        "train.max_time": [25.0, None],
        "train.compile": [None, True],
        "train.resume": ["auto", "out/a run"],
        "log.profile": [[], [10, 12]],
        "optim.lr": [4e-4, 1e-05],
        "data.validation": [[], [{"path": "da ta/t\u00e9xts"}]],
    }
    assert changes_in_words(changes) == (
        "train.max_time 25.0 -> null, train.compile null -> true, train.resume auto -> out/a run, "
        'log.profile [] -> [10, 12], optim.lr 0.0004 -> 1e-05, data.validation [] -> [{"path": "da ta/t\u00e9xts"}]'
    )


def test_a_summary_in_a_file_has_100_columns_and_whole_commands(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--out_dir", "x" * 150])
    names = ("attention", "rope", "rms_norm", "swiglu", "cross_entropy", "symmetric_matmul")
    ops = dict.fromkeys(names, "reference")
    paths = (replace(run.sources[0], path=Path("data/of-some-length")), replace(run.sources[1], path=Path("data/two")))
    run = replace(run, ops=ops, sources=list(paths), validation=[], args=replace(run.args, out_dir="out/mine"))
    show_summary(
        "pretrain", start_summary(run, "master float32, compute bfloat16, reduction float32", ["here: rank 0"])
    )
    said = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in said) <= 100
    at = said.index("saves    every 5,000 steps, on a signal and at the end, in the background; the newest 3 and every")
    assert said[at + 1].startswith("         50,000th step kept; 13.2 GB each, ")
    assert any("data/of-some-length" in line for line in said)  # not broken at its hyphens
    show_summary("stopped", end_summary(run, [], {"training": 1.0}, TrainState(step=3, tokens=96)))
    assert f"next     python train.py --out_dir {'x' * 150}    # starts anew" in capsys.readouterr().out.splitlines()


def test_the_start_summary_of_a_resumed_run_says_what_is_done_and_what_is_left(run: Run) -> None:
    args = replace(run.args, train=replace(run.args.train, max_steps=None, max_tokens=320))
    done = TrainState(step=6, samples=12, tokens=96, warmup_samples=8)  # at half of today's batch
    resumed = replace(run, args=args, resume=Path("checkpoints/step-00000006"), done=done)
    assert [line for line in start_summary(resumed, "all fp32", []) if line[0] in ("length", "done", "left")] == [
        ("length", f"13 steps, 40 samples, 320 tokens, {40 / 15:.2f} epochs"),
        ("done", f"6 steps, 12 samples, 96 tokens, {12 / 15:.2f} epochs"),
        ("left", f"7 steps, 28 samples, 224 tokens, {28 / 15:.2f} epochs"),
    ]
    said = dict(start_summary(resumed, "all fp32", []))
    marks = {"now": 6, "end": 12}
    assert said["lr"] == "  ".join(f"{name} (step {step}) {resumed.lr_at(step):.3e}" for name, step in marks.items())
    down, drawn = run.sources[1], run.mixture.samples_by_source(40)[1]
    assert said["data"] == (
        f"{down.path}: {down.tokens:,} tokens, {drawn / 40:.2%} of the samples, {drawn / 4:.2f} epochs"
    )


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"keep_last": None}, "in the background; all kept"),
        ({"keep_last": 2, "keep_every": None, "asynchronous": False}, "while training waits; the newest 2 kept"),
        ({"interval": 7, "keep_every": 70}, "the newest 3 and every 70th step kept"),
    ],
)
def test_what_is_kept_of_checkpoints(run: Run, policy: dict[str, Any], said: str) -> None:
    args = replace(run.args, checkpoint=CheckpointArgs(**policy), train=replace(run.args.train, precision="fp32"))
    args = replace(args, train=replace(args.train, compile=True))
    summary = dict(start_summary(replace(run, args=args), "all fp32", []))
    assert said in summary["saves"]
    assert summary["saves"].startswith(f"every {policy.get('interval', 5000):,} steps")
    assert "slow" not in summary
    assert summary["ops"] == "attention sdpa, blocks compiled"


def test_the_same_command_names_who_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain/train.py", "--out_dir", "my run"])
    command = "pretrain/train.py --out_dir 'my run'"
    job = {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0"}  # of a batch script
    step = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for env, expected in (
        ({}, f"python {command}"),
        (job, f"python {command}"),
        (job | step, f"srun ... python {command}"),
        (ranks | {"TORCHELASTIC_RUN_ID": "x"}, f"torchrun ... {command}"),
        (job | step | ranks | {"TORCHELASTIC_RUN_ID": "x", "SLURM_STEP_NUM_TASKS": "1"}, f"torchrun ... {command}"),
        (ranks, f"the same command of your launcher, for python {command}"),
        (job | step | ranks, f"the same command of your launcher, for python {command}"),
        (ranks | {"OMPI_COMM_WORLD_SIZE": "2"}, f"the same command of your launcher, for python {command}"),
    ):
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            assert same_command(find_world(ParallelArgs()).launcher) == expected


def test_the_end_summary_says_what_there_is_to_start_from(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain/train.py"])
    stopped = list(end_summary(run, [], {"training": 1.0}, TrainState()))
    assert stopped == [
        ("time", "since this start: training 1s"),
        ("saved", "nothing, as no step was done"),
        ("next", "python pretrain/train.py    # starts anew"),
    ]
    elsewhere = replace(run, resume=Path("other/checkpoints/step-00000003"))
    stopped = list(end_summary(elsewhere, [], {"training": 1.0}, TrainState(step=3)))
    assert stopped[1:] == [
        ("saved", "nothing, as no step was done"),
        ("next", "python pretrain/train.py    # starts from other/checkpoints/step-00000003 again"),
    ]
    (run.out_dir / "checkpoints/step-00000003").mkdir(parents=True)
    stopped = list(end_summary(run, [{"step": 3, "tokens": 1, "loss": 2.0}], {"training": 1.0}, TrainState(step=3)))
    assert stopped[-4:] == [
        ("saved", f"{run.out_dir}/checkpoints/step-00000003"),
        ("next", "python pretrain/train.py    # resumes from there"),
        ("", f"python scripts/generate.py {run.out_dir} --tokenizer TOKENIZER --prompt TEXT"),
        ("", f"python scripts/report.py {run.out_dir}"),
    ]


def test_the_best_of_the_end_summary_is_a_number(run: Run) -> None:
    rows = [
        {"step": step, "tokens": step, "val_loss": loss} for step, loss in enumerate((math.nan, -math.inf, 2.0, 3.0))
    ]
    for count, said in ((4, "3.0000 at step 3, best 2.0000 at step 2"), (1, "nan at step 0")):
        assert dict(end_summary(run, rows[:count], {}, TrainState()))["val_loss"] == said


def test_commands_of_the_end_summary_can_be_pasted_whatever_the_folder_is_called(run: Run, tmp_path: Path) -> None:
    run = replace(run, args=replace(run.args, out_dir=str(tmp_path / "my runs/no. 1; $HOME")))
    (run.out_dir / "checkpoints/step-00000010").mkdir(parents=True)
    row = {"step": 10, "tokens": 1, "loss": 2.0}
    summary = list(end_summary(run, [row], {"training": 1.0}, TrainState(step=10)))
    commands = [shlex.split(text) for key, text in summary if key in ("next", "")]
    folder = str(run.out_dir)
    assert commands == [
        ["python", "scripts/convert_lit_checkpoint.py", folder, f"{folder}/hf", "--tokenizer", "TOKENIZER"],
        ["python", "scripts/generate.py", folder, "--tokenizer", "TOKENIZER", "--prompt", "TEXT"],
        ["python", "scripts/report.py", folder],
    ]


def test_a_log_on_a_full_disk_does_not_end_its_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with full_disk() as file, log.open("w") as other:
        monkeypatch.setattr("sys.stdout", file)
        console = Console(10, 0)
        console.start()
        console.metrics({"step": 1, "tokens": 32, "loss": 7.0}, None)
        show_summary("done", [("loss", "7.0")])
        console.stop()
        os.dup2(other.fileno(), file.fileno())  # there is room again
        console.line("the next")
    assert log.read_text().splitlines() == ["step  1/10  loss 7.0000", "loss     7.0", "the next"]
