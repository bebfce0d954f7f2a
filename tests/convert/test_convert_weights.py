"""Tensors and metadata as they are read: nothing rounded, dropped, taken for another or shared."""

import dataclasses
import json
import math
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from models import CONFIG, METADATA, difference, given, to_hf, weights
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.metadata import StorageMeta

from tinyllama import InputError
from tinyllama.checkpoint import reader
from tinyllama.config import cli
from tinyllama.convert import hf_folder, native, verify
from tinyllama.convert.weights import copy_into, open_weights
from tinyllama.model import GPT, from_weights

SHA256 = "4" * 64


def write_hf(path, state, config=CONFIG, kind="safetensors", **changes):
    """A folder as others write it: without our mark."""
    hf_folder.write(path, given(config=config))
    (path / "export.json").unlink()
    (path / "model.safetensors").unlink()
    if kind == "safetensors":
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, path / "pytorch_model.bin")
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | changes))
    return path


class Writer(dcp.FileSystemWriter):
    def storage_meta(self):
        return StorageMeta()  # without a pickled Path, as our own checkpoints


def write_native(path, state, config=CONFIG):
    step_dir = path / "step-00000007"
    tensors = {f"model.{name}": tensor for name, tensor in state.items()}
    dcp.save(tensors, storage_writer=Writer(step_dir), no_dist=True)
    (step_dir / "config.yaml").write_text(cli.dump({"model": dataclasses.asdict(config)}))
    (step_dir / "state.json").write_text(json.dumps({"step": 7, "samples": 1, "tokens": 2}))
    return step_dir


def write_upstream(path, state, config=CONFIG):
    torch.save({"model": state, "step_count": 5, "iter_num": 40}, path)
    return path


def mixed(state, *dtypes):
    """Its tensors in turn in one and the other dtype."""
    return {name: tensor.to(dtypes[i % len(dtypes)]) for i, (name, tensor) in enumerate(state.items())}


WRITERS = {
    "safetensors": lambda path, state: write_hf(path, state),
    "bin": lambda path, state: write_hf(path, state, kind="bin"),
    "step directory": write_native,
    "upstream": write_upstream,
}


def stored(kind, state):
    return to_hf(state, CONFIG) if kind in ("safetensors", "bin") else dict(state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("dtypes", "whole"),
    [
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),  # neither holds the other's numbers
        ((torch.float16,), torch.float16),
    ],
)
@pytest.mark.parametrize("kind", WRITERS)
def test_dtypes_that_are_mixed_are_read_in_one_that_holds_all(kind, dtypes, whole, tmp_path):
    state = mixed(weights(), *dtypes)
    if kind in ("safetensors", "bin"):  # the parts of the fused tensor must be of one dtype to compare with it
        state = {name: t.to(state["transformer.wte.weight"].dtype) if t.ndim == 2 else t for name, t in state.items()}
        state["transformer.ln_f.weight"] = state["transformer.ln_f.weight"].to(dtypes[-1])
    found = open_weights(WRITERS[kind](tmp_path / "there", stored(kind, state)), CONFIG)
    assert {tensor.dtype for tensor in state.values()} == set(dtypes)
    assert found.dtype == whole
    for name, tensor in state.items():
        read = found.read(name)
        assert read.dtype == whole
        assert torch.equal(read.double(), tensor.double()), name


def test_one_number_that_bf16_rounds_is_enough_for_fp32(tmp_path):
    norm = "transformer.ln_f.weight"
    state = {name: tensor.bfloat16() for name, tensor in weights().items()}
    state[norm] = torch.full_like(state[norm], 1 + 2**-20, dtype=torch.float32)
    found = open_weights(write_hf(tmp_path / "hf", to_hf(state, CONFIG)))
    hf_folder.write(tmp_path / "again", found)
    assert load_file(tmp_path / "again/model.safetensors")["model.norm.weight"].tolist() == [1 + 2**-20] * 64
    assert open_weights(native.write(tmp_path / "ours", found)).read(norm).tolist() == [1 + 2**-20] * 64


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRITERS)
def test_a_tensor_too_many_or_too_few_or_turned_is_refused(kind, tmp_path):
    state = stored(kind, weights())
    part = "model.layers.1.self_attn.q_proj.weight" if kind in ("safetensors", "bin") else "lm_head.weight"
    turned = (
        "model.layers.0.mlp.up_proj.weight" if part.startswith("model.") else "transformer.h.0.mlp.swiglu.w2.weight"
    )
    extra = part.replace("weight", "bias")
    for i, (changed, problem) in enumerate(
        [
            (state | {extra: torch.ones(64)}, f"{extra} is not of such a model"),
            ({name: tensor for name, tensor in state.items() if name != part}, f"{part} is missing"),
            (
                state | {turned: state[turned].T.contiguous()},
                f"{turned} has shape [64, 96], the model's sizes make [96, 64]",
            ),
        ]
    ):
        there = WRITERS[kind](tmp_path / f"there{i}", changed)
        with pytest.raises(InputError) as caught:
            open_weights(there, CONFIG)
        assert caught.value.args == (f"{there}: {problem}: give weights and sizes of one model",)


