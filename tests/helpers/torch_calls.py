"""What PyTorch is asked to do."""

import collections
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """How often each of PyTorch's operations has been called, collectives among them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(("c10d._allgather_base_", "c10d._reduce_scatter_base_")):
            # from one tensor to another, which is so many times as large, or as small
            name += f" over {max(args[0].numel(), args[1].numel()) // min(args[0].numel(), args[1].numel())}"
        self.counts[name] += 1
        return func(*args, **(kwargs or {}))
