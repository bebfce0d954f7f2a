"""Sample texts of tiny runs on CPU ranks."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import load_weights
from runs import branch, metrics

from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.config.args import PretrainArgs
from tinyllama.config.model import named_config
from tinyllama.eval import generate
from tinyllama.model import GPT
from tinyllama.tokenizer import Tokenizer

PROMPTS = ["The little llama walked along", "def read"]


@pytest.fixture
def sampled(config: dict[str, Any], packed_folder: Callable[..., Path], tokenizer_file: Path) -> dict[str, Any]:
    """The settings of a run on a text, which continues two prompts."""
    tokenizer = Tokenizer(tokenizer_file)
    ids = [*tokenizer.encode("The little llama walked along the river until the evening. " * 20), tokenizer.eos_id]
    sha256 = hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    folder = packed_folder([[ids] * 12], name="text", vocab_size=400, tokenizer_sha256=sha256)
    config["model"] |= {"vocab_size": 400, "block_size": 48}
    config["data"] = {"sources": [{"path": str(folder)}], "validation": [{"path": str(folder)}]}
    config["train"]["max_steps"], config["eval"] = 30, {"interval": 30, "max_samples": 2}
    config["eval"] |= {"samples": PROMPTS, "tokenizer": str(tokenizer_file)}
    config["checkpoint"]["interval"] = 30
    return config


def written(config: dict[str, Any], tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "run.yaml"


def samples(out_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out_dir / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("size", [1, 2])
def test_samples_are_those_of_generate_and_change_no_number(
    world, sampled: dict[str, Any], tokenizer_file: Path, tmp_path: Path, size: int
) -> None:
    out, plain = tmp_path / "run", tmp_path / "plain"
    file = written(sampled, tmp_path)
    world(size).train("--config", file, "--out_dir", out)
    world(size).train("--config", file, "--out_dir", plain, "--eval.samples", "[]")
    assert not (plain / "samples.jsonl").exists()
    for name in ("loss", "val_loss", "grad_norm"):
        assert [row[name] for row in metrics(out)] == [row[name] for row in metrics(plain)]
    found = samples(out)
    assert [(one["step"], one["prompt"]) for one in found] == [(step, p) for step in (0, 30) for p in PROMPTS]
    assert found[-1]["tokens"] == 30 * 8 * 48
    tokenizer = Tokenizer(tokenizer_file)
    model = GPT(named_config(**sampled["model"]))
    model.load_state_dict(load_weights(out / "checkpoints" / "step-00000030"))
    for one in found[2:]:
        ids = tokenizer.encode(one["prompt"])
        text = generate.Text(tokenizer, ids)
        for (token,) in generate.stream(model, [ids], 48 - len(ids), eos_ids={tokenizer.eos_id}):
            if token is not None and token != tokenizer.eos_id:
                text.add(token)
        text.rest()
        assert one["prompt"] + one["text"] == text.text
    assert found[-2]["text"].startswith(" the river")


def test_a_step_that_is_done_again_has_its_samples_once(world, sampled: dict[str, Any], tmp_path: Path) -> None:
    sampled["train"]["max_steps"] = 8
    sampled["checkpoint"]["interval"] = sampled["eval"]["interval"] = 4
    out, file = tmp_path / "run", written(sampled, tmp_path)
    world(1).train("--config", file, "--out_dir", out)
    again = branch(out, 4)
    (again / "samples.jsonl").write_text((out / "samples.jsonl").read_text() + '{"step": 3')
    world(1).train("--config", file, "--out_dir", again)
    assert samples(again) == samples(out)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"samples": ["x", ""]}, r"eval.samples: '' has 0 tokens: give one of 1 to 47, fewer than model.block_size"),
        ({"samples": ["a b c d " * 40]}, r"eval.samples: 'a b c .* has [0-9]+ tokens: give one of 1 to 47"),
        ({"tokenizer": "nowhere/tokenizer.model"}, "nowhere/tokenizer.model"),
        ({"tokenizer": None}, "eval.samples are made at validations: give data.validation and eval.tokenizer, too"),
    ],
)
def test_samples_that_cannot_be_made_are_said_at_the_start(
    recipe: Any, sampled: dict[str, Any], tmp_path: Path, changes: dict[str, Any], error: str
) -> None:
    sampled["eval"] |= changes
    with pytest.raises(InputError, match=error):
        recipe.setup(cli.parse(PretrainArgs, ["--config", str(written(sampled, tmp_path))]))
