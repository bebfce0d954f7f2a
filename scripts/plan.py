"""Estimate what a run takes on a cluster: memory per GPU, tokens/s, limits of scaling, days, energy, disk.

python scripts/plan.py --config F --gpus 16 --gpu a100-40g [--gpus_per_node 8] [--network_gbps 200] [--mfu 0.5]
python scripts/plan.py --config F --gpus 64 --gpu h200 --benchmark FILE [--train.micro_batch_size 16 ...]

F is a run's YAML, and its settings can be given as flags, too, as for pretrain/train.py. FILE holds the output of
benchmark_step.py, of which the fastest run of this code counts, on one GPU, with AdamW and in train.precision. The
assumed figures are at the top of tinyllama/tools/plan.py.
"""

from pathlib import Path

from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.config.args import PretrainArgs, check
from tinyllama.tools import plan
from tinyllama.train.budget import gradient_accumulation


def main() -> None:
    """Parse the flags, estimate and print."""
    parser = cli.arguments(__doc__)
    parser.add_argument("--gpus", type=int, required=True, help="total number of GPUs")
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(plan.GPUS)}")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="GPUs per node (default: 8)")
    parser.add_argument(
        "--network_gbps", type=float, help="network bandwidth per GPU, Gbit/s (default: usual for --gpu)"
    )
    parser.add_argument(
        "--mfu", type=float, help="share of the dense peak FLOP/s that one GPU reaches (default: usual for --gpu)"
    )
    parser.add_argument("--benchmark", type=Path, help="output of benchmark_step.py, instead of --mfu")
    ours, settings = parser.parse_known_args()  # which leaves --config to train.py's rules, too: the later one wins
    if not any(word.partition("=")[0] == "--config" for word in settings):
        parser.error("the following arguments are required: --config")
    args = cli.parse(PretrainArgs, settings)
    config = check(args)
    if ours.gpu not in plan.GPUS:
        raise InputError(f"--gpu {ours.gpu} is not known; known: {', '.join(plan.GPUS)}")
    for name, most in (("gpus", 10**6), ("gpus_per_node", 4096), ("network_gbps", 10**6)):
        if getattr(ours, name) is not None and not 0 < getattr(ours, name) <= most:
            raise InputError(f"--{name} {getattr(ours, name)} must be greater than 0, at most {most:,}")
    if ours.network_gbps is not None and ours.network_gbps < 0.001:
        raise InputError(f"--network_gbps {ours.network_gbps} must be at least 0.001")
    per_node = ours.gpus_per_node
    if ours.gpus > per_node and ours.gpus % per_node:
        full = ours.gpus // per_node * per_node
        fitting = next(number for number in range(per_node, 0, -1) if ours.gpus % number == 0)
        raise InputError(
            f"--gpus {ours.gpus} does not fill nodes of --gpus_per_node {per_node}: give --gpus {full} or "
            f"{full + per_node}, or --gpus_per_node {fitting}"
        )
    gpu = plan.GPUS[ours.gpu]
    cluster = plan.Cluster(gpu, ours.gpus, per_node, ours.network_gbps or gpu.network)
    if ours.gpus % cluster.shard(args.parallel.shard):
        valid = ", ".join(str(number) for number in range(1, ours.gpus + 1) if ours.gpus % number == 0)
        raise InputError(f"parallel.shard {args.parallel.shard} does not divide {ours.gpus} GPUs; valid: {valid}")
    gradient_accumulation(args.train, ours.gpus)  # raises for a batch that train.py would refuse
    rate, source = plan.rate_of_one(args, config, gpu, ours.mfu, ours.benchmark)
    print(*plan.summary(args, config, cluster, rate, source), sep="\n")
    print()
    print(*plan.scaling(args, config, cluster, rate), sep="\n")


if __name__ == "__main__":
    cli.run(main)
