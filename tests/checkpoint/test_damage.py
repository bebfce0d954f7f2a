"""Damage to a step, by a generator: each try is refused in one line or loads what was saved, and takes no memory."""

import itertools
import json
import math
import os
import pickle
import random
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from checkpoint_rank import CONFIG
from checkpoints import load_weights

from tinyllama.checkpoint import hashes, reader
from tinyllama.checkpoint.state import FIELDS, TrainState
from tinyllama.checkpoint.writer import Checkpointer
from tinyllama.config.args import PretrainArgs
from tinyllama.train.anomaly import WINDOW

SMALL = (".metadata", "config.yaml", "state.json")
TENSORS = "__0_0.distcp"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small step with every field of a state.json."""
    folder = tmp_path_factory.mktemp("saved")
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    try:
        metadata = {
            "data": {"seed": 1},
            "model": asdict(CONFIG),
            "bos_id": 1,
            "eos_id": 2,
            "tokenizer_sha256": "1" * 64,
        }
        metadata |= {"eos_ids": [2], "bos": True}
        metadata |= {"wandb_id": "k2j1", "converted_from": "/somewhere", "origin": {"resume": None}}
        model = torch.nn.Linear(3, 2)
        saver = Checkpointer(
            folder,
            config=yaml.safe_dump({"model": asdict(CONFIG), "train": {"init_from": None}}),
            metadata=metadata,
            keep_last=None,
            keep_every=None,
            asynchronous=False,
        )
        state = TrainState(7, 56, 448, validated=4, skipped=2, skipped_in_a_row=1, recent=[[3.5, 1.25], [3.25, 1.0]])
        step_dir = saver.save(state, model, torch.optim.AdamW(model.parameters(), fused=True))
    finally:
        dist.destroy_process_group()
    assert step_dir is not None
    return step_dir


@pytest.fixture
def step(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / saved.name))


@pytest.fixture
def old(step: Path) -> Path:
    """The same, as a version saved it that had no hashes."""
    (step / "state.json").write_text(json.dumps(reader.read_state(step)))
    assert reader.read_hashes(step) is None
    return step


def refusal(step: Path) -> str | None:
    """Why ``step`` is refused; None if it is loaded."""
    why = reader.problem(step)
    if why is None:
        try:
            reader.verify(step, "give another")
            weights = load_weights(step)
            assert all(tensor.numel() <= 6 for tensor in weights.values())
        except reader.DamagedError as error:
            (why,) = error.args
    if why is not None:
        assert why.isprintable()
        assert 0 < len(why) < 1000
    return why


def content(step: Path) -> Any:
    """All that a run takes from a step."""
    state, settings, tensors = reader.read_state(step), reader.read_settings(step), load_weights(step)
    return json.dumps([state, settings], sort_keys=True), {name: tensor.tolist() for name, tensor in tensors.items()}


class Tally:
    """Counts the tries, and what came of them."""

    def __init__(self, right: Any) -> None:
        self.right, self.tries, self.refused, self.wrong = right, 0, 0, []

    def take(self, step: Path, what: object) -> None:
        self.tries += 1
        if refusal(step) is not None:
            self.refused += 1
        elif content(step) != self.right:
            self.wrong.append(what)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """No test takes more than 300 MB, whatever a file declares."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def bytes_damaged(step: Path, names: tuple[str, ...], stride: int, values: int) -> Iterator[tuple[str, int, int]]:
    """Put other values, a flipped bit first, at every ``stride``-th byte of the files, one after the other."""
    rng = random.Random(5)
    for name in names:
        whole = (step / name).read_bytes()
        for at in range(rng.randrange(stride), len(whole), stride):
            flipped = whole[at] ^ 1 << rng.randrange(8)
            others = rng.sample([value for value in range(256) if value not in (whole[at], flipped)], values - 1)
            for value in (flipped, *others):
                (step / name).write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
                yield name, at, value
        (step / name).write_bytes(whole)


def check_bytes(step: Path, stride: int, values: int, tensor_stride: int) -> tuple[int, int]:
    tally = Tally(content(step))
    for what in itertools.chain(
        bytes_damaged(step, SMALL, stride, values), bytes_damaged(step, (TENSORS,), tensor_stride, values)
    ):
        tally.take(step, what)
    assert tally.wrong == []
    assert refusal(step) is None
    return tally.tries, tally.refused


def test_a_damaged_byte_is_refused_or_harmless(step: Path) -> None:
    tries, refused = check_bytes(step, stride=3, values=1, tensor_stride=101)
    assert tries > 1000
    assert refused > 0.95 * tries  # the rest is white space in state.json


@pytest.mark.slow
def test_every_damaged_byte_is_refused_or_harmless(step: Path) -> None:
    tries, refused = check_bytes(step, stride=1, values=4, tensor_stride=7)
    print(f"{tries} tries, {refused} refused")
    assert tries > 20_000
    assert refused > 0.95 * tries


