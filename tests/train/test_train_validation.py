"""What a run's validation measures: every held-out token once, by source, and by other sources after a resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoints import load_weights
from packed import change
from runs import column, metrics


def test_validation_is_the_mean_over_every_held_out_token(world, config_file: Path, tmp_path: Path) -> None:
    from tinyllama.config.model import named_config
    from tinyllama.data.packed import open_packed
    from tinyllama.model import GPT

    out = tmp_path / "run"
    config = yaml.safe_load(config_file.read_text())
    manifest = Path(config["data"]["validation"][0]["path"]) / "manifest.json"
    figures = json.loads(manifest.read_bytes())
    figures["subsets"] = {".": {"tokens": figures["tokens"], "bytes": 3 * figures["tokens"]}}
    change(manifest, subsets=figures["subsets"])
    said = world(2).train("--config", config_file, "--out_dir", out, "--train.micro_batch_size", 4)
    model = GPT(named_config(**config["model"]))
    model.load_state_dict(load_weights(out / "checkpoints" / "step-00000040"))
    held_out = open_packed(config["data"]["validation"][0]["path"])
    blocks = torch.from_numpy(held_out.blocks(np.arange(held_out.num_blocks(32)), 32).astype(np.int64))
    with torch.no_grad():
        expected = model(blocks[:, :-1], blocks[:, 1:]) / blocks[:, 1:].numel()
    assert column(out, "val_loss")[-1] == pytest.approx(expected.item(), abs=1e-6)
    assert [row["step"] for row in metrics(out) if row["val_loss"]] == ["0", "20", "40"]
    losses, bits = ([float(row[name]) for row in metrics(out) if row["val_loss"]] for name in ("val_loss", "val_bpb"))
    assert bits == pytest.approx([loss / np.log(2) / 3 for loss in losses])
    assert f"val_loss {losses[-1]:.4f}  val_bpb {bits[-1]:.4f}  " in said
    assert f"val_bpb  {bits[-1]:.4f} bits per byte at step 40" in said


@pytest.mark.parametrize("size", [1, 2])
def test_each_validation_source_has_its_own_loss(
    world, config: dict[str, Any], packed_folder: Callable[..., Path], tmp_path: Path, size: int
) -> None:
    from tinyllama.config.model import named_config
    from tinyllama.data.packed import open_packed
    from tinyllama.model import GPT

    rng = np.random.default_rng(1)
    noise = [[int(token) for token in rng.integers(3, 250, 40)] + [2] for _ in range(18)]
    mixed, unread = packed_folder([noise], name="noise, of 学习", vocab_size=256), tmp_path / "held_out"
    for folder, share in ((unread, 3), (mixed, 2)):
        figures = json.loads((folder / "manifest.json").read_bytes())
        subset = {"tokens": figures["tokens"], "bytes": share * figures["tokens"]}
        change(folder / "manifest.json", subsets={".": subset})
    config["data"]["validation"] = [{"path": str(unread)}, {"path": str(mixed)}]
    config["train"] |= {"max_steps": 2, "micro_batch_size": 4}
    config["optim"]["warmup_steps"] = 1
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "run"
    said = world(size).train("--config", tmp_path / "two.yaml", "--out_dir", out)

    model = GPT(named_config(**config["model"]))
    model.load_state_dict(load_weights(out / "checkpoints" / "step-00000002"))
    sums, counts = [], []
    for folder in (unread, mixed):
        dataset = open_packed(folder)
        blocks = torch.from_numpy(dataset.blocks(np.arange(dataset.num_blocks(32)), 32).astype(np.int64))
        with torch.no_grad():
            sums.append(model(blocks[:, :-1], blocks[:, 1:]).item())
        counts.append(blocks[:, 1:].numel())
    row = {name: float(value) for name, value in metrics(out)[-1].items() if name.startswith("val_")}
    first, second = (loss / count for loss, count in zip(sums, counts, strict=True))
    assert row["val_loss"] == pytest.approx(sum(sums) / sum(counts), abs=1e-6)
    assert row["val_loss/held_out"] == pytest.approx(first, abs=1e-6)
    assert row["val_loss/noise, of 学习"] == pytest.approx(second, abs=1e-6)
    assert row["val_bpb/held_out"] == pytest.approx(row["val_loss/held_out"] / np.log(2) / 3)
    assert row["val_bpb/noise, of 学习"] == pytest.approx(row["val_loss/noise, of 学习"] / np.log(2) / 2)
    assert f"  held_out {first:.4f} ({first / np.log(2) / 3:.4f} bpb)  noise, of 学习 {second:.4f} (" in said


def test_a_resumed_run_may_be_validated_on_other_sources(
    world, config: dict[str, Any], packed_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """What was measured stays, under the name that it had; what is new begins with the resumption."""
    config["train"]["max_steps"] = 4
    config["optim"]["warmup_steps"] = 1
    config["eval"]["interval"] = 1
    out, file = tmp_path / "run", tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    world(1).train("--config", file, "--out_dir", out, "--train.max_steps", 2)
    before = metrics(out)
    other = packed_folder([[[7, 8, 9] * 20 + [2]] * 4], name="other", vocab_size=256)
    config["data"]["validation"] = [{"path": str(other)}, {"path": str(tmp_path / "up")}]
    file.write_text(yaml.safe_dump(config))
    world(1).train("--config", file, "--out_dir", out)
    rows = metrics(out)
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    for was, row in zip(before, rows, strict=False):
        assert {name: row[name] for name in was} == was
    assert [bool(row["val_loss/held_out"]) for row in rows] == [True] * 3 + [False] * 2
    assert [bool(row["val_loss/other"]) for row in rows] == [False] * 3 + [True] * 2
