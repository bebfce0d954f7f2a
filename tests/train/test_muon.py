"""Muon on ranks against a plain implementation, and what a step of it takes."""

import itertools
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import yaml
from runs import branch, column, tensors
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tinyllama.checkpoint.names import step_dir, step_dirs
from tinyllama.config.args import OptimArgs
from tinyllama.config.model import ModelConfig, named_config
from tinyllama.model import GPT, init_weights
from tinyllama.ops import symmetric_matmul
from tinyllama.train.muon import (
    Assignment,
    Matrix,
    hidden_matrices,
    iterate_on_gram,
    iterate_on_matrix,
    orthogonalize,
)
from tinyllama.train.optim import build_optimizer

LR, DECAY = 1e-2, 0.3
# no ranks divide the rows of w1 and w2, and three not those of w3 and of the projections
SIZES = {"n_embd": 28, "n_head": 14, "n_query_groups": 2, "intermediate_size": 37, "n_layer": 2}
HIDDEN = ("attn.weight", "proj.weight", "w1.weight", "w2.weight", "w3.weight")
SHARDS = {"c10d.alltoall_base_.default": 2}
WORLDS: dict[str, tuple[int, object, dict[str, int]]] = {
    "one rank": (1, "full", {}),
    "2 ranks, sharded": (2, "full", SHARDS),
    "3 ranks, sharded": (3, "full", SHARDS),
    "4 ranks, sharded": (4, "full", SHARDS),
    "2 ranks, replicated": (2, "none", {"c10d.allgather_.default": 1}),
    "3 ranks, replicated": (3, "none", {"c10d.allgather_.default": 1}),
    "4 ranks, two replicas": (4, 2, SHARDS | {"c10d.allgather_.default": 1}),
}


@pytest.fixture
def muon(config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The tiny run with Muon, of a batch that one, two and four ranks divide, each with a micro-batch or two."""
    config["model"] |= SIZES
    config["train"] |= {"global_batch_size": 12, "micro_batch_size": 3, "max_steps": 20}
    config["optim"] |= {"name": "muon", "schedule": "linear", "lr": LR, "min_lr": 0.0, "weight_decay": DECAY}
    config["checkpoint"]["interval"] = config["eval"]["interval"] = 10
    (tmp_path / "muon.yaml").write_text(yaml.safe_dump(config))
    return config


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    x = matrix / matrix.norm()
    if len(x) > len(x.T):
        return newton_schulz(matrix.T).T
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x


class Plain(NamedTuple):
    """Weights before ten steps of Muon and AdamW without ranks, parameter by parameter, and all tensors after them."""

    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain() -> Plain:
    """The fourth step is left out."""
    sizes: dict[str, Any] = {"block_size": 32, "vocab_size": 256} | SIZES
    config = named_config("quickstart", **sizes)
    model = GPT(config)
    init_weights(model, 3407)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    start = {f"model.{name}": weight.clone() for name, weight in weights.items()}
    momenta = {name: torch.zeros_like(weight) for name, weight in weights.items() if name.endswith(HIDDEN)}
    others = {name: torch.nn.Parameter(weight) for name, weight in weights.items() if name not in momenta}
    adamw = torch.optim.AdamW(others.values(), LR, (0.9, 0.95), weight_decay=DECAY, foreach=False)
    # which head of its group each row of attn.attn is of: a query, the key or the value
    queries = config.n_head // config.n_query_groups
    head = torch.arange(config.qkv_size) // config.head_size % (queries + 2)
    qkv = [head < queries, head == queries, head == queries + 1]
    for step in (0, 1, 2, 4, 5, 6, 7, 8, 9):
        for name, parameter in others.items():
            parameter.grad = gradient(name, parameter.shape, step)
        adamw.step()
        for name, momentum in momenta.items():
            now = gradient(name, momentum.shape, step)
            momentum.copy_(0.95 * momentum + 0.05 * now)
            nesterov = 0.95 * momentum + 0.05 * now
            for rows in qkv if "attn.attn" in name else [torch.ones(len(momentum), dtype=torch.bool)]:
                part = nesterov[rows]
                update = newton_schulz(part) * 0.2 * max(part.shape) ** 0.5
                weights[name][rows] -= LR * DECAY * weights[name][rows] + LR * update
    end = {f"model.{name}": weight for name, weight in weights.items()}
    end |= {f"optimizer.momentum.{name}": momentum for name, momentum in momenta.items()}
    for name, parameter in others.items():
        end |= {f"optimizer.{key}.{name}": value for key, value in adamw.state[parameter].items()}
    return Plain(start, end)


def gradient(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    """As rank.py's."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode())))


def steps_on(world: Any, size: int, tmp_path: Path, *flags: object) -> tuple[dict[str, torch.Tensor], Any]:
    """All tensors after ten steps of optimizer_steps in rank.py, and what each rank says of them."""
    file, settings = tmp_path / "tensors.pt", ["--config", tmp_path / "muon.yaml", "--out_dir", tmp_path]
    settings += ["--train.micro_batch_size", 1]  # which three ranks can share
    answers = world(size)("optimizer_steps", file, *settings, *flags)
    return torch.load(file), [answer["result"] for answer in answers]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if WORLDS[name][0] == 4 else ()) for name in WORLDS]
)
def test_on_ranks_it_is_the_plain_muon(world, muon, plain: Plain, tmp_path: Path, name: str) -> None:
    size, shard, collectives = WORLDS[name]
    found, counts = steps_on(world, size, tmp_path, "--parallel.shard", shard)
    assert found.keys() == plain.end.keys()
    for key, value in plain.end.items():
        assert (found[key] - value).abs().max() < 1e-5, key
    for key, value in plain.start.items():
        assert (found[key] - value).abs().max() > 1e-2, key
    assert counts == [[collectives] * 10] * size  # a step, however many matrices there are


