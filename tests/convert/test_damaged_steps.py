"""What reads a checkpoint refuses a damaged one, in one line and before it has written anything."""

import json
import shutil
from pathlib import Path

import pytest

from tinyllama.checkpoint import reader

SCRIPTS = {
    "export_checkpoint": lambda step, folder, tokenizer: (step, folder / "out.safetensors"),
    "convert_lit_checkpoint": lambda step, folder, tokenizer: (step, folder / "out", "--tokenizer", tokenizer),
    "generate": lambda step, folder, tokenizer: (
        step,
        "--tokenizer",
        tokenizer,
        "--prompt",
        "a",
        "--max_new_tokens",
        1,
    ),
}


def flip(file: Path) -> None:
    payload = bytearray(file.read_bytes())
    payload[len(payload) // 2] ^= 1
    file.write_bytes(payload)


@pytest.fixture
def copied(step_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(step_dir, tmp_path / "run" / step_dir.name))


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "config.yaml", "state.json"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_flipped_bit_is_refused(name: str, file: str, copied: Path, tmp_path: Path, tokenizer_file, script) -> None:
    flip(copied / file)
    (tmp_path / "results").mkdir()
    code, out, error = script(name, *SCRIPTS[name](copied, tmp_path / "results", tokenizer_file))
    assert code == 2
    assert out == ""
    assert error.startswith(f"error: {copied} is ")
    assert error.endswith(": give another step of its run\n")
    assert file in error
    assert error.count("\n") == 1
    assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_newer_step_that_is_passed_over_is_told_beside_the_results(
    name: str, copied: Path, tmp_path: Path, tokenizer_file, script
) -> None:
    newer = shutil.copytree(copied, copied.with_name("step-00000013"))
    (newer / "__0_0.distcp").unlink()
    code, out, error = script(name, *SCRIPTS[name](copied.parent, tmp_path, tokenizer_file))
    assert (code, "passed over" in out) == (0, False)
    assert error.count("passed over: ") == 1
    assert error.startswith(f"passed over: {newer} is not a complete checkpoint (")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_step_without_hashes_is_read_and_that_is_said(
    name: str, copied: Path, tmp_path: Path, tokenizer_file, script
) -> None:
    (copied / "state.json").write_text(json.dumps(reader.read_state(copied)))
    code, _, error = script(name, *SCRIPTS[name](copied, tmp_path, tokenizer_file))
    assert code == 0
    assert error.count(f"{copied} is of a version that saved no hashes: its tensors are not verified\n") == 1
