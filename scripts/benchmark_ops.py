"""Measure each operation's backends, forward and backward, and this GPU's limits of copying and multiplying.

    python scripts/benchmark_ops.py                           # the shapes of TinyLlama-1.1B, 16 x 2048 tokens, bf16
    python scripts/benchmark_ops.py --micro_batch_size 8 --operation attention

It prints a JSON line each: median microseconds, and TFLOP/s (attention counts half of the scores, for the causal mask)
or GB/s (bytes that must be read and written at least once). `compiled` is the same backend under torch.compile, as it
runs inside a block. The first two lines are the ceilings: a copy, and a matmul of 8192 cubed.
"""

import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.config.model import ModelConfig, named_config
from tinyllama.ops.choice import OPERATIONS
from tinyllama.ops.rope import rope_tables

Call = Callable[[], Any]
DEVICE = torch.device("cuda")


def microseconds(call: Call, repeats: int = 20) -> float:
    """Return the median time of ``call`` on the GPU, between two events, after three warm-up calls."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def cases(operation: str, config: ModelConfig, samples: int) -> tuple[tuple[Any, ...], float, float]:
    """Return inputs, and the TFLOP and GB of a forward pass; the backward pass has twice as many matmuls."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_()

    T, C, H = config.block_size, config.n_embd, config.intermediate_size
    N = samples * T
    if operation == "attention":
        q = normal(samples, config.n_head, T, config.head_size)
        k, v = (normal(samples, config.n_query_groups, T, config.head_size) for _ in range(2))
        return (q, k, v), 2 * samples * config.n_head * T * T * config.head_size / 1e12, 0
    if operation == "rope":
        hs, G = config.head_size, config.n_query_groups
        qkv = normal(samples, T, G, config.n_head // G + 2, hs)
        tables = rope_tables(T, hs, config.rope_base, DEVICE)
        return (qkv, *tables), 0, (2 * qkv.nbytes + sum(table.nbytes for table in tables)) / 1e9
    if operation == "rms_norm":
        return (normal(samples, T, C), normal(C), config.norm_eps, normal(samples, T, C)), 0, 4 * N * C * 2 / 1e9
    if operation == "swiglu":
        sizes = ((C, H), (C, H), (H, C))
        linears = [torch.nn.Linear(*size, bias=False, device=DEVICE, dtype=torch.bfloat16) for size in sizes]
        return (normal(samples, T, C), *linears), 6 * N * C * H / 1e12, 0
    if operation == "symmetric_matmul":
        x = normal(config.n_layer, C, H).detach()  # of every block's w1
        return (x, x.mT), 2 * config.n_layer * C * C * H / 1e12, 0
    if operation == "cross_entropy":
        V = config.padded_vocab_size
        targets = torch.randint(config.vocab_size, (samples, T), device=DEVICE)
        return (normal(samples, T, C), normal(V, C), targets), 2 * N * C * V / 1e12, 0
    raise KeyError(operation)


def measure(operation: str, name: str, compiled: bool, config: ModelConfig, samples: int) -> dict[str, Any]:
    """Return the JSON line of one backend."""
    backend = OPERATIONS[operation][name]
    line: dict[str, Any] = {"operation": operation, "backend": name, "compiled": compiled, "library": backend.version()}
    if backend.float8:
        return line | {"error": "it needs a model's scales: use benchmark_step.py --run ours:train.precision=float8"}
    if problem := backend.problem(DEVICE):
        return line | {"error": problem}
    call = torch.compile(backend.call, dynamic=False) if compiled else backend.call
    try:
        torch.cuda.reset_peak_memory_stats()
        inputs, tflop, gb = cases(operation, config, samples)
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            forward = microseconds(lambda: call(*inputs))
        line["forward_us"] = round(forward, 1)
        line |= {"forward_tflops": round(tflop / forward * 1e6)} if tflop else {}
        line |= {"forward_gb_per_second": round(gb / forward * 1e6)} if gb else {}
        wanted = [p for x in inputs for p in (x.parameters() if isinstance(x, torch.nn.Module) else [x])]
        wanted = [p for p in wanted if isinstance(p, Tensor) and p.requires_grad]
        if wanted:
            outputs = call(*inputs)
            weights = [torch.randn_like(y) for y in (outputs if isinstance(outputs, tuple) else [outputs])]
            del outputs
            # backward() would accumulate gradients
            total = microseconds(lambda: torch.autograd.grad(call(*inputs), wanted, weights))
            line["forward_backward_us"] = round(total, 1)
            times = 3.5 if operation == "attention" else 3  # its forward pass has two matmuls, its backward pass five
            line |= {"forward_backward_tflops": round(times * tflop / total * 1e6)} if tflop else {}
    except (RuntimeError, AssertionError) as error:  # out of memory, or a shape that the kernel does not support
        return line | {"error": str(error).splitlines()[0]}
    return line | {"peak_memory_gib": round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)}


def ceilings() -> list[dict[str, Any]]:
    """Measure this GPU's ceilings of copying and multiplying."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(2**31, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy, matmul = microseconds(lambda: target.copy_(source)), microseconds(lambda: a @ b)
    return [
        {"ceiling": "copy", "gb_per_second": round(2 * source.nbytes / copy / 1e3)},
        {"ceiling": "bf16 matmul of 8192 cubed", "tflops": round(2 * 8192**3 / matmul / 1e6)},
    ]


def main() -> None:
    """Parse the flags, measure and print."""
    parser = cli.arguments(__doc__)
    parser.add_argument(
        "--model", default="tinyllama_1.1b", help="named size that gives the shapes (default: tinyllama_1.1b)"
    )
    parser.add_argument("--micro_batch_size", type=cli.count, default=16, help="sequences per call (default: 16)")
    parser.add_argument(
        "--operation", choices=OPERATIONS, action="append", help="measure only this operation; may be repeated"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("there is no CUDA GPU here: run this where there is one")
    config = named_config(args.model)
    for line in ceilings():
        print(json.dumps(line | {"device": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)
    torch.cuda.empty_cache()
    for operation in args.operation or OPERATIONS:
        for name in OPERATIONS[operation]:
            for compiled in (False, True):
                line = measure(operation, name, compiled, config, args.micro_batch_size)
                print(json.dumps(line), flush=True)
                torch.cuda.empty_cache()
                if "error" in line:
                    break


if __name__ == "__main__":
    cli.run(main)
