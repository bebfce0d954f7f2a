"""Verify a conversion: compare logits in fp32 and token ids of both models on fixed input."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tinyllama import InputError, printable
from tinyllama.convert.tokenizer_files import TEXTS
from tinyllama.convert.weights import Weights, hf_tensors
from tinyllama.model import from_weights
from tinyllama.tokenizer import Tokenizer

# in 22 layers with logits up to 20, another order of fp32 sums differs by 2e-4, a wrong norm_eps by 6e-2
TOLERANCE = 1e-3


class VerificationError(RuntimeError):
    """Report a conversion that is wrong, which is not written."""


def verify(hf_dir: Path, weights: Weights, dtype: torch.dtype, is_foreign: bool = False) -> float:
    """Return the largest |logit difference| between our model of ``weights`` and transformers' of ``hf_dir``, in fp32.

    Both are first rounded to ``dtype``, that of the written weights, so that only the conversion is measured. Raises
    VerificationError when transformers finds other parameters in the folder than its model has, and when the folder
    has a tokenizer that transformers does not read as we do, unless the folder ``is_foreign`` and its own. Raises
    InputError for logits that are not finite in either, of which no conversion can be right.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = weights.config
    ours = from_weights(config, weights.cast(dtype).cast(torch.float32).load())
    how: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if is_foreign:  # the names in it may be those of a compiled model, which transformers does not read
        how |= {"config": LlamaConfig.from_pretrained(hf_dir), "state_dict": hf_tensors(hf_dir)}
    loaded: Any = LlamaForCausalLM.from_pretrained(None if is_foreign else hf_dir, **how)
    theirs, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise VerificationError(f"verify: transformers reports {kind} in {hf_dir}: {printable(sorted(info[kind]))}")
    ids = torch.randint(config.vocab_size, (2, min(config.block_size, 127)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.to(dtype))
        both = ours(ids), theirs(ids).logits
        if not any(logits.isfinite().all() for logits in both):  # in one alone, the conversion is at fault
            raise InputError(
                f"the logits of {hf_dir if is_foreign else weights.path} in {str(dtype).removeprefix('torch.')} are "
                "not finite, nor then are some of its weights: give another one, or another --dtype"
            )
        difference = (both[0] - both[1]).abs().max().item()
    if not is_foreign and (hf_dir / "tokenizer_config.json").exists():
        reference, exported = Tokenizer(hf_dir), AutoTokenizer.from_pretrained(hf_dir)
        for text in TEXTS:
            # some are longer than the context
            encoded = exported(text, add_special_tokens=False, verbose=False)["input_ids"]
            if encoded != reference.encode(text):
                name = reference.path.name
                raise VerificationError(f"verify: AutoTokenizer does not encode {text!r} as {name} in {hf_dir} does")
    return difference


def summarize(difference: float) -> tuple[str, int]:
    """Return the line that a command prints about ``difference`` and its exit code, 1 if not within the tolerance."""
    text = f"verify: max |logit difference| to transformers {difference:.1e}, tolerance {TOLERANCE:.0e}"
    return text, int(not difference <= TOLERANCE)


@contextlib.contextmanager
def written(output: Path) -> Iterator[None]:
    """End the command with 1 if the verification in the block finds a difference, so that ``output`` is not written."""
    try:
        yield
    except VerificationError as error:
        print(f"{output} is not written: the conversion is wrong", file=sys.stderr)
        print(error)
        sys.exit(1)


def verified(hf_dir: Path, weights: Weights, dtype: torch.dtype, is_foreign: bool = False) -> str:
    """Return the line of ``summarize``; raises VerificationError where ``verify`` does and above the tolerance."""
    text, code = summarize(verify(hf_dir, weights, dtype, is_foreign))
    if code:
        raise VerificationError(text)
    return text
