"""One rank of two that save and load tiny checkpoints, or the parent of processes that are killed while they save.

`python checkpoint_rank.py RANK WORLD_SIZE STORE` answers a command a line on stdin with a line on stdout; world size 0
joins no group, for a process with a group must not fork. `Ranks` in test_checkpointer.py starts it.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import threading
import traceback
import warnings
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tinyllama.checkpoint import hashes, reader, writer
from tinyllama.checkpoint.state import TrainState
from tinyllama.checkpoint.tensors import materialize_optimizer_state, named_tensors
from tinyllama.checkpoint.writer import Checkpointer, CheckpointError
from tinyllama.config.model import ModelConfig
from tinyllama.model import GPT

CONFIG = ModelConfig("tiny", block_size=8, vocab_size=61, n_layer=2, n_head=4, n_embd=24, intermediate_size=37)


def values(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    """What the tensor ``name`` of a checkpoint of ``step`` holds: random numbers that these three decide."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode())))


def contents(step_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    storage = reader._Reader(step_dir)
    found = {name: torch.empty(entry.size) for name, entry in storage.read_metadata().state_dict_metadata.items()}
    with warnings.catch_warnings():  # it warns that it asks no group
        warnings.simplefilter("ignore", UserWarning)
        torch.distributed.checkpoint.load(found, storage_reader=storage, no_dist=True)
    return found


def holds(step_dir: Path, step: int) -> bool:
    """Whether a checkpoint has the right numbers and every tensor, bit for bit, as ``fill`` makes them."""
    saved, found = reader.read_state(step_dir), contents(step_dir)
    assert (saved["step"], saved["samples"], saved["tokens"]) == (step, 3 * step, 24 * step)
    assert len(found) == 4 * sum(1 for _ in GPT(CONFIG).named_parameters())
    return all(torch.equal(tensor, values(name, tensor.shape, step)) for name, tensor in found.items())


class Run(NamedTuple):
    """A model, sharded if there are ranks, and its optimizer."""

    model: GPT
    optimizer: torch.optim.AdamW

    @classmethod
    def build(cls, device: str = "cpu", sharded: bool = True) -> "Run":
        model = GPT(CONFIG).to(device)
        if sharded:
            mesh = init_device_mesh(device, (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard"))
            for block in model.transformer["h"]:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return cls(model, torch.optim.AdamW(model.parameters(), fused=True))

    @torch.no_grad()
    def fill(self, step: int) -> None:
        """Give every tensor the values of ``step``."""
        materialize_optimizer_state(self.optimizer)
        for name, tensor in named_tensors(self.model, self.optimizer).items():
            full = values(name, tensor.shape, step).to(tensor.device)
            if isinstance(tensor, DTensor):
                full = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.copy_(full)

    def save(self, saver: Checkpointer, step: int, **how: bool) -> Path | None:
        """Save the values of ``step``, and change them at once."""
        self.fill(step)
        try:
            return saver.save(TrainState(step, 3 * step, 24 * step), self.model, self.optimizer, **how)
        finally:
            self.fill(-1)


def make(
    folder: Path, asynchronous: bool = False, keep_last: int | None = None, keep_every: int | None = None
) -> Checkpointer:
    """A Checkpointer of the tiny run."""
    config = yaml.safe_dump({"model": asdict(CONFIG)})
    metadata = {"data": {"seed": 1}}
    return Checkpointer(
        folder, config=config, metadata=metadata, keep_last=keep_last, keep_every=keep_every, asynchronous=asynchronous
    )


@contextlib.contextmanager
def before_data(action: Any) -> Any:
    """Call ``action`` on this rank before it writes its tensors."""
    write_data = writer._Writer.write_data

    def first(*args: Any) -> Any:
        action()
        return write_data(*args)

    with mock.patch.object(writer._Writer, "write_data", first):
        yield


def asynchronously(run: Run, folder: Path) -> Any:
    """Save two steps; the values are changed, surely, before the first is being written."""
    saver, changed = make(folder, asynchronous=True), threading.Event()
    with before_data(changed.wait):
        published = [run.save(saver, 5)]
        there = (folder / "step-00000005").exists(), saver.done()
        changed.set()
        published.append(run.save(saver, 6))
        one_at_a_time = (folder / "step-00000005").exists()
        published += [saver.wait(), saver.wait()]
    return [str(path) for path in published], [*there, one_at_a_time]


def load(run: Run, step_dir: Path) -> Any:
    """Load a checkpoint; gives its step and whether every shard is as saved."""
    run.fill(0)
    state = reader.load(step_dir, run.model, run.optimizer)
    loaded = named_tensors(run.model, run.optimizer).items()
    full = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in loaded}
    return asdict(state), all(torch.equal(full[name], values(name, full[name].shape, state.step)) for name in full)


def verified(run: Run, step_dir: Path) -> Any:
    """Load a checkpoint; gives the error, if there is one, and the files that this rank hashed for it."""
    with mock.patch.object(hashes, "of_file", wraps=hashes.of_file) as of_file:
        try:
            reader.load(step_dir, run.model, run.optimizer)
            error = None
        except reader.DamagedError as damaged:
            error = str(damaged)
    return error, sorted(call.args[0].name for call in of_file.call_args_list)


def failing(run: Run, folder: Path, how: str) -> Any:
    """Save step 1, fail to save step 2, save step 3; gives what was said and what there was in between.

    ``how``: full: rank 0 sees a full disk; limit: rank 1 may not write so much; ballast: the disk fills up meanwhile.
    """
    saver, ballast = make(folder, asynchronous=True), folder / "ballast"
    run.save(saver, 1, wait=True)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk() -> None:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    with contextlib.ExitStack() as stack:
        if how == "full" and dist.get_rank() == 0:
            usage = shutil.disk_usage(folder)._replace(free=100_000)
            stack.enter_context(mock.patch("shutil.disk_usage", return_value=usage))
        if how == "limit" and dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        if how == "ballast" and dist.get_rank() == 1:
            stack.enter_context(before_data(fill_the_disk))
        try:
            run.save(saver, 2)
            saver.wait()
            said = ""
        except CheckpointError as error:
            said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    there = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    ballast.unlink(missing_ok=True)
    run.save(saver, 3, wait=True)
    return said, there


def pinned(run: Run, folder: Path) -> bool:
    """Save two steps from the GPU, asynchronously; gives whether all copies were made into pinned memory."""
    run, saver = Run.build("cuda"), make(folder, asynchronous=True)
    copies = []
    for step in (3, 4):
        run.save(saver, step)
        staged = saver._stager.state_dict_cache.values()
        copies.append([copy.to_local() if isinstance(copy, DTensor) else copy for copy in staged])
    saver.wait()
    assert [copy.data_ptr() for copy in copies[0]] == [copy.data_ptr() for copy in copies[1]]
    return all(copy.is_pinned() for copy in copies[0] if copy.dim())  # the counts of steps have no dimension


def killed(folder: Path, when: int) -> int:
    """Save step 1, then step 2 in a process that is killed when it asks for its ``when``-th fsync; gives its status.

    After the last fsync old steps are removed: that is the next number's place to be killed.
    """
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        store = dist.FileStore(str(folder) + "-store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        run, saver, count = Run.build(sharded=False), make(folder, asynchronous=True, keep_last=1), 0
        run.save(saver, 1, wait=True)
        fsync, rmtree = os.fsync, shutil.rmtree

        def next_one(go_on: Any) -> Any:
            def counted(*args: Any, **kwargs: Any) -> None:
                nonlocal count
                count += 1
                if count == when:
                    os.kill(os.getpid(), signal.SIGKILL)
                go_on(*args, **kwargs)

            return counted

        os.fsync = next_one(fsync)
        run.save(saver, 2)  # which asks for nothing to be removed but what is not there
        shutil.rmtree = next_one(rmtree)
        saver.wait()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def main() -> None:
    """Answer commands until stdin ends."""
    rank, world_size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    run = None
    if world_size:
        dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
        run = Run.build()
    for line in sys.stdin:
        name, path, *args = json.loads(line)
        try:
            call = globals()[name]
            answer = {"result": call(run, Path(path), *args) if run else call(Path(path), *args)}
        except BaseException:
            answer = {"defect": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
