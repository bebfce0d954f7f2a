"""Check whether a machine is ready for training, and say how to fix what is not.

Nothing here may raise: a broken library is a finding, not a traceback.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from tinyllama import InputError
from tinyllama.config.args import OptimArgs
from tinyllama.config.model import named_config
from tinyllama.ops import choice, float8
from tinyllama.ops.backend import install_command
from tinyllama.throughput import peak_flops, usual_rates
from tinyllama.tools import rates

OK, NOTE, WRONG = "ok", "note", "wrong"


@dataclass(frozen=True)
class Finding:
    """One result of the check."""

    state: str
    """ok; note: absent or slow, but not needed; wrong: training would fail, or not compute what the settings say"""
    name: str
    text: str
    hint: str = ""


@dataclass(frozen=True)
class Library:
    """A package to try."""

    package: str  # its name for pip
    purpose: str  # the setting or command that uses it
    trial: str  # code of a tiny call
    gpu: bool = False  # whether it needs a GPU
    capability: tuple[int, int] = (0, 0)  # least compute capability of that GPU


KERNEL = """
import torch
from {0} import {1}
if torch.cuda.is_available():
    ones = torch.ones({2}, device="cuda", dtype=torch.bfloat16)
    {1}({3})
    torch.cuda.synchronize()
"""
FLASH = ("flash_attn_func", "1, 16, 2, 64", "ones, ones, ones, causal=True")
GATED = ("gemm_gated", "16, 16", "ones, ones, activation='swiglu', tuned=False")
LIBRARIES = (
    Library("lightning", "training", "from lightning.fabric.strategies import ModelParallelStrategy"),
    Library("transformers", "conversion and evaluation", "from transformers import LlamaForCausalLM"),
    Library("flash-attn", "ops.attention flash_attn", KERNEL.format("flash_attn", *FLASH), gpu=True),
    Library("flash-attn-4", "ops.attention flash_attn_4", KERNEL.format("flash_attn.cute", *FLASH), True, (9, 0)),
    Library("quack-kernels", "ops quack", KERNEL.format("quack.gemm_interface", *GATED), True, (9, 0)),
    Library("xformers", "ops.swiglu xformers", "from xformers.ops import SwiGLU", gpu=True),
    Library("triton", "torch.compile on a GPU and float8", "import triton; triton.next_power_of_2(3)", gpu=True),
    Library("gigatoken", "data preparation, 10 times as fast", "import gigatoken"),
    Library("wandb", "log.wandb", "import wandb; wandb.Settings()"),
    Library("lm-eval", "scripts/evaluate_harness.py", "from lm_eval.tasks import TaskManager"),
)
UNNEEDED = {
    "flash-attn": ((9, 0), "flash-attn-4 is faster on this GPU"),
    "xformers": ((0, 0), "its versions for this torch have no fused SwiGLU"),
}
"""libraries that gain nothing on GPUs from this compute capability on, and why"""
TRIAL = """
import sys
try:
    exec(sys.argv[1])