def test_the_output_matrix_is_there_unless_it_is_the_embedding(tmp_path):
    state = to_hf(weights(), CONFIG)
    embedding = state.pop("lm_head.weight") * 0 + state["model.embed_tokens.weight"]
    with pytest.raises(InputError, match=r"lm_head.weight is missing"):
        open_weights(write_hf(tmp_path / "untied", dict(state)))
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    for name, more in (("once", {}), ("twice", {"lm_head.weight": embedding})):
        table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # that older versions saved
        found = open_weights(write_hf(tmp_path / name, state | more | table, config=tied))
        assert found.config.tie_embeddings
        assert set(found.load()) == set(weights(tied))
        assert torch.equal(found.read("transformer.wte.weight"), embedding)


def test_what_is_known_of_the_tokenizer_travels_with_the_weights(tmp_path):
    metadata = {"step": 12, "tokens": 3456, "tokenizer_sha256": SHA256}
    metadata |= {"eos_id": 7, "eos_ids": [7], "bos_id": 5, "bos": True}
    hf_folder.write(tmp_path / "hf", given(metadata=metadata))
    assert open_weights(tmp_path / "hf").metadata == metadata
    step_dir = native.write(tmp_path / "ours", open_weights(tmp_path / "hf"))
    state = reader.read_state(step_dir)
    assert state.pop("versions").keys() == {"tinyllama", "torch"}
    # a step of 0: it begins a run, however long the weights were trained
    assert state == {
        **{"format_version": 1, "step": 0, "samples": 0, "tokens": 0, "converted_from": str(tmp_path / "hf")},
        **{"tokenizer_sha256": SHA256, "eos_id": 7, "eos_ids": [7], "bos_id": 5, "bos": True},
    }
    assert open_weights(step_dir).metadata == metadata | {"step": 0, "tokens": 0}
    hf_folder.write(tmp_path / "again", open_weights(step_dir))
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (7, 5)
    assert json.loads((tmp_path / "again/export.json").read_text())["tokenizer_sha256"] == SHA256


@pytest.mark.parametrize(
    ("changes", "generation", "eos_id", "eos_ids", "bos_id"),
    [
        ({"eos_token_id": [400, 399], "bos_token_id": 398}, 2, 400, [400, 399, 2], 398),
        ({"eos_token_id": 7, "bos_token_id": 5}, [9, 7, 11], 7, [7, 9, 11], 5),
        ({"eos_token_id": 0, "bos_token_id": None}, None, 0, [0], None),
        ({"eos_token_id": -1, "bos_token_id": -1}, "2", None, [], None),
        ({"eos_token_id": [], "bos_token_id": None}, [True, 10**30, {}, 3], None, [3], None),
    ],
)
def test_the_ends_of_a_text_are_those_of_both_files(changes, generation, eos_id, eos_ids, bos_id, tmp_path):
    path = write_hf(tmp_path / "hf", to_hf(weights(), CONFIG), **changes)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    expected = {"step": 0, "tokens": 0, "tokenizer_sha256": None, "bos": None}
    expected |= {"eos_id": eos_id, "eos_ids": eos_ids, "bos_id": bos_id}
    assert open_weights(path).metadata == expected
    (path / "generation_config.json").unlink()
    first = changes["eos_token_id"] if isinstance(changes["eos_token_id"], list) else [changes["eos_token_id"]]
    assert open_weights(path).metadata["eos_ids"] == [i for i in first if i >= 0]


def test_every_end_of_a_text_travels_there_and_back(tmp_path):
    ends = {"eos_token_id": [7, 9, 11]}
    step_dir = native.write(
        tmp_path / "ours", open_weights(write_hf(tmp_path / "hf", to_hf(weights(), CONFIG), **ends))
    )
    assert open_weights(step_dir).metadata["eos_ids"] == [7, 9, 11, 2]
    hf_folder.write(tmp_path / "again", open_weights(step_dir))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "again" / name).read_text())["eos_token_id"] == [7, 9, 11, 2]


