"""The hash of a file, as it is written and as it is read."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllama.checkpoint import hashes


def test_the_hash_is_the_standard_one() -> None:
    assert hashes.of_bytes(b"") == "99aa06d3014798d86001c324468d497f"  # as xxhsum -H2 prints


@given(st.lists(st.binary(max_size=20_000), max_size=8))
def test_a_file_has_the_hash_of_what_was_written(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("hashed") / "file"
    with hashes.HashedFile(path) as file:
        for part in parts:
            file.write(memoryview(part))
        assert file.tell() == sum(map(len, parts))
    assert path.read_bytes() == b"".join(parts)
    assert file.hexdigest() == hashes.of_file(path) == hashes.of_bytes(b"".join(parts))


def test_what_is_fsynced_has_been_flushed(tmp_path: Path) -> None:
    with hashes.HashedFile(tmp_path / "file") as file:
        file.write(b"12345")
        file.fileno()  # which os.fsync is given
        assert (tmp_path / "file").read_bytes() == b"12345"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=5), st.dictionaries(st.text(), st.text(), max_size=3))
def test_a_sealed_state_is_what_it_was(state: dict, files: dict) -> None:
    for reserved in ("hashes", "hash_algorithm"):
        state.pop(reserved, None)
    files.pop("state.json", None)
    payload = hashes.seal(state, files)
    assert hashes.unseal(payload) == (state, files)
    assert hashes.unseal(json.dumps(state).encode()) == (state, None)
    changed = json.loads(payload) | {"step": "other"}
    with pytest.raises(ValueError, match="does not match its hash"):
        hashes.unseal(json.dumps(changed).encode())
