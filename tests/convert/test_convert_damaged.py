"""Damaged and hostile folders and files, by a generator: each is refused in one line, or is the model that it was."""

import json
import random

import pytest
import torch
from models import CONFIG, given, to_hf, weights
from safetensors.torch import load_file

from tinyllama import InputError
from tinyllama.convert import hf_folder
from tinyllama.convert.tokenizer_files import write_tokenizer
from tinyllama.convert.weights import open_weights
from tinyllama.tokenizer import Tokenizer

WEIGHTS = weights()

# as they stand in a file of JSON
VALUES = [
    *("null", "true", "-1", "0", "2.5", "NaN", "Infinity", "1e308", "[]", "{}", '"x"', '[{"x": [null]}]'),
    *("9" * 30, "9" * 4000, json.dumps("\n\x1b[31m\u202e" + "y" * 5000), '"\\ud800"', json.dumps(["z" * 300] * 300)),
]
UNREADABLE = ["9" * 5000, "[" * 100_000 + "]" * 100_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "", "{", '"\udcff"']

# what may be anything, as a wrong type of it counts as unknown or it says nothing about the weights
FREE = {
    "config.json": {"rope_theta"},  # rope_parameters has a theta
    "generation_config.json": {"bos_token_id", "eos_token_id", "max_length", "suppress_tokens"},
    "export.json": {"tinyllama", "step", "tokens", "bos", "tokenizer_sha256", "files"},
    "tokenizer_config.json": {
        *("tokenizer_class", "unk_token", "pad_token", "padding_side", "add_bos_token", "add_eos_token"),
        *("clean_up_tokenization_spaces", "model_max_length", "model_input_names"),
    },
    "model.safetensors.index.json": {"metadata", "metadata/total_size"},
}
IDS = {"null", "-1", "0", "9" * 30, "9" * 4000}  # those beyond the vocabulary count as unknown
# what may be nothing, or another number
CHOSEN = {
    "rms_norm_eps": {"2.5"},
    "architectures": {"null", "0", "[]", "{}"},
    **dict.fromkeys(("rope_scaling", "rope_parameters"), {"null", "{}"}),
    **dict.fromkeys(("head_dim", "dtype", "torch_dtype", "bos_token", "eos_token"), {"null"}),
    **{"bos_token_id": IDS, "eos_token_id": IDS | {"[]"}},
    "model/name": {'"x"', *VALUES[14:16]},
    "model/block_size": set(VALUES),  # config.json has the sizes
}


@pytest.fixture
def folder(tmp_path):
    hf_folder.write(tmp_path / "hf", given(), shard_bytes=100_000)
    return tmp_path / "hf"


def is_refused(read):
    """Whether ``read`` raises InputError: a line a problem, short, that a terminal can show."""
    try:
        read()
        return False
    except InputError as error:
        problems = error.args
    assert problems
    for problem in problems:
        assert problem.isprintable(), problem
        assert len(problem) < 1000, problem
    return True


def is_damaged(path):
    """Whether the folder at ``path`` is refused; if it is not, it has the weights that it had."""

    def read():
        for name, tensor in open_weights(path).load().items():
            assert torch.equal(tensor, WEIGHTS[name]), name

    return is_refused(read)


def with_value(text, path, value):
    """The JSON object ``text`` with the JSON ``value`` where ``path`` leads."""
    content = json.loads(text)
    *parents, last = path
    inside = content
    for parent in parents:
        inside = inside[parent]
    inside[last] = "the value"
    return json.dumps(content).replace('"the value"', value)


def paths(content):
    for key, value in content.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, below) for below in list(value)[:3])


@pytest.mark.parametrize("name", FREE)
def test_every_field_with_every_value(name, folder, tokenizer_file):
    if name == "tokenizer_config.json":
        write_tokenizer(folder, Tokenizer(tokenizer_file), 96)
        (folder / "tokenizer.model").unlink()  # so that tokenizer.json is read
    file = folder / name
    text = file.read_text()
    accepted, expected, tried = set(), set(), 0
    for path in paths(json.loads(text)):
        key = "/".join(path)
        for value in VALUES:
            file.write_text(with_value(text, path, value))
            tried += 1
            if not is_damaged(folder):
                accepted.add((key, value))
        allowed = VALUES if key in FREE[name] else CHOSEN.get(key, ())
        expected |= {(key, value) for value in allowed}
    assert accepted == expected
    for value in (*VALUES, *UNREADABLE):
        file.write_bytes(value.encode("utf-8", "surrogateescape"))
        whole = {"generation_config.json": {"{}"}, "tokenizer_config.json": {"{}"}}.get(name, set())
        assert is_damaged(folder) != (value in whole or name == "export.json"), value[:99]
    file.write_text(text)
    assert not is_damaged(folder)
    assert tried > 50


def safetensors(header, payload=b""):
    header = header.encode("utf-8", "surrogateescape")
    return len(header).to_bytes(8, "little") + header + payload


