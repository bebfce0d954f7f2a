"""Matmuls in float8 from step to step: their scales, in checkpoints, on several ranks, and what they do to a run."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from needs import float8_on_cpu
from runs import World, column, tensors

from tinyllama import InputError
from tinyllama.checkpoint import reader
from tinyllama.checkpoint.names import step_dir
from tinyllama.config import cli
from tinyllama.config.args import ParallelArgs, PretrainArgs, TrainArgs
from tinyllama.config.model import ModelConfig
from tinyllama.model import GPT, OPS
from tinyllama.ops import float8
from tinyllama.ops.float8_casts import AMAX, SCALE, SCALE_INV
from tinyllama.train.delayed_scaling import GRADIENT
from tinyllama.train.optim import local_gradients
from tinyllama.train.parallel import finish_gradients, parallelize, reshard, sync_gradients

pytestmark = float8_on_cpu
CONFIG = ModelConfig(
    "tiny", block_size=16, vocab_size=64, n_layer=2, n_head=4, n_query_groups=2, n_embd=32, intermediate_size=48
)
MATMULS = 5
"""of a block: qkv, proj, w1, w2 and w3, with three scales each"""
FLOAT8 = ["--train.precision", "float8", "--ops.swiglu", "float8"]
SHORT = [*FLOAT8, "--train.max_steps", 8, "--checkpoint.interval", 4, "--eval.interval", 4, "--optim.lr", 2e-3]


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def built(mesh: dist.DeviceMesh, precision: str, swiglu: str = "reference", **how: Any) -> GPT:
    with torch.device("meta"):
        model = GPT(CONFIG, OPS | {"swiglu": swiglu})
    return parallelize(model, mesh, ParallelArgs(), 1, TrainArgs(precision=precision, **how))  # type: ignore[arg-type]


def gradients(model: GPT, seed: int = 1, factor: float = 1.0) -> torch.Tensor:
    """Those of two micro-batches, all in one vector."""
    blocks = torch.randint(CONFIG.vocab_size, (2, 2, 17), generator=torch.Generator().manual_seed(seed))
    for number, block in enumerate(blocks):
        sync_gradients(model, number == 1, ParallelArgs())
        (model(block[:, :-1], block[:, 1:]) * factor).backward()
    finish_gradients(model)
    return torch.cat([gradient.flatten() for gradient in local_gradients(model)])


def rows(model: GPT) -> torch.Tensor:
    scaling = model.scaling
    return torch.cat((torch.stack(scaling._inputs), torch.stack(scaling._gradients)), dim=1)  # (matmuls, 3, ROW)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_compiled_passes_see_what_they_cast(mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the part of torch.compile that decides what changes in place, not the one that writes C++."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    eager, compiled = (built(mesh, "float8", "float8", compile=compiles) for compiles in (False, True))
    for model in (eager, compiled):
        gradients(model)
        model.scaling.end_step(torch.tensor(False))
        model.scaling.start_step()
        gradients(model, factor=2.0)
    assert torch.equal(rows(compiled)[..., SCALE], rows(eager)[..., SCALE])
    assert torch.allclose(rows(compiled)[..., AMAX], rows(eager)[..., AMAX], rtol=0.1)
    assert (rows(compiled)[..., AMAX] > 0).all()


@pytest.mark.parametrize("swiglu", ["float8", "reference"])
@pytest.mark.parametrize("recomputed", ["none", "selective", "full"])
def test_gradients_are_those_of_bf16_within_float8s_precision(mesh, swiglu: str, recomputed: str) -> None:
    expected = gradients(built(mesh, "bf16"))
    model = built(mesh, "float8", swiglu, activation_checkpointing=recomputed)
    found = gradients(model)
    assert 0.01 < apart(found, expected) < 0.2  # e5m2 rounds by up to an eighth, in each of the layers
    model.scaling.start_step()
    assert torch.equal(gradients(model), found)  # with scales that the step before has left


def test_scales_are_powers_of_two_with_room(mesh) -> None:
    model = built(mesh, "float8", "float8")
    gradients(model)
    model.scaling.end_step(torch.tensor(False))
    block = model.layers[0]
    weight = block.attn.proj.weight.to_local().bfloat16().abs().max()
    scale, scale_inv, amax = block.attn.proj.scales.inputs[float8.WEIGHT, [SCALE, SCALE_INV, AMAX]]
    assert amax == weight
    assert scale == 2 ** torch.floor(torch.log2(224 / weight)) == 1 / scale_inv  # of e4m3's 448, with headroom for 2
    scale, amax = block.mlp.swiglu.w1.scales.gradient[0, [SCALE, AMAX]]
    assert 3584 / 2 < scale * amax <= 3584  # of e5m2's 57344, with headroom for 16
    assert rows(model).shape[:2] == (2 * MATMULS, 3)
    assert (rows(model)[:, :, AMAX] > 0).all()


def test_a_step_takes_the_scales_of_the_step_before(mesh) -> None:
    model = built(mesh, "float8", "float8")
    gradients(model)
    model.scaling.end_step(torch.tensor(False))
    first = rows(model)[:, GRADIENT, SCALE].clone()
    model.scaling.start_step()
    gradients(model, factor=8.0)
    assert torch.equal(rows(model)[:, GRADIENT, SCALE], first)
    model.scaling.end_step(torch.tensor(True))  # a rejected step says nothing about the next one
    assert torch.equal(rows(model)[:, GRADIENT, SCALE], first)
    model.scaling.start_step()
    gradients(model, factor=8.0)
    model.scaling.end_step(torch.tensor(False))
    assert torch.equal(rows(model)[:, GRADIENT, SCALE], first / 8)


def test_a_first_step_that_was_rejected_leaves_a_first_step_to_do(mesh) -> None:
    expected = gradients(built(mesh, "float8", "float8"))
    model = built(mesh, "float8", "float8")
    model.scaling.start_step()
    assert gradients(model, factor=torch.inf).isnan().any()
    model.scaling.end_step(torch.tensor(True))
    assert model.scaling.exponents() == []
    model.scaling.start_step()
    assert torch.equal(gradients(model), expected)
    model.scaling.end_step(torch.tensor(False))
    assert len(model.scaling.exponents()) == 30


@pytest.mark.parametrize("then", ["float8", "reference"])
@pytest.mark.parametrize("now", ["float8", "reference"])
def test_scales_are_good_for_another_implementation_of_swiglu(mesh, then: str, now: str) -> None:
    small = 1e-6  # which is 0 in e5m2 without a scale
    expected = gradients(built(mesh, "bf16"), factor=small)
    before, model = built(mesh, "float8", then), built(mesh, "float8", now)
    gradients(before, factor=small)
    before.scaling.end_step(torch.tensor(False))
    model.scaling.resume(before.scaling.exponents(), Path("step-00000001"))
    assert apart(gradients(model, factor=small), expected) < 0.2


def test_scales_are_good_for_another_batch(mesh) -> None:
    """And for other ranks: both are in the number that the loss is multiplied by."""
    before, model = (built(mesh, "float8", "float8", global_batch_size=batch) for batch in (512, 2))
    gradients(before, factor=1 / (512 * CONFIG.block_size))
    before.scaling.end_step(torch.tensor(False))
    model.scaling.resume(before.scaling.exponents(), Path("step-00000001"))
    ratio = rows(before)[..., SCALE] / rows(model)[..., SCALE]
    assert torch.equal(ratio, torch.tensor([1.0, 1.0, 256.0]).expand(2 * MATMULS, 3))
    expected = gradients(built(mesh, "bf16"), factor=1 / (2 * CONFIG.block_size))
    assert apart(gradients(model, factor=1 / (2 * CONFIG.block_size)), expected) < 0.2


def test_exponents_beyond_what_a_checkpoint_may_hold_are_the_last_ones(mesh) -> None:
    model = built(mesh, "float8", "float8", global_batch_size=2**30)  # of 2^34 tokens
    model.scaling.resume([-126, 0, 126] * 2 * MATMULS, Path("step-00000001"))
    assert rows(model)[0, :, SCALE].tolist() == [2.0**-126, 1.0, 2.0**126]
    for row in model.scaling._gradients:
        row[0, SCALE] = 2.0**-100
    assert model.scaling.exponents() == [-126, 0, -126] * 2 * MATMULS


def test_what_grows_more_than_its_room_is_cut_and_what_is_not_finite_is_seen() -> None:
    x, weight = torch.eye(16).bfloat16(), torch.eye(16).bfloat16()
    scales = float8.new_scales(torch.tensor(False), "cpu")
    assert torch.equal(float8.linear(x, weight, scales), x)
    scales.known.fill_(True)
    for value, expected in ((1.75, 1.75), (3.5, 3.5), (300.0, 3.5), (-300.0, -3.5)):  # 448 / 2^7 is 3.5
        x[0, 0] = value
        assert float8.linear(x, weight, scales)[0, 0] == expected
    assert scales.inputs[float8.X, AMAX] == 300
    for value in (float("inf"), float("nan")):
        x[0, 0] = value
        assert float8.linear(x, weight, scales)[0, 0].isnan()
    before = scales.inputs[:, SCALE].clone()
    float8.rescale(scales.inputs, float8.E4M3)
    assert torch.equal(scales.inputs[:, SCALE], before)  # of an infinite magnitude there is no scale


def test_validation_leaves_no_trace_in_the_scales(mesh) -> None:
    ends = []
    for validates in (False, True):
        model = built(mesh, "float8", "float8")
        gradients(model)
        model.scaling.end_step(torch.tensor(False))
        if validates:
            with torch.no_grad():
                big = model.layers[0].attn.proj.weight.to_local()
                big *= 1000
                model(torch.zeros(1, 16, dtype=torch.long))
                reshard(model)
                big /= 1000
        model.scaling.start_step()
        gradients(model)
        model.scaling.end_step(torch.tensor(False))
        ends.append(rows(model))
    assert torch.equal(*ends)


def test_a_resumed_run_is_the_straight_one_on_any_ranks(
    world: Callable[[int], World], config_file: Path, tmp_path: Path
) -> None:
    command = ["--config", config_file, *SHORT]
    straight = tmp_path / "straight"
    world(2)("train_float8", *command, "--out_dir", straight)
    state = json.loads((straight / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert len(state["float8_exponents"]) == 2 * MATMULS * 3
    assert len(set(state["float8_exponents"])) > 3
    for ranks in (2, 1):
        resumed = tmp_path / f"resumed-{ranks}"
        at = straight / "checkpoints" / "step-00000004"
        world(ranks)("train_float8", *command, "--out_dir", resumed, "--train.resume", at)
        losses = column(straight, "loss")[4:]
        if ranks == 2:
            assert column(resumed, "loss") == losses
            ends = [tensors(folder / "checkpoints" / "step-00000008") for folder in (straight, resumed)]
            assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())
        else:
            assert column(resumed, "loss") == pytest.approx(losses, rel=2e-3)  # sums in another order, rounded to bf16


def test_what_is_sharded_trains_as_what_is_not(
    world: Callable[[int], World], config_file: Path, tmp_path: Path
) -> None:
    losses = []
    for shard, freed in (("none", "true"), ("full", "true"), ("full", "false")):
        out_dir = tmp_path / f"{shard} {freed}"
        flags = ["--parallel.shard", shard, "--parallel.reshard_after_forward", freed]
        world(2)("train_float8", "--config", config_file, *SHORT, "--out_dir", out_dir, *flags)
        losses.append(column(out_dir, "loss"))
    whole, by_fsdp, gathered = losses
    assert whole == pytest.approx(by_fsdp, rel=2e-3)
    assert gathered == whole  # the same matmuls, and w1 and w2 alternate in memory


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--model.n_embd", 40], "model.n_embd is 40"),
        (["--model.intermediate_size", 72], "model.intermediate_size is 72"),
        (
            ["--model.n_embd", 48, "--model.n_head", 12, "--model.n_query_groups", 1],
            "model.n_embd x (1 + 2 x model.n_query_groups / model.n_head) is 56",
        ),
        (
            ["--model.block_size", 24, "--train.micro_batch_size", 1],
            "train.micro_batch_size x model.block_size is 24",
        ),
    ],
)
def test_sizes_that_are_no_multiples_are_refused_by_the_names_of_their_settings(
    recipe: Any, flags: list[Any], problem: str, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, gpu = float8.problem, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("tinyllama.ops.backend.is_importable", lambda module: True)
    monkeypatch.setattr(float8, "problem", lambda device, sizes: check(gpu, sizes))
    argv = ["--config", config_file, *FLOAT8, "--out_dir", tmp_path / "run", *flags]
    with pytest.raises(InputError) as refused:
        recipe.setup(cli.parse(PretrainArgs, [str(word) for word in argv]))
    assert refused.value.args == (
        f"train.precision float8 cannot be used: {problem}, not a multiple of 16: change it, or use bf16",
    )


@pytest.mark.parametrize("number", [29, 31])
def test_scales_of_another_model_are_damage(
    number: int, world: Callable[[int], World], config_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ["train_float8", "--config", config_file, *SHORT]
    world(2)(*command, "--out_dir", out)
    losses = column(out, "loss")
    step = step_dir(out / "checkpoints", 8)
    (step / "state.json").write_text(json.dumps(reader.read_state(step) | {"float8_exponents": [3] * number}))
    damage = f"{step} is damaged (its state.json has {number} scales of float8, and this model 30)"
    answers = world(2)(*command, "--out_dir", tmp_path / "other", "--train.max_steps", 12, "--train.resume", step)
    hint = "move it out of its folder, and the run resumes from the checkpoint before it"
    assert [answer["problems"] for answer in answers] == [[f"{damage}: {hint}"]] * 2
    said = world(2)(*command, "--out_dir", out, "--train.resume", "auto")[0]["said"]
    assert said.count(f"passed over: {damage}\n") == 1
    assert f"resumed from {step_dir(out / 'checkpoints', 4)} at step 4" in said
    assert column(out, "loss") == losses
