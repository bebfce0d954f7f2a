"""The model card of an export says what the run recorded, and no more."""

import dataclasses
import json
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
from tinyllama.monitor.model_card import _data, _recipe, model_card


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
    assert "| learning rate | cosine from a peak of 0.0004 to 4e-05, 2,000 steps of warm-up |" in text
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


def test_a_learning_rate_that_was_changed_is_told(weights: Weights) -> None:
    events = [
        {"event": "start", "step": 0, "changed": {}},
        {"event": "start", "step": 4, "changed": {"optim.lr": [3e-3, 9e-4], "log.interval": [1, 5]}},
        {"event": "start", "step": 4, "changed": {"optim.lr": [3e-3, 1e-3]}},  # again from there
        {"event": "start", "step": 8, "changed": {"optim.lr": [1e-3, 4e-4]}},
        {"event": "start", "step": 9, "changed": {"optim.lr": "damaged"}},
        {"event": "start", "step": 13, "changed": {"optim.lr": [4e-4, 1e-5]}},  # after the checkpoint
    ]
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (weights.path.parents[1] / "events.jsonl").write_text(lines)
    told = (
        "cosine from a peak of 0.0004 to 4e-05, 2,000 steps of warm-up; peak 0.003 before step 4, 0.001 before step 8"
    )
    assert f"| learning rate | {told} |" in model_card(weights, "mine", "mine")["README.md"]


def test_weights_that_the_first_start_gave_are_named(weights: Weights) -> None:
    """The last start need not give train.init_from again."""
    state, hashed = reader.read_state(weights.path), reader.read_hashes(weights.path)
    payload = hashes.seal(state | {"origin": {"resume": None, "init_from": "/models/older"}}, hashed)
    (weights.path / "state.json").write_bytes(payload)
    card = model_card(weights, "mine", "mine")["README.md"]
    assert "pretrained further on 3,456 tokens (12 steps) with TinyLlama" in card
    assert "| starts from | `older` |" in card


def test_tokens_of_sources_are_of_the_step_that_is_named(weights: Weights) -> None:
    assert "| source | share of the samples | tokens |" in model_card(weights, "mine", "mine")["README.md"]
    metrics = weights.path.parents[1] / "metrics.csv"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:11]))  # the run was stopped at step 12
    card = model_card(weights, "mine", "mine")["README.md"]
    assert "| source | share of the samples | tokens by step 10 |" in card
    assert "| `starcoder` | 25.0000% | 720 |\n" in card


def test_the_tokens_of_a_single_source_are_those_of_the_checkpoint() -> None:
    settings = {"data": {"sources": [{"path": "data/mine", "weight": 1.0}]}}
    rows = [{"step": 10, "tokens": 2880, "tokens_mine": 2880}]
    assert _data(settings, {"tokens": 3456}, rows) == [("`mine`", "100.0000%", "3,456")]
    assert _data(settings, {}, rows) == [("`mine`", "100.0000%", "2,880")]


def test_sources_whose_folders_have_one_name_have_their_own_tokens() -> None:
    sources = [{"path": path, "weight": 1.0} for path in ("a/web", "b/web", "data/per_second")]
    rows = [{"step": 10, "tokens": 6000, "tokens_per_second": 7.5, "tokens_web": 1000, "tokens_web_1": 2000}]
    rows[0]["tokens_per_second_2"] = 3000
    found = _data({"data": {"sources": sources}}, {"tokens": 6600}, rows)
    assert [(name, drawn) for name, _, drawn in found] == [
        ("`web`", "1,000"),
        ("`web`", "2,000"),
        ("`per_second`", "3,000"),
    ]


def test_a_constant_learning_rate_has_no_other() -> None:
    optim = {"lr": 4e-4, "min_lr": 4e-5, "warmup_steps": 0, "weight_decay": 0.1, "schedule": "constant"}
    assert dict(_recipe({"optim": optim, "train": {"global_batch_size": 8}}, 32, []))["learning rate"] == (
        "constant at 0.0004, 0 steps of warm-up"
    )


def test_what_is_not_known_is_left_out() -> None:
    files = model_card(given(), "mine", "mine")
    assert set(files) == {"README.md"}
    assert "license" not in files["README.md"]
    assert not re.search("## (Data|Recipe|Loss|Scores)", files["README.md"])
    assert "exported by TinyLlama" in files["README.md"]


@pytest.mark.parametrize("wrong", ["", "MIT License", "a\nb", "x" * 80])
def test_a_licence_is_an_identifier(wrong: str) -> None:
    with pytest.raises(InputError, match="is not a license identifier of the Hub"):
        model_card(given(), "mine", "mine", wrong)
