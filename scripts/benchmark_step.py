"""Measure whole optimizer steps of this and other codebases, one after another, each in processes of its own.

    python scripts/benchmark_step.py                                    # ours, TinyLlama-1.1B, 65,536 tokens a step
    python scripts/benchmark_step.py --peers litgpt,hf --micro_batch_size 16
    python scripts/benchmark_step.py --run ours:train.precision=float8 --run ours:ops.attention=sdpa_cudnn,8
    python scripts/benchmark_step.py --gpus 1,2 --run ours --run litgpt # each on one GPU, then on two

It prints a JSON line per run: tokens/s, MFU (throughput.py has the formula), peak memory, seconds to the end of the
first step (compilation), backends and versions. ``tokens_per_second``, and with it the MFU and the time of a step, is
the greater of two that stand beside it, ours and peers' alike: ``tokens_per_second_synchronized``, by the median of
--steps steps of which each is waited for, and ``tokens_per_second_in_a_row``, by the mean of as many that follow each
other as in training. The waits make the first too low, and a disturbance of any step the second.
A run is NAME[:SETTING,...]; a number sets its micro-batch, key=value a flag of pretrain/train.py (ours only). Tokens
are random; master weights are always fp32.
`litgpt` uses the model, loss, precision, optimizer and FSDP strategy of its pretraining loop under torch.compile;
`litgpt:cudnn=off` without cuDNN's attention, which PyTorch chooses on Hopper and an A100 does not have. `hf` is
transformers with Liger's kernels. --budget adds the time of a step by kind of kernel. With --gpus, tokens and tokens/s
are those of each GPU; ``kept`` is its tokens/s as a fraction of those at the first number of GPUs, and
``not_hidden_ms`` by how much longer a step takes than there.
"""

import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.config.args import PretrainArgs
from tinyllama.config.model import ModelConfig, named_config
from tinyllama.throughput import flops_per_token, peak_flops

Step = Callable[[list[tuple[Tensor, Tensor]]], Any]  # (input_ids, targets), each (B, T), of every micro-batch
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# the kind of a kernel by its name; the first match wins
KINDS = {
    "RoPE": r"^_turn$",
    "loss": r"^_cross_entropy$",
    "casts to float8, SwiGLU's gate": r"^_cast$|^_gate",
    "compiled element-wise": r"^triton",
    "norms": r"RMSNorm",
    "attention": r"flash|fmha|attention|sdpa|cudnn_generated",
    "matmuls": r"gemm|cutlass|nvjet|cublas|s16816|xmma",
    "clip and optimizer": r"adam|multi_tensor|foreach|lpnorm",
    "copies and casts": r"memcpy|memset|copy|cat_array|CatArray|split_with_sizes|chunk_cat|nccl",
    "embedding": r"embedding|sort|radix|scan",
    "element-wise": r"elementwise|reduce|vectorized",
}


FIXED = ("model.", "train.micro_batch_size", "train.global_batch_size", "parallel.devices")
"""beginnings of settings that no run can change: batches and speed are of the script's own flags"""


def ours(name: str, settings: dict[str, str], tokens: int, micro_batch: int, gpus: int) -> tuple[Step, dict[str, Any]]:
    """Build our step from the recipe's parts; ``tokens`` are those of each GPU."""
    from tinyllama.checkpoint.state import TrainState
    from tinyllama.model import GPT
    from tinyllama.ops import choice
    from tinyllama.train.anomaly import Guard
    from tinyllama.train.launch import find_world
    from tinyllama.train.optim import build_optimizer
    from tinyllama.train.parallel import build_fabric
    from tinyllama.train.step import TrainStep

    flags = {"model.name": name, "parallel.reshard_after_forward": "false", "parallel.devices": str(gpus)} | settings
    args = cli.parse(PretrainArgs, [f"--{key}={value}" for key, value in flags.items()])
    config = args.model.resolve()
    ops = choice.resolve(vars(args.ops), config, DEVICE, precision=args.train.precision)
    choice.load(ops)
    world = find_world(args.parallel)
    fabric = build_fabric(world, args.parallel, args.train)
    fabric.launch()
    with torch.device("meta"):
        gpt = GPT(config, ops)
    model = fabric.setup_module(gpt)
    optimizer: Any = fabric.setup_optimizers(build_optimizer(gpt, args.optim, args.train.precision))
    state = TrainState()
    guard = Guard(args.train, optimizer.optimizer, state, world.replicas, fabric.device)
    accumulation = tokens // config.block_size // micro_batch
    train_step = TrainStep(args, fabric, gpt, model, optimizer, guard, accumulation, tokens * gpus)

    def step(batches: list[tuple[Tensor, Tensor]]) -> None:
        train_step(state, iter(batches), 1e-4)
        guard.poll()

    return step, {"ops": choice.describe(ops), "precision": args.train.precision, **settings}


