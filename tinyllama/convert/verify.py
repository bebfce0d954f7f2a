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
    """A conversion is wrong; it is not written."""


def verify(hf_dir: Path, weights: Weights, dtype: torch.dtype, is_foreign: bool = False) -> float:
    """Return the largest |logit difference|, in fp32, between our model of ``weights`` and transformers' of ``hf_dir``.

    Both are first rounded to ``dtype``, that of the written weights, so that only the conversion is measured. Raises
    VerificationError if the folder lacks parameters of transformers' model or has others and, unless it ``is_foreign``,
    if transformers does not encode text with its tokenizer as we do. Raises InputError if the logits of both models are
    not finite, and if transformers cannot load or run a folder that ``is_foreign``.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = weights.config
    ours = from_weights(config, weights.cast(dtype).cast(torch.float32).load())
    how: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _refused(hf_dir) if is_foreign else contextlib.nullcontext():
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
        with _refused(hf_dir) if is_foreign else contextlib.nullcontext():
            expected = theirs(ids).logits
        both = ours(ids), expected
        if not any(logits.isfinite().all() for logits in both):  # in one alone, the conversion is at fault
            raise InputError(
                f"the logits of {hf_dir if is_foreign else weights.path} in {str(dtype).removeprefix('torch.')} are "
                "not finite: give other weights, or another --dtype"
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


@contextlib.contextmanager
def _refused(hf_dir: Path) -> Iterator[None]:
    """Raise InputError for what transformers raises of ``hf_dir``, which others have made."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # it checks what it reads in many ways
        why = printable(" ".join(str(error).split()) or type(error).__name__, 300)
        raise InputError(
            f"{hf_dir}: transformers cannot use it ({why}): mend its config.json, or give --no-verify"
        ) from error


@contextlib.contextmanager
def exit_if_wrong(output: Path) -> Iterator[None]:
    """Exit with 1, and say that ``output`` is not written, if the block raises VerificationError."""
    try:
        yield
    except VerificationError as error:
        print(f"{output} is not written: the conversion is wrong", file=sys.stderr)
        print(error)
        sys.exit(1)


def verified_line(hf_dir: Path, weights: Weights, dtype: torch.dtype, is_foreign: bool = False) -> str:
    """Verify, and return the line to print; raises VerificationError above the tolerance, too."""
    difference = verify(hf_dir, weights, dtype, is_foreign)
    text = f"verify: max |logit difference| to transformers {difference:.1e}, tolerance {TOLERANCE:.0e}"
    if not difference <= TOLERANCE:  # NaN is not
        raise VerificationError(text)
    return text
