"""Verify a conversion: compare logits in fp32 and token ids of both models on fixed input."""

from pathlib import Path

import torch

from tinyllama.convert.tokenizer_files import TEXTS
from tinyllama.convert.weights import Weights
from tinyllama.model import from_weights
from tinyllama.tokenizer import Tokenizer

# in 22 layers with logits up to 20, another order of fp32 sums differs by 2e-4, a wrong norm_eps by 6e-2
TOLERANCE = 1e-3


def verify(hf_dir: Path, weights: Weights, dtype: torch.dtype) -> float:
    """Return the largest |logit difference| between our model of ``weights`` and transformers' of ``hf_dir``, in fp32.

    Both are first rounded to ``dtype``, that of the written weights, so that only the conversion is measured. Raises
    RuntimeError when the folder has a tokenizer and transformers does not encode as ours does.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = weights.config
    ours = from_weights(config, weights.cast(dtype).cast(torch.float32).load())
    theirs = LlamaForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    ids = torch.randint(config.vocab_size, (2, min(config.block_size, 127)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.to(dtype))
        difference = (ours(ids) - theirs(ids).logits).abs().max().item()
    if (hf_dir / "tokenizer_config.json").exists():
        reference, exported = Tokenizer(hf_dir), AutoTokenizer.from_pretrained(hf_dir)
        for text in TEXTS:
            if exported(text, add_special_tokens=False)["input_ids"] != reference.encode(text):
                raise RuntimeError(f"{hf_dir}: AutoTokenizer does not encode {text!r} as {reference.path.name} does")
    return difference


def summarize(difference: float) -> tuple[str, int]:
    """Return the line that a command prints about ``difference`` and its exit code, 1 if not within the tolerance."""
    text = f"verify: max |logit difference| to transformers {difference:.1e}, tolerance {TOLERANCE:.0e}"
    return text, int(not difference <= TOLERANCE)
