"""What a machine has for training, whether it really works, and what to do where it does not.

Nothing here may raise: a library that is broken is a finding, not a traceback.
"""

import contextlib
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinyllama import InputError, durable
from tinyllama.ops import choice
from tinyllama.throughput import peak_flops

OK, NOTE, WRONG = "ok", "note", "wrong"


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    state: str
    """ok; note: absent or slow, nothing needs it; wrong: it will fail, or compute something else than asked for"""
    name: str
    text: str
    remedy: str = ""


def examine(out_dir: Path, env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Every finding, in the order of a machine's layers from the bottom up."""
    for look in (machine, gpus, lambda: software(torch.__version__), libraries, operations):
        yield from _safely(look)
    yield from _safely(lambda: slurm(env))
    yield from _safely(lambda: disk(out_dir))


def machine() -> Iterator[Finding]:
    """The processor, its memory, and Python."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cores = len(os.sched_getaffinity(0))
    yield Finding(OK, "machine", f"{platform.node()}, {platform.platform()}, {cores} cores, {memory:,.0f} GB memory")
    yield Finding(OK, "python", f"{platform.python_version()} at {sys.executable}")


def gpus() -> Iterator[Finding]:
    """The GPUs, their driver, and one product on each."""
    smi = shutil.which("nvidia-smi")
    if not torch.cuda.is_available():
        if smi is None:
            yield Finding(NOTE, "gpu", "none: training runs on the CPU, for tests and the quickstart")
            return
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        remedy = "install a torch for CUDA, of no newer a CUDA than the driver's (nvidia-smi shows it)"
        yield Finding(WRONG, "gpu", f"nvidia-smi is there, but torch {torch.__version__} ({built}) sees none", remedy)
        return
    if smi:
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split("\n")[0]
        yield Finding(OK, "driver", driver)
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        peak = peak_flops(facts.name)
        text = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, capability {facts.major}.{facts.minor}, "
        text += f"{peak / 1e12:.0f} TFLOP/s" if peak else "peak not known: no MFU will be shown"
        ones = torch.ones(256, 256, device=f"cuda:{index}", dtype=torch.bfloat16)
        works = (ones @ ones).float().mean().item() == 256
        yield Finding(OK if works else WRONG, f"gpu {index}", text, "" if works else "a product of ones is wrong on it")
        if (facts.major, facts.minor) < (8, 0):
            yield Finding(WRONG, f"gpu {index}", "computes no bfloat16", "give --train.precision fp32, or a newer GPU")
    if torch.distributed.is_nccl_available():
        yield Finding(OK, "nccl", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding(WRONG, "nccl", "torch has none", "install a torch for CUDA from pytorch.org")


def software(torch_version: str) -> Iterator[Finding]:
    """torch and lightning, and the versions of them that do something else than they say."""
    cuda = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if torch.version.cuda else "CPU only"
    yield Finding(OK, "torch", f"{torch_version}, {cuda}")
    if not (2, 11) <= _numbers(torch_version) < (2, 14):
        remedy = "pip install 'torch>=2.11,<2.14'"
        yield Finding(WRONG, "torch", "FSDP2 and its checkpoints are tested with 2.11 to 2.13", remedy)
    version = importlib.metadata.version("lightning")
    yield Finding(OK, "lightning", version)
    if _numbers(version) < (2, 6, 4):
        text = "2.6.0 and 2.6.1 build FSDP parameters without fp32 master weights"
        yield Finding(WRONG, "lightning", text, "pip install 'lightning>=2.6.4'")
    if torch.cuda.is_available() and shutil.which(os.environ.get("CC", "gcc")) is None:
        yield Finding(WRONG, "compiler", "no C compiler: torch.compile fails", "install gcc, or --train.compile false")


def libraries() -> Iterator[Finding]:
    """Every optional library: its version, and whether a tiny call of it works."""
    for name, (extra, call) in OPTIONAL.items():
        package = PACKAGES.get(name, name.replace("_", "-"))
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(NOTE, package, f"not installed; for {extra}", f"pip install {package}")
            continue
        began = time.perf_counter()
        try:
            call(importlib.import_module(name))
        except BaseException as error:  # a stub may even call sys.exit
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            if isinstance(error, KeyboardInterrupt):
                raise
            remedy = f"pip uninstall {package}, or install it for this torch and CUDA"
            yield Finding(WRONG, package, f"{version} is installed and does not work: {reason}", remedy)
            continue
        yield Finding(OK, package, f"{version}, works ({time.perf_counter() - began:.1f} s); for {extra}")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if _numbers(importlib.metadata.version("xformers")) >= (0, 0, 34):
            text = "0.0.34 and newer have no fused SwiGLU: --ops.swiglu xformers runs eagerly"
            yield Finding(NOTE, "xformers", text, "pip install 'xformers<0.0.34', or leave ops.swiglu at auto")


def operations() -> Iterator[Finding]:
    """What each operation resolves to here, and what else could be named."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = choice.resolve({}, device, dtype=dtype)
    for operation, backends in choice.OPERATIONS.items():
        usable = [name for name, backend in backends.items() if backend.fault(device) is None]
        text = f"{chosen[operation]} (auto); can run here: {', '.join(usable)}"
        yield Finding(OK, f"ops.{operation}", text)


def slurm(env: Mapping[str, str]) -> Iterator[Finding]:
    """Whether what Slurm says of the job is what a launch needs."""
    if "SLURM_JOB_ID" not in env:
        if shutil.which("sbatch"):
            yield Finding(OK, "slurm", "here, and this is no job of it")
        return
    yield Finding(OK, "slurm", f"job {env['SLURM_JOB_ID']} on {env.get('SLURM_JOB_NODELIST', '?')}")
    if env.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        text = f"the job is called {env['SLURM_JOB_NAME']}: Lightning takes it for a shell and starts its own ranks"
        yield Finding(WRONG, "slurm", text, "give another --job-name, or use torchrun inside")
    if "SLURM_NTASKS" in env and "SLURM_NTASKS_PER_NODE" not in env:
        text = "--ntasks is given without --ntasks-per-node"
        yield Finding(WRONG, "slurm", text, "give --nodes and --ntasks-per-node, one task a GPU")
    gpus_here = torch.cuda.device_count()
    tasks = re.match(r"\d+", env.get("SLURM_NTASKS_PER_NODE", ""))
    if tasks and gpus_here and int(tasks[0]) != gpus_here:
        text = f"{tasks[0]} tasks a node and {gpus_here} GPUs on this one"
        yield Finding(WRONG, "slurm", text, f"give --ntasks-per-node {gpus_here} and --gpus-per-node {gpus_here}")


def disk(out_dir: Path, megabytes: int = 64) -> Iterator[Finding]:
    """How much is free where a run would write, and how fast it is written and synced."""
    folder = out_dir.absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    probe = durable.temporary(folder / "doctor")
    payload = os.urandom(1 << 20)
    began = time.perf_counter()
    try:
        with probe.open("xb") as file:
            for _ in range(megabytes):
                file.write(payload)
        durable.sync(probe)
        speed = megabytes / (time.perf_counter() - began)
    except OSError as error:
        yield Finding(WRONG, "disk", f"{folder} cannot be written: {error.strerror}", "give another out_dir")
        return
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    text = f"{folder}: {free:,.0f} GB free, {speed:,.0f} MB/s written and synced"
    yield Finding(OK, "disk", text)
    if free < 53:
        text = f"{free:,.0f} GB free; the 1.1B's checkpoints are 13.2 GB each, and 4 of them are there at a time"
        yield Finding(NOTE, "disk", text, "give an out_dir on a larger disk for a large model")


def _attend(attention: Callable[..., Any]) -> None:
    if torch.cuda.is_available():
        ones = torch.ones(1, 16, 2, 64, device="cuda", dtype=torch.bfloat16)  # (B, T, nh, hs)
        attention(ones, ones, ones, causal=True)


OPTIONAL: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "flash_attn": ("ops.attention flash_attn", lambda m: _attend(m.flash_attn_func)),
    "flash_attn.cute": ("ops.attention flash_attn_4", lambda m: _attend(m.flash_attn_func)),
    "xformers": ("ops.swiglu xformers", lambda m: importlib.import_module("xformers.ops").SwiGLU),
    "torchao": ("train.precision float8", lambda m: importlib.import_module("torchao.float8").Float8LinearConfig()),
    "triton": ("torch.compile on a GPU", lambda m: m.next_power_of_2(3)),
    "gigatoken": ("data preparation, 10 times as fast", lambda m: m.__name__),
    "wandb": ("log.wandb", lambda m: m.Settings()),
    "lm_eval": ("scripts/evaluate_harness.py", lambda m: importlib.import_module("lm_eval.tasks").TaskManager),
}
"""What is not needed, by the module to import: what it is for, and a tiny call."""

PACKAGES = {"flash_attn.cute": "flash-attn-4"}
"""What pip calls a module, where the name does not tell."""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def _safely(look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from look()
    except InputError as error:
        yield Finding(WRONG, "ops", "; ".join(map(str, error.args)), "see above")
    except Exception as error:
        name = getattr(look, "__name__", "look").strip("<>")
        yield Finding(WRONG, name, f"could not be examined: {type(error).__name__}: {error}", "mend it, and ask again")
