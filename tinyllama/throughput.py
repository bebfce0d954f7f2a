"""Speed and time: FLOPs of the model and of Muon, a GPU's peak FLOP/s, a meter of tokens per second, and durations."""

import re
import time
from collections import deque

from tinyllama.config.model import ModelConfig

# Dense bf16 FLOP/s of the tensor cores, from NVIDIA's data sheets; the first pattern that matches a device's name wins.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "G?H200": 989.5e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H[18]00": 989.5e12,
    "A[18]00": 312e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX A6000": 154.8e12,
    "RTX 4090(?! D| Laptop)": 165.2e12,
    "RTX 3090(?! Ti| Laptop)": 71e12,
}

# What a card reaches when all is well: FLOP/s of a bf16 matmul of 8192^3 and bus bytes/s of NCCL's all-reduce of 1 GiB
# over 4 or more of one host, measured, and bytes/s of its memory, from NVIDIA's data sheets.
USUAL = {
    "H200": (790e12, 355e9, 4.8e12),
    "H100 80GB HBM3": (780e12, 355e9, 3.35e12),
}


def usual_rates(device_name: str) -> tuple[float, float, float] | None:
    """Return the usual rates of the GPU that the driver calls ``device_name``, as in USUAL; None if it is not there."""
    return next((rates for name, rates in USUAL.items() if re.search(rf"(?<!G)\b{name}\b", device_name)), None)


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of the GPU that the driver calls ``device_name``; None if the table lacks it."""
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


def flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs per token of a forward and backward pass, 6 (N - N_wte) + 12 L d T.

    It counts 6 for each parameter of a matmul (arXiv:2001.08361), and attention's two matmuls over the whole context,
    causal or not (arXiv:2204.02311, appendix B). It reproduces upstream's published 56 % at 24k tokens/s on an A100.
    """
    return 6 * config.num_params(embedding=False) + 12 * config.n_layer * config.n_embd * config.block_size


def newton_schulz_flops(rows: int, cols: int) -> int:
    """Return the FLOPs of Muon's five iterations of a matrix (tinyllama/train/muon.py).

    A matmul of (m, k) and (k, n) takes 2 m k n. With s the shorter and l the longer side, each iteration has two of
    (s, s) and (s, l) and one of (s, s): 5 (4 s^2 l + 2 s^3) in all. Where l >= 2 s they work on the Gram matrix, with
    four of (s, s) and (s, l), and 14 of (s, s). That quack computes half of a symmetric product is not counted.
    """
    short, long = sorted((rows, cols))
    if long >= 2 * short:
        return 8 * short**2 * long + 28 * short**3
    return 5 * (4 * short**2 * long + 2 * short**3)


class Meter:
    """Measures tokens per second over the last ``window`` log intervals.

    The first interval includes compilation, so it is dropped once a second one exists.
    """

    def __init__(self, window: int = 10) -> None:
        self._intervals: deque[tuple[int, float]] = deque(maxlen=window)
        self._intervals_ended = 0
        self._tokens, self._seconds, self._steps = 0, 0.0, 0
        self.steps, self.step_seconds = 0, 0.0
        """steps of the last interval, and the mean time of one"""
        self.resume()

    def resume(self) -> None:
        """Start the clock; the time since ``pause`` (a validation, a checkpoint) is not counted."""
        self._began = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock until ``resume``."""
        self._seconds += time.perf_counter() - self._began

    def step(self, tokens: int) -> None:
        """Count a step's tokens."""
        self._tokens += tokens
        self._steps += 1

    def end_interval(self) -> float:
        """End the log interval, start the next, and return the tokens per second of the window."""
        self.pause()
        self._intervals_ended += 1
        if self._intervals_ended == 2:
            self._intervals.clear()
        self._intervals.append((self._tokens, self._seconds))
        self.steps, self.step_seconds = self._steps, self._seconds / self._steps
        self._tokens, self._seconds, self._steps = 0, 0.0, 0
        self.resume()
        return sum(tokens for tokens, _ in self._intervals) / sum(seconds for _, seconds in self._intervals)


def duration(seconds: float) -> str:
    """Format ``seconds`` in the two largest of days, hours, minutes and seconds: 1h 02m."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02d}h"
    if hours:
        return f"{h}h {m:02d}m"
    return f"{m}m {s:02d}s" if minutes else f"{s}s"


def seconds(time_s: float) -> str:
    """Return so many seconds, in ms where there is a small part of one."""
    return f"{time_s:,.2f} s" if time_s >= 0.1 or not time_s else f"{1000 * time_s:.3g} ms"


def time_unit(hours: float) -> tuple[str, float]:
    """Return the unit in which to state so many hours, and the hours that it has."""
    if hours >= 48:
        return "days", 24
    if hours >= 1:
        return "hours", 1
    return ("min", 1 / 60) if hours >= 1 / 60 else ("s", 1 / 3600)
