"""The recipe, for real: what tiny models on CPU ranks compute, read and leave behind."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoints import load_weights
from runs import branch, column, metrics, tensors

from tinyllama.checkpoint import reader

ROOT = Path(__file__).parents[2]


LAYOUTS = {
    "sharded over 2": (2, []),
    "replicated over 2": (2, ["--parallel.shard", "none", "--train.micro_batch_size", 4]),
    "sharded over 4": (4, []),
    "2 shards, 2 replicas": (4, ["--parallel.shard", 2]),
    "replicated over 4": (4, ["--parallel.shard", "none"]),
    "selective checkpointing": (2, ["--train.activation_checkpointing", "selective"]),
    "full checkpointing": (4, ["--train.activation_checkpointing", "full", "--train.micro_batch_size", 1]),
    "gathered once": (2, ["--parallel.reshard_after_forward", "false"]),
    "gathered once over 4": (4, ["--parallel.reshard_after_forward", "false"]),
    "gathered once, 2 shards, 2 replicas": (4, ["--parallel.reshard_after_forward", "false", "--parallel.shard", 2]),
    "reduced often": (2, ["--parallel.sync_every_micro_batch", "true", "--train.micro_batch_size", 1]),
}


QUICK = ["sharded over 2", "replicated over 2", "gathered once"]


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param([name for name in LAYOUTS if name not in QUICK], marks=pytest.mark.slow)]
)
def test_the_layout_does_not_change_the_run(
    world, straight, config_file: Path, tmp_path: Path, names: list[str]
) -> None:
    alone = straight(1)
    for name in names:
        size, flags = LAYOUTS[name]
        out = tmp_path / name if flags else straight(size)
        if flags:
            world(size).train("--config", config_file, "--out_dir", out, *flags)
        for loss in ("loss", "val_loss"):
            assert column(out, loss) == pytest.approx(column(alone, loss), abs=2e-6, rel=0), (name, loss)


@pytest.mark.parametrize("shard", ["full", "node"])
def test_nodes_communicate_beside_what_they_compute(
    world, straight, config_file: Path, tmp_path: Path, shard: str
) -> None:
    """By FSDP2, or in the backward pass of what nothing shards; the numbers are those of one rank."""
    flags = ["--parallel.reshard_after_forward", "false", "--parallel.shard", shard]
    world(2, 2).train("--config", config_file, "--out_dir", tmp_path / "run", *flags)
    for loss in ("loss", "val_loss"):
        assert column(tmp_path / "run", loss) == pytest.approx(column(straight(1), loss), abs=2e-6, rel=0)


def test_ranks_need_not_divide_the_weights_that_they_gather(
    world, config: dict[str, Any], config_file: Path, tmp_path: Path
) -> None:
    """The rows of no matrix are a multiple of 3, nor those of most of 2; FSDP2 goes on from such a checkpoint."""
    config["model"] |= {"n_embd": 28, "n_head": 14, "n_query_groups": 2, "intermediate_size": 37}
    config["train"] |= {"global_batch_size": 12, "micro_batch_size": 2, "max_steps": 12}
    config["checkpoint"]["interval"] = config["eval"]["interval"] = 6
    config_file.write_text(yaml.safe_dump(config))
    held = ["--config", config_file, "--parallel.reshard_after_forward", "false", "--out_dir"]
    for size in (1, 3, 2):
        world(size).train(*held, tmp_path / str(size))
    middle = tmp_path / "3" / "checkpoints" / "step-00000006"
    world(2).train("--config", config_file, "--out_dir", tmp_path / "resumed", "--train.resume", middle)
    world(2).train(*held, tmp_path / "held", "--train.resume", middle)
    for name in ("3", "2", "resumed", "held"):
        found, alone = column(tmp_path / name, "loss"), column(tmp_path / "1", "loss")
        assert found == pytest.approx(alone[-len(found) :], abs=2e-6, rel=0), name


def test_start_weights_are_the_same_for_every_world(world, config_file: Path) -> None:
    start = world(1)("start_hash", "--config", config_file)[0]["result"]
    assert world(2)("start_hash", "--config", config_file)[1]["result"] == start
    assert world(2)("start_hash", "--config", config_file, "--parallel.shard", 1)[0]["result"] == start
    assert world(1)("start_hash", "--config", config_file, "--train.seed", 1)[0]["result"] != start


def test_bf16_computes_in_bf16_and_keeps_the_rest_in_fp32(world, config_file: Path) -> None:
    for rank in world(2)("dtypes", "--config", config_file, "--train.precision", "bf16"):
        assert rank["result"] == {
            "stream": ["torch.bfloat16"],
            "tables": ["torch.float32"],
            "computed": ["torch.bfloat16"],
            "gradients": ["torch.float32"],
            "master": ["torch.float32"],
            "moments": ["torch.float32"],
        }


def test_a_run_is_watched_in_each_phase_and_after_a_resume(world, config_file: Path, tmp_path: Path) -> None:
    flags = ["--config", config_file, "--out_dir", tmp_path / "run", "--eval.interval", 2, "--checkpoint.interval", 3]
    flags += ["--train.start_timeout", 700]
    first = [[0, "validation"], [0, "step"], [1, "step"], [2, "validation"], [2, "step"], [3, "checkpoint"]]
    first += [[3, "step"], [4, "validation"], [4, "step"], [5, "step"], [6, "validation"], [6, "checkpoint"]]
    second = [[6, "step"], [7, "step"], [8, "validation"], [8, "checkpoint"]]  # step 6 has been validated
    for steps, timeout, beats in ((6, 200, first), (8, 210, second)):
        answers = world(2)("watched", *flags, "--train.max_steps", steps, "--train.timeout", timeout)
        for rank, seen in enumerate(answer["result"] for answer in answers):
            assert seen["beats"] == beats
            assert (seen["rank"], seen["world_size"], seen["code"]) == (rank, 2, 0)
            assert (seen["first_timeout"], seen["timeout"]) == (700, timeout)
            # steady from its second step on; a save may take as long as torch lets it
            assert seen["timeouts"] == [timeout + 60, 1800]
            assert seen["collects"] is False
            assert (seen["owner"]["job_id"], seen["owner"]["pid"]) == ("77", world(2).processes[0].pid)


def test_a_dry_run_prints_the_plan_and_writes_nothing(world, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = world(2).train("--config", config_file, "--out_dir", out, "--dry_run")
    assert "ranks 0 1" in said
    assert "weights  1 copy, sharded over 2 ranks" in said
    assert "dtypes   master float32, compute float32, reduction float32" in said
    assert "8 samples a step = 2 ranks x 2 micro-batches x 2 samples, 256 tokens" in said
    assert not out.exists()


def test_what_a_run_leaves_behind(world, config: dict[str, Any], config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = world(1).train("--config", config_file, "--out_dir", out, "--train.max_steps", 23, "--log.interval", 10)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000020", "step-00000023"]
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert resolved["model"]["n_head"] == 4
    assert None not in resolved["model"].values()
    assert (out / "checkpoints" / "step-00000023" / "config.yaml").read_text() == (out / "config.yaml").read_text()
    assert [row["step"] for row in metrics(out)] == ["0", "10", "20", "23"]
    assert metrics(out)[-1]["lr"] == "0.001"
    assert sorted(path.name for path in out.iterdir()) == [
        *("checkpoints", "config.yaml", "events.jsonl", "heartbeat", "metrics.csv")
    ]
    state = reader.read_state(out / "checkpoints" / "step-00000023")
    assert (state["tokenizer_sha256"], state["bos_id"], state["eos_id"]) == ("0" * 64, 1, 2)
    assert (state["step"], state["samples"], state["tokens"], state["validated"]) == (23, 184, 5888, 23)
    assert [source["weight"] for source in state["data"]["sources"]] == [0.7, 0.3]
    assert (state["data"]["seed"], state["model"]) == (3407, resolved["model"])
    said = " ".join(said.split())  # summaries fold long lines
    assert "start (step 0) 2.000e-03 warm (step 4) 1.000e-02 half (step 11)" in said
    assert "end (step 22) 1.000e-03" in said
    # the same command again has nothing to do, and does nothing
    again = world(1).train("--config", config_file, "--out_dir", out, "--train.max_steps", 23, "--log.interval", 10)
    assert "step-00000023 at step 23" in again
    assert [row["step"] for row in metrics(out)] == ["0", "10", "20", "23"]
    # and a run that ends before its checkpoint is a mistake
    (problem,) = world(1)("train", "--config", config_file, "--out_dir", out, "--train.max_steps", 22)[0]["problems"]
    assert problem == f"{out}/checkpoints/step-00000023 is beyond the run's 22 steps: raise train.max_steps"


BAD_RUNS = {
    "no such folder": (["--data.sources", '[{"path": "nowhere"}]'], ["nowhere is not a folder"]),
    "no batch": (["--train.global_batch_size", 4096], ["blocks of 33 tokens, fewer than one batch of train.global_b"]),
    "no block": (["--model.block_size", 100000], ["up holds", "down holds", "held_out holds"]),
    "batch": (
        ["--train.global_batch_size", 7],
        ["not a multiple of 1 ranks x train.micro_batch_size 2: give"],
    ),
    "vocabulary": (["--model.vocab_size", 999], ["up was made", "down was made", "held_out was made"]),
    "shard": (["--parallel.shard", 3], ["parallel.shard 3 does not divide the 1 ranks; valid: 1"]),
    "min_lr": (["--optim.min_lr", 1], ["optim.min_lr 1.0 is greater than optim.lr 0.01"]),
    "resume": (["--train.resume", "nowhere"], ["nowhere holds no complete checkpoint"]),
}


@pytest.mark.parametrize("bad", BAD_RUNS)
def test_bad_input_is_refused_before_anything_is_written(world, config_file: Path, tmp_path: Path, bad: str) -> None:
    flags, expected = BAD_RUNS[bad]
    out = tmp_path / "run"
    answer = world(1)("train", "--config", config_file, "--out_dir", out, *flags)[0]
    assert "problems" in answer, answer
    assert len(answer["problems"]) == len(expected)
    for problem, part in zip(answer["problems"], expected, strict=True):
        assert part in problem
    assert not out.exists()


def test_a_token_outside_the_vocabulary_is_found(
    world, config: dict[str, Any], config_file: Path, tmp_path: Path
) -> None:
    shard = Path(config["data"]["sources"][0]["path"]) / "shard-00000.bin"
    tokens = np.fromfile(shard, np.uint16)
    tokens[100] = 9999
    tokens.tofile(shard)
    (problem,) = world(1)("train", "--config", config_file, "--out_dir", tmp_path / "run")[0]["problems"]
    assert "token 9999 at position 100 " in problem


@pytest.mark.slow
def test_plain_python_starts_its_own_ranks(config_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "pretrain/train.py", "--config", config_file, "--parallel.devices", "2"]
    flags = ["--out_dir", tmp_path / "run", "--train.max_steps", "6", "--train.precision", "bf16"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 samples a step = 2 ranks x 2 micro-batches x 2 samples, 256 tokens" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "step-00000006" / "__1_0.distcp").exists()
    wrong = subprocess.run([*command, "--train.max_step", "6"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr == "error: unknown flag --train.max_step; did you mean train.max_steps?\n"


@pytest.mark.slow
def test_a_run_resumed_inside_a_ramp_sees_what_an_uninterrupted_one_sees(
    world, config: dict[str, Any], tmp_path: Path
) -> None:
    config["data"]["sources"][0] |= {"weight": 1, "final_weight": 0.2}
    config["data"]["sources"][1] |= {"weight": 0, "final_weight": 0.8}
    config["data"]["ramp_tokens"] = 30 * 128 * 32
    config["train"] |= {"global_batch_size": 128, "micro_batch_size": 32}  # the run is of five windows
    path = tmp_path / "ramp.yaml"
    path.write_text(yaml.safe_dump(config))
    out = tmp_path / "straight"
    world(2).train("--config", path, "--out_dir", out)
    resumed, alone = branch(out, 20), tmp_path / "alone"
    shutil.copytree(resumed, alone)
    world(2).train("--config", path, "--out_dir", resumed)
    for name in ("step", "loss", "val_loss", "grad_norm", "tokens_up", "tokens_down"):
        assert column(resumed, name) == column(out, name), name
    before, after = (tensors(run / "checkpoints" / "step-00000040") for run in (out, resumed))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    down = np.array(column(out, "tokens_down")) / 32  # its share is 0.8 of sample / 3840, then 0.8
    assert down[[8, 16, 40]] == pytest.approx(
        [0.4 * 1024**2 / 3840, 0.4 * 2048**2 / 3840, 0.4 * 3840 + 0.8 * 1280], abs=1
    )
    world(1).train("--config", path, "--out_dir", alone)
    assert column(alone, "loss") == pytest.approx(column(out, "loss"), abs=2e-6)
    (problem,) = world(1)("train", "--config", path, "--out_dir", resumed, "--data.ramp_tokens", 9999)[0]["problems"]
    assert "data.ramp_tokens was 122880 and is 9999" in problem


@pytest.mark.slow
def test_tied_embeddings_train_resume_and_export_alike_in_every_world(
    world, config_file: Path, tmp_path: Path, script: Callable[..., tuple[int, str, str]]
) -> None:
    flags = ["--config", config_file, "--model.tie_embeddings", "true"]
    alone, out, compiled = (tmp_path / name for name in ("alone", "two", "compiled"))
    world(1).train(*flags, "--out_dir", alone)
    world(2).train(*flags, "--out_dir", out)
    for name in ("loss", "val_loss"):
        assert column(out, name) == pytest.approx(column(alone, name), abs=2e-6, rel=0)
    assert column(out, "loss")[-1] < 0.7 * column(out, "loss")[0]
    saved = tensors(out / "checkpoints" / "step-00000040")
    assert "model.transformer.wte.weight" in saved
    assert not [name for name in saved if "lm_head" in name]
    resumed = branch(out, 20)
    world(2).train(*flags, "--out_dir", resumed)
    assert column(resumed, "loss") == column(out, "loss")
    again = tensors(resumed / "checkpoints" / "step-00000040")
    assert all(torch.equal(tensor, again[name]) for name, tensor in saved.items())
    code, said, err = script("convert_lit_checkpoint", out, tmp_path / "hf", "--verify")
    assert (code, json.loads((tmp_path / "hf/config.json").read_text())["tie_word_embeddings"]) == (0, True), said + err
    code, said, err = script("convert_hf_checkpoint", tmp_path / "hf", tmp_path / "back", "--verify")
    assert code == 0, said + err
    back = load_weights(tmp_path / "back/step-00000000")
    assert back.keys() == {name.removeprefix("model.") for name in saved if name.startswith("model.")}
    assert all(torch.equal(tensor, saved[f"model.{name}"]) for name, tensor in back.items())
    world(2).train(*flags, "--out_dir", compiled, "--train.compile", "true", "--train.max_steps", 12)
    world(2).train(*flags, "--out_dir", tmp_path / "eager", "--train.max_steps", 12)
    assert column(compiled, "loss") == pytest.approx(column(tmp_path / "eager", "loss"), abs=1e-5, rel=0)


def test_upstreams_autocast_learns_what_fp32_does(straight, config_file: Path, tmp_path: Path) -> None:
    """The curve that test_numerics.py compares with on a GPU."""
    script, out = "tests/helpers/autocast_run.py", tmp_path / "autocast"
    command = [sys.executable, script, "--config", config_file, "--out_dir", out, "--train.compile", "false"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    exact = column(straight(1), "loss")
    assert column(out, "loss") == pytest.approx(exact, rel=1e-2)
    assert column(out, "loss") != pytest.approx(exact, rel=1e-5)  # it did multiply in bf16
