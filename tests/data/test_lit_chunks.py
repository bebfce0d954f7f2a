import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from tinyllama import InputError
from tinyllama.data.packed import open_packed


def write_chunk(path: Path, tokens, code=8, dtype="<u2", magic=b"LITPKDS", version=1) -> Path:
    tokens = np.asarray(tokens, dtype=dtype)
    header = magic + struct.pack("<Q", version) + struct.pack("<B", code) + struct.pack("<Q", len(tokens))
    path.write_bytes(header + tokens.tobytes())
    return path


def test_lit_chunks_read_as_one_stream(tmp_path):
    # as lit_gpt.packed_dataset.PackedDatasetBuilder names them; written out of order
    write_chunk(tmp_path / "train_slim_1_0000000000.bin", [7, 8])
    write_chunk(tmp_path / "train_slim_0_0000000001.bin", [4, 5, 65535])
    write_chunk(tmp_path / "train_slim_0_0000000000.bin", [1, 2, 3])
    (tmp_path / "notes.txt").write_text("of another kind")
    (tmp_path / "recycle_bin").write_text("of another kind")
    dataset = open_packed(tmp_path)
    assert dataset.read(0, 8).tolist() == [1, 2, 3, 4, 5, 65535, 7, 8]
    assert dataset.blocks(np.array([1, 0]), 2).tolist() == [[4, 5, 65535], [1, 2, 3]]
    assert (dataset.tokens, dataset.vocab_size, dataset.documents, dataset.tokenizer_sha256) == (8, None, None, None)
    assert (dataset.max_token, dataset.bos, dataset.eos, dataset.eos_id) == (None, None, None, None)


@pytest.mark.parametrize(
    ("code", "dtype", "last"),
    [(1, "u1", 255), (2, "i1", 127), (3, "<i2", 32767), (4, "<i4", 2**31 - 1), (5, "<i8", 2**40), (8, "<u2", 65535)],
)
def test_lit_chunk_dtypes(tmp_path, code, dtype, last):
    write_chunk(tmp_path / "a.bin", [0, last], code, dtype)
    dataset = open_packed(tmp_path)
    assert dataset.dtype == np.dtype(dtype)
    assert dataset.read(0, 2).tolist() == [0, last]


def test_lit_chunk_errors_are_told_together(tmp_path):
    write_chunk(tmp_path / "a.bin", [1, 2], magic=b"NOTPKDS")
    write_chunk(tmp_path / "b.bin", [1, 2])
    write_chunk(tmp_path / "c.bin", [1, 2], code=4, dtype="<i4")
    write_chunk(tmp_path / "d.bin", [1, 2], version=2)
    write_chunk(tmp_path / "e.bin", [1, 2], code=6, dtype="<f4")
    write_chunk(tmp_path / "e2.bin", [1, 2], code=7, dtype="<f8")
    write_chunk(tmp_path / "e3.bin", [1, 2], version=0)
    write_chunk(tmp_path / "e4.bin", [1, 2], magic=b"LITPKDT")
    whole = write_chunk(tmp_path / "f.bin", [1, 2]).read_bytes()
    (tmp_path / "f.bin").write_bytes(whole[:-1])
    (tmp_path / "g.bin").write_bytes(whole + b"\0")
    (tmp_path / "h.bin").write_bytes(whole[:20])
    (tmp_path / "i.bin").write_bytes(b"")
    with pytest.raises(InputError) as error:
        open_packed(tmp_path)
    problems = {Path(problem.split()[0]).name: problem for problem in error.value.args}
    assert sorted(problems) == [f"{name}.bin" for name in ("a", "c", "d", "e", "e2", "e3", "e4", "f", "g", "h", "i")]
    for name in ("a.bin", "e4.bin", "h.bin", "i.bin"):
        assert "is not a chunk file" in problems[name]
    assert "holds int32 tokens but b.bin uint16" in problems["c.bin"]
    assert "version 2 and dtype code 8" in problems["d.bin"]
    assert "version 1 and dtype code 6" in problems["e.bin"]
    assert "version 1 and dtype code 7" in problems["e2.bin"]
    assert "version 0 and dtype code 8" in problems["e3.bin"]
    assert "has 27 bytes, not the 28" in problems["f.bin"]
    assert "has 29 bytes, not the 28" in problems["g.bin"]


def test_lit_chunks_without_tokens(tmp_path):
    write_chunk(tmp_path / "a.bin", [])
    with pytest.raises(InputError, match="holds no tokens"):
        open_packed(tmp_path)


def test_lit_fingerprint(tmp_path):
    def of(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, tokens in files.items():
            write_chunk(folder / f"{name}.bin", tokens)
        return open_packed(folder).fingerprint

    base = of(a=[1, 2], b=[3, 4])
    assert of(b=[3, 4], a=[1, 2]) == base
    others = [of(a=[1, 2], b=[3, 5]), of(a=[1, 2], c=[3, 4]), of(a=[1, 2, 3], b=[4]), of(a=[1, 2])]
    long = [0] * 9000
    others += [of(a=long), of(a=[1, *long[1:]]), of(a=[*long[1:], 1])]
    assert len({base, *others}) == 1 + len(others)


def test_lit_fingerprint_never_changes(tmp_path):
    # of each file in order: its name, its size and 4,096 bytes of both its ends, each hashed by itself
    whole = hashlib.blake2b(digest_size=32)
    for name, tokens in (("b", range(9000)), ("a", [1, 2, 3])):
        write_chunk(tmp_path / f"{name}.bin", tokens)
    for name in ("a.bin", "b.bin"):
        payload = (tmp_path / name).read_bytes()
        for part in (name.encode(), len(payload).to_bytes(8, "little"), payload[:4096], payload[-4096:]):
            whole.update(hashlib.blake2b(part).digest())
    assert open_packed(tmp_path).fingerprint == whole.hexdigest()