def litgpt(
    name: str, settings: dict[str, str], tokens: int, micro_batch: int, gpus: int
) -> tuple[Step, dict[str, Any]]:
    """Build LitGPT's step: model, chunked loss, bf16-mixed, fused AdamW and FSDP of its pretraining command."""
    import lightning
    from lightning.fabric.strategies import FSDPStrategy
    from litgpt import GPT, Config
    from litgpt.model import Block
    from litgpt.utils import chunked_cross_entropy

    ours = named_config(name)
    torch.backends.cuda.enable_cudnn_sdp(settings.get("cudnn") != "off")
    strategy: Any = "auto"
    if gpus > 1:
        strategy = FSDPStrategy(auto_wrap_policy={Block}, state_dict_type="full", sharding_strategy="HYBRID_SHARD")
    fabric = lightning.Fabric(devices=gpus, strategy=strategy, precision="bf16-mixed")
    fabric.launch()
    config = Config.from_name("tiny-llama-1.1b", **_litgpt_sizes(ours))
    with fabric.init_module(empty_init=False):
        model: Any = GPT(config)
    compiled: Any = torch.compile(model)
    model = fabric.setup(compiled)
    parameters, fused = model.parameters(), DEVICE.type == "cuda"
    adamw = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    optimizer: Any = fabric.setup_optimizers(adamw)

    def step(batches: list[tuple[Tensor, Tensor]]) -> None:
        for number, (input_ids, targets) in enumerate(batches, 1):
            with fabric.no_backward_sync(model, enabled=number < len(batches)):
                loss = chunked_cross_entropy(model(input_ids), targets)
                fabric.backward(loss / len(batches))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, {"versions": _versions("litgpt", "torch", "lightning"), **settings}


def _litgpt_sizes(config: ModelConfig) -> dict[str, Any]:
    names = ("block_size", "n_layer", "n_head", "n_query_groups", "n_embd", "intermediate_size", "vocab_size")
    sizes = {key: getattr(config, key) for key in names}
    return sizes | {"padded_vocab_size": config.padded_vocab_size}


def hf(name: str, settings: dict[str, str], tokens: int, micro_batch: int, gpus: int) -> tuple[Step, dict[str, Any]]:
    """Build a step of transformers' Llama with Liger's kernels (and fused linear cross-entropy) in bf16 autocast."""
    if gpus > 1:
        raise InputError("--run hf is measured on one GPU: leave --gpus out")
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers import LlamaConfig, LlamaForCausalLM

    from tinyllama.convert.layout import hf_config

    apply_liger_kernel_to_llama()
    config = LlamaConfig(**hf_config(named_config(name), 2, 1, torch.float32))
    with DEVICE:
        model = LlamaForCausalLM(config)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(batches: list[tuple[Tensor, Tensor]]) -> None:
        for input_ids, targets in batches:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = model(input_ids, shift_labels=targets, labels=targets, use_cache=False).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, {"versions": _versions("transformers", "liger_kernel", "torch")}


RUNS = {"ours": ours, "litgpt": litgpt, "hf": hf}