def one_tensor(name="model.norm.weight", dtype="F32", shape=(1,), offsets=(0, 4)):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return safetensors(json.dumps({name: entry}), bytes(4))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\0" * 8, b"\xff" * 8, *map(safetensors, ("", "{}", "[]", *UNREADABLE))),
        *(one_tensor(f"model.layers.{'9' * 5000}.weight"), one_tensor("\n\x1b[31m" + "z" * 5000)),
        *(one_tensor(shape=[1] * 5000), one_tensor(shape=[2**62, 2**62]), one_tensor(shape=[2**62, 0])),
        *(one_tensor(offsets=[0, 2**63]), one_tensor(dtype="F6_E2M3"), one_tensor(dtype="F64"), one_tensor(dtype="x")),
    ],
)
def test_safetensors_that_are_none_or_claim_too_much(content, tmp_path):
    hf_folder.write(tmp_path / "hf", given())
    (tmp_path / "hf/model.safetensors").write_bytes(content)
    assert is_damaged(tmp_path / "hf")


def test_a_tensor_that_a_header_names_twice_is_refused(tmp_path):
    hf_folder.write(tmp_path / "hf", given())
    file = tmp_path / "hf/model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    norm, other = "model.norm.weight", "model.layers.0.input_layernorm.weight"
    assert header[norm]["shape"] == header[other]["shape"]
    first = json.dumps({norm: header[other]})[:-1]  # the reader of safetensors takes the last one, and says nothing
    file.write_bytes(safetensors(f"{first}, {json.dumps(header)[1:]}", content[end:]))
    assert torch.equal(load_file(file)[norm], WEIGHTS["transformer.ln_f.weight"])
    said = rf"^{file} cannot be read \(the key {norm} is there twice\): fetch it whole \(git lfs pull\)$"
    with pytest.raises(InputError, match=said):
        open_weights(tmp_path / "hf")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_key_that_is_twice_in_a_json_is_refused(name, folder):
    file = folder / name
    text = file.read_text()
    key, value = next((key, value) for key, value in json.loads(text).items())
    file.write_text(f"{{{json.dumps(key)}: {json.dumps(value)},{text.lstrip()[1:]}")
    assert json.loads(file.read_text()) == json.loads(text)
    with pytest.raises(InputError, match=rf"^{file} cannot be read as JSON \(the key {key} is there twice\): "):
        open_weights(folder)


def test_any_byte_of_the_header_of_safetensors(tmp_path):
    hf_folder.write(tmp_path / "hf", given())
    file = tmp_path / "hf/model.safetensors"
    content = file.read_bytes()
    generator, end = random.Random(0), 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for place in [*range(8), *generator.sample(range(8, end), 300)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        refused += is_damaged(tmp_path / "hf")
    assert refused > 250  # the others are in what says nothing about the weights


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ["bin", "upstream"])
def test_any_byte_of_a_pickle_and_any_cut(kind, legacy, tmp_path):
    """The numbers of a tensor have no hash in the older format: that the weights are the same cannot be asked."""
    state = weights() if kind == "upstream" else to_hf(weights(), CONFIG)
    file = tmp_path / ("lit_model.pth" if kind == "upstream" else "pytorch_model.bin")
    path = file
    if kind == "bin":
        hf_folder.write(tmp_path / "hf", given())
        (tmp_path / "hf/model.safetensors").unlink()
        path, file = tmp_path / "hf", tmp_path / "hf" / file.name
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    content = file.read_bytes()
    generator = random.Random(1)
    places = [*generator.sample(range(4000), 60), *generator.sample(range(len(content) - 3000, len(content)), 40)]
    tried = refused = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] = generator.randrange(256)
        for version in (damaged, damaged[:place]):
            file.write_bytes(version)
            tried += 1
            refused += is_refused(lambda: open_weights(path, CONFIG).load())
    assert refused > tried // 2


@pytest.mark.parametrize("name", ["pytorch_model.bin", "lit_model.pth"])
def test_any_bit_of_the_numbers_in_a_pickle(name, tmp_path):
    """Each file in the archive that torch.save makes has a checksum, which torch.load does not look at."""
    hf_folder.write(tmp_path / "hf", given())
    (tmp_path / "hf/model.safetensors").unlink()
    file = tmp_path / "hf" / name
    path = file if name == "lit_model.pth" else tmp_path / "hf"
    torch.save(weights() if name == "lit_model.pth" else to_hf(weights(), CONFIG), file)
    content = file.read_bytes()

    def read():
        for key, tensor in open_weights(path, CONFIG).load().items():
            assert torch.equal(tensor, WEIGHTS[key]), key

    assert not is_refused(read)
    generator, refused = random.Random(3), 0
    for place in generator.sample(range(10_000, len(content) - 20_000), 40):
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        refused += is_refused(read)
    assert refused > 30  # the others are between the numbers
    place = content.index(weights()["transformer.ln_f.weight"].numpy().tobytes())
    file.write_bytes(content[:place] + b"\0\0\0\0" + content[place + 4 :])
    with pytest.raises(
        InputError, match=rf"{name} cannot be loaded \(.* does not match its checksum\): give a complete"
    ):
        open_weights(path, CONFIG)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_any_byte_of_a_tokenizer(name, tmp_path, tokenizer_file):
    write_tokenizer(tmp_path, Tokenizer(tokenizer_file), 96)
    file = tmp_path / name
    content = file.read_bytes()
    generator = random.Random(2)
    for place in generator.sample(range(len(content)), 150):
        damaged = bytearray(content)
        damaged[place] = generator.randrange(256)
        for version in (damaged, damaged[:place]):
            file.write_bytes(version)
            is_refused(lambda: Tokenizer(file).encode("a text"))
