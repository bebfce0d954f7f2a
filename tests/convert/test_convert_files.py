"""What a conversion writes, byte by byte, and in which order it reaches the disk."""

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from models import CONFIG, METADATA, given, to_hf, weights
from safetensors.torch import load_file

from tinyllama import InputError, __version__
from tinyllama.config.model import ModelConfig
from tinyllama.convert import hf_folder, layout, native, tensor_file
from tinyllama.convert.weights import open_weights
from tinyllama.tokenizer import Tokenizer


def read_json(path):
    return json.loads(path.read_text())


HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 448,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-4,
    "rope_theta": 5000.0,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "torch_dtype": "float32",
    "dtype": "float32",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONDENSED = {
    "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0},
    "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
}


def test_each_field_of_the_small_files(tmp_path, tokenizer_file):
    hf_folder.write(tmp_path / "hf", given())
    assert read_json(tmp_path / "hf/config.json") == HF_CONFIG
    generation = {"bos_token_id": 2, "eos_token_id": 2, "max_length": 96, "suppress_tokens": list(range(400, 448))}
    assert read_json(tmp_path / "hf/generation_config.json") == generation
    mark = {"tinyllama": __version__, "step": 12, "tokens": 3456, "bos": False, "tokenizer_sha256": None}
    mark |= {"model": dataclasses.asdict(CONFIG)}
    files = ["config.json", "export.json", "generation_config.json", "model.safetensors"]
    assert read_json(tmp_path / "hf/export.json") == mark | {"files": files}

    # the metadata of the data give way to those of the tokenizer itself
    condensed = dataclasses.replace(CONFIG, vocab_size=448, rope_condense_ratio=4, tie_embeddings=True)
    metadata = METADATA | {"eos_id": 7, "bos_id": None, "tokenizer_sha256": "4" * 64}
    tokenizer = Tokenizer(tokenizer_file)
    hf_folder.write(tmp_path / "more", given(config=condensed, metadata=metadata).cast("bfloat16"), tokenizer)
    assert read_json(tmp_path / "more/config.json") == HF_CONFIG | CONDENSED
    generation = {"bos_token_id": 2, "eos_token_id": 2, "max_length": 96, "pad_token_id": 0}
    assert read_json(tmp_path / "more/generation_config.json") == generation
    mark |= {"model": dataclasses.asdict(condensed), "tokenizer_sha256": tokenizer.sha256}
    files = sorted([*files, "tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
    assert read_json(tmp_path / "more/export.json") == mark | {"files": files}
    assert read_json(tmp_path / "more/tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{"bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"},
        **{"pad_token": "<unk>", "padding_side": "left"},
        **{"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False},
        "model_max_length": 96,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    assert (tmp_path / "more/tokenizer.model").read_bytes() == tokenizer_file.read_bytes()

    # data whose documents begin with bos
    hf_folder.write(tmp_path / "bos", given(metadata=METADATA | {"bos": True}), tokenizer)
    assert read_json(tmp_path / "bos/tokenizer_config.json")["bos_token"] == "<s>"
    assert read_json(tmp_path / "bos/generation_config.json")["bos_token_id"] == 1
    assert read_json(tmp_path / "bos/config.json") == HF_CONFIG


def test_sizes_that_a_config_json_leaves_out_are_transformers_defaults():
    from transformers import LlamaConfig

    said = {"vocab_size": 448, "hidden_size": 64, "intermediate_size": 96}
    said |= {"num_hidden_layers": 2, "num_attention_heads": 8}
    theirs = LlamaConfig(**said)
    assert layout.config_of(said | {"model_type": "llama"}, "config.json", None) == ModelConfig(
        "llama",
        block_size=theirs.max_position_embeddings,
        vocab_size=448,
        n_layer=2,
        n_head=8,
        n_query_groups=theirs.num_key_value_heads,
        n_embd=64,
        intermediate_size=96,
        norm_eps=theirs.rms_norm_eps,
        rope_base=int(theirs.rope_parameters["rope_theta"]),
        tie_embeddings=theirs.tie_word_embeddings,
    )


def test_what_config_of_takes_transformers_takes():
    from transformers import LlamaConfig

    absent = object()
    values = [
        absent,
        None,
        0,
        1,
        8,
        -1,
        8.0,
        1e-5,
        "x",
        "8",
        "silu",
        "float16",
        True,
        False,
        [],
        [2],
        ["2"],
        [True],
        {},
    ]
    read = ["architectures", "vocab_size", *layout.SIZES, *layout.TYPES, "dtype", "torch_dtype", "rope_theta"]
    taken = {key: [] for key in read}
    for key, value in itertools.product(read, values):
        content = {name: known for name, known in (HF_CONFIG | {key: value}).items() if known is not absent}
        try:
            layout.config_of(content, "config.json", None)
        except InputError:
            continue
        LlamaConfig(**json.loads(json.dumps(content)))
        taken[key].append(value)
    assert taken["hidden_act"] == [absent, "silu"]
    assert taken["rms_norm_eps"] == [absent, 8.0, 1e-5]
    assert taken["attention_bias"] == [absent, False]
    assert taken["head_dim"] == [absent, None, 8]
    assert taken["bos_token_id"] == [absent, None, 0, 1, 8, -1]
    assert taken["eos_token_id"] == [absent, None, 0, 1, 8, -1, [], [2]]
    assert taken["torch_dtype"] == taken["dtype"] == [absent, None, "float16"]


def test_rope_settings_are_those_that_transformers_reads():
    """Of every mixture of the older and the newer keys, whatever they contradict."""
    from transformers import LlamaConfig

    parameters = [None, {}, {"rope_type": "default", "rope_theta": 70000.0}, {"rope_type": "linear", "factor": 3.0}]
    parameters += [parameters[-1] | {"rope_theta": 9000.0, "partial_rotary_factor": 1.0}]
    scaling = [None, {}, {"type": "linear", "factor": 2.5}, {"rope_type": "default"}]
    scaling += [scaling[2] | {"rope_type": "linear", "rope_theta": 300.0}, {"type": "linear", "rope_type": "default"}]
    absent = object()
    tried = 0
    for values in itertools.product([absent, *parameters], [absent, *scaling], [absent, 1e6]):
        changes = dict(zip(("rope_parameters", "rope_scaling", "rope_theta"), values, strict=True))
        content = {key: value for key, value in (HF_CONFIG | changes).items() if value is not absent}
        theirs = LlamaConfig(**json.loads(json.dumps(content))).rope_parameters
        found = layout.config_of(content, "config.json", None)
        linear = theirs["rope_type"] == "linear"
        expected = (theirs["rope_theta"], theirs["factor"] if linear else 1)
        assert (found.rope_base, found.rope_condense_ratio) == expected, changes
        tried += 1
    assert tried == 6 * 7 * 2


def test_rope_settings_of_older_and_newer_folders():
    for changes, base, ratio in [
        ({"rope_theta": 500000.0, "rope_parameters": None}, 500000, 1),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 70000.0}}, 70000, 1),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.5}}, 5000, 2.5),
        ({"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 9000}, "rope_theta": 1.0}, 9000, 3),
    ]:
        found = layout.config_of(HF_CONFIG | changes, "config.json", None)
        assert (found.rope_base, found.rope_condense_ratio) == (base, ratio)


@pytest.mark.parametrize(
    ("rows", "pieces", "vocab_size", "multiple"),
    [
        *[(448, 400, 400, 64), (640, 520, 520, 128), (768, 520, 520, 256), (512, 100, 100, 512)],
        *[(1024, 100, 100, 1024), (1024, 1000, 1000, 64), (2048, 100, 2048, 64), (448, 448, 448, 64)],
        *[(450, 450, 450, 1), (450, 400, 450, 1), (448, None, 448, 64), (450, None, 450, 1)],
    ],
)
def test_padding_is_what_rounding_the_pieces_up_explains(rows, pieces, vocab_size, multiple):
    found = layout.config_of(HF_CONFIG | {"vocab_size": rows}, "config.json", pieces)
    assert (found.vocab_size, found.padding_multiple, found.padded_vocab_size) == (vocab_size, multiple, rows)


def parsed(path):
    """A safetensors file's header without its metadata, the metadata, and the bytes of each tensor."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0  # or the numbers behind it are not aligned
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    payload = content[8 + length :]
    end = 0
    for entry in header.values():
        begin, after = entry["data_offsets"]
        assert begin == end
        end = after
    assert end == len(payload)
    return header, metadata, {key: payload[slice(*entry["data_offsets"])] for key, entry in header.items()}


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_file_of_weights_byte_by_byte(dtype, tmp_path):
    state = weights()
    tensor_file.export(given(state).cast(dtype), tmp_path / "new" / "model.safetensors")
    header, metadata, found = parsed(tmp_path / "new/model.safetensors")
    to, name = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16")}.get(dtype, (torch.half, "F16"))
    assert found == {key: raw(tensor.to(to)) for key, tensor in state.items()}
    assert {key: (entry["dtype"], entry["shape"]) for key, entry in header.items()} == {
        key: (name, list(tensor.shape)) for key, tensor in state.items()
    }
    assert json.loads(metadata.pop("model")) == dataclasses.asdict(CONFIG)
    assert metadata == {"format": "pt", "tinyllama": __version__, "step": "12", "tokens": "3456"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.safetensors"]


def test_shards_are_filled_to_the_last_byte_and_the_index_names_them(tmp_path):
    hf_folder.write(tmp_path / "hf", given(), shard_bytes=49152)  # twice a matrix of the MLP
    names = [f"model-{i:05d}-of-00008.safetensors" for i in range(1, 9)]
    assert sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors")) == names
    expected = to_hf(weights(), CONFIG)
    sizes, places = [], {}
    for name in names:
        header, metadata, found = parsed(tmp_path / "hf" / name)
        assert metadata == {"format": "pt"}
        assert found == {key: raw(expected[key]) for key in header}
        sizes.append(sum(map(len, found.values())))
        places |= dict.fromkeys(header, name)
    # the embedding is larger than a shard; norms with queries and keys; values with proj; each matrix of the MLP in
    # turn; the output matrix is larger, too, and the last norm is left
    assert sizes == [114688, 45568, 37376, 49152, 49152, 49152, 114688, 256]
    assert places.keys() == expected.keys()
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
    assert read_json(tmp_path / "hf/model.safetensors.index.json") == index
    assert set(read_json(tmp_path / "hf/export.json")["files"]) == {path.name for path in (tmp_path / "hf").iterdir()}
    hf_folder.write(tmp_path / "one", given(), shard_bytes=sum(sizes))
    assert load_file(tmp_path / "one/model.safetensors").keys() == expected.keys()


@pytest.fixture
def disk(monkeypatch):
    """What reaches the disk, in order: ("sync", path, bytes in it, names beside it) and ("rename", from, to)."""
    calls = []

    def fsync(handle, real=os.fsync):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        calls.append(("sync", path, os.fstat(handle).st_size, {other.name for other in path.parent.iterdir()}))
        real(handle)

    def renames(real):
        def rename(source, target, **options):
            calls.append(("rename", Path(source), Path(target)))
            return real(source, target, **options)

        return rename

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renames(os.rename))
    monkeypatch.setattr(os, "replace", renames(os.replace))
    return calls


@pytest.mark.parametrize("kind", ["hf", "ours"])
@pytest.mark.parametrize("earlier", [False, True])
def test_every_file_has_reached_the_disk_before_the_folder_appears(kind, earlier, disk, tmp_path, tokenizer_file):
    source = tmp_path / "source"
    hf_folder.write(source, given(), Tokenizer(tokenizer_file))
    output, unfinished, replaced = tmp_path / "out", tmp_path / ".out.tmp", tmp_path / ".out.replaced"

    def write():
        if kind == "hf":
            hf_folder.write(output, given(), Tokenizer(tokenizer_file), shard_bytes=100_000)
        else:
            native.write(output, open_weights(source))

    if earlier:
        write()
    for stale in (unfinished, replaced):  # of an export that was killed
        stale.mkdir()
        (stale / "stale").touch()
    disk.clear()
    write()
    appears = disk.index(("rename", unfinished, output))
    synced = {path: size for what, path, size, *_ in disk[:appears] if what == "sync"}
    written = list(output.rglob("*"))
    assert len([path for path in written if path.is_file()]) >= (9 if kind == "hf" else 7)
    for path in written:
        size = synced[unfinished / path.relative_to(output)]
        assert path.is_dir() or size == path.stat().st_size, path.name
    assert unfinished in synced
    before = disk[appears - 1]
    assert (before == ("rename", output, replaced)) == earlier
    after = [call for call in disk[appears + 1 :] if call[1] == tmp_path]
    assert len(after) == 1
    beside = {path.name for path in tmp_path.iterdir()}
    assert beside == {"out", "source"}
    assert not any("stale" in path.name for path in written)


def test_the_earlier_export_is_removed_when_the_new_one_is_safe(tmp_path, monkeypatch):
    hf_folder.write(tmp_path / "out", given())
    seen = []
    real = os.fsync

    def fsync(handle):
        if os.readlink(f"/proc/self/fd/{handle}") == str(tmp_path):
            seen.append({path.name for path in tmp_path.iterdir()})
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    hf_folder.write(tmp_path / "out", given())
    assert seen == [{"out", ".out.lock", ".out.replaced"}]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_of_weights_has_reached_the_disk_before_it_appears(disk, tmp_path):
    file = tmp_path / "model.safetensors"
    tensor_file.export(given(), file)  # an older one
    disk.clear()
    tensor_file.export(given(), file)
    (first, unfinished, size, _), renamed, (last, folder, *_) = disk
    assert (first, size) == ("sync", file.stat().st_size)
    assert renamed == ("rename", unfinished, file)
    assert (last, folder) == ("sync", tmp_path)
    assert unfinished.parent == tmp_path
    assert unfinished.suffix == ".tmp"
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["thesis.tex", "short", "hf/model.safetensors", "hf/export.json"])
def test_an_export_replaces_an_export_and_no_other_file(name, tmp_path, script, step_dir):
    hf_folder.write(tmp_path / "hf", given())
    (tmp_path / "thesis.tex").write_text("the work of years")
    (tmp_path / "short").write_text("7")
    before = (tmp_path / name).read_bytes()
    said = f"error: {tmp_path / name} is there and is not an export, and is left as it is: give another file\n"
    assert script("export_checkpoint", step_dir, tmp_path / name) == (2, "", said)
    assert (tmp_path / name).read_bytes() == before
    file = tmp_path / "model.safetensors"
    file.touch()  # as mktemp does
    for _ in range(2):
        assert script("export_checkpoint", step_dir, file)[0] == 0
        assert load_file(file).keys() == weights().keys()


@pytest.mark.parametrize("is_there", [False, True])
def test_an_export_through_a_link_keeps_the_link(is_there, tmp_path):
    (tmp_path / "disk").mkdir()
    link, file = tmp_path / "link", tmp_path / "disk" / "model.safetensors"
    link.symlink_to("disk/model.safetensors")
    if is_there:
        file.touch()
    tensor_file.export(given(), link)
    assert link.is_symlink()
    assert load_file(file).keys() == weights().keys()
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def broken(error=ValueError):
    """Weights whose last tensor cannot be read."""
    state = weights()

    def read(name):
        if name == "lm_head.weight":
            raise error("in the middle of it")
        return state[name]

    return dataclasses.replace(given(), read=read)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("write", [hf_folder.write, native.write])
@pytest.mark.parametrize("mine", [False, True], ids=["missing", "empty"])
def test_an_export_that_a_kill_left_under_its_other_name_is_put_back(write, mine, tmp_path):
    write(tmp_path / "out", given())
    before = content(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")  # killed between the two renames
    (tmp_path / ".out.tmp").mkdir()
    if mine:
        (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="in the middle"):
        write(tmp_path / "out", broken())
    assert content(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}

    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    write(tmp_path / "out", given(weights(seed=6)))
    assert content(tmp_path / "out").keys() == before.keys()
    assert content(tmp_path / "out") != before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_the_earlier_export_is_put_back_when_the_new_one_does_not_get_its_name(error, tmp_path, monkeypatch):
    hf_folder.write(tmp_path / "out", given())
    before = content(tmp_path / "out")
    real = os.rename

    def rename(source, target, **options):
        if Path(source).name == ".out.tmp":
            raise error
        real(source, target, **options)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else InputError):
        hf_folder.write(tmp_path / "out", given(weights(seed=6)))
    assert content(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_half_of_an_export_is_not_put_back(tmp_path, monkeypatch):
    """One whose removal was killed after the new one had its name, and that one moved away."""
    hf_folder.write(tmp_path / "out", given())
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)  # the kill
    hf_folder.write(tmp_path / "out", given())
    monkeypatch.undo()
    assert (tmp_path / ".out.replaced").is_dir()
    (tmp_path / "out").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="in the middle"):
        hf_folder.write(tmp_path / "out", broken())
    assert {path.name for path in tmp_path.iterdir()} == {"moved"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_goes_wrong_while_writing_leaves_what_was_there(error, tmp_path):
    hf_folder.write(tmp_path / "hf", given())
    tensor_file.export(given(), tmp_path / "file")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for write, output in ((hf_folder.write, "hf"), (native.write, "ours")):
        with pytest.raises(error):
            write(tmp_path / output, broken(error))
    with pytest.raises(error):
        tensor_file.export(broken(error), tmp_path / "file")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "file"}


@pytest.mark.parametrize("mark", ['{"files": "config.json"}', '{"files": {"config.json": 1}}', "[]", "{", "{}"])
def test_a_mark_that_is_none_protects_what_lies_there(mark, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/export.json").write_text(mark)
    (tmp_path / "hf/config.json").write_text("mine")
    with pytest.raises(InputError, match=r"hf holds config.json, which no export wrote"):
        hf_folder.write(tmp_path / "hf", given())
    assert (tmp_path / "hf/config.json").read_text() == "mine"


def test_a_conversion_takes_the_tokenizer_with_it(tmp_path, tokenizer_file):
    hf_folder.write(tmp_path / "hf", given(), Tokenizer(tokenizer_file))
    native.write(tmp_path / "ours", open_weights(tmp_path / "hf"))
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    mark = read_json(tmp_path / "ours/export.json")
    files = ["export.json", "step-00000000", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert mark == {"tinyllama": __version__, "from": str(tmp_path / "hf"), "files": files}
