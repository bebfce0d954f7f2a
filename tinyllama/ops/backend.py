"""One implementation of an operation: what it needs, and why it cannot run where it cannot."""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation."""

    call: Callable[..., Any]
    cuda: bool = False
    """it runs on a GPU only"""
    half: bool = False
    """it takes 16-bit numbers only"""
    capability: tuple[int, int] = (0, 0)
    """least compute capability of that GPU"""
    multiple: int = 1
    """what the model's sizes must be multiples of"""
    module: str | None = None
    """a module it imports"""
    package: str | None = None
    """what pip installs it by"""
    notes: Callable[[], str | None] = field(default=lambda: None)
    """what a user should know of the installed version"""

    def fault(
        self, device: torch.device, dtype: torch.dtype = torch.bfloat16, sizes: Mapping[str, int] = MappingProxyType({})
    ) -> str | None:
        """Why it cannot run on ``device`` with tensors of ``dtype``, with the remedy; None when it can.

        ``sizes``: those of a model that it meets, by key.
        """
        if self.cuda and device.type != "cuda":
            return "it runs on a CUDA GPU only: choose another, or auto"
        if self.cuda and (found := torch.cuda.get_device_capability(device)) < self.capability:
            return f"it needs compute capability {self.capability}, this GPU has {found}: choose another, or auto"
        if self.half and dtype.itemsize > 2:
            return "it computes in 16 bits: choose another, auto, or train.precision bf16"
        for key, size in sizes.items():
            if size % self.multiple:
                return f"it takes multiples of {self.multiple}, the model's {key} is {size}: choose another, or auto"
        if self.module is not None and not _importable(self.module):
            return f"it needs {self.package}: pip install {self.package}, or choose another"
        return None

    def version(self) -> str:
        """The library behind it, and its version."""
        if self.package is None:
            return f"torch {torch.__version__}"
        try:
            return f"{self.package} {importlib.metadata.version(self.package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{self.package}, not installed"


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False
