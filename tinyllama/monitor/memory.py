"""Say what holds the memory of a GPU when it has no more: the largest owners, and a snapshot of all of it."""

import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama import atomic
from tinyllama.model import GPT
from tinyllama.train.adamw import local

MEMORY_VIZ = "https://docs.pytorch.org/memory_viz"
HINT = (
    "lower train.micro_batch_size, or set train.activation_checkpointing, parallel.shard full or "
    "parallel.reshard_after_forward true"
)
WITHOUT_FRAMES = "without Python frames: the backward pass, and all that came after the first log interval"


def record() -> None:
    """Record which Python code allocates each block of GPU memory: about 2 us for each, and no history."""
    if torch.cuda.is_available():
        torch.cuda.memory._record_memory_history("state", context="state", stacks="python")


def stop_recording() -> None:
    """Record no more: nearly every run that is out of memory is so in its first steps, and recording takes time."""
    if torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(None)


def explain(rank: int, gpt: GPT, optimizer: torch.optim.Optimizer, folder: Path) -> str:
    """Return one line about what holds this rank's memory, and write a snapshot of it into ``folder``."""
    snapshot = torch.cuda.memory._snapshot()
    file = folder / f"rank-{rank:05d}.pickle"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write(file, pickle.dumps(snapshot))
        where = f"{file} opens in {MEMORY_VIZ}"
    except OSError as error:
        where = f"{file} cannot be written ({error.strerror})"
    return f"{describe(snapshot, rank, known_owners(gpt, optimizer))}: {HINT}; {where}"


def describe(snapshot: Mapping[str, Any], rank: int, known: Mapping[int, str]) -> str:
    """Return how much of the memory is used, and its three largest owners."""
    sizes = owners(snapshot, known)
    reserved = sum(segment["total_size"] for segment in snapshot["segments"])
    largest = ", ".join(f"{size / 1e9:.2f} GB {owner}" for owner, size in sizes.most_common(3)) or "nothing"
    return (
        f"rank {rank} is out of GPU memory, with {sizes.total() / 1e9:.2f} of {reserved / 1e9:.2f} GB in use: {largest}"
    )


def owners(snapshot: Mapping[str, Any], known: Mapping[int, str]) -> Counter[str]:
    """Return the bytes of each owner in a snapshot of torch.cuda.memory: by a block's address, else by its frames."""
    sizes: Counter[str] = Counter()
    for segment in snapshot["segments"]:
        for block in segment["blocks"]:
            if block["state"] != "inactive":
                sizes[known.get(block["address"]) or _by_frames(block.get("frames", []))] += block["size"]
    return sizes


def known_owners(gpt: GPT, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Return the addresses of this rank's weights, gradients and optimizer state, each with its name.

    In a pass the modules have gathered weights; the optimizer has its own at all times.
    """
    kinds: dict[str, list[Tensor]] = {"gathered weights": list(gpt.parameters()), "gradients": []}
    if gpt.gathered is not None:
        kinds["gathered weights"] = [bucket.copy for bucket in gpt.gathered.buckets]
        kinds["gradients"] = [bucket.gradient.total for bucket in gpt.gathered.buckets]
    kinds |= {"weights": [], "optimizer state": []}
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        kinds["weights"].append(parameter)
        kinds["gradients"] += [] if parameter.grad is None else [parameter.grad]
        kinds["optimizer state"] += [
            value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)
        ]
    return {local(tensor).untyped_storage().data_ptr(): name for name, tensors in kinds.items() for tensor in tensors}


def _by_frames(frames: list[dict[str, Any]]) -> str:
    """Name the owner of a block by the Python code that allocated it; ``frames`` begins with the innermost."""
    files = [frame["filename"] for frame in frames]
    if any("torch/distributed/fsdp/" in file for file in files):
        return "weights gathered or gradients reduced by FSDP"
    if any(file.endswith("tinyllama/train/gathered.py") for file in files):
        return "copies of the weights and sums of gradients"
    if any("torch/optim/" in file or file.endswith("tinyllama/train/muon.py") for file in files):
        return "temporaries of the optimizer"
    for frame in frames:
        parts = Path(frame["filename"]).parts
        # a module's __call__ is in every stack of a model
        layer = parts[-3:-1] == ("nn", "modules") and parts[-1] != "module.py"
        if (
            layer
            or parts[-3:-1] == ("torch", "nn")
            or "tinyllama" in parts[-3:-1]
            or parts[-2:] == ("pretrain", "train.py")
        ):
            activations = layer or parts[-1] == "model.py" or parts[-2] in ("ops", "nn")
            return f"{'activations of ' * activations}{'/'.join(parts[-2:])}:{frame['line']} {frame['name']}"
    return WITHOUT_FRAMES if not frames else f"{Path(files[0]).name}:{frames[0]['line']} {frames[0]['name']}"
