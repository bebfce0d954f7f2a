"""Runs that start from given weights (train.init_from), go on, and branch off."""

import json
import os
import shutil
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


@pytest.fixture
def hf_dir(config: dict[str, Any], tmp_path: Path) -> Path:
    """A Hugging Face folder of random weights of the run's sizes, not made by us."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5}
    torch.manual_seed(8)
    theirs = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2, tie_word_embeddings=False))
    theirs.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_a_run_starts_from_given_weights_and_with_transformers_loss(
    world, config: dict[str, Any], config_file: Path, hf_dir: Path, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    from tinyllama.data.packed import open_packed

    held_out = open_packed(config["data"]["validation"][0]["path"])
    blocks = torch.from_numpy(held_out.blocks(np.arange(held_out.num_blocks(32)), 32).astype(np.int64))
    theirs = LlamaForCausalLM.from_pretrained(hf_dir)
    with torch.no_grad():
        logits = theirs(blocks[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()
    run = ["--config", config_file, "--train.max_steps", 20, "--checkpoint.interval", 10, "--eval.interval", 10]
    start = [*run, "--train.init_from", hf_dir]
    out = tmp_path / "started"
    said = world(2).train(*start, "--out_dir", out)
    assert f"start    a new run from the weights of {hf_dir} at step 0" in said
    assert column(out, "val_loss")[0] == pytest.approx(expected, abs=1e-5)
    assert column(out, "loss")[0] != pytest.approx(column(out, "loss")[-1], abs=0.1)
    assert metrics(out)[0]["step"] == "0"
    assert tensors(out / "checkpoints/step-00000010")["optimizer.step.lm_head.weight"] == 10  # the optimizer's is fresh

    # a requeued job gives the same command and goes on from its own checkpoint, without the weights even
    requeued = branch(out, 10)
    shutil.move(hf_dir, tmp_path / "away")
    said = world(2).train(*start, "--out_dir", requeued)
    assert f"resumed from {requeued / 'checkpoints/step-00000010'} at step 10" in said
    assert column(requeued, "loss") == column(out, "loss")
    shutil.move(tmp_path / "away", hf_dir)

    # but a folder with a checkpoint of any other run is not taken for it, nor continued by mistake
    (problem,) = world(2)("train", *run, "--out_dir", out, "--train.init_from", tmp_path / "other")[0]["problems"]
    assert f"is of a run that started from {hf_dir}, and train.init_from is {tmp_path / 'other'}" in problem
    (problem,) = world(2)("train", *start, "--out_dir", out, "--train.resume", out)[0]["problems"]
    assert "train.init_from and a path in train.resume are both given" in problem

    # weights only: of a checkpoint of ours, and of an upstream file, as of the folder
    step_dir = out / "checkpoints/step-00000020"
    torch.save({"model": load_weights(step_dir), "step_count": 20}, tmp_path / "lit_model.pth")
    for number, source in enumerate((step_dir, tmp_path / "lit_model.pth")):
        again = tmp_path / f"again {number}"
        world(2).train(*run, "--train.init_from", source, "--out_dir", again, "--train.max_steps", 6)
        assert column(again, "val_loss")[0] == column(out, "val_loss")[-1]
        assert [float(row["lr"]) for row in metrics(again) if row["lr"]][0] == pytest.approx(0.01 / 5)


def test_init_from_may_be_left_out_at_a_start_and_given_again(
    world, config_file: Path, hf_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = ["--config", config_file, "--out_dir", out]
    world(1).train(*run, "--train.init_from", os.path.relpath(hf_dir, ROOT), "--train.max_steps", 6)
    world(1).train(*run, "--train.max_steps", 7)
    assert "at step 7" in world(1).train(*run, "--train.init_from", hf_dir, "--train.max_steps", 8)
    state = reader.read_state(out / "checkpoints/step-00000008")
    assert state["origin"] == {"resume": None, "init_from": str(hf_dir)}
    (problem,) = world(1)("train", *run, "--train.init_from", tmp_path / "other")[0]["problems"]
    assert f"is of a run that started from {hf_dir}, and train.init_from is {tmp_path / 'other'}" in problem


def test_a_branch_of_a_run_that_started_from_other_weights_has_their_sizes(
    world, config: dict[str, Any], config_file: Path, hf_dir: Path, tmp_path: Path
) -> None:
    config["model"] = {"block_size": 32}
    config_file.write_text(yaml.safe_dump(config))
    out, other = tmp_path / "run", tmp_path / "branch"
    run = ["--config", config_file, "--checkpoint.interval", 6]
    world(1).train(*run, "--out_dir", out, "--train.init_from", hf_dir, "--train.max_steps", 12)
    start = out / "checkpoints" / "step-00000006"
    branch_off = [*run, "--out_dir", other, "--train.resume", start]
    world(1).train(*branch_off, "--train.max_steps", 12)
    assert column(other, "loss") == column(out, "loss")[6:]
    assert "at step 12" in world(1).train(*branch_off, "--train.max_steps", 13)
    (problem,) = world(1)("train", *branch_off, "--out_dir", tmp_path / "deeper", "--model.n_layer", 3)[0]["problems"]
    assert problem.startswith(f"cannot resume from {start}: model.n_layer was 2 and is 3; put it back")


def test_weights_that_do_not_fit_the_run_are_refused(world, config_file: Path, hf_dir: Path, tmp_path: Path) -> None:
    start = ["--config", config_file, "--train.init_from", hf_dir, "--out_dir", tmp_path / "run"]
    for flags, problem in [
        (["--model.n_layer", 3], "model.n_layer is 3 and in"),
        (["--model.norm_eps", 1e-6], "model.norm_eps is 1e-06 and in"),
        (["--model.padding_multiple", 300], "makes 300 rows and"),
        (["--train.init_from", tmp_path / "none"], "holds no complete checkpoint"),
    ]:
        assert problem in world(1)("train", *start, *flags)[0]["problems"][0]
    settings = json.loads((hf_dir / "config.json").read_text())
    (hf_dir / "config.json").write_text(json.dumps(settings | {"rope_theta": 5000.0, "rope_parameters": None}))
    assert not (tmp_path / "run").exists()
    world(1).train(*start, "--train.max_steps", 6, "--out_dir", tmp_path / "of its base")
    assert yaml.safe_load((tmp_path / "of its base/config.yaml").read_text())["model"]["rope_base"] == 5000
    world(1).train(*start, "--model.rope_base", 10000, "--model.rope_condense_ratio", 2, "--train.max_steps", 6)
