"""Proof of a conversion: the logits and token ids of both sides, in fp32, on fixed input."""

from pathlib import Path

import torch

from tinyllama.convert.tokenizer_files import TEXTS
from tinyllama.convert.weights import Weights
from tinyllama.model import from_weights
from tinyllama.tokenizer import Tokenizer

# fp32 sums in another order make 2e-4 in 22 layers with logits up to 20, a wrong norm_eps 6e-2
TOLERANCE = 1e-3


def verify(hf_dir: Path, weights: Weights, dtype: torch.dtype) -> float:
    """The largest |logit difference| of our model of ``weights`` to transformers' of ``hf_dir``, in fp32.

    Both are rounded to ``dtype`` first, that of what was written, so that only the conversion is measured. Raises
    RuntimeError when transformers' tokenizer of the folder, if it has one, does not give our ids.
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
    """What a command says of ``difference``, and its exit code: 1 above the tolerance, or when it is no number."""
    text = f"verify: max |logit difference| to transformers {difference:.1e}, tolerance {TOLERANCE:.0e}"
    return text, int(not difference <= TOLERANCE)
