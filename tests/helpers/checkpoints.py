"""What a checkpoint holds, for tests."""

from pathlib import Path

import torch

from tinyllama.checkpoint import reader


def load_weights(step_dir: Path) -> dict[str, torch.Tensor]:
    """The model's full tensors by name, on the CPU, as saved (fp32)."""
    entries, read = reader.open_weights(step_dir)
    return {name: read(name) for name in entries}