@pytest.mark.parametrize("size", [1, 2])
def test_bf16_iterations_move_weights_as_fp32_ones_do_within_2_percent(
    world, muon, plain: Plain, tmp_path: Path, size: int
) -> None:
    found, _ = steps_on(world, size, tmp_path, "--train.precision", "bf16")
    for key in (key for key in plain.start if key.endswith(HIDDEN)):
        moved, expected = found[key] - plain.start[key], plain.end[key] - plain.start[key]
        assert 1e-4 < (moved - expected).norm() / expected.norm() < 0.02, key
    for key in (key for key in found if "momentum" in key):  # which are fp32 all the same
        assert (found[key] - plain.end[key]).abs().max() < 1e-6, key


@pytest.mark.parametrize(
    ("size", "shard", "frees"),
    [(2, "full", True), (2, "none", True), pytest.param(4, 2, False, marks=pytest.mark.slow)],
    ids=["sharded", "replicated", "two replicas, gathered once"],
)
def test_a_resumed_run_is_the_straight_run(world, muon, tmp_path: Path, size: int, shard: object, frees: bool) -> None:
    straight, settings = tmp_path / "straight", ["--config", tmp_path / "muon.yaml", "--parallel.shard", shard]
    settings += ["--parallel.reshard_after_forward", str(frees).lower()]
    world(size).train(*settings, "--out_dir", straight)
    resumed = branch(straight, 10)
    world(size).train(*settings, "--out_dir", resumed)
    assert column(resumed, "loss") == column(straight, "loss")
    before, after = (tensors(step_dir(run / "checkpoints", 20)) for run in (straight, resumed))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert column(straight, "loss")[-1] < 0.85 * column(straight, "loss")[0]


@pytest.mark.slow
def test_a_run_resumes_on_other_ranks_as_adamw_does(world, muon, tmp_path: Path) -> None:
    straight, elsewhere = tmp_path / "straight", tmp_path / "elsewhere"
    world(1).train("--config", tmp_path / "muon.yaml", "--out_dir", straight)
    settings = ["--config", tmp_path / "muon.yaml", "--out_dir", elsewhere, "--checkpoint.interval", 5]
    # by FSDP2 and where all is gathered once, and at last on two replicas
    for size, shard, until, frees in ((2, "full", 5, "false"), (1, "full", 10, "true"), (4, 2, 20, "true")):
        world(size).train(*settings, "--parallel.shard", shard, "--parallel.reshard_after_forward", frees)
        for step, path in step_dirs(elsewhere / "checkpoints"):
            if step > until:
                shutil.rmtree(path)
    assert column(elsewhere, "loss") == pytest.approx(column(straight, "loss"), rel=1e-5)
    one, other = (tensors(step_dir(run / "checkpoints", 20)) for run in (straight, elsewhere))
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("shard", ["full", "none"])
def test_a_step_that_is_not_finite_is_skipped(world, muon, tmp_path: Path, shard: str) -> None:
    skipping = ["--config", tmp_path / "muon.yaml", "--train.on_nonfinite", "skip", "--train.max_steps", 10]
    skipping += ["--parallel.shard", shard, "--out_dir", tmp_path / "run"]
    assert [answer["result"] for answer in world(2)("train_poisoned", 1, 8, *skipping)] == [0, 0]
    assert column(tmp_path / "run", "skipped") == [0] * 7 + [1] * 3
    assert all(tensor.isfinite().all() for tensor in tensors(step_dir(tmp_path / "run" / "checkpoints", 10)).values())


