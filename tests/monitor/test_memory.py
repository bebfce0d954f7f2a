"""What a snapshot of a GPU's memory says; its structure is the one that torch.cuda.memory._snapshot documents."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import CONFIG, weights

from tinyllama.config.args import OptimArgs, ParallelArgs, TrainArgs
from tinyllama.model import GPT, from_weights
from tinyllama.monitor import memory
from tinyllama.train.adamw import local
from tinyllama.train.optim import build_optimizer
from tinyllama.train.parallel import finish_gradients, parallelize

SITE = "/venv/lib/python3.12/site-packages/torch"
LINEAR = (f"{SITE}/nn/modules/linear.py", 134, "forward")
CALL = (f"{SITE}/nn/modules/module.py", 1780, "_call_impl")
ATTENTION = ("/home/me/repo/tinyllama/model.py", 140, "forward")
STEP = ("/home/me/repo/tinyllama/train/step.py", 53, "__call__")
SWIGLU = ("/home/me/repo/tinyllama/ops/swiglu.py", 40, "reference")
CASES = {
    "a layer of torch": ([LINEAR, CALL, ATTENTION, CALL, STEP], "activations of modules/linear.py:134 forward"),
    "an operation": (
        [(f"{SITE}/_ops.py", 1209, "__call__"), SWIGLU, CALL, ATTENTION, STEP],
        "activations of ops/swiglu.py:40 reference",
    ),
    "compiled code": (
        [("/tmp/torchinductor_me/ab/cab.py", 311, "call"), CALL, ATTENTION, STEP],
        "activations of tinyllama/model.py:140 forward",
    ),
    "the step": ([STEP, ("/home/me/repo/pretrain/train.py", 190, "step")], "train/step.py:53 __call__"),
    "FSDP": (
        [(f"{SITE}/distributed/fsdp/_fully_shard/_fsdp_collectives.py", 200, "foreach_all_gather"), CALL, ATTENTION],
        "weights gathered or gradients reduced by FSDP",
    ),
    "AdamW": ([(f"{SITE}/optim/adam.py", 800, "_fused_adam"), STEP], "temporaries of the optimizer"),
    "another library": ([("/opt/lib/wandb/x.py", 3, "f")], "x.py:3 f"),
    "no frames": ([], memory.WITHOUT_FRAMES),
}


def block(size: int, frames: list[tuple[str, int, str]], address: int = 0, state: str = "active_allocated") -> Any:
    names = ("filename", "line", "name")
    found = [dict(zip(names, frame, strict=True)) for frame in frames]
    return {"address": address, "size": size, "requested_size": size - 12, "state": state, "frames": found}


def snapshot(*blocks: Any) -> dict[str, Any]:
    total = sum(one["size"] for one in blocks)
    segment = {"device": 0, "address": 0, "total_size": total, "stream": 0, "segment_type": "large"}
    return {"segments": [segment | {"blocks": list(blocks)}], "device_traces": [[]], "allocator_settings": {}}


@pytest.mark.parametrize("name", CASES)
def test_an_owner_is_named_by_its_code(name: str) -> None:
    frames, owner = CASES[name]
    assert memory.owners(snapshot(block(512, frames)), {}) == {owner: 512}


def test_the_three_largest_are_named_and_what_is_free_is_not_counted() -> None:
    blocks = [block(3 * 10**9, CASES["a layer of torch"][0]), block(2 * 10**9, CASES["a layer of torch"][0])]
    blocks += [block(4 * 10**9, [], address=7), block(10**9, CASES["FSDP"][0], state="active_awaiting_free")]
    blocks += [block(10**8, CASES["AdamW"][0]), block(9 * 10**9, CASES["AdamW"][0], state="inactive")]
    assert memory.describe(snapshot(*blocks), 3, {7: "optimizer state"}) == (
        "rank 3 is out of GPU memory, with 10.10 of 19.10 GB in use: 5.00 GB activations of modules/linear.py:134 "
        "forward, 4.00 GB optimizer state, 1.00 GB weights gathered or gradients reduced by FSDP"
    )
    assert memory.describe(snapshot(), 0, {}) == "rank 0 is out of GPU memory, with 0.00 of 0.00 GB in use: nothing"


def test_weights_gradients_and_the_optimizer_are_known_by_their_addresses(monkeypatch: Any, tmp_path: Path) -> None:
    gpt = from_weights(CONFIG, weights())
    optimizer = torch.optim.AdamW(gpt.parameters())
    gpt(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
    optimizer.step()
    weight = gpt.lm_head.weight
    assert weight.grad is not None
    moment = optimizer.state[weight]["exp_avg"]
    taken = snapshot(*(block(tensor.nbytes, [], tensor.data_ptr()) for tensor in (weight, weight.grad, moment)))
    known = memory.known_owners(gpt, optimizer)
    assert memory.owners(taken, known) == dict.fromkeys(("weights", "gradients", "optimizer state"), weight.nbytes)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: taken)
    file = tmp_path / "memory" / "rank-00002.pickle"
    text = memory.explain(2, gpt, optimizer, tmp_path / "memory")
    assert text.endswith(f"parallel.reshard_after_forward true; {file} opens in https://docs.pytorch.org/memory_viz")
    assert pickle.loads(file.read_bytes()) == taken
    (tmp_path / "file").touch()
    text = memory.explain(2, gpt, optimizer, tmp_path / "file")
    assert text.endswith("rank-00002.pickle cannot be written (File exists)")


def test_all_are_known_in_a_pass_of_gathered_weights_too() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            gpt = GPT(CONFIG)
        parallelize(gpt, dist.init_device_mesh("cpu", (1,)), ParallelArgs(), 1, TrainArgs())
        optimizer = build_optimizer(gpt, OptimArgs())
        ids = torch.tensor([[1, 2, 3]])
        gpt(ids, ids).backward()
        finish_gradients(gpt)
        optimizer.step()
        optimizer.zero_grad()
        master = gpt.lm_head.weight
        gpt(ids, ids)  # and here memory runs out
        known = memory.known_owners(gpt, optimizer)
        assert gpt.lm_head.weight_gradient is not None
        expected = {
            "weights": local(master),
            "gathered weights": gpt.lm_head.weight,
            "gradients": gpt.lm_head.weight_gradient.total,
            "optimizer state": local(optimizer.state[master]["exp_avg"]),
        }
        assert {name: known.get(tensor.untyped_storage().data_ptr()) for name, tensor in expected.items()} == {
            name: name for name in expected
        }
    finally:
        dist.destroy_process_group()