def parsed(run: str, config: ModelConfig, tokens: int, micro_batch: int) -> tuple[str, dict[str, str], int]:
    """Return a run's name, settings and micro-batch; raises InputError unless ``tokens`` are whole micro-batches."""
    kind, _, text = run.partition(":")
    settings = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    if fixed := [key for key in settings if key.startswith(FIXED)]:
        raise InputError(f"--run {run} cannot set {fixed[0]}: --model, --tokens, --gpus and {kind}:NUMBER do")
    micro_batch = next((int(part) for part in text.split(",") if part.isdecimal()), micro_batch)
    if not micro_batch:
        raise InputError(f"--run {run} has a micro-batch of 0: give 1 or more")
    size = micro_batch * config.block_size
    if tokens % size:
        below = tokens // size * size
        nearest = f"{below} or {below + size}" if below else f"{size}"
        raise InputError(
            f"--tokens {tokens} is not a multiple of the {size} of a micro-batch of --run {run}: give {nearest}"
        )
    return kind, settings, micro_batch


def measure(run: str, name: str, tokens: int, steps: int, micro_batch: int, budget: bool, gpus: int) -> dict[str, Any]:
    """Measure one run, of which this process is one of ``gpus`` ranks, and return its JSON line."""
    config = named_config(name)
    kind, settings, micro_batch = parsed(run, config, tokens, micro_batch)
    began = time.perf_counter()
    step, details = RUNS[kind](name, settings, tokens, micro_batch, gpus)
    batches = _batches(config, tokens // config.block_size, micro_batch)
    step(next(batches))
    _sync()
    compiled = time.perf_counter() - began
    for _ in range(2):
        step(next(batches))
    _sync()
    times = []
    for _ in range(steps):
        batch = next(batches)
        _sync()
        start = time.perf_counter()
        step(batch)
        _sync()
        times.append(time.perf_counter() - start)
    start = time.perf_counter()  # without synchronizing between the steps, as in training
    for _ in range(steps):
        step(next(batches))
    _sync()
    synchronized, in_a_row = tokens / statistics.median(times), steps * tokens / (time.perf_counter() - start)
    speed = max(synchronized, in_a_row)
    peak = peak_flops(torch.cuda.get_device_name()) if DEVICE.type == "cuda" else None
    line = {
        "run": run,
        "model": name,
        "gpus": gpus,
        "micro_batch_size": micro_batch,
        "tokens_per_step": tokens,
        "tokens_per_second": round(speed),
        "tokens_per_second_synchronized": round(synchronized),
        "tokens_per_second_in_a_row": round(in_a_row),
        "step_ms": round(tokens / speed * 1e3, 1),
        "mfu": round(speed * flops_per_token(config) / peak, 4) if peak else None,
        "mfu_formula": "tokens/s x (6 (N - N_wte) + 12 L d T) / dense bf16 peak",
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if peak else None,
        "first_step_seconds": round(compiled, 1),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "torch": torch.__version__,
        **details,
    }
    return line | ({"budget_ms": _budget(step, [next(batches) for _ in range(4)])} if budget else {})


def _batches(config: ModelConfig, samples: int, micro_batch: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    while True:
        shape = (samples, config.block_size + 1)
        blocks = torch.randint(config.vocab_size, shape, generator=generator, device=DEVICE)
        yield [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in blocks.split(micro_batch)]


def _budget(step: Step, batches: list[list[tuple[Tensor, Tensor]]]) -> dict[str, float]:
    """Return the milliseconds of a step by kind of kernel, and those of the whole step.

    They are means of steps in a row: one alone, after a pause, runs at a higher clock.
    """
    from torch.profiler import ProfilerActivity, profile

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        begin.record()
        for batch in batches:
            step(batch)
        end.record()
        _sync()
    spent: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    for event in profiler.key_averages():
        name = event.key
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")
        ms = event.self_device_time_total / 1e3 / len(batches)
        spent[kind] += ms
        kernels[name[:90]] += ms
        launches[name[:90]] += event.count
    spent["the step, profiled"] = begin.elapsed_time(end) / len(batches)
    for name, ms in sorted(kernels.items(), key=itemgetter(1), reverse=True)[:25]:
        print(f"{ms:9.2f} ms {launches[name] / len(batches):7.1f} x  {name}", file=sys.stderr)
    return {kind: round(ms, 1) for kind, ms in sorted(spent.items(), key=itemgetter(1), reverse=True)}


def _sync() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _versions(*packages: str) -> str:
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def main() -> int:
    """Parse the flags; measure one run here, or start a process for each run."""
    parser = cli.arguments(__doc__)
    parser.add_argument("--model", default="tinyllama_1.1b", help="named size (default: tinyllama_1.1b)")
    parser.add_argument("--peers", default="", help="peers to measure, too, if they are installed: litgpt,hf")
    parser.add_argument("--run", action="append", default=[], help="NAME[:SETTING,...]; may be repeated")
    parser.add_argument(
        "--micro_batch_size", type=cli.count, default=16, help="micro-batch of runs that name none (default: 16)"
    )
    parser.add_argument("--tokens", type=cli.count, default=65536, help="tokens per optimizer step (default: 65,536)")
    parser.add_argument(
        "--steps", type=cli.count, default=10, help="number of steps of each of the two measurements (default: 10)"
    )
    parser.add_argument(
        "--gpus", default="1", help="numbers of GPUs to measure each run on, such as 1,2,4 (default: 1)"
    )
    parser.add_argument(
        "--memory_cap_gib", type=float, help="fail a run that needs more GPU memory, GiB (default: no limit)"
    )
    parser.add_argument("--budget", action="store_true", help="add the time by kind of kernel, ms")
    parser.add_argument("--here", action="store_true", help="measure the one run in this process")
    args = parser.parse_args()
    runs = args.run or ["ours"]
    runs += [peer for peer in args.peers.split(",") if peer]
    if unknown := [run for run in runs if run.partition(":")[0] not in RUNS]:
        raise InputError(f"{unknown[0]} is not known: choose {', '.join(RUNS)}")
    for run in runs:
        parsed(run, named_config(args.model), args.tokens, args.micro_batch_size)
    if args.budget and DEVICE.type != "cuda":
        raise InputError("--budget needs a CUDA GPU, whose kernels it counts: leave it out")
    counts = args.gpus.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise InputError(f"--gpus is {args.gpus!r}: give numbers, as in 1,2,4")
    if args.here:
        if args.memory_cap_gib and DEVICE.type == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(args.memory_cap_gib * 2**30 / total)
        settings = (args.model, args.tokens, args.steps, args.micro_batch_size, args.budget, int(counts[0]))
        line = measure(runs[0], *settings)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(line), flush=True)
        return 0
    flags = ["--model", args.model, "--micro_batch_size", args.micro_batch_size, "--tokens", args.tokens]
    flags += ["--steps", args.steps, *(["--budget"] if args.budget else []), "--here"]
    flags += ["--memory_cap_gib", args.memory_cap_gib] if args.memory_cap_gib else []
    failed = 0
    for run in runs:
        first: dict[str, Any] = {}
        for count in map(int, counts):
            line = start(count, [*map(str, flags), "--run", run])
            failed |= not line
            first = first or line
            if line and count != first["gpus"]:
                line["kept"] = round(line["tokens_per_second"] / first["tokens_per_second"], 4)
                line["not_hidden_ms"] = round(line["step_ms"] - first["step_ms"], 1)
            if line:
                print(json.dumps(line), flush=True)
    return failed


def start(gpus: int, flags: list[str]) -> dict[str, Any]:
    """Measure a run on ``gpus`` ranks, each a process, and return its line; {} if it fails, which says why itself."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus), "--"] if gpus > 1 else []
    command = [sys.executable, *launcher, str(Path(__file__)), *flags, "--gpus", str(gpus)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    return dict(json.loads(lines[-1])) if not ended.returncode and lines else {}


if __name__ == "__main__":
    cli.run(main)
