import itertools
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from packed import add

from tinyllama import InputError
from tinyllama.data.loader import Batch, Loader, on_device, validation_batches
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import ShardWriter, open_packed, write_manifest
from tinyllama.ops.cross_entropy import IGNORE_INDEX

ROOT = Path(__file__).parents[2]
T = 3  # block_size; block b of a dataset starts with token first + 4 * b, so batches tell which blocks they are
VOCAB = 60_000
BLOCKS = 29


def pack(folder, tokens, num_shards=1, vocab_size=VOCAB):
    folder.mkdir()
    names = [f"shard-{shard:02d}" for shard in range(num_shards)]
    for name, part in zip(names, np.array_split(tokens, num_shards), strict=True):
        with ShardWriter(folder, name, vocab_size) as writer:
            add(writer, part)
            writer.finish(tokenizer_sha256="0", encoder="none", bos=False, eos=False, bos_id=None, eos_id=None)
    write_manifest(folder, names)
    return open_packed(folder)


def numbers(num_blocks, first=0, rest=2):
    return first + np.arange(num_blocks * (T + 1) + rest)  # rest: tokens after the last whole block


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return [pack(folder / "a", numbers(BLOCKS), 3), pack(folder / "b", numbers(11, first=10_000), 2)]


class Located(Mixture):
    """A mixture that fails when it is asked for nothing: a loader that finds no samples would look for ever."""

    def locate(self, samples):
        assert len(samples)
        return super().locate(samples)


def loader(datasets, weights=(0.693584, 0.306416), num_blocks=None, **changes):
    num_blocks = num_blocks or [dataset.num_blocks(T) for dataset in datasets]
    mixture = Located(num_blocks, weights[: len(datasets)], 0, [dataset.fingerprint for dataset in datasets])
    sizes = {"global_batch_size": 8, "micro_batch_size": 2, "rank": 0, "world_size": 1, "start_sample": 0}
    return Loader(datasets, mixture, block_size=T, **{"vocab_size": VOCAB, **sizes, **changes})


def on_cpu(batches):
    """(input_ids, targets, samples) of each batch."""
    for batch in batches:
        for input_ids, targets in on_device([batch], torch.device("cpu")):
            yield input_ids, targets, batch.samples


def rows(batches):
    """{sample number: first token} after checking that each row is a block of consecutive tokens."""
    seen = {}
    for input_ids, targets, samples in on_cpu(batches):
        assert input_ids.dtype == targets.dtype == torch.int64
        assert input_ids.is_contiguous()
        assert targets.is_contiguous()
        for row, target, sample in zip(input_ids.tolist(), targets.tolist(), samples.tolist(), strict=True):
            assert [*row, target[-1]] == list(range(row[0], row[0] + T + 1))
            assert target[:-1] == row[1:]
            assert sample not in seen
            seen[sample] = row[0]
    return seen