def check_bytes_of_an_old_step(old: Path, stride: int, values: int) -> int:
    tries = 0
    for _ in bytes_damaged(old, SMALL, stride, values):
        refusal(old)  # there is nothing to compare with, but nothing happens
        tries += 1
    return tries


def test_a_damaged_byte_of_a_step_without_hashes_does_nothing(old: Path) -> None:
    assert check_bytes_of_an_old_step(old, stride=7, values=1) > 400


@pytest.mark.slow
def test_no_damaged_byte_of_a_step_without_hashes_does_anything(old: Path) -> None:
    assert check_bytes_of_an_old_step(old, stride=1, values=4) > 12_000


@pytest.mark.parametrize("name", SMALL)
def test_a_file_cut_short_anywhere_is_refused(name: str, step: Path) -> None:
    size = (step / name).stat().st_size
    for length in range(size - 1, -1, -max(size // 40, 1)):
        os.truncate(step / name, length)
        assert refusal(step) is not None, length


def test_a_flipped_bit_in_the_tensors_is_named(step: Path) -> None:
    for _ in bytes_damaged(step, (TENSORS,), stride=97, values=1):
        assert reader.problem(step) is None
        with pytest.raises(reader.DamagedError) as error:
            reader.verify(step, "give another")
        assert str(error.value) == f"{step} is damaged ({TENSORS} does not match its hash): give another"


VALUES = (
    None,
    True,
    -2,
    1.5,
    "x\x00",
    [],
    {},
    2**63,
    10**400,
    math.nan,
    [[1.0]],
    [[1.0, math.inf]],
    {"a": 1},
    "y" * 9999,
)
# what is no damage: the field is optional, or free
GOOD: dict[str, list[Any]] = {
    "recent": [[]],
    "decay_batch": [1.5],
    "data": [None, {}, {"a": 1}],
    "model": [None, {}, {"a": 1}],
    **dict.fromkeys(("bos_id", "eos_id", "tokenizer_sha256"), [None]),
    "eos_ids": [[]],
    "bos": [None, True],
    "converted_from": ["x\x00", "y" * 9999],
    "versions": [{}],
    "origin": [{}],
}


def test_every_field_of_a_state_must_be_what_a_run_has_saved(step: Path) -> None:
    state, hashed, whole = (
        reader.read_state(step),
        reader.read_hashes(step),
        json.loads((step / "state.json").read_text()),
    )
    assert hashed is not None
    assert state.keys() == FIELDS.keys() | {"wandb_id"}
    for name, value in itertools.product(FIELDS, VALUES):
        if json.dumps(value) == json.dumps(state[name]):
            continue  # no damage
        plain = whole | {name: value}
        forged = hashes.seal(state | {name: value}, hashed)
        for payload, good in ((json.dumps(plain).encode(), False), (forged, value in GOOD.get(name, []))):
            (step / "state.json").write_bytes(payload)
            assert (refusal(step) is None) == good, (name, value)


# of 7 steps, 56 samples, and 448 tokens, which are the samples' blocks of 8
NUMBERS: dict[str, tuple[dict[str, Any], str | None]] = {
    "as many losses as are kept": ({"recent": [[5.0, 1.0]] * WINDOW}, None),
    "more of them": ({"recent": [[5.0, 1.0]] * (WINDOW + 1)}, "its state.json says recent [[5.0, 1.0], [5.0, "),
    "a warm-up that ends now": ({"warmup_samples": 56}, None),
    "a warm-up that ends later": ({"warmup_samples": 57}, "its state.json says warmup_samples 57 of 56 samples"),
    "more samples": ({"samples": 1000}, "its state.json says tokens 448 of 1000 samples of 8 tokens"),
    "more tokens": ({"tokens": 2**61}, f"its state.json says tokens {2**61} of 56 samples of 8 tokens"),
    "more of both": ({"samples": 1000, "tokens": 8000}, None),
    "blocks of text": (
        {"samples": 2**61, "model": {"block_size": "8"}},
        f"its state.json says tokens 448 of {2**61} samples of '8' tokens",
    ),
    "blocks of which nothing is said": ({"model": None, "tokens": 449}, None),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_the_numbers_of_a_step_without_hashes_must_fit_each_other(case: str, old: Path) -> None:
    numbers, why = NUMBERS[case]
    (old / "state.json").write_text(json.dumps(reader.read_state(old) | numbers))
    found = refusal(old)
    assert (found and found[: len(why or "")]) == why


def test_every_group_of_the_settings_holds_settings(old: Path) -> None:
    settings = reader.read_settings(old)
    for group, value in itertools.product((field.name for field in fields(PretrainArgs)), (5, None, "x", [1])):
        (old / "config.yaml").write_text(yaml.safe_dump(settings | {group: value}))
        is_group = group not in ("out_dir", "dry_run")
        assert refusal(old) == (f"its config.yaml does not hold settings of {group}" if is_group else None)


def test_the_hashes_must_be_there_or_not_at_all(step: Path) -> None:
    state, whole = reader.read_state(step), json.loads((step / "state.json").read_text())
    for name, value in itertools.product(("hashes", "hash_algorithm"), VALUES[1:]):
        (step / "state.json").write_text(json.dumps(whole | {name: value}))
        assert refusal(step) == "state.json does not match its hash", value
    for name in ("hashes", "hash_algorithm"):
        (step / "state.json").write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        assert refusal(step) == "state.json does not match its hash"
    for name in whole["hashes"].keys() - {"state.json"}:
        others = {key: value for key, value in whole["hashes"].items() if key not in (name, "state.json")}
        (step / "state.json").write_bytes(hashes.seal(state, others))
        assert name in (refusal(step) or "")


@pytest.mark.parametrize("name", ["/dev/zero", "../outside", "other.distcp", "x" * 300])
def test_only_the_files_of_the_step_are_hashed(name: str, step: Path) -> None:
    hashed = reader.read_hashes(step)
    assert hashed is not None
    (step / "state.json").write_bytes(hashes.seal(reader.read_state(step), hashed | {name: "0" * 32}))
    assert (reader.problem(step) or "").startswith("its state.json does not have the hashes of its files: ")
    with pytest.raises(reader.DamagedError):
        reader.verify(step, "give another")


# what may stand in the place of a file, and has no end or no content
PLACES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "a pipe": os.mkfifo,
    "a folder": lambda path: path.mkdir(),
    "a device without an end": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to the file": lambda path: path.symlink_to(path.with_name(f"{path.name}.moved")),
    "a file of 4 TB": lambda path: (path.touch(), os.truncate(path, 2**42)),
}


@pytest.mark.parametrize("name", [*SMALL, TENSORS])
@pytest.mark.parametrize("place", PLACES)
def test_only_regular_files_of_the_step_are_read(name: str, place: str, step: Path, old: Path) -> None:
    file = step / name
    file.rename(file.with_name(f"{name}.moved"))
    PLACES[place](file)
    assert name in (refusal(step) or "")


Change = Callable[[Any], object]
TENSOR, WEIGHT = "optimizer.exp_avg.weight", (2, 3)


def stored(metadata: Any) -> Any:
    """Where the moment of the weight lies."""
    return next(entry for index, entry in metadata.storage_data.items() if index.fqn == TENSOR)


def shape(*sizes: int) -> Change:
    return lambda metadata: setattr(metadata.state_dict_metadata[TENSOR], "size", torch.Size(sizes))


def path(name: object) -> Change:
    return lambda metadata: setattr(stored(metadata), "relative_path", name)


def chunk(**parts: object) -> Change:
    return lambda metadata: vars(metadata.state_dict_metadata[TENSOR].chunks[0]).update(parts)


METADATA: dict[str, Change] = {
    "too many rows": shape(2**40, 3),
    "too many columns": shape(2, 2**40),
    "too few rows": shape(1, 3),
    "no rows": shape(0, 3),
    "rows before the first": shape(-2, 3),
    "other dimensions": shape(6),
    "no dimension": shape(),
    "a shape that is none": lambda metadata: setattr(metadata.state_dict_metadata[TENSOR], "size", [2, 3]),
    "a dtype that is none": lambda metadata: setattr(metadata.state_dict_metadata[TENSOR].properties, "dtype", "x"),
    "no chunks": lambda metadata: metadata.state_dict_metadata[TENSOR].chunks.clear(),
    "a chunk twice": lambda metadata: metadata.state_dict_metadata[TENSOR].chunks.extend(
        metadata.state_dict_metadata[TENSOR].chunks
    ),
    "a chunk that is none": lambda metadata: metadata.state_dict_metadata[TENSOR].chunks.append(5),
    "a chunk elsewhere": chunk(offsets=torch.Size((1, 0))),
    "a chunk of columns": chunk(sizes=torch.Size((2, 2))),
    "a chunk that is too long": chunk(sizes=torch.Size((3, 3))),
    "a tensor that is none": lambda metadata: metadata.state_dict_metadata.update({TENSOR: 5}),
    "a name that is none": lambda metadata: metadata.state_dict_metadata.update({5: 5}),
    "no tensors": lambda metadata: setattr(metadata, "state_dict_metadata", None),
    "no storage": lambda metadata: setattr(metadata, "storage_data", None),
    "no storage of a tensor": lambda metadata: metadata.storage_data.clear(),
    "before the file": lambda metadata: setattr(stored(metadata), "offset", -1),
    "beyond the file": lambda metadata: setattr(stored(metadata), "offset", 2**60),
    "more than the file": lambda metadata: setattr(stored(metadata), "length", 2**60),
    "less than the tensor": lambda metadata: setattr(stored(metadata), "length", 23),
    "less than nothing": lambda metadata: setattr(stored(metadata), "length", -1),
    "half of a byte": lambda metadata: setattr(stored(metadata), "offset", 0.5),
    "transformed": lambda metadata: setattr(stored(metadata), "transform_descriptors", ["zstd"]),
    "a file above": path(f"../step-00000007/{TENSORS}"),
    "a file below": path(f"./{TENSORS}"),
    "the folder": path("."),
    "the folder above": path(".."),
    "no file": path(""),
    "any file": path("/etc/passwd"),
    "a file that is not there": path("__1_0.distcp"),
    "a name with an end": path(f"{TENSORS}\x00"),
    "a name of bytes": path(TENSORS.encode()),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_cannot_be_is_refused(case: str, old: Path) -> None:
    metadata = pickle.loads((old / ".metadata").read_bytes())
    assert stored(metadata).relative_path == TENSORS
    METADATA[case](metadata)
    (old / ".metadata").write_bytes(pickle.dumps(metadata))
    assert reader.problem(old) is not None
    assert refusal(old) is not None


# pickles that declare, in a few bytes, more than they have, and others that are none
PICKLES = {
    "bytes": b"B" + struct.pack("<I", 2**31),
    "more bytes": b"\x8e" + struct.pack("<Q", 2**40),
    "a bytearray": b"\x96" + struct.pack("<Q", 2**40),
    "a text": b"\x8d" + struct.pack("<Q", 2**62),
    "a number": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "a negative length": b"\x8b" + struct.pack("<i", -5),
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "a place in the memo": b"Nr" + struct.pack("<I", 2**31) + b".",
    "a place in the memo, in digits": b"Np4000000000\n.",
    "a place in the memo that is not there": b"j" + struct.pack("<I", 2**31) + b".",
    "digits": b"L" + b"9" * 6000 + b"L\n.",
    "nests": b"(" * 100_000 + b"t" * 100_000 + b".",
    "an extension": b"\x82\x01.",
    "a persistent id": b"Pid\n.",
    "an integer": b"K\x05.",
    "nothing": b"N.",
    "no end": b"N",
    "empty": b"",
    "a class": b"ctorch.distributed.checkpoint.metadata\nMetadata\n.",
    "a Metadata of nothing": b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81.",
    "a dtype that is called": b"ctorch\nfloat32\n)R.",
    "a module's attribute": b"\x80\x04\x8c\x05torch\x8c\x08Size.mro\x93.",
    "random bytes": random.Random(1).randbytes(5000),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_that_declare_what_they_do_not_have_are_refused(case: str, old: Path) -> None:
    (old / ".metadata").write_bytes(PICKLES[case])
    assert "metadata" in (refusal(old) or "")


TEXTS: dict[str, dict[str, str | bytes]] = {
    "state.json": {
        "nests": "[" * 100_000,
        "nested fields": '{"step":' * 100_000,
        "a long number": '{"step": ' + "9" * 6000 + "}",
        "no number": '{"step": NaN, "samples": 1, "tokens": 1}',
        "no text": b'{"step": "\xff\xfe"}',
        "another encoding": '{"step": 7}'.encode("utf-16"),
        "zeros": bytes(500),
        "empty": "",
        "a list": "[7]",
        "no step": '{"samples": 1, "tokens": 1}',
        "nothing": "null",
    },
    "config.yaml": {
        "nests": "[" * 3000,
        "nested mappings": "{a: " * 5000,
        "indented": "".join(" " * i + "a:\n" for i in range(2000)),
        "aliases": "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghij")),
        "an alias of itself": "model: &m [*m]",
        "a long number": "model: {n_layer: " + "9" * 6000 + "}",
        "an object": "model: !!python/object/apply:os.system [ls]",
        "a tag": "model: !!int ''",
        "a time": "model: !!timestamp x",
        "a date": "model: 2001-99-99",
        "a key that is a list": "? [model]\n: 1",
        "a tab": "model:\n\tname: x",
        "no text": b"model: \xff",
        "a control": "model: \x01",
        "zeros": bytes(500),
        "empty": "",
        "a list": "[model]",
        "a word": "model",
        "no sizes": "model:",
        "sizes of a wrong type": "model: {name: x, n_layer: '2'}",
        "sizes that are too large": "model: {name: x, n_layer: 1000000000000}",
        "unknown sizes": "model: {name: x, layers: 5}",
        "settings that are none": "train: 5\nmodel: {name: x}",
    },
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in TEXTS for case in TEXTS[name]])
def test_texts_that_are_none_of_ours_are_refused(name: str, case: str, old: Path) -> None:
    text = TEXTS[name][case]
    (old / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refusal(old) is not None
