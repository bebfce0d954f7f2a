"""Fixtures of many tests: a tiny tokenizer and packed datasets."""

import io
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# enough different words for some 400 pieces, of which 259 are the bytes and the control tokens
_PROSE = """
The little llama walked along the river until the evening, and the others followed her to the hills above the town.
Numbers such as 1984, 3.14159 and 2048 are split into digits, spaces  and\ttabs are kept. She said: "nothing is lost."
def read(path, count=1024):
    with open(path, "rb") as file:
        return [line.strip() for line in file if not line.startswith(b"#")]
"""


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model with Llama's settings and about 400 pieces: unk 0, bos 1, eos 2, then 256 bytes."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_PROSE.splitlines() * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture
def packed_folder(tmp_path: Path):
    """A function that packs shards, each a list of documents' token ids, into a folder and returns its path."""
    from tinyllama.data.packed import ShardWriter, write_manifest

    def pack(shards: list[list[list[int]]], name: str = "packed", vocab_size: int = 400, **facts) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        policy = {"tokenizer_sha256": "0" * 64, "encoder": "none", "bos": False, "eos": True, "bos_id": 1, "eos_id": 2}
        names = [f"shard-{number:05d}" for number in range(len(shards))]
        for shard, documents in zip(names, shards, strict=True):
            with ShardWriter(folder, shard, vocab_size) as writer:
                for document in documents:
                    writer.add(document)
                writer.finish(**policy | facts)
        write_manifest(folder, names)
        return folder

    return pack


@pytest.fixture(scope="session")
def step_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A real checkpoint of models.py's weights, without training one."""
    import dataclasses

    import torch
    import torch.distributed as dist
    from models import CONFIG, FACTS, weights

    from tinyllama.checkpoint.state import TrainState
    from tinyllama.checkpoint.writer import Checkpointer
    from tinyllama.config import cli
    from tinyllama.model import from_weights
    from tinyllama.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("run")
    facts = {**FACTS, "tokenizer_sha256": Tokenizer(tokenizer_file).sha256}
    model = from_weights(CONFIG, weights())
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
    for parameter in model.parameters():
        parameter.grad.zero_()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()  # moves nothing, but makes the state that a checkpoint holds
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    try:
        state = TrainState(step=12, samples=36, tokens=3456)
        resolved = cli.dump({"model": dataclasses.asdict(CONFIG)})
        for key in state.__dict__:
            facts.pop(key, None)
        keep = {"keep_last": None, "keep_every": None, "asynchronous": False}
        checkpointer = Checkpointer(folder / "checkpoints", config=resolved, facts=facts, **keep)
        return checkpointer.save(state, model, optimizer)
    finally:
        dist.destroy_process_group()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A function that runs a script with arguments and gives its exit code, stdout and stderr."""
    import runpy
    import sys

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(Path(__file__).parents[1] / "scripts" / f"{name}.py"), run_name="__main__")
        return end.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
