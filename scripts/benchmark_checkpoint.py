"""Measure how long a synchronous and an asynchronous save block training; prints a JSON line for each.

python scripts/benchmark_checkpoint.py [--model tinyllama_120m] [--rounds 3] [--folder DIR]

It runs in one process, on a GPU if there is one, and alternates the two. `blocked` is the time until the save returns,
`whole` the time until the checkpoint is complete. Seconds are medians without the first round, which allocates buffers.
"""

import json
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from tinyllama.checkpoint.state import TrainState
from tinyllama.checkpoint.tensors import materialize_optimizer_state, named_tensors
from tinyllama.checkpoint.writer import Checkpointer
from tinyllama.config import cli
from tinyllama.config.model import named_config
from tinyllama.model import GPT


def main() -> None:
    """Parse the flags, measure and print."""
    parser = cli.arguments(__doc__)
    parser.add_argument("--model", default="tinyllama_120m", help="named size (default: tinyllama_120m)")
    parser.add_argument("--rounds", type=cli.count, default=3, help="measured saves of each kind (default: 3)")
    parser.add_argument(
        "--folder", type=Path, help="folder on the disk to measure (default: the system's for temporary files)"
    )
    args = parser.parse_args()
    config = named_config(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        model = GPT(config).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        materialize_optimizer_state(optimizer)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in named_tensors(model, optimizer).values())
        settings = cli.dump({"model": asdict(config)})
        savers = {
            name: Checkpointer(
                Path(folder, name),
                config=settings,
                metadata={},
                keep_last=1,
                keep_every=None,
                asynchronous=name != "sync",
            )
            for name in ("sync", "async")
        }
        blocked: dict[str, list[float]] = {name: [] for name in savers}
        whole: dict[str, list[float]] = {name: [] for name in savers}
        for step in range(1, args.rounds + 2):
            for name, saver in savers.items():
                start = time.perf_counter()
                saver.save(TrainState(step), model, optimizer)
                blocked[name].append(time.perf_counter() - start)
                saver.wait()
                whole[name].append(time.perf_counter() - start)
        dist.destroy_process_group()
    details = {"model": args.model, "parameters": config.num_params(), "gigabytes": round(num_bytes / 1e9, 3)}
    for name in savers:
        seconds = {"blocked": statistics.median(blocked[name][1:]), "whole": statistics.median(whole[name][1:])}
        print(json.dumps({"save": name, "device": device, **details, **{k: round(v, 3) for k, v in seconds.items()}}))


if __name__ == "__main__":
    cli.run(main)
