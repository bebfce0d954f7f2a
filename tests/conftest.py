"""Fixtures of many tests: a tiny tokenizer and packed datasets."""

import contextlib
import io
import os
import re
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported, here and in every process that a test starts: the tensors of tests are so small that threads
# take twenty times the CPU to wait for each other, and several tests run at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# how long an example takes is the load of the machine
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

# enough different words for some 400 pieces, of which 259 are the bytes and the control tokens
_PROSE = """
The little llama walked along the river until the evening, and the others followed her to the hills above the town.
Numbers such as 1984, 3.14159 and 2048 are split into digits, spaces  and\ttabs are kept. She said: "nothing is lost."
def read(path, count=1024):
    with open(path, "rb") as file:
        return [line.strip() for line in file if not line.startswith(b"#")]
"""


# what launchers, terminals and wandb set around whoever starts the tests
_INHERITED = re.compile(
    r"(SLURM|TORCHELASTIC|PMI|PMIX|OMPI|LT|WANDB)_.*|((LOCAL|GROUP|NODE|ROLE)_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)"
    r"|COLUMNS|LINES|TERM|(NO|FORCE)_COLOR|TTY_(COMPATIBLE|INTERACTIVE)|PYTHONSAFEPATH"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: what is left for the end is short, so that both workers end together."""
    first = ("tests/test_guides.py", "tests/train/")
    items.sort(key=lambda item: next((i for i, name in enumerate(first) if item.nodeid.startswith(name)), len(first)))


@pytest.fixture(scope="session", autouse=True)
def _as_from_a_plain_shell() -> Iterator[None]:
    """The environment, signals and limits of a shell in the foreground, here and in every process that a test starts.

    A script that starts the tests in the background leaves SIGINT ignored, as nohup does SIGHUP, which no test needs.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # ranks that many tests share keep their groups' sockets
    with pytest.MonkeyPatch.context() as patch:
        for name in filter(_INHERITED.fullmatch, list(os.environ)):
            patch.delenv(name)
        for name in ("no_proxy", "NO_PROXY"):  # some tests serve files themselves
            patch.setenv(name, "127.0.0.1,localhost", prepend=",")
        yield


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
    from packed import add

    from tinyllama.data.packed import ShardWriter, write_manifest

    def pack(shards: list[list[list[int]]], name: str = "packed", vocab_size: int = 400, **facts) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        policy = {"tokenizer_sha256": "0" * 64, "encoder": "none", "bos": False, "eos": True, "bos_id": 1, "eos_id": 2}
        names = [f"shard-{number:05d}" for number in range(len(shards))]
        for shard, documents in zip(names, shards, strict=True):
            with ShardWriter(folder, shard, vocab_size) as writer:
                for document in documents:
                    add(writer, document)
                writer.finish(**policy | facts)
        write_manifest(folder, names)
        return folder

    return pack


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preparation does in this process, input by input, what a worker does in its own: no time goes to starting one."""
    from tinyllama import InputError
    from tinyllama.prepare import prepare
    from tinyllama.prepare.encode import Mismatch

    def over_workers(todo, setup, recipe, workers):
        work = setup(recipe)
        for one in todo:
            try:
                yield one, work(one)
            except InputError as error:
                yield one, error
            except Mismatch as error:
                yield one, Mismatch(f"{one.path}: {error}")

    monkeypatch.setattr(prepare, "over_workers", over_workers)


@pytest.fixture(scope="session")
def step_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A real checkpoint of models.py's weights, without training one."""
    import dataclasses

    import torch
    import torch.distributed as dist
    from models import CONFIG, METADATA, weights

    from tinyllama.checkpoint.state import TrainState
    from tinyllama.checkpoint.writer import Checkpointer
    from tinyllama.config import cli
    from tinyllama.model import from_weights
    from tinyllama.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("run")
    metadata = {**METADATA, "tokenizer_sha256": Tokenizer(tokenizer_file).sha256}
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
            metadata.pop(key, None)
        keep = {"keep_last": None, "keep_every": None, "asynchronous": False}
        checkpointer = Checkpointer(folder / "checkpoints", config=resolved, metadata=metadata, **keep)
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


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory; where only root may mount, one in a namespace of a process of ours."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode == 0:
        yield folder
        subprocess.run(["umount", "-l", folder], check=True)
        return
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", '"$@" && echo mounted && read end', "sh"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*unshare, *mount], text=True, **pipes) as inside:
        assert inside.stdin
        assert inside.stdout
        assert inside.stderr
        if inside.stdout.readline() != "mounted\n":
            why = inside.stderr.read().strip()
            pytest.skip(f"needs root or user namespaces, to mount a small file system: {why}")
        yield Path(f"/proc/{inside.pid}/root{folder}")
        inside.stdin.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    with mounted(tmp_path / "small", "size=4m") as folder:
        yield folder


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that nobody may write to."""
    with mounted(tmp_path / "read_only", "size=4m,ro") as folder:
        yield folder