def test_what_an_upstream_file_says_and_what_is_known_of_all_of_them(tmp_path):
    found = open_weights(write_upstream(tmp_path / "lit_model.pth", weights()), CONFIG)
    expected = {"step": 5, "tokens": None, "tokenizer_sha256": None}
    assert found.metadata == expected | {"eos_id": 2, "eos_ids": [2], "bos_id": 1, "bos": None}
    torch.save(weights(), tmp_path / "bare.pth")
    assert open_weights(tmp_path / "bare.pth", CONFIG).metadata["step"] == 0
    with pytest.raises(InputError, match="bare.pth does not say its model's sizes"):
        open_weights(tmp_path / "bare.pth")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["safetensors", "bin", "upstream"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"_forward_module.{name}",
        lambda name: f"module.{name}",
        lambda name: f"_forward_module._orig_mod.{name}",
        # blocks compiled, or wrapped, one by one
        lambda name: re.sub(r"(\.\d+\.)", r"\1_orig_mod.", name),
        lambda name: "_fsdp_wrapped_module." + re.sub(r"(\.\d+\.)", r"\1_checkpoint_wrapped_module.", name),
    ],
)
def test_names_of_a_compiled_or_wrapped_model_are_those_of_the_model(wrap, kind, tmp_path):
    state = weights()
    wrapped = {wrap(name): tensor for name, tensor in stored(kind, state).items()}
    found = open_weights(WRITERS[kind](tmp_path / "there", wrapped), CONFIG)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in state.items())
    if kind == "upstream":  # with the names of its older version
        older = zip(("fc_1", "fc_2", "proj"), ("swiglu.w1", "swiglu.w2", "swiglu.w3"), strict=True)
        for theirs, ours in older:
            state = {name.replace(f".mlp.{ours}.", f".mlp._orig_mod.{theirs}."): t for name, t in state.items()}
        found = open_weights(write_upstream(tmp_path / "older", {wrap(name): t for name, t in state.items()}), CONFIG)
        assert all(torch.equal(found.read(name), tensor) for name, tensor in weights().items())
    twice = wrapped | {name: tensor + 1 for name, tensor in stored(kind, state).items() if name.startswith("lm_head")}
    if len(twice) > len(wrapped):
        with pytest.raises(InputError, match="has parameters both with and without _orig_mod, "):
            open_weights(WRITERS[kind](tmp_path / "twice", twice), CONFIG)


@pytest.mark.parametrize("prefix", ["model.", "net.model."])
def test_a_prefix_that_no_wrapper_of_ours_makes_is_named(prefix, tmp_path):
    file = tmp_path / "lit_model.pth"
    torch.save({"model": {prefix + name: tensor for name, tensor in weights().items()}}, file)
    with pytest.raises(InputError) as error:
        open_weights(file, CONFIG)
    assert str(error.value) == (
        f"{file} has '{prefix}' before its names, as in {prefix}transformer.wte.weight: save it again with names that "
        "begin with transformer and lm_head"
    )
    torch.save({"epoch": 1, "state_dict": weights()}, file)
    with pytest.raises(InputError, match=r"lit_model.pth has its tensors in 'state_dict', not in 'model': save that"):
        open_weights(file, CONFIG)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRITERS)
def test_a_tensor_that_was_read_may_be_changed(kind, tmp_path):
    state = weights()
    found = open_weights(WRITERS[kind](tmp_path / "there", stored(kind, state)), CONFIG)
    for name in ("transformer.ln_f.weight", "transformer.h.1.attn.attn.weight"):
        found.read(name).zero_()
        assert torch.equal(found.read(name), state[name])


def test_a_cast_rounds_each_tensor_as_it_is_read():
    state = weights()
    name = "transformer.h.0.attn.proj.weight"
    for dtype in ("bfloat16", "float16"):
        cast = given(state).cast(dtype)
        assert cast.dtype == getattr(torch, dtype)
        assert torch.equal(cast.read(name), state[name].to(cast.dtype))
    assert given(state).cast(None).dtype == torch.float32
    twice = given(state).cast("bfloat16").cast(torch.float32)
    assert torch.equal(twice.read(name), state[name].bfloat16().float())