except BaseException as error:  # a stub may even call sys.exit
    print(f"\\n{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
    sys.exit(1)
"""
TRIAL_SECONDS = 180
IDLE = "run this again when the machine has less to do"

REASONS = {
    "torch": "FSDP2 and its checkpoints are tested with 2.11 to 2.13",
    "lightning": "2.6.0 and 2.6.1 build FSDP parameters without fp32 master weights",
}
"""why the version of a package matters, where known"""


def examine(out_dir: Path, env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Yield all findings, in the order of a machine's layers from the bottom up."""
    broken: set[str] = set()
    layers: dict[str, Callable[[], Iterator[Finding]]] = {
        "machine": machine,
        "gpu": gpus,
        "speed": speed,
        "packages": packages,
        "libraries": libraries,
        "ops": lambda: operations(broken),
        "slurm": lambda: slurm(env),
        "disk": lambda: disk(out_dir),
    }
    for name, look in layers.items():
        try:
            for finding in look():
                if finding.state == WRONG and name == "libraries":
                    broken.add(finding.name)
                yield finding
        except InputError as error:
            yield Finding(WRONG, name, "; ".join(map(str, error.args)), "see above")
        except Exception as error:
            yield Finding(WRONG, name, f"could not be examined: {_first_line(error)}", "fix it, and run this again")


def machine() -> Iterator[Finding]:
    """Report the processor, its memory and Python."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cores = len(os.sched_getaffinity(0))
    yield Finding(OK, "machine", f"{platform.node()}, {platform.platform()}, {cores} cores, {memory:,.0f} GB memory")
    yield Finding(OK, "python", f"{platform.python_version()} at {sys.executable}")


def gpus() -> Iterator[Finding]:
    """Check the GPUs and their driver, with a matmul on each GPU."""
    smi = shutil.which("nvidia-smi")
    if not torch.cuda.is_available():
        if smi is None:
            yield Finding(NOTE, "gpu", "none: training runs on the CPU, for tests and the quickstart")
            return
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        hint = "install a torch whose CUDA is not newer than the driver's (nvidia-smi shows it)"
        yield Finding(WRONG, "gpu", f"nvidia-smi is there, but torch {torch.__version__} ({built}) sees none", hint)
        return
    if smi:
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split("\n")[0]
        yield Finding(OK, "driver", driver)
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        peak = peak_flops(gpu.name)
        text = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}, "
        text += f"{peak / 1e12:.0f} TFLOP/s" if peak else "peak not known: no MFU will be shown"
        yield Finding(OK, f"gpu {index}", text)
        if (gpu.major, gpu.minor) < (8, 0):
            yield Finding(WRONG, f"gpu {index}", "computes no bfloat16", "give --train.precision fp32, or a newer GPU")
        try:
            ones = torch.ones(256, 256, device=f"cuda:{index}")
            works = (ones @ ones).mean().item() == 256
            problem = "a matmul of ones is wrong on it"
        except RuntimeError as error:  # no kernel for so old or so new a GPU, or no free memory
            works, problem = False, _first_line(error)
        if not works:
            hint = "check in nvidia-smi that it is free, and install a torch built for it; otherwise it needs repair"
            yield Finding(WRONG, f"gpu {index}", problem, hint)
    if torch.distributed.is_nccl_available():
        yield Finding(OK, "nccl", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding(WRONG, "nccl", "torch has none", "install a torch for CUDA from pytorch.org")


def speed() -> Iterator[Finding]:
    """Measure matmuls and copies on each GPU, else on the CPU, and NCCL's all-reduce, and name what is slow."""
    if os.getloadavg()[0] > len(os.sched_getaffinity(0)):
        yield Finding(NOTE, "load", f"the machine is busy ({_load()}): what is measured now may be too slow", IDLE)
    if not torch.cuda.is_available():
        cpu = torch.device("cpu")
        flops, copied = rates.matmul_flops(cpu, 1024, torch.float32), rates.copy_bytes(cpu, 256)
        text = f"matmul {flops / 1e9:,.0f} GFLOP/s (fp32, {torch.get_num_threads()} threads), "
        yield Finding(OK, "speed cpu", f"{text}memory {copied / 1e9:,.1f} GB/s (copy)")
        return
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    for index, name in enumerate(names):
        gpu = torch.device("cuda", index)
        try:
            measured = rates.matmul_flops(gpu, 8192, torch.bfloat16), rates.copy_bytes(gpu, 1024)
        except RuntimeError as error:  # no free memory, or a GPU that does not work, of which gpus() speaks
            hint = "check in nvidia-smi that nothing else runs on it"
            yield Finding(NOTE, f"speed {index}", f"not measured: {_first_line(error)}", hint)
            continue
        torch.cuda.empty_cache()
        yield compared(f"speed {index}", name, *measured)
    if len(names) > 1 and torch.distributed.is_nccl_available():
        yield all_reduce(names)


def compared(title: str, gpu: str, flops: float, copied: float) -> Finding:
    """Compare the FLOP/s and the copied bytes/s of a GPU with what is usual for its kind."""
    text = f"matmul {flops / 1e12:,.0f} TFLOP/s (bf16), memory {copied / 1e9:,.0f} GB/s (copy)"
    if (usual := usual_rates(gpu)) is None:
        return Finding(OK, title, f"{text}; what is usual for a {gpu} is not known here")
    usual_flops, _, memory = usual
    text += f"; usual: {usual_flops / 1e12:,.0f} TFLOP/s, and about 90 % of {memory / 1e9:,.0f} GB/s"
    slow = ["matmul"] * (flops < 0.9 * usual_flops) + ["memory"] * (copied < 0.8 * memory)
    if not slow:
        return Finding(OK, title, text)
    hint = "check in nvidia-smi -q that nothing else runs on it, and its clocks, power, temperature and ECC errors"
    return Finding(NOTE, title, f"slow {' and '.join(slow)}: {text}", hint)


def all_reduce(names: list[str]) -> Finding:
    """Measure NCCL over the GPUs of this machine, which have ``names``."""
    try:
        measured = rates.all_reduce_bytes("nccl", len(names), 1024, TRIAL_SECONDS)
    except Exception as error:  # its message is a traceback, which ends with what went wrong
        text = f"an all-reduce over {len(names)} GPUs fails: {str(error).strip().splitlines()[-1]}"
        return Finding(WRONG, "speed nccl", text, "NCCL_DEBUG=INFO says more")
    if measured is None:
        text = f"an all-reduce over {len(names)} GPUs was not over after {TRIAL_SECONDS} s, at {_load()}"
        return Finding(NOTE, "speed nccl", text, f"{IDLE}; with NCCL_DEBUG=INFO NCCL says what it waits for")
    text = f"all-reduce of 1 GiB over {len(names)} GPUs: {measured / 1e9:,.0f} GB/s (bus)"
    usual = usual_rates(names[0])
    if usual is None or len(names) < 4:  # two or three were not measured
        return Finding(OK, "speed nccl", text)
    text += f"; usual: {usual[1] / 1e9:,.0f} GB/s"
    if measured >= 0.8 * usual[1]:
        return Finding(OK, "speed nccl", text)
    hint = "check that nvidia-smi topo -m shows NV between all GPUs, and what NCCL_DEBUG=INFO says about NVLink"
    return Finding(NOTE, "speed nccl", f"slow: {text}", hint)


def _load() -> str:
    return f"a load of {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores"


def packages() -> Iterator[Finding]:
    """Compare the installed versions with the requirements of pyproject.toml."""
    cuda = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if torch.version.cuda else "CPU only"
    yield Finding(OK, "torch", f"{torch.__version__}, {cuda}")
    if torch.cuda.is_available() and shutil.which(os.environ.get("CC", "gcc")) is None:
        yield Finding(WRONG, "compiler", "no C compiler: torch.compile fails", "install gcc, or --train.compile false")
    try:
        requirements = importlib.metadata.requires("tinyllama") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(NOTE, "tinyllama", "not installed: versions are not compared", "pip install -e .")
        return
    for wanted in map(Requirement, requirements):
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            if wanted.marker is None:  # else it belongs to an extra
                yield Finding(WRONG, wanted.name, "not installed", "pip install -e .")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            why = REASONS.get(wanted.name, "other versions are not tested")
            text = f"{version} is installed, {wanted.specifier} is asked for: {why}"
            yield Finding(WRONG, wanted.name, text, f"pip install '{wanted.name}{wanted.specifier}'")


def libraries() -> Iterator[Finding]:
    """Try a tiny call of every library in LIBRARIES, one after another: at once, they would keep each other waiting."""
    for finding in map(_try, LIBRARIES):
        yield finding
        if (finding.name, finding.state) == ("xformers", OK):
            text = "0.0.34 and newer have no fused SwiGLU: --ops.swiglu xformers runs eagerly"
            if Version(importlib.metadata.version("xformers")) >= Version("0.0.34"):
                # each wheel before names one version of torch: 0.0.33.post2 is the last, and wants 2.9.1
                hint = (
                    "leave ops.swiglu at auto: the wheels of older versions need torch 2.9.1 or older, which is too old"
                )
                yield Finding(NOTE, "xformers", text, f"{hint} for this package")


def _try(library: Library) -> Finding:
    """Call ``library`` in its own process: built for another torch it may do anything, even end its process."""
    package, purpose = library.package, f"for {library.purpose}"
    try:
        version = importlib.metadata.version(package)
        command = [sys.executable, "-c", TRIAL, library.trial]
        trial = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TRIAL_SECONDS)
    except importlib.metadata.PackageNotFoundError:
        if library.gpu and not torch.cuda.is_available():
            return Finding(NOTE, package, f"not installed, and no GPU to use it; {purpose}")
        if library.gpu and torch.cuda.get_device_capability() < library.capability:
            least = ".".join(map(str, library.capability))
            text = f"not installed, and only for GPUs of compute capability {least} or higher; {purpose}"
            return Finding(NOTE, package, text)
        since, why = UNNEEDED.get(package, ((99, 0), ""))
        if library.gpu and torch.cuda.get_device_capability() >= since:
            return Finding(NOTE, package, f"not installed, and not needed: {why}; {purpose}")
        return Finding(NOTE, package, f"not installed; {purpose}", install_command(package))
    except subprocess.TimeoutExpired:
        text = f"{version}, not known whether it works: its trial was not over after {TRIAL_SECONDS} s, at {_load()}"
        return Finding(NOTE, package, text, IDLE)
    else:
        if trial.returncode == 0:
            return Finding(OK, package, f"{version}, works; {purpose}")
        if trial.returncode < 0:
            problem = f"{signal.Signals(-trial.returncode).name} ended the process that called it"
        else:
            problem = (trial.stdout.splitlines() or [f"exit code {trial.returncode}"])[-1]
    text = f"{version} is installed and does not work: {problem}"
    return Finding(WRONG, package, text, f"pip uninstall {package}, or install it for this torch and CUDA")


