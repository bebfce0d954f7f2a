"""Measure what a machine does in a second: matmuls, copies within memory, and an all-reduce over its GPUs."""

import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROUNDS = 10


def matmul_flops(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """Return the FLOP/s of matmuls of two square matrices of ``size`` rows."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=out), device)


def copy_bytes(device: torch.device, megabytes: int) -> float:
    """Return the bytes per second that a copy within the device's memory reads and writes."""
    source = torch.zeros(megabytes << 20, device=device, dtype=torch.uint8)
    copy = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: copy.copy_(source), device)


def all_reduce_bytes(backend: str, ranks: int, megabytes: int, timeout: float) -> float | None:
    """Return the bus bandwidth of an all-reduce, as nccl-tests count it, over processes of this machine.

    Each rank sends and receives 2 (n - 1) / n of the bytes. None: they were not done within ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(_all_reduce, (backend, ranks, megabytes, timeout, folder), ranks, join=False)
        deadline = time.monotonic() + timeout
        while not context.join(timeout=1):  # raises what a process has raised
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                return None
        seconds = float((Path(folder) / "seconds").read_text(encoding="utf-8"))
    return 2 * (ranks - 1) / ranks * (megabytes << 20) / seconds


def _all_reduce(rank: int, backend: str, ranks: int, megabytes: int, timeout: float, folder: str) -> None:
    gpu = torch.device("cuda", rank) if backend == "nccl" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
        device_id=gpu,
    )
    device = gpu or torch.device("cpu")
    numbers = torch.zeros((megabytes << 20) // 4, device=device)
    seconds = _seconds(lambda: dist.all_reduce(numbers), device)
    if rank == 0:
        (Path(folder) / "seconds").write_text(str(seconds), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call, after some that warm up."""
    times = []
    for number in range(ROUNDS + 3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 3:
            times.append(time.perf_counter() - began)
    return statistics.median(times)