def test_weights_fill_a_model_of_another_dtype():
    state = {name: tensor.bfloat16() for name, tensor in weights().items()}
    for dtype in (torch.float32, torch.bfloat16):
        model = GPT(CONFIG).to(dtype)
        before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        copy_into(model, dataclasses.replace(given(state), dtype=torch.bfloat16))
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, nn.Parameter)
            assert parameter.data_ptr() == before[name]
            assert parameter.dtype == dtype
            assert torch.equal(parameter.float(), state[name].float())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_do_not_verify(wrong, tmp_path, script):
    state = weights()
    state["transformer.h.1.norm_1.weight"][3] = wrong
    hf_folder.write(tmp_path / "hf", given(state))  # they are the same on both sides
    with pytest.raises(InputError, match="^the logits of /nowhere/memory in float32 are not finite"):
        difference(tmp_path / "hf", state)
    code, out, err = script("convert_hf_checkpoint", tmp_path / "hf", tmp_path / "ours", "--verify")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: the logits of {tmp_path / 'hf'} in float32 are not finite")
    with pytest.raises(verify.VerificationError, match=r"^verify: max \|logit difference\| to transformers nan"):
        verify.verified_line(tmp_path / "hf", given(), torch.float32)  # if ours are finite, the conversion is wrong


def test_one_wrong_row_does_not_verify(tmp_path):
    hf_folder.write(tmp_path / "hf", given())
    other = weights()
    other["lm_head.weight"][7] *= 1.01
    with pytest.raises(verify.VerificationError, match=r"^verify: max \|logit difference\| to transformers \d"):
        verify.verified_line(tmp_path / "hf", given(other), torch.float32)
    assert verify.verified_line(tmp_path / "hf", given(), torch.float32).endswith(", tolerance 1e-03")


@pytest.mark.parametrize(("found", "verifies"), [(0, 1), (3e-4, 1), (2e-3, 0), (0.06, 0), (math.inf, 0), (math.nan, 0)])
def test_the_tolerance_lies_between_the_noise_of_fp32_and_a_wrong_norm(found, verifies, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "verify", lambda *_: found)
    line = f"verify: max |logit difference| to transformers {found:.1e}, tolerance 1e-03"
    if verifies:
        assert verify.verified_line(tmp_path, given(), torch.float32) == line
    else:
        with pytest.raises(verify.VerificationError) as error:
            verify.verified_line(tmp_path, given(), torch.float32)
        assert str(error.value) == line


def test_the_commands_round_to_the_dtype_that_is_asked_for(tmp_path, script, step_dir):
    state = weights()
    code, out, err = script("convert_lit_checkpoint", step_dir, tmp_path / "hf", "--dtype", "bfloat16", "--verify")
    assert (code, len(out.splitlines())) == (0, 2), err
    found = load_file(tmp_path / "hf/model.safetensors")
    for key, tensor in to_hf(state, CONFIG).items():
        assert found[key].dtype == torch.bfloat16
        assert torch.equal(found[key], tensor.bfloat16())
    code, out, err = script("convert_hf_checkpoint", tmp_path / "hf", tmp_path / "ours", "--dtype", "float16")
    assert (code, len(out.splitlines())) == (0, 3), err
    found = open_weights(tmp_path / "ours")
    assert found.dtype == torch.float16
    assert all(torch.equal(found.read(name), tensor.bfloat16().half()) for name, tensor in state.items())


def test_a_model_of_mixed_weights_has_the_logits_of_transformers(tmp_path):
    """The norms in fp32 beside matrices in bf16, as some folders have them."""
    state = {name: tensor.bfloat16() if tensor.ndim == 2 else tensor for name, tensor in weights().items()}
    write_hf(tmp_path / "hf", to_hf(state, CONFIG))
    found = open_weights(tmp_path / "hf")
    assert verify.verify(tmp_path / "hf", found, found.dtype) <= 1e-5
    ids = torch.arange(40)[None] % 400
    exact = {name: tensor.float() for name, tensor in state.items()}
    with torch.no_grad():
        assert torch.equal(from_weights(CONFIG, found.load())(ids), from_weights(CONFIG, exact)(ids))


def test_facts_of_a_checkpoint_are_those_of_its_state(step_dir):
    metadata = open_weights(step_dir).metadata
    sha256 = reader.read_state(step_dir)["tokenizer_sha256"]
    assert metadata == METADATA | {"tokenizer_sha256": sha256}
    assert len(sha256) == 64
