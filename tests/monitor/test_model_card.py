"""The model card of an export says what the run recorded, and no more."""

import dataclasses
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml
from models import CONFIG, given

from tinyllama import InputError
from tinyllama.checkpoint import hashes, reader
from tinyllama.convert.weights import Weights, open_weights
from tinyllama.monitor.model_card import model_card


@pytest.fixture
def weights(step_dir: Path, tmp_path: Path) -> Weights:
    """A checkpoint of a run of 12 steps on two sources, with its metrics and scores."""
    run = tmp_path / "my run"
    copied = shutil.copytree(step_dir, run / "checkpoints" / step_dir.name)
    sources = [{"path": "data/slim|pajama", "weight": 3.0}, {"path": "data/starcoder", "weight": 1.0}]
    settings = {"model": dataclasses.asdict(CONFIG), "data": {"sources": sources}}
    settings["optim"] = {"lr": 4e-4, "min_lr": 4e-5, "warmup_steps": 2000, "weight_decay": 0.1, "schedule": "cosine"}
    settings["train"] = {"global_batch_size": 1024, "precision": "bf16"}
    others = reader.read_hashes(copied)
    others.pop("config.yaml")
    for name, payload in hashes.last_files(reader.read_state(copied), yaml.safe_dump(settings), others).items():
        (copied / name).write_bytes(payload)
    rows = [
        f"{step},{step * 288},{5 - step / 4},{4.5 if step % 6 == 0 else ''},{step * 216},{step * 72}"
        for step in range(1, 15)
    ]
    header = "step,tokens,loss,val_loss,tokens_slim|pajama,tokens_starcoder"
    (run / "metrics.csv").write_text("\n".join([header, *rows, ""]))
    scores = ["12,3456,hellaswag,acc_norm,0.25,0", "6,1728,hellaswag,acc_norm,0.9,0", "12,3456,mine,acc,0.5,"]
    (run / "eval.csv").write_text("\n".join(["step,tokens,task,metric,value,shots", *scores, ""]))
    return open_weights(copied)


def test_it_says_what_the_run_recorded(weights: Weights) -> None:
    files = model_card(weights, "owner/mine", "owner/mine", "apache-2.0")
    card = files["README.md"]
    front, _, text = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front) == {
        **{"license": "apache-2.0", "library_name": "transformers"},
        **{"pipeline_tag": "text-generation", "tags": ["llama", "pretrained"]},
    }
    assert "pretrained from scratch on 3,456 tokens (12 steps) with TinyLlama" in text
    assert f"a Llama of {CONFIG.num_params():,} parameters" in text
    pieces = f"{CONFIG.vocab_size:,} pieces in {CONFIG.padded_vocab_size:,} rows"
    assert CONFIG.vocab_size < CONFIG.padded_vocab_size
    assert f"| size | value |\n| --- | --- |\n| layers, width, MLP | {CONFIG.n_layer}, " in text
    assert f"| vocabulary | {pieces} |\n" in text
    assert "| setting | value |\n" in text
    assert "\n|  |" not in text  # no empty heading
    assert "\n\n\n" not in text
    assert "| `slim\\|pajama` | 75.0000% | 2,592 |\n| `starcoder` | 25.0000% | 864 |\n" in text
    assert "| learning rate | cosine from 0.0004 to 4e-05, 2,000 steps of warm-up |" in text
    assert "| batch | 1,024 samples, 98,304 tokens |" in text
    assert "Validation loss 4.5000 at step 12." in text
    header, _, first, second = text.partition("## Scores\n\n")[2].splitlines()[:4]
    assert "| TinyLlama" in header
    assert first.startswith("| hellaswag | acc_norm | 0.2500 | 0.")  # beside the published ones
    assert second.startswith("| mine | acc | 0.5000 |")
    assert "0.9000" not in text  # of another step
    for tool in ("transformers", "vLLM", "llama.cpp", "CTranslate2", "TRL"):
        assert f"[{tool}](http" in text
    assert re.search("@[A-Z]+@", card) is None

    picture = ElementTree.fromstring(files["loss.svg"])
    curves = [element.get("points").split() for element in picture.iter() if element.tag.endswith("polyline")]
    assert [len(curve) for curve in curves] == [12, 2]  # not what came after the step
    heights = [float(point.partition(",")[2]) for point in curves[0]]
    assert heights == sorted(heights)  # a falling loss


def test_what_is_not_known_is_left_out() -> None:
    files = model_card(given(), "mine", "mine")
    assert set(files) == {"README.md"}
    assert "license" not in files["README.md"]
    assert not re.search("## (Data|Recipe|Loss|Scores)", files["README.md"])
    assert "exported by TinyLlama" in files["README.md"]


@pytest.mark.parametrize("wrong", ["", "MIT License", "a\nb", "x" * 80])
def test_a_licence_is_an_identifier(wrong: str) -> None:
    with pytest.raises(InputError, match="is no identifier of the Hub"):
        model_card(given(), "mine", "mine", wrong)