def operations(broken: Collection[str] = ()) -> Iterator[Finding]:
    """Report the backend that each operation resolves to here, and those it could use.

    No backend of a ``broken`` package can run, and ``auto`` does not fall back from it: it chooses what is installed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "bf16" if device.type == "cuda" else "fp32"
    chosen = choice.resolve({}, named_config("tinyllama_1.1b"), device, precision=precision)
    lack = float8.problem(device, {}) or ("triton does not work" if "triton" in broken else None)
    for operation, backends in choice.OPERATIONS.items():
        usable = [
            name
            for name, backend in backends.items()
            if backend.problem(device) is None and not (lack and backend.float8) and backend.package not in broken
        ]
        auto, can_run = chosen[operation], f"can run here: {', '.join(usable)}"
        if (package := backends[auto].package) in broken:
            text = f"{auto} (auto) cannot run, as {package} does not work; {can_run}"
            yield Finding(WRONG, f"ops.{operation}", text, f"see {package} above, or give --ops.{operation} another")
        else:
            yield Finding(OK, f"ops.{operation}", f"{auto} (auto); {can_run}")
    if lack is None:
        yield Finding(OK, "train.precision", "float8 can run here, too")
    else:
        yield Finding(NOTE, "train.precision", f"float8 cannot be used: {lack}")


def slurm(env: Mapping[str, str]) -> Iterator[Finding]:
    """Check that the variables of a Slurm job are what a launch needs."""
    if "SLURM_JOB_ID" not in env:
        if shutil.which("sbatch"):
            yield Finding(OK, "slurm", "found; this process is not in a job")
        return
    yield Finding(OK, "slurm", f"job {env['SLURM_JOB_ID']} on {env.get('SLURM_JOB_NODELIST', '?')}")
    if "SLURM_NTASKS" in env and "," in (layout := env.get("SLURM_TASKS_PER_NODE", "")):
        text = f"the tasks are spread unevenly over the nodes: {layout}"
        yield Finding(WRONG, "slurm", text, "give --nodes and --ntasks-per-node, one task a GPU")
    tasks, gpus_here = re.match(r"\d+", env.get("SLURM_NTASKS_PER_NODE", "")), torch.cuda.device_count()
    if tasks and gpus_here and int(tasks[0]) != gpus_here:
        text = f"{tasks[0]} tasks a node and {gpus_here} GPUs on this one"
        yield Finding(WRONG, "slurm", text, f"give --ntasks-per-node {gpus_here} and --gpus-per-node {gpus_here}")


def disk(out_dir: Path, megabytes: int = 64) -> Iterator[Finding]:
    """Check the free space where a run would write, and measure the speed of writing and syncing."""
    folder = out_dir.absolute()
    while not folder.is_dir():
        if os.path.lexists(folder):  # a file, a device or a link to nothing: no folder can be made of it or below it
            yield Finding(WRONG, "disk", f"{folder} is not a folder", "give another out_dir")
            return
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    payload = os.urandom(1 << 20)
    began = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(megabytes):
                file.write(payload)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield Finding(WRONG, "disk", f"{folder} cannot be written: {error.strerror}", "give another out_dir")
        return
    speed = megabytes / (time.perf_counter() - began)
    yield Finding(OK, "disk", f"{folder}: {free:,.0f} GB free, {speed:,.0f} MB/s written and synced")
    size = OptimArgs().checkpoint_bytes(named_config("tinyllama_1.1b")) / 1e9
    if free < 4 * size:
        text = f"{free:,.0f} GB free; the 1.1B's checkpoints are {size:.1f} GB each, and 4 of them are there at a time"
        yield Finding(NOTE, "disk", text, "give an out_dir on a larger disk for a large model")
    scratch = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if scratch < 1:
        text = f"{tempfile.gettempdir()}: {scratch:.1f} GB free, and torch.compile and others write there"
        yield Finding(WRONG, "disk", text, "free some, or set TMPDIR to a larger disk")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
