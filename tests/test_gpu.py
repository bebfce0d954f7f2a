"""What only a GPU can show: `pytest -m gpu` on a machine that has one."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from checkpoints import load_weights
from models import generate
from needs import a_gpu, float8_on_gpu

from tinyllama.config.args import OptimArgs, ParallelArgs, TrainArgs
from tinyllama.config.model import ModelConfig, named_config
from tinyllama.model import GPT, OPS, Block, init_weights
from tinyllama.monitor.run_files import read_metrics
from tinyllama.ops import choice
from tinyllama.ops.linear import add_matmul, empty_sum
from tinyllama.tools import rates
from tinyllama.train.optim import build_optimizer, local_gradients
from tinyllama.train.parallel import finish_gradients, parallelize

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda")
CONFIG = ModelConfig("tiny", block_size=256, vocab_size=512, n_layer=2, n_head=4, n_query_groups=2, n_embd=256)

pytestmark = [pytest.mark.gpu, a_gpu]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.DeviceMesh]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield dist.init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


@pytest.fixture
def train(packed_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., list[float]]:
    """Run the recipe in a process of its own; gives the losses of its steps."""
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(3, 60, rng.integers(50, 900)).tolist(), 2] for _ in range(400)]
    config = {
        "model": {"name": "quickstart", "vocab_size": 512, "n_layer": 2, "n_embd": 256, "intermediate_size": 512},
        "data": {"sources": [{"path": str(packed_folder([documents], vocab_size=512))}]},
        "train": {"max_steps": 12, "global_batch_size": 16, "micro_batch_size": 8},
        "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2},
        "checkpoint": {"interval": 6},
        "log": {"interval": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def run(name: str, *flags: object, script: str = "pretrain/train.py") -> list[float]:
        command = [sys.executable, script, "--config", tmp_path / "run.yaml", "--out_dir", tmp_path / name]
        done = subprocess.run([*map(str, command), *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return [float(row["loss"]) for row in read_metrics(tmp_path / name / "metrics.csv") if row["loss"]]

    return run


@pytest.mark.parametrize("wanted", [OPS | {"attention": "sdpa_cudnn"}, {}], ids=["plain", "auto"])
def test_a_compiled_block_is_the_eager_one(wanted: dict[str, str]) -> None:
    model = GPT(CONFIG, choice.resolve(wanted, CONFIG, GPU, precision="bf16")).to(GPU)
    init_weights(model, seed=0)
    block: Block = model.transformer["h"][0].bfloat16()
    cos, sin = model.rope_tables(GPU)
    x = torch.randn(2, 256, 256, device=GPU, dtype=torch.bfloat16)
    results = []
    for forward in (block.forward, torch.compile(block.forward, fullgraph=True)):
        given = [x.clone().requires_grad_(), x.flip(0).requires_grad_()]
        y, added = forward(*given, cos, sin)
        loss = y.float().square().sum() + added.float().square().sum()
        gradients = torch.autograd.grad(loss, [*given, *block.parameters()])
        results.append([y.detach(), added.detach(), *gradients])
    for eager, compiled in zip(*results, strict=True):
        # the same sums in bf16, rounded at other places
        assert (eager - compiled).float().norm() <= 2e-2 * eager.float().norm()


def test_a_sum_of_gradients_is_written_and_then_added_to_without_rounding() -> None:
    generator = torch.Generator(GPU).manual_seed(0)
    a, b = (torch.randn(128, 512, device=GPU, generator=generator).bfloat16() for _ in range(2))
    product = a.double() @ b.double().T
    gradient = empty_sum(product)
    gradient.total.fill_(torch.nan)  # the first addition does not read it
    for times in (1, 2, 3):
        add_matmul(*gradient, a, b.T)
        torch.testing.assert_close(gradient.total.double(), times * product, rtol=1e-5, atol=1e-3)


def test_the_fused_run_learns_what_the_reference_does(train: Callable[..., list[float]]) -> None:
    plain = ["--train.precision", "fp32", "--train.compile", "false", "--ops.cross_entropy", "reference"]
    reference = train("reference", *plain, "--ops.attention", "reference")
    assert train("fused") == pytest.approx(reference, rel=5e-3)
    masked = train("masked", "--data.document_mask", "--ops.attention", "flex")
    apart = train("apart", *plain, "--ops.attention", "reference", "--data.document_mask")
    assert masked == pytest.approx(apart, rel=5e-3)
    if torch.cuda.get_device_capability() >= (8, 9):
        assert train("float8", "--train.precision", "float8") == pytest.approx(reference, rel=2e-2)


def test_a_resumed_run_is_the_straight_run(train: Callable[..., list[float]], tmp_path: Path) -> None:
    straight = train("straight")
    resumed = train("resumed", "--train.resume", tmp_path / "straight" / "checkpoints" / "step-00000006")
    assert resumed == pytest.approx(straight[6:], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("float8", marks=float8_on_gpu)])
def test_with_deterministic_algorithms_a_resumed_run_is_the_straight_one_bit_for_bit(
    precision: str, train: Callable[..., list[float]], tmp_path: Path
) -> None:
    script, flags = "tests/helpers/deterministic_run.py", ["--train.precision", precision]
    straight = train("straight", *flags, script=script)
    at = tmp_path / "straight" / "checkpoints" / "step-00000006"
    assert train("resumed", "--train.resume", at, *flags, script=script) == straight[6:]
    ends = [load_weights(tmp_path / name / "checkpoints" / "step-00000012") for name in ("straight", "resumed")]
    assert all(torch.equal(ends[0][name], weight) for name, weight in ends[1].items())


@pytest.mark.parametrize(
    "flags",
    [
        ["--train.skip_spikes=6"],
        ["--data.document_mask"],
        ["--optim.name=muon"],
        pytest.param(["--train.precision=float8"], marks=float8_on_gpu),
        ["--train.activation_checkpointing=selective", "--train.compile=false"],
    ],
    ids=lambda flags: flags[0].partition("=")[0],
)
def test_the_host_does_not_wait_for_the_gpu_in_a_step(flags: list[str], train: Callable[..., list[float]]) -> None:
    losses = train("run", "--log.interval=12", *flags, script="tests/helpers/no_wait_run.py")
    assert len(losses) == 1


def test_recomputing_changes_memory_not_losses(train: Callable[..., list[float]]) -> None:
    kept = train("kept")
    for what in ("selective", "full"):
        assert train(what, "--train.activation_checkpointing", what) == pytest.approx(kept, rel=2e-3)


def test_flex_without_documents_is_computed_again(train: Callable[..., list[float]]) -> None:
    kept = train("kept", "--ops.attention=flex")
    again = train("again", "--ops.attention=flex", "--train.activation_checkpointing=selective")
    assert again == pytest.approx(kept, rel=2e-3)


def test_auto_says_what_it_chose(train: Callable[..., list[float]], tmp_path: Path) -> None:
    train("run", "--train.max_steps", 3)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events[0]["ops"] == choice.resolve({}, CONFIG, GPU, precision="bf16")
    assert events[0]["ops"]["cross_entropy"] == "chunked"


def test_a_step_of_the_whole_1_1b_model_is_that_of_the_reference(mesh: dist.DeviceMesh) -> None:
    config = named_config("tinyllama_1.1b")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, config.block_size + 1), generator=generator).to(GPU)

    def step(ops: dict[str, str], **how: Any) -> list[float]:
        """Loss, norm of its gradient, and what AdamW's step on it makes of the loss."""
        with torch.device("meta"):
            gpt = GPT(config, ops)
        model = parallelize(gpt, mesh, ParallelArgs(), 1, TrainArgs(**how))
        optimizer = build_optimizer(model, OptimArgs(lr=1e-4))
        first = model(ids[:, :-1], ids[:, 1:]) / config.block_size
        first.backward()
        finish_gradients(model)
        norm = torch.nn.utils.get_total_norm(local_gradients(model))
        optimizer.step()
        with torch.no_grad():
            second = model(ids[:, :-1], ids[:, 1:]) / config.block_size
        return [first.item(), norm.item(), second.item()]

    # with all scores in fp32 the activations of 22 layers would not fit
    expected = step(OPS | {"attention": "reference"}, precision="fp32", compile=False, activation_checkpointing="full")
    assert expected[0] == pytest.approx(np.log(config.vocab_size), rel=0.05)
    assert expected[2] < expected[0]
    ours = step(choice.resolve({}, config, GPU, precision="bf16"))
    assert ours[0] == pytest.approx(expected[0], rel=1e-3)
    assert ours[1:] == pytest.approx(expected[1:], rel=2e-2)


def test_greedy_tokens_are_those_of_the_cpu() -> None:
    model = GPT(CONFIG)
    init_weights(model, seed=3)
    prompts = [[5, 17, 80], [9], [300, 2, 3, 4, 5, 6, 7]]
    expected = generate(model, prompts, 300)
    assert len({token for tokens in expected for token in tokens}) > 10
    assert generate(model.to(GPU), prompts, 300) == expected


def test_an_all_reduce_is_measured_without_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    assert rates.all_reduce_bytes("nccl", ranks=1, megabytes=1, timeout=300) == 0  # one rank sends nothing
    assert "barrier" not in "".join(capfd.readouterr())
