"""A tiny model of known weights, ours and transformers', for the tests of what goes in and out."""

from pathlib import Path

import torch

from tinyllama.config.model import ModelConfig
from tinyllama.convert import layout, verify
from tinyllama.convert.weights import Weights, open_weights
from tinyllama.eval.generate import stream
from tinyllama.model import GPT, init_weights

# vocab_size 400 is that of the tokenizer_file fixture; 400 pieces in 448 rows
CONFIG = ModelConfig(
    "tiny",
    block_size=96,
    vocab_size=400,
    n_layer=2,
    n_head=8,
    n_query_groups=2,
    n_embd=64,
    intermediate_size=96,
    norm_eps=1e-4,
    rope_base=5000,
)
METADATA = {"step": 12, "tokens": 3456, "tokenizer_sha256": None}
METADATA |= {"eos_id": 2, "eos_ids": [2], "bos_id": 1, "bos": False}


def weights(config=CONFIG, seed=5):
    # Larger than at the start, so that the logits are far apart, though not so large that fp32 cannot hold them to 1e-5
    # (logits of 8 are 2e-5 off float64's, ours and transformers' alike); norms that are not all one.
    model = GPT(config)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.rand(p.shape, generator=generator) for name, p in model.state_dict().items()}
    return {name: p * 1.5 if p.ndim == 2 else 0.5 + noise[name] for name, p in model.state_dict().items()}


def to_hf(state, config):
    return {k: t for ours, theirs in layout.keys(config) for k, t in layout.to_hf(theirs, state[ours], config).items()}


def from_hf(state, config):
    return {ours: layout.from_hf([state[key] for key in theirs], config) for ours, theirs in layout.keys(config)}


def given(state=None, config=CONFIG, metadata=METADATA):
    return Weights(Path("/nowhere/memory"), config, torch.float32, metadata, (state or weights(config)).__getitem__)


def difference(folder, state=None, config=CONFIG):
    dtype = open_weights(folder).dtype
    return verify.verify(folder, given(state, config), dtype)


def generate(model, prompts, max_new_tokens, **how):
    steps = list(stream(model, prompts, max_new_tokens, **how))
    return [[step[i] for step in steps if step[i] is not None] for i in range(len(prompts))]


def llama(config):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**layout.hf_config(config, 2, 1, torch.float32))).eval()
