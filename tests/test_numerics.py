"""What the 120M model learns from the quickstart's corpus, fast and exact: `pytest -m gpu tests/test_numerics.py`.

Prints, with -s, the largest difference of each pair of runs.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from needs import a_gpu, float8_on_gpu

from tinyllama.monitor.run_files import read_metrics

ROOT = Path(__file__).parents[1]
SIZES = ["--model.name", "tinyllama_120m", "--model.vocab_size", 2048, "--train.global_batch_size", 32]
# So slow a rate that a run does not multiply small differences: with a warm-up of 50 steps to 4e-4 the gradient's norm
# jumps, and two fp32 runs of which one starts from weights rounded to bf16 part by 3 % (12 layers, 256 wide).
WARMUP = 100
CALM = ["--optim.lr=1e-4", "--optim.min_lr=1e-5", "--optim.warmup_steps", WARMUP, "--train.global_batch_size=8"]
CALM += ["--train.micro_batch_size=8"]
REFERENCE = [*CALM, "--train.precision", "fp32", "--train.compile", "false", "--train.micro_batch_size", 4]
REFERENCE += [f"--ops.{op}=reference" for op in ("attention", "rms_norm", "swiglu", "cross_entropy")]

pytestmark = [pytest.mark.gpu, a_gpu]

Train = Callable[..., list[dict[str, str]]]


def call(*command: object) -> None:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """A function that trains the 120M model on the quickstart's corpus; gives the rows of its metrics.csv."""
    folder = tmp_path_factory.mktemp("numerics")
    raw, tokenizer = folder / "raw", folder / "tokenizer.model"
    call("scripts/quickstart_corpus.py", "--output", raw)
    sources = [raw / "slimpajama" / "train", f"{raw}/starcoder:content"]
    call("scripts/train_tokenizer.py", "--source", *sources, "--output", tokenizer, "--vocab_size", 2048)
    for script, source in (
        ("slimpajama", "slimpajama"), ("starcoder", "starcoder"), ("starcoder", "starcoder_validation")
    ):  # fmt: skip
        flags = ["--source", raw / source, "--tokenizer", tokenizer, "--output", folder / source]
        call(f"scripts/prepare_{script}.py", *flags)
    data = [
        f'--data.sources=[{{"path": "{folder}/slimpajama"}}, {{"path": "{folder}/starcoder"}}]',
        f'--data.validation=[{{"path": "{folder}/starcoder_validation"}}]',
    ]

    def run(name: str, steps: int, *flags: object, script: str = "pretrain/train.py") -> list[dict[str, str]]:
        schedule = ["--train.max_steps", steps, "--optim.lr=1e-3", "--optim.min_lr=1e-4", "--optim.warmup_steps=20"]
        quiet = ["--log.interval=10", "--checkpoint.interval", steps, "--eval.interval", steps]
        call(
            script, *SIZES, *data, *schedule, *quiet, "--train.micro_batch_size=32", *flags, "--out_dir", folder / name
        )
        return read_metrics(folder / name / "metrics.csv")

    return run


def losses(rows: list[dict[str, str]]) -> dict[int, float]:
    """Training losses after the warm-up, by step."""
    return {int(row["step"]): float(row["loss"]) for row in rows if row["loss"] and int(row["step"]) > WARMUP}


def held_out_losses(rows: list[dict[str, str]]) -> dict[int, float]:
    """Held-out losses, by step."""
    return {int(row["step"]): float(row["val_loss"]) for row in rows if row["val_loss"] and int(row["step"])}


def test_bf16_fused_learns_what_fp32_and_upstreams_autocast_do(train: Train) -> None:
    fused = losses(train("fused", 200, *CALM))
    others = {
        "fp32 reference": losses(train("fp32", 200, *REFERENCE)),
        "bf16-mixed by autocast": losses(train("autocast", 200, *REFERENCE, script="tests/helpers/autocast_run.py")),
    }
    assert len(fused) == 10
    for name, curve in others.items():
        worst = max(abs(fused[step] / loss - 1) for step, loss in curve.items())
        print(f"bf16 fused against {name}: at most {worst:.3%} apart, last losses {fused[200]:.4f} {curve[200]:.4f}")
        assert fused == pytest.approx(curve, rel=5e-3)


@float8_on_gpu
def test_float8_learns_what_bf16_does(train: Train) -> None:
    """Four epochs of the corpus, and no more: once a model knows it by heart, held-out losses are chance.

    After 24 of them, at a training loss of 0.02, two runs in bf16 had 4.60 and 4.67, two in float8 4.62 and 4.56.
    """
    flags = [*CALM, "--eval.interval=250", "--train.precision"]
    bf16, float8 = (held_out_losses(train(name, 1000, *flags, name)) for name in ("bf16", "float8"))
    print(f"held-out losses, by step: bf16 {bf16}, float8 {float8}")
    assert list(bf16) == [250, 500, 750, 1000]
    assert bf16[1000] < bf16[750], "it no longer learns: these losses would not tell how well it does in float8"
    assert float8 == pytest.approx(bf16, rel=1e-2)