def test_transformers_loads_what_muon_has_trained(world, muon, tmp_path: Path, script: Any) -> None:
    world(2).train("--config", tmp_path / "muon.yaml", "--out_dir", tmp_path / "run", "--train.max_steps", 10)
    hf = tmp_path / "hf"
    code, out, err = script("convert_lit_checkpoint", tmp_path / "run", hf, "--verify")
    assert code == 0, err
    assert re.search(r"^verify: max \|logit difference\| to transformers \d", out, re.MULTILINE)
    assert json.loads((hf / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    found, ours = load_file(hf / "model.safetensors"), tensors(step_dir(tmp_path / "run" / "checkpoints", 10))
    down = found["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(down, ours["model.transformer.h.1.mlp.swiglu.w3.weight"])


def test_the_state_of_another_optimizer_is_refused(world, muon, tmp_path: Path) -> None:
    settings = ["--config", tmp_path / "muon.yaml", "--out_dir", tmp_path / "run", "--train.max_steps", 6]
    world(1).train(*settings)
    (answer,) = world(1)("train", *settings, "--optim.name", "adamw")
    (said,) = answer["problems"]
    assert said.endswith(
        "step-00000006 holds the state of optim.name muon, and this run's is adamw: put it back, or give its weights "
        "as train.init_from in another out_dir"
    )


def test_an_orthogonalized_matrix_has_singular_values_of_about_one() -> None:
    x = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    found = orthogonalize(x)
    singular = torch.linalg.svdvals(found)
    assert 0.65 < singular.min() < singular.max() < 1.25
    turned = left.mT @ found @ right.mT  # the same singular vectors
    assert (turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
    assert torch.equal(orthogonalize(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))
    assert values.max() > 5  # and were not so before


def big() -> list[Matrix]:
    """The hidden matrices of the 1.1B."""
    with torch.device("meta"):
        return hidden_matrices(GPT(named_config("tinyllama_1.1b")))


@pytest.mark.parametrize("shape", [(2, 16, 32), (1, 24, 200), (3, 130, 40)])
def test_iterations_on_x_x_t_are_those_on_x(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x /= x.norm(dim=(1, 2), keepdim=True)
    wide = x if shape[1] < shape[2] else x.mT
    expected = iterate_on_matrix(wide, symmetric_matmul.reference)
    torch.testing.assert_close(iterate_on_gram(wide, symmetric_matmul.reference), expected, rtol=0, atol=1e-12)
    # in 16 bits both round
    exact = expected if wide is x else expected.mT
    errors = [
        (found.double() - target).norm() / target.norm()
        for found, target in (
            (orthogonalize(x.bfloat16()), exact),
            (iterate_on_matrix(wide.half(), symmetric_matmul.reference), expected),
        )
    ]
    assert max(errors) < 0.01, errors


def test_every_matrix_has_one_owner_and_owners_have_about_the_same_to_do() -> None:
    matrices = big()
    assert len(matrices) == 5 * 22
    for replicas, shards in ((1, 1), (1, 16), (2, 8), (16, 1), (3, 5)):
        assignment = Assignment(matrices, replicas, shards)
        owned = [index for replica in assignment.owned for owner in replica for index in owner]
        assert sorted(owned) == list(range(110))
        assert max(assignment.loads) < 1.06 * sum(assignment.loads) / (replicas * shards)


@pytest.fixture
def fake_world() -> Iterator[Callable[..., DeviceMesh]]:
    """A function that makes this process a rank of a world whose other ranks there are not, and returns its mesh."""

    def join(rank: int, replicas: int, shards: int) -> DeviceMesh:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=replicas * shards)
        return init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))

    yield join
    dist.destroy_process_group()
    _clear_sharding_prop_cache()


class Sent(TorchDispatchMode):
    """The collectives that are called, and the bytes that this rank sends in them."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.replicas, (_, self.shard) = mesh.shape[0], mesh.get_coordinate()
        self.calls: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name == "c10d.alltoall_base_.default":
            _, sent, _, _, sizes, *_ = args
            self.bytes += (len(sent) - sizes[self.shard]) * sent.element_size()
        elif name == "c10d.allgather_.default":
            self.bytes += (self.replicas - 1) * args[1][0].nbytes
        if name.startswith("c10d"):
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


def sent_bytes(assignment: Assignment, sizes: list[int], replica: int, shard: int) -> int:
    """What a rank sends in a step, in bf16."""

    def of_shard(indices: Iterable[int], shard: int) -> int:
        return sum(assignment.numel(index, shard) for index in indices)

    owners = assignment.owned[replica]
    to_owners = sum(of_shard(owner, shard) for owner in owners) - of_shard(owners[shard], shard)
    back = sum(sizes[index] for index in owners[shard]) - of_shard(owners[shard], shard)
    most = max(sum(of_shard(owner, shard) for owner in other) for other in assignment.owned)
    return 2 * (to_owners + back + (assignment.replicas - 1) * most)


BUSIEST = {(1, 16): 229_376_000, (2, 8): 337_117_184, (16, 1): 1_855_979_520}
"""Bytes that the busiest rank of 16 sends in a step of the 1.1B, by replicas and shards, in bf16. One all-gather of the
weights of all parameters takes 2,063 MB of each."""


def bytes_by_rank(replicas: int, shards: int) -> dict[tuple[int, int], int]:
    matrices = big()
    sizes = [matrix.parameter.numel() for matrix in matrices]
    assert sum(sizes) == 968_884_224
    assignment = Assignment(matrices, replicas, shards)
    ranks = itertools.product(range(replicas), range(shards))
    return {(replica, shard): sent_bytes(assignment, sizes, replica, shard) for replica, shard in ranks}


@pytest.mark.parametrize(("replicas", "shards"), BUSIEST)
def test_bytes_that_a_rank_of_16_sends_in_a_step_of_the_1_1b(replicas: int, shards: int) -> None:
    assert max(bytes_by_rank(replicas, shards).values()) == BUSIEST[replicas, shards]


@pytest.mark.parametrize(
    ("replicas", "shards", "calls"),
    [
        (2, 8, ["c10d.alltoall_base_.default"] * 2 + ["c10d.allgather_.default"]),
        pytest.param(1, 16, ["c10d.alltoall_base_.default"] * 2, marks=pytest.mark.slow),
        pytest.param(16, 1, ["c10d.allgather_.default"], marks=pytest.mark.slow),
    ],
)
def test_a_step_of_the_1_1b_on_16_ranks_sends_that_in_at_most_three_collectives(
    fake_world, replicas: int, shards: int, calls: list[str]
) -> None:
    by_rank = bytes_by_rank(replicas, shards)
    replica, shard = max(by_rank, key=by_rank.__getitem__)
    mesh = fake_world(replica * shards + shard, replicas, shards)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = GPT(named_config("tinyllama_1.1b"))
        fully_shard(model, mesh=mesh)
        optimizer = build_optimizer(model, OptimArgs(name="muon"))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.found_inf = torch.zeros(())
        with Sent(mesh) as sent:
            optimizer.step()
    print(f"{replicas} replicas of {shards} shards: {len(sent.calls)} collectives, {sent.bytes / 1e6:.1f} MB")
    assert (sent.calls, sent.bytes) == (calls, BUSIEST[replicas, shards])


@pytest.mark.parametrize("rows", [1, 5, 16, 37])
@pytest.mark.parametrize("shards", [1, 2, 3, 4])
def test_rows_are_cut_as_fsdp_cuts_them(rows: int, shards: int) -> None:
    assignment = Assignment([Matrix(torch.empty(rows, 2, device="meta"), 1, (rows,))], 1, shards)
    chunks = [len(chunk) for chunk in torch.empty(rows).chunk(shards)]
    assert [assignment.rows(0, shard) for shard in range(shards)] == chunks + [0] * (shards - len(chunks))


def test_parts_are_the_rows_of_q_k_and_v() -> None:
    config = ModelConfig("tiny", block_size=8, vocab_size=8, n_layer=1, n_head=4, n_query_groups=2, n_embd=8)
    (matrix, *_) = hidden_matrices(GPT(config))
    rows = torch.arange(16)[:, None] * torch.ones(1, 8)  # 2 groups of 2 + 1 + 1 heads of 2 rows
    q, k, v = matrix.split(rows)
    assert q[:, 0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert k[:, 0].tolist() == [4, 5, 12, 13]
    assert v[:, 0].tolist() == [6, 7, 14, 15]
    assert torch.equal(matrix.join([q, k, v]), rows)


def test_one_learning_rate_and_decay_serve_both() -> None:
    model = GPT(
        ModelConfig(
            "tiny", block_size=8, vocab_size=64, n_layer=1, n_head=2, n_query_groups=2, n_embd=64, intermediate_size=160
        )
    )
    init_weights(model, 0)
    optimizer = build_optimizer(model, OptimArgs(name="muon", lr=1e-3, weight_decay=0.0), "fp32")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).square().mean().sqrt().item()
        # AdamW's first update is the gradient's sign; later ones are about 0.2
        expected = 0.2e-3 if name.endswith(HIDDEN) else 1e-3
        assert moved == pytest.approx(expected, rel=0.25), name
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 0.0)] * 2
