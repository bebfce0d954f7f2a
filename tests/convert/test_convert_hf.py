"""What comes in: Hugging Face folders and upstream's files, and what is refused."""

import dataclasses
import shutil

import pytest
import torch
import torch.nn.functional as F
from checkpoints import load_weights
from models import CONFIG, given, llama, to_hf, weights

from tinyllama import InputError
from tinyllama.checkpoint import reader, resume
from tinyllama.config.model import ModelConfig, named_config
from tinyllama.convert import hf_folder, layout, native
from tinyllama.convert.weights import open_weights
from tinyllama.model import from_weights
from tinyllama.tokenizer import Tokenizer

MODELS = {
    "22 layers": ModelConfig(
        "tiny", 64, 320, n_layer=22, n_head=32, n_query_groups=4, n_embd=128, intermediate_size=176
    ),
    "multi-head": dataclasses.replace(CONFIG, n_query_groups=8),
    "odd vocabulary": dataclasses.replace(CONFIG, vocab_size=397, padding_multiple=1),
    "tied": dataclasses.replace(CONFIG, tie_embeddings=True),
    "condensed": dataclasses.replace(CONFIG, rope_condense_ratio=4.0),
}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_there_and_back_is_bit_equal_and_the_logits_are_those_of_transformers(config, shard_bytes, tmp_path):
    from transformers import LlamaForCausalLM

    for dtype in ("float32", "bfloat16"):
        out = given(config=config).cast(dtype)
        hf_folder.write(tmp_path / "hf", out, shard_bytes=shard_bytes)
        back = open_weights(tmp_path / "hf")
        step_dir = native.write(tmp_path / "ours", back)
        again = open_weights(tmp_path / "ours")
        assert reader.problem(step_dir) is None
        assert again.path == step_dir
        assert (back.config, again.config) == (config, config)
        assert again.dtype == out.dtype
        assert same(again.load(), out.load())
        assert same(load_weights(step_dir), out.load())
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 10**9)

    hf_folder.write(tmp_path / "hf", given(config=config), shard_bytes=shard_bytes)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.config.tie_word_embeddings == config.tie_embeddings
    ids = torch.randint(config.vocab_size, (2, config.block_size), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (from_weights(config, weights(config))(ids) - theirs(ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_folder_of_transformers_own_making_comes_in(kind, tmp_path, script):
    config = dataclasses.replace(CONFIG, vocab_size=450, padding_multiple=1, rope_condense_ratio=2.0)
    theirs = llama(config)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.1, generator=generator)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    if kind == "bin":
        for file in (tmp_path / "hf").glob("*.safetensors*"):
            file.unlink()
        torch.save(theirs.state_dict(), tmp_path / "hf/pytorch_model.bin")
    code, out, err = script("convert_hf_checkpoint", tmp_path / "hf", tmp_path / "ours", "--verify")
    assert code == 0, err
    assert out.splitlines()[:2] == [
        f"{tmp_path / 'hf'} -> {tmp_path / 'ours/step-00000000'}",
        "vocabulary: 450 pieces in 450 rows",
    ]
    found = open_weights(tmp_path / "ours")
    assert (found.config.rope_condense_ratio, found.config.padded_vocab_size, found.config.norm_eps) == (2, 450, 1e-4)
    assert same(to_hf(found.load(), found.config), dict(theirs.state_dict()))


def test_rows_that_only_pad_are_told_by_the_tokenizer(tmp_path, tokenizer_file):
    config = dataclasses.replace(CONFIG, vocab_size=512)
    theirs = llama(config)
    theirs.save_pretrained(tmp_path / "hf")
    shutil.copy(tokenizer_file, tmp_path / "hf/tokenizer.model")  # of 400 pieces, which 128 round up to 512
    found = native.write(tmp_path / "ours", open_weights(tmp_path / "hf"))
    sizes = reader.read_model_config(found)
    assert (sizes.vocab_size, sizes.padding_multiple, sizes.padded_vocab_size) == (400, 128, 512)
    assert Tokenizer(tmp_path / "ours").vocab_size == 400


def plain_logits(state, ids, config):
    """Upstream's model written out in plain PyTorch for one sequence ids (T,), by its parameter names."""
    heads, groups, size = config.n_head, config.n_query_groups, config.head_size
    per_group = heads // groups
    T = len(ids)
    theta = 1.0 / config.rope_base ** (torch.arange(0, size, 2).float() / size)
    angles = torch.outer(torch.arange(T).float(), theta).repeat(1, 2)  # the halves have the same angles
    cos, sin = angles.cos(), angles.sin()

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps) * weight

    def turned(x):
        return x * cos + torch.cat((-x[:, size // 2 :], x[:, : size // 2]), dim=-1) * sin

    x = state["transformer.wte.weight"][ids]
    for layer in range(config.n_layer):
        of = {k.removeprefix(f"transformer.h.{layer}."): v for k, v in state.items() if f".h.{layer}." in k}
        rows = (norm(x, of["norm_1.weight"]) @ of["attn.attn.weight"].T).view(T, groups, per_group + 2, size)
        outputs = []
        for head in range(heads):
            group = head // per_group
            q, k, v = rows[:, group, head % per_group], rows[:, group, per_group], rows[:, group, per_group + 1]
            scores = turned(q) @ turned(k).T / size**0.5
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
            outputs.append(scores.softmax(-1) @ v)
        x = x + torch.cat(outputs, -1) @ of["attn.proj.weight"].T
        h = norm(x, of["norm_2.weight"])
        x = x + (F.silu(h @ of["w1"].T) * (h @ of["w2"].T)) @ of["w3"].T
    return norm(x, state["transformer.ln_f.weight"]) @ state["lm_head.weight"].T


@pytest.mark.parametrize("names", ["swiglu", "plain"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_file_in_upstreams_layout_has_the_logits_of_its_attention_written_out(names, wrapped, tmp_path, script):
    from transformers import LlamaForCausalLM

    state = weights()
    written = dict(state)
    if names == "plain":
        for ours, theirs in (("swiglu.w1", "fc_1"), ("swiglu.w2", "fc_2"), ("swiglu.w3", "proj")):
            written = {name.replace(f"mlp.{ours}", f"mlp.{theirs}"): tensor for name, tensor in written.items()}
    content = {"model": written, "iter_num": 80, "step_count": 10, "hparams": {"lr": 1e-3}} if wrapped else written
    torch.save(content, tmp_path / "lit_model.pth")
    sizes = [f"--model.{k}={v}" for k, v in dataclasses.asdict(CONFIG).items() if k not in ("name", "tie_embeddings")]
    code, out, err = script("convert_lit_checkpoint", tmp_path / "lit_model.pth", tmp_path / "hf", *sizes, "--verify")
    assert code == 0, err
    ids = torch.randint(400, (40,), generator=torch.Generator().manual_seed(2))
    short = {k.replace("mlp.swiglu.w1.weight", "w1").replace("mlp.swiglu.w2.weight", "w2"): v for k, v in state.items()}
    short = {k.replace("mlp.swiglu.w3.weight", "w3"): v for k, v in short.items()}
    expected = plain_logits(short, ids, CONFIG)
    with torch.no_grad():
        assert (LlamaForCausalLM.from_pretrained(tmp_path / "hf")(ids[None]).logits[0] - expected).abs().max() <= 1e-5
        assert expected.std() > 0.3


def test_config_of_reads_what_hf_config_writes():
    for config in MODELS.values():
        hf = layout.hf_config(config, 2, 1, torch.float32)
        found = layout.config_of(hf, "config.json", None)
        assert dataclasses.replace(found, name="tiny", vocab_size=config.vocab_size) == dataclasses.replace(
            config, padding_multiple=found.padding_multiple
        )
    real = named_config("tinyllama_1.1b")
    assert layout.config_of(layout.hf_config(real, 2, 1, torch.float32), "config.json", 32000) == real
    with pytest.raises(InputError, match="rope_theta 0.5 is not a whole number"):
        layout.config_of(
            layout.hf_config(CONFIG, 2, 1, torch.float32) | {"rope_parameters": {"rope_theta": 0.5}}, "", None
        )


def test_what_is_converted_is_never_replaced(tmp_path, script):
    hf_folder.write(tmp_path / "hf", given())
    native.write(tmp_path / "ours", open_weights(tmp_path / "hf"))
    for name, source in [
        ("convert_hf_checkpoint", "hf"),
        ("convert_lit_checkpoint", "ours"),
        ("convert_lit_checkpoint", "ours/step-00000000"),
    ]:
        code, _, err = script(name, tmp_path / source, tmp_path / source.partition("/")[0])
        assert (code, err.count("\n")) == (2, 1)
        assert "which is to be converted: give another folder" in err
    assert same(open_weights(tmp_path / "hf").load(), open_weights(tmp_path / "ours").load())


def test_converted_weights_cannot_be_resumed_from(tmp_path):
    hf_folder.write(tmp_path / "hf", given())
    step_dir = native.write(tmp_path / "ours", open_weights(tmp_path / "hf"))
    saved, now = reader.read_state(step_dir), {"data": {"seed": 1}, "model": {"n_layer": 2}}
    with pytest.raises(InputError, match="holds weights and no run to resume: give it as train.init_from"):
        resume.refuse_changes(step_dir, {key: saved.get(key) for key in now}, now)
