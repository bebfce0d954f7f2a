"""One rank of four that save a model of 0.5 GB, or the process that exports it and says how much memory that took.

`python export_rank.py save RANK STORE RUN` and `python export_rank.py export RUN OUTPUT`; test_export_memory.py does.
"""

import resource
import sys
from dataclasses import asdict
from pathlib import Path

from tinyllama.config import cli
from tinyllama.config.model import ModelConfig

CONFIG = ModelConfig("half a gigabyte", vocab_size=32000, n_layer=12, n_head=16, n_embd=1024, intermediate_size=1024)
METADATA = {"tokenizer_sha256": None, "bos_id": 1, "eos_id": 2}


def save(rank: int, store: str, run: Path) -> None:
    """This rank's part of a step directory; the model is sharded as in training, its moments are zeros."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from tinyllama.checkpoint.state import TrainState
    from tinyllama.checkpoint.writer import Checkpointer
    from tinyllama.model import GPT, init_weights

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 4), rank=rank, world_size=4)
    with torch.device("meta"):
        model = GPT(CONFIG)
    for block in model.transformer["h"].children():
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device="cpu")
    init_weights(model, seed=1)
    keep = {"keep_last": None, "keep_every": None, "asynchronous": False}
    checkpointer = Checkpointer(
        run / "checkpoints", config=cli.dump({"model": asdict(CONFIG)}), metadata=METADATA, **keep
    )
    checkpointer.save(TrainState(step=3, samples=3, tokens=9), model, torch.optim.AdamW(model.parameters(), fused=True))
    dist.destroy_process_group()


def export(run: Path, output: Path) -> None:
    """Print the peak memory (bytes) of exporting, above that of the imports."""
    import torch.distributed.checkpoint  # noqa: F401 (part of the baseline)
    import transformers  # noqa: F401

    from tinyllama.convert import hf_folder
    from tinyllama.convert.weights import open_weights

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = peak()
    hf_folder.write(output, open_weights(run))
    print(peak() - before)


if __name__ == "__main__":
    if sys.argv[1] == "save":
        save(int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    else:
        export(Path(sys.argv[2]), Path(sys.argv[3]))
