"""Choose the implementation of each operation once for a run, by name; it is printed and never replaced silently."""

from collections.abc import Mapping

import torch

from tinyllama import InputError
from tinyllama.config.model import ModelConfig
from tinyllama.ops import attention, cross_entropy, rms_norm, rope, swiglu, symmetric_matmul
from tinyllama.ops.backend import Backend

OPERATIONS: dict[str, dict[str, Backend]] = {
    "attention": attention.BACKENDS,
    "rope": rope.BACKENDS,
    "rms_norm": rms_norm.BACKENDS,
    "swiglu": swiglu.BACKENDS,
    "cross_entropy": cross_entropy.BACKENDS,
    "symmetric_matmul": symmetric_matmul.BACKENDS,
}
"""backends of each operation by name, the reference first"""

SIZES = {
    "attention": ("head_size",),
    "rope": (),
    "rms_norm": ("n_embd",),
    "swiglu": ("n_embd", "intermediate_size"),
    "cross_entropy": (),
    "symmetric_matmul": ("n_embd", "intermediate_size"),
}
"""sizes of a model that concern an operation's kernels"""

# auto takes the first backend that can run, in the order of the measurements in docs/benchmarks.md, else the reference
AUTO: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"attention": ("sdpa",)},
    "ampere": {"attention": ("flash_attn", "sdpa_flash", "sdpa"), "rope": ("triton",), "cross_entropy": ("chunked",)},
    "hopper": {
        "attention": ("flash_attn_4", "flash_attn", "sdpa_flash", "sdpa"),
        "rope": ("triton",),
        "rms_norm": ("quack",),
        "swiglu": ("quack",),
        "cross_entropy": ("chunked",),
        "symmetric_matmul": ("quack",),
    },
}

MASKED = ("flex", "sdpa", "reference")
"""backends of attention that can keep documents apart, the fastest first"""

FLOAT8 = ("float8", "reference")
"""backends of swiglu whose matmuls are in float8 where train.precision is, the fastest first"""


def family(device: torch.device) -> str:
    """Return the column of AUTO for ``device``: cpu, ampere (and Ada and older) or hopper (and newer)."""
    if device.type != "cuda":
        return "cpu"
    return "hopper" if torch.cuda.get_device_capability(device) >= (9, 0) else "ampere"


def resolve(
    wanted: Mapping[str, str], config: ModelConfig, device: torch.device, *, precision: str, masked: bool = False
) -> dict[str, str]:
    """Return the backend of each operation by name, for this train.precision, with a document mask or without.

    ``wanted`` maps each operation to a name or ``auto``. Raises InputError for all names that are unknown or unusable.
    """
    chosen: dict[str, str] = {}
    problems = []
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    column = family(device) if dtype != torch.float32 else "cpu"
    for operation, backends in OPERATIONS.items():
        name = wanted.get(operation, "auto")
        able, lack = tuple(backends), ""
        sizes = {key: getattr(config, key) for key in SIZES[operation]}
        if masked and operation == "attention":
            able, lack = MASKED, "takes no document mask"
        if operation == "swiglu" and precision == "float8":
            able, lack = FLOAT8, "does not multiply in float8"
        elif name in backends and backends[name].float8:
            able, lack = tuple(key for key in able if not backends[key].float8), "needs train.precision float8"
        if name == "auto":
            order = able if lack and column != "cpu" else AUTO[column].get(operation, ())
            usable = (name for name in order if backends[name].problem(device, dtype, sizes) is None)
            chosen[operation] = next(usable, "reference")
        elif name not in backends:
            problems.append(f"ops.{operation} {name!r} is not known: choose auto, {', '.join(backends)}")
        elif name not in able:
            problems.append(f"ops.{operation} {name} {lack}: choose auto, {', '.join(able)}")
        elif problem := backends[name].problem(device, dtype, sizes):
            problems.append(f"ops.{operation} {name} cannot be used: {problem}")
        else:
            chosen[operation] = name
    if problems:
        raise InputError(*problems)
    return chosen


def load(chosen: Mapping[str, str]) -> None:
    """Import the library of each operation's backend; raises InputError for all that are installed and broken.

    auto does not fall back from these: the run would be slower than this machine, or than its other ranks.
    """
    unusable: dict[str, list[str]] = {}
    for operation, name in chosen.items():
        try:
            OPERATIONS[operation][name].load()
        except InputError as error:
            unusable.setdefault(str(error), []).append(f"ops.{operation} {name}")
    if unusable:
        raise InputError(*(f"{', '.join(names)} cannot be used: {problem}" for problem, names in unusable.items()))


def describe(chosen: Mapping[str, str]) -> str:
    """Return one line that names each operation's backend and library."""
    parts = []
    for operation, name in chosen.items():
        backend = OPERATIONS[operation][name]
        parts.append(f"{operation} {name}" + (f" ({backend.version()})" if backend.package else ""))
        parts[-1] += f" [{backend.note}]" if backend.note else ""
    return ", ".join(parts)
