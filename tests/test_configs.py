"""Every recipe in configs/ can be read, makes a model, and says the numbers it is known by."""

from pathlib import Path

import pytest
import yaml

from tinyllama.config import cli
from tinyllama.config.args import PretrainArgs, check
from tinyllama.train.budget import gradient_accumulation

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_is_valid(path: Path) -> None:
    args = cli.parse(PretrainArgs, ["--config", str(path)])
    assert check(args).name == args.model.name
    assert args.out_dir == f"out/{path.stem}"
    assert f"--config configs/pretrain/{path.name}" in path.read_text()


@pytest.mark.parametrize(
    ("name", "tokens", "ranks"),
    [
        ("tinyllama_1.1b", 2_097_152, 16),
        ("tinyllama_1.1b_fineweb", 2_097_152, 16),
        ("tinyllama_1.1b_muon", 2_097_152, 16),
        ("tinyllama_120m", 524_288, 8),
        ("tinyllama_120m_muon", 524_288, 8),
        ("tinyllama_code", 737_280, 6),
        ("tinyllama_code_8192", 737_280, 6),
        ("tinyllama_v1.1_basic", 1_835_008, 16),
        ("tinyllama_v1.1_continual", 1_835_008, 16),
        ("tinyllama_v1.1_cooldown", 4 * 1_835_008, 16),
    ],
)
def test_tokens_a_step_of_a_recipe_and_that_they_divide(name: str, tokens: int, ranks: int) -> None:
    path = next(path for path in CONFIGS if path.stem == name)
    args = cli.parse(PretrainArgs, ["--config", str(path)])
    assert args.train.global_batch_size * check(args).block_size == tokens
    assert gradient_accumulation(args.train, ranks) >= 1


def test_the_fineweb_recipe_is_the_published_run_on_other_data() -> None:
    published, fineweb = (
        yaml.safe_load(next(path for path in CONFIGS if path.stem == name).read_text())
        for name in ("tinyllama_1.1b", "tinyllama_1.1b_fineweb")
    )
    assert [source["weight"] for source in fineweb["data"]["sources"]] == [0.693584, 0.306416]
    assert [source["weight"] for source in published["data"]["sources"]] == [0.693584, 0.306416]
    assert {key for key in published if published[key] != fineweb[key]} == {"out_dir", "data"}
