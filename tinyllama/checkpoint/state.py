"""Where a run stands: plain numbers, the same on every rank and for every world size."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

MOST_EXPONENT = 126
"""largest exponent e for which fp32 has both 2^e and 2^-e as normal numbers"""
MOST_RECENT = 128
"""largest length of ``recent``, the steps that train/anomaly.py compares the next one with"""


@dataclass
class TrainState:
    """Progress of a run: all that resuming needs besides the tensors."""

    step: int = 0
    """optimizer steps done"""
    samples: int = 0
    """samples seen by the whole world: the position in the data"""
    tokens: int = 0
    """tokens predicted by the whole world"""
    validated: int = -1
    """the last step that was validated"""
    skipped: int = 0
    """steps skipped so far: their updates were not applied"""
    skipped_in_a_row: int = 0
    """consecutive skipped steps, up to the last step"""
    recent: list[list[float]] = field(default_factory=list)
    """loss and gradient norm of the last accepted steps, to recognize a spike (train.skip_spikes)"""
    warmup_samples: int = -1
    """samples seen when the warm-up ended; -1 before that, and in checkpoints from before it was recorded"""
    decay_batch: float = -1
    """samples of each of the steps that optim.decay_steps counts; -1 without it, and in checkpoints from before it was
    recorded"""
    float8_exponents: list[int] = field(default_factory=list)
    """scales of the next step's casts to float8, as powers of two (train/delayed_scaling.py); [] if there are none"""


def from_json(content: dict[str, Any]) -> TrainState:
    """Return the numbers in a state.json; a number that an earlier version did not save has its default."""
    return TrainState(**{field.name: content[field.name] for field in fields(TrainState) if field.name in content})


def check_json(content: dict[str, Any]) -> None:
    """Raise ValueError if a field of a state.json, if it is there, cannot be what a run has saved.

    A step of a version that saved no hashes has no other check.
    """
    for name, holds in FIELDS.items():
        if name in content and not holds(content[name]):
            raise ValueError(f"its state.json says {name} {content[name]!r:.100}")
    if missing := [name for name in ("step", "samples", "tokens") if name not in content]:
        raise ValueError(f"its state.json has no {missing[0]}")
    samples, tokens, ended = content["samples"], content["tokens"], content.get("warmup_samples", -1)
    if ended > samples:
        raise ValueError(f"its state.json says warmup_samples {ended} of {samples} samples")
    block_size = (content.get("model") or {}).get("block_size")  # the same in all of a run
    if block_size is not None and not (is_count(block_size) and tokens == samples * block_size):
        raise ValueError(f"its state.json says tokens {tokens} of {samples} samples of {block_size!r:.100} tokens")


def is_count(value: Any) -> bool:
    """Return whether ``value`` is a number of things, which 64 bits hold."""
    return type(value) is int and 0 <= value < 2**62


def _is_count_or_unknown(value: Any) -> bool:
    return is_count(value) or (type(value) is int and value == -1)


def _is_batch_or_unknown(value: Any) -> bool:
    return type(value) in (int, float) and (0 < value < 2**62 or value == -1)


def _is_pair(value: Any) -> bool:
    """Return whether ``value`` is two finite numbers of 32 bits."""
    pair = value if isinstance(value, list) else ()
    return len(pair) == 2 and all(type(number) in (int, float) and abs(number) < 3.4e38 for number in pair)


def _is_exponent(value: Any) -> bool:
    return type(value) is int and abs(value) <= MOST_EXPONENT


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096 and value.isprintable()


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_origin(value: Any) -> bool:
    """Return whether ``value`` is paths, which may hold any character, or None by name."""
    return isinstance(value, dict) and all(path is None or isinstance(path, str) for path in value.values())


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


FIELDS: dict[str, Callable[[Any], bool]] = {
    "format_version": lambda value: type(value) is int and value == 1,
    "step": is_count,
    "samples": is_count,
    "tokens": is_count,
    "validated": _is_count_or_unknown,
    "skipped": is_count,
    "skipped_in_a_row": is_count,
    "warmup_samples": _is_count_or_unknown,
    "decay_batch": _is_batch_or_unknown,
    "recent": lambda value: isinstance(value, list) and len(value) <= MOST_RECENT and all(map(_is_pair, value)),
    "float8_exponents": lambda value: isinstance(value, list) and all(map(_is_exponent, value)),
    "world_size": lambda value: is_count(value) and value > 0,
    "data": _or_none(lambda value: isinstance(value, dict)),
    "model": _or_none(lambda value: isinstance(value, dict)),
    "bos_id": _or_none(is_count),
    "eos_id": _or_none(is_count),
    "eos_ids": lambda value: isinstance(value, list) and all(map(is_count, value)),
    "bos": _or_none(lambda value: isinstance(value, bool)),
    "tokenizer_sha256": _or_none(_is_text),
    "converted_from": lambda value: isinstance(value, str),
    "versions": _is_texts,
    "origin": _is_origin,
}
"""What each field of a state.json may be. wandb_id is not checked here: a wrong one must not make a checkpoint
unusable, and wandb_logger.py replaces it."""