def run(datasets, steps, **sizes):
    """What all ranks see in ``steps`` steps, with the number of each sample checked against its place."""
    world, size, micro = sizes["world_size"], sizes["global_batch_size"], sizes["micro_batch_size"]
    seen = {}
    for rank in range(world):
        with loader(datasets, rank=rank, **sizes) as batches:
            got = list(itertools.islice(batches, steps * size // world // micro))
        expected = (np.arange(steps)[:, None] * size + rank * (size // world) + np.arange(size // world)).reshape(
            -1, micro
        )
        assert [batch.samples.tolist() for batch in got] == expected.tolist()
        seen |= rows(got)
    assert sorted(seen) == list(range(steps * size))
    return [seen[sample] for sample in sorted(seen)]


# training


@pytest.mark.parametrize("num_shards", range(1, 21))
def test_order_for_every_world_size_and_micro_batch(tmp_path, num_shards):
    dataset = pack(tmp_path / "data", numbers(BLOCKS), num_shards)
    one = run([dataset], 3 * BLOCKS, global_batch_size=1, micro_batch_size=1, world_size=1)
    blocks = [4 * block for block in range(BLOCKS)]
    assert sorted(one[:BLOCKS]) == sorted(one[BLOCKS : 2 * BLOCKS]) == blocks
    assert one[:BLOCKS] != one[BLOCKS : 2 * BLOCKS]
    assert one[:BLOCKS] != blocks
    for world_size, micro_batch_size in itertools.product(range(1, 9), range(1, 5)):
        size = world_size * micro_batch_size * (1 + num_shards % 2)  # odd: with accumulation
        seen = run(
            [dataset],
            BLOCKS // size + 1,
            global_batch_size=size,
            micro_batch_size=micro_batch_size,
            world_size=world_size,
        )
        assert seen == one[: len(seen)]


def test_two_sources_keep_their_shares_and_epochs(two):
    seen = run(two, 128, global_batch_size=8, micro_batch_size=2, world_size=2)
    first = [token for token in seen if token < 10_000]
    second = [token for token in seen if token >= 10_000]
    assert len(first) == 710  # 1,024 * 0.693584
    for start in range(0, len(first) - BLOCKS, BLOCKS):
        assert sorted(first[start : start + BLOCKS]) == [4 * block for block in range(BLOCKS)]
    for start in range(0, len(second) - 11, 11):
        assert sorted(second[start : start + 11]) == [10_000 + 4 * block for block in range(11)]


@pytest.mark.parametrize("skipped", [1, 5, 127, 128, 1024])  # 1,024 samples, 128 steps, are located at once
def test_starting_at_a_step_equals_skipping_to_it(two, skipped):
    with loader(two) as batches:
        expected = list(itertools.islice(batches, skipped * 4, skipped * 4 + 10))
    with loader(two, start_sample=8 * skipped) as batches:
        got = list(itertools.islice(batches, 10))
    assert [batch.samples.tolist() for batch in got] == [batch.samples.tolist() for batch in expected]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(got, expected, strict=True))


def test_sources_of_different_dtypes_in_one_batch(tmp_path):
    datasets = [
        pack(tmp_path / "a", numbers(5, first=50_000)),  # uint16
        pack(tmp_path / "b", numbers(5), vocab_size=70_000),  # uint32
    ]
    assert {d.dtype.itemsize for d in datasets} == {2, 4}
    with loader(datasets, weights=(1, 1)) as batches:
        seen = rows(itertools.islice(batches, 8))
    assert {token // 50_000 for token in seen.values()} == {0, 1}


@pytest.mark.parametrize("wide_first", [False, True])
def test_ids_above_65535_beside_a_uint16_source(tmp_path, wide_first):
    datasets = [
        pack(tmp_path / "narrow", numbers(5)),
        pack(tmp_path / "wide", numbers(5, first=70_000), vocab_size=80_000),
    ][:: -1 if wide_first else 1]
    blocks = [4 * block for block in range(5)] + [70_000 + 4 * block for block in range(5)]
    with loader(datasets, weights=(1, 1), vocab_size=80_000) as batches:
        seen = rows(itertools.islice(batches, 8))
    assert set(seen.values()) <= set(blocks)
    assert {token // 70_000 for token in seen.values()} == {0, 1}
    sizes = {"block_size": T, "vocab_size": 80_000, "micro_batch_size": 5, "rank": 0, "world_size": 1}
    assert sorted(rows(validation_batches(datasets, max_samples=None, **sizes)).values()) == blocks


@pytest.mark.parametrize("size", [48, 3008, 8208, 20_000])  # 1,024 samples of a rank are located at once
def test_batches_of_thousands_of_samples(two, size):
    world, steps = 2, 3
    mixture = Mixture([BLOCKS, 11], [2, 1], 0, [dataset.fingerprint for dataset in two])
    source, _, block = mixture.locate(np.arange(steps * size))
    first = (source * 10_000 + 4 * block).reshape(steps, world, size // world)
    for rank in range(world):
        sizes = {"global_batch_size": size, "micro_batch_size": 8, "rank": rank, "world_size": world}
        batches = loader(two, weights=(2, 1), **sizes)
        taken = []
        while len(taken) < steps * size // world // 8:
            read = batches._ready.get(timeout=60)  # rather than wait for ever for a thread that finds no samples
            assert not isinstance(read, BaseException), read
            taken += read
        batches.close()
        tokens = torch.cat([batch.tokens for batch in taken]).to(torch.int64)[: steps * size // world]
        assert tokens[:, 0].tolist() == first[:, rank].ravel().tolist()


@pytest.mark.parametrize("signed_first", [False, True])
def test_signed_chunk_files_beside_a_uint16_source(tmp_path, signed_first):
    (tmp_path / "lit").mkdir()
    tokens = numbers(5, rest=0).astype("<i2")
    (tmp_path / "lit/a.bin").write_bytes(struct.pack("<7sQBQ", b"LITPKDS", 1, 3, len(tokens)) + tokens.tobytes())
    datasets = [pack(tmp_path / "a", numbers(5, first=50_000)), open_packed(tmp_path / "lit")]
    with loader(datasets[:: -1 if signed_first else 1], weights=(1, 1)) as batches:
        seen = rows(itertools.islice(batches, 8))
    assert {token // 50_000 for token in seen.values()} == {0, 1}


def test_ids_of_a_uint16_source_alone(tmp_path):
    dataset = pack(tmp_path / "high", numbers(5, first=40_000))
    with loader([dataset]) as batches:
        seen = rows(itertools.islice(batches, 8))
    assert set(seen.values()) == {40_000 + 4 * block for block in range(5)}


def test_a_token_outside_the_vocabulary_beside_another_source(two, tmp_path):
    tokens = numbers(25)
    tokens[4 * 20 + 1] = VOCAB
    dataset = pack(tmp_path / "damaged", tokens, num_shards=2, vocab_size=VOCAB + 1)
    with pytest.raises(InputError, match="damaged: token 60000 at position 81 is outside"):
        validate([two[1], dataset], 1, 36)


def test_a_signed_chunk_file_with_a_negative_id(tmp_path):
    (tmp_path / "lit").mkdir()
    tokens = numbers(2, rest=0).astype("<i4")
    tokens[6] = -3
    (tmp_path / "lit" / "a.bin").write_bytes(struct.pack("<7sQBQ", b"LITPKDS", 1, 4, len(tokens)) + tokens.tobytes())
    dataset = open_packed(tmp_path / "lit")
    sizes = {"block_size": T, "vocab_size": VOCAB, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    message = "lit: token -3 at position 6 is outside the vocabulary of 60000"
    with pytest.raises(InputError, match=message):
        list(validation_batches([dataset], max_samples=None, **sizes))
    with loader([dataset]) as batches, pytest.raises(InputError, match=message):
        list(itertools.islice(batches, 2))


def test_token_outside_the_vocabulary(tmp_path):
    tokens = numbers(BLOCKS)
    tokens[41] = 65_000
    dataset = pack(tmp_path / "damaged", tokens, num_shards=3, vocab_size=65_535)
    batches = loader([dataset])
    with pytest.raises(InputError) as caught:
        list(itertools.islice(batches, BLOCKS))
    assert not any(thread.name == "loader" for thread in threading.enumerate())
    assert list(batches) == []  # and not a wait for a thread that is gone
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'damaged'}: token 65000 at position 41 is outside the vocabulary of 60000")
    assert message.endswith(": prepare the folder again with this model's tokenizer, or correct model.vocab_size")
    assert "\n" not in message


def test_bytes_of_a_shard_that_are_damaged_are_no_other_vocabulary(tmp_path, script):
    pack(tmp_path / "my data", numbers(8, rest=0), num_shards=2)
    with (tmp_path / "my data" / "shard-01.bin").open("r+b") as file:
        file.seek(2 * 5)
        file.write(b"\xff\xff")
    message = (
        f"{tmp_path}/my data: token 65535 at position 21 is outside the vocabulary of 60000: its manifest says so too, "
        f"so bytes are damaged: python scripts/inspect_packed.py '{tmp_path}/my data' --verify says where"
    )
    dataset = open_packed(tmp_path / "my data")
    with loader([dataset]) as batches, pytest.raises(InputError) as caught:
        list(itertools.islice(batches, 4))
    assert str(caught.value) == message
    with pytest.raises(InputError) as caught:
        validate([dataset], 1, 2)
    assert str(caught.value) == message
    code, _, err = script("inspect_packed", tmp_path / "my data", "--verify")
    assert code == 2
    assert f"{tmp_path / 'my data' / 'shard-01'}.bin is not what was written" in err


def test_a_defect_in_the_thread_reaches_the_consumer(two):
    with loader(two, num_blocks=[10**6, 10**6]) as batches, pytest.raises(IndexError, match="block outside"):
        list(itertools.islice(batches, 4))


def test_whatever_ends_the_thread_reaches_the_consumer(two, monkeypatch):
    def stop(*arguments):
        raise SystemExit("not an Exception")

    monkeypatch.setattr(two[0], "blocks", stop)
    batches = loader(two[:1])
    assert isinstance(batches._ready.get(timeout=60), SystemExit)  # iterating would wait for ever for it
    batches.close()


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_close_ends_the_thread(two, taken):
    before = threading.active_count()
    batches = loader(two)
    list(itertools.islice(batches, taken))
    assert threading.active_count() == before + 1
    batches.close()
    batches.close()
    assert threading.active_count() == before
    assert list(batches) == []


def test_the_thread_reads_a_few_batches_ahead_and_no_more(two, monkeypatch):
    reads = []
    blocks = two[0].blocks
    monkeypatch.setattr(two[0], "blocks", lambda *arguments: reads.append(1) or blocks(*arguments))
    with loader(two[:1]) as batches:
        next(batches)
        deadline = time.perf_counter() + 60
        while len(reads) < 6 and time.perf_counter() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(reads) == 6  # one taken, four waiting, one in hand


@pytest.mark.parametrize(("micro_batch_size", "size"), [(1, 64), (3, 63), (48, 48), (96, 96)])
def test_a_read_is_64_samples_or_one_micro_batch(two, monkeypatch, micro_batch_size, size):
    reads = []
    blocks = two[0].blocks
    monkeypatch.setattr(two[0], "blocks", lambda found, *rest: reads.append(len(found)) or blocks(found, *rest))
    with loader(two[:1], micro_batch_size=micro_batch_size, global_batch_size=96 * 3) as batches:
        assert len(next(batches).tokens) == micro_batch_size
    assert reads[0] == size


def test_tokens_travel_as_they_are_packed(two):
    with loader(two) as batches:
        batch = next(batches)
    assert batch.tokens.dtype == torch.uint16
    assert batch.tokens.shape == (2, T + 1)


@pytest.mark.gpu
def test_a_gpu_gets_what_a_cpu_gets(two, tmp_path):
    big = pack(tmp_path / "big", numbers(5, first=65_000), vocab_size=70_000)
    wide = [Batch(torch.from_numpy(big.blocks(np.array([0, 1]), T)).pin_memory(), np.array([0, -1]))]
    with loader(two) as batches:
        taken = list(itertools.islice(batches, 50)) + wide
    assert all(batch.tokens.is_pinned() for batch in taken)
    gpu, cpu = (on_device(taken, torch.device(name)) for name in ("cuda", "cpu"))
    for pair, expected in zip(gpu, cpu, strict=True):
        assert [tensor.tolist() for tensor in pair] == [tensor.tolist() for tensor in expected]


# in a process of its own: what other tests leave behind would be counted, too
MEMORY = """
import gc, sys, tracemalloc
from tinyllama.data.loader import Loader
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import open_packed

batches_a_round, rounds = 1024, 5  # 2,048 samples, of which 1,024 are located at once: as often in each round
datasets = [open_packed(path) for path in sys.argv[1:]]
mixture = Mixture([29, 11], [0.7, 0.3], 0, [dataset.fingerprint for dataset in datasets])
sizes = {"block_size": 3, "vocab_size": 60_000, "global_batch_size": 8, "micro_batch_size": 2}
with Loader(datasets, mixture, **sizes, rank=0, world_size=1, start_sample=0) as batches:
    tracemalloc.start()
    held = []
    for _ in range(rounds):  # the least of a round: what comes and goes depends on how busy the machine is
        gc.collect()
        held.append(min(tracemalloc.get_traced_memory()[0] for _ in range(batches_a_round) if next(batches)))
# after a first round, in which modules are imported: the smallest object kept for each batch takes 24 bytes with its
# place in a list
assert held[-1] - held[1] < 16 * batches_a_round * (rounds - 2), held
"""


def test_memory_does_not_grow_with_the_batches(two):
    subprocess.run([sys.executable, "-c", MEMORY, *(dataset.path for dataset in two)], check=True, cwd=ROOT)


# validation


def validate(datasets, world_size, micro_batch_size, max_samples=None):
    """Rows of all ranks, and the sum of the targets that count."""
    seen, total, lengths = {}, 0, set()
    for rank in range(world_size):
        sizes = {"block_size": T, "vocab_size": VOCAB, "micro_batch_size": micro_batch_size}
        ranks = list(validation_batches(datasets, rank=rank, world_size=world_size, max_samples=max_samples, **sizes))
        lengths.add(len(ranks))
        for batch, (input_ids, targets, samples) in zip(ranks, on_cpu(ranks), strict=True):
            assert input_ids.shape == targets.shape == (micro_batch_size, T)
            real = samples >= 0
            assert (samples[real] % world_size == rank).all()
            assert (targets[~real] == IGNORE_INDEX).all()
            assert (input_ids[~real] == 0).all()
            total += int(targets[targets != IGNORE_INDEX].sum())
            part = rows([Batch(batch.tokens[real], samples[real])])
            assert not part.keys() & seen.keys()
            seen |= part
    assert len(lengths) == 1  # a collective in every batch of every rank
    return seen, total, lengths.pop()


def test_validation_is_the_same_for_every_world_size_and_micro_batch(two):
    one, total, _ = validate(two, 1, 1)
    assert list(one.values()) == [4 * block for block in range(BLOCKS)] + [10_000 + 4 * block for block in range(11)]
    assert total == sum(3 * first + 6 for first in one.values())
    for world_size, micro_batch_size in itertools.product(range(1, 9), range(1, 5)):
        assert validate(two, world_size, micro_batch_size)[:2] == (one, total)


@pytest.mark.parametrize("max_samples", [None, 1, 3, 10])
def test_a_validation_batch_has_rows_of_one_dataset(two, max_samples):
    for world_size, micro_batch_size in itertools.product((1, 2, 3), (1, 3)):
        sizes = {"block_size": T, "vocab_size": VOCAB, "micro_batch_size": micro_batch_size, "world_size": world_size}
        for rank in range(world_size):
            batches = list(validation_batches(two, rank=rank, max_samples=max_samples, **sizes))
            assert [batch.source for batch in batches] == sorted(batch.source for batch in batches)
            for batch in batches:
                real = batch.tokens.long()[torch.from_numpy(batch.samples >= 0)]
                assert ((real >= 10_000) == bool(batch.source)).all()  # the ids of the second begin there


def test_validation_with_fewer_samples_than_rows(tmp_path):
    dataset = pack(tmp_path / "five", numbers(5))
    one, total, _ = validate([dataset], 1, 1)
    assert validate([dataset], 3, 2) == (one, total, 1)  # 5 samples in 6 rows
    assert validate([dataset], 8, 4) == (one, total, 1)  # ranks 5, 6 and 7 have none


def test_validation_samples_are_spread_evenly(two):
    seen, _, batches = validate(two, 2, 2, max_samples=5)
    assert seen == {0: 0, 1: 4 * 8, 2: 4 * 16, 3: 4 * 24, 4: 10_000 + 4 * 3}  # blocks 0, 8, 16, 24, 32 of 40
    assert batches == 2
    blocks = [0, 5, 11, 17, 22, 28, 34]  # 40 / 7 apart
    expected = [4 * block if block < BLOCKS else 10_000 + 4 * (block - BLOCKS) for block in blocks]
    assert list(validate(two, 1, 2, max_samples=7)[0].values()) == expected
    assert validate(two, 2, 2, max_samples=40) == validate(two, 2, 2, max_samples=1000) == validate(two, 2, 2)


def test_validation_token_outside_the_vocabulary(tmp_path):
    tokens = numbers(5)
    tokens[9] = VOCAB
    dataset = pack(tmp_path / "other", tokens, vocab_size=VOCAB + 1)
    with pytest.raises(InputError, match="other: token 60000 at position 9 is outside the vocabulary of 60000"):
        validate([dataset], 1, 2)
