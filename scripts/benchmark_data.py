"""Measure data preparation and loading on this machine: one JSON line for each variant, medians of interleaved rounds.

    python scripts/benchmark_data.py --tokenizer FILE [--rounds 3] [--megabytes 55] [--work DIR]

The shards are this Python's own texts, laid out like SlimPajama (.jsonl.zst) and StarCoder (.parquet). Every figure is
per CPU-second of a process of its own. ``original`` is the way of the original's scripts: text lines, JSON parsed
twice, sentencepiece to a list, an array for each document. ``litdata`` is measured where it is installed.
"""

import importlib.util
import json
import multiprocessing
import os
import re
import resource
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import zstandard
from pyarrow import parquet

from tinyllama import cli
from tinyllama.data.prepare import Options, prepare
from tinyllama.data.sources import Fields, Input, find_inputs

DOCSTRING = re.compile(r'"""(.{200,20000}?)"""', re.DOTALL)
SHARDS = {
    "slimpajama": (".jsonl.zst", Fields(subsets=True, leave_out=("RedPajamaGithub",))),
    "starcoder": (".parquet", Fields("content")),
}


def texts(endings: set[str], size: int) -> Iterator[str]:
    """Each different text of this Python's library and packages, up to ``size`` characters."""
    seen = set()
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix in endings and path.is_file():
                text = path.read_bytes().decode(errors="ignore")
                if path.suffix == ".py" and ".md" in endings:
                    text = "\n\n".join(DOCSTRING.findall(text))  # prose
                if text.strip() and text not in seen and size > 0:
                    seen.add(text)
                    size -= len(text)
                    yield text


def write_shards(folder: Path, size: int, copies: int) -> None:
    """``copies`` of a shard of each kind, ``size`` characters each."""
    names = [f"RedPajama{name}" for name in ("CommonCrawl", "C4", "Wikipedia", "Github")]
    rows = [
        json.dumps({"text": text, "meta": {"redpajama_set_name": names[3 if i % 20 == 19 else i % 3]}}) + "\n"
        for i, text in enumerate(texts({".py", ".md", ".rst", ".txt"}, size))
    ]
    code = pyarrow.table({"content": list(texts({".py"}, size))})
    for kind in SHARDS:
        (folder / kind).mkdir()
    for i in range(copies):
        (folder / f"slimpajama/{i}.jsonl.zst").write_bytes(zstandard.compress("".join(rows).encode()))
        parquet.write_table(code, folder / f"starcoder/{i}.parquet", compression="zstd")


def original(kind: str, folder: Path, tokenizer: Path, output: Path) -> int:
    """Tokens that a loop like the original's makes of one shard."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    tokens = 0

    def documents() -> Iterator[str]:
        if kind == "starcoder":
            yield from parquet.read_table(folder / "starcoder/0.parquet", columns=["content"])["content"].to_pylist()
            return
        with zstandard.open(folder / "slimpajama/0.jsonl.zst", "rt", encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"]
                if json.loads(line)["meta"]["redpajama_set_name"] != "RedPajamaGithub":
                    yield text

    with open(output / "original.bin", "wb") as file:
        for text in documents():
            ids = np.array([*processor.encode(text), processor.eos_id()], dtype=np.uint16)
            file.write(ids.tobytes())
            tokens += ids.size
    return tokens


def ours(kind: str, folder: Path, tokenizer: Path, output: Path, encoder: str) -> int:
    """Tokens that a worker of ours makes of the same shard, hashes and facts included."""
    from tinyllama.data.prepare import _packer, _recipe

    ending, fields = SHARDS[kind]
    one = Input(str(folder / kind / f"0{ending}"), f"0{ending}", 0)
    options = Options(tokenizer, output, encoder=encoder)  # type: ignore[arg-type]
    return _packer(_recipe(fields, options))(one)["tokens"]


def litdata(kind: str, folder: Path, tokenizer: Path, output: Path) -> int:
    """The same shard through LitData's optimize and sentencepiece."""
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = str(output / "cache")
    import litdata as library
    import sentencepiece
    import torch

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    ending, fields = SHARDS[kind]
    from tinyllama.data.readers import Source

    def ids(path: str) -> Iterator[torch.Tensor]:
        for text in Source(Path(path), fields):
            yield torch.tensor([*processor.encode(text), 2], dtype=torch.uint16)

    library.optimize(
        ids, [str(folder / kind / f"0{ending}")], str(output / "litdata"), chunk_bytes="64MB",
        item_loader=library.streaming.TokensLoader(), num_workers=1,
    )  # fmt: skip
    return sum(path.stat().st_size for path in (output / "litdata").glob("*.bin")) // 2


def load(folder: Path, rate: float | None) -> int:
    """Samples of 2,049 tokens in batches of 8 through the loader; with ``rate``, that many a second for 10 s."""
    from tinyllama.data.loader import Loader
    from tinyllama.data.mixture import Mixture
    from tinyllama.data.packed import open_packed

    data = open_packed(folder)
    mixture = Mixture([data.num_blocks(2048)], [1.0], 0, [data.fingerprint])
    sizes = {"global_batch_size": 1024, "micro_batch_size": 8, "rank": 0, "world_size": 1, "start_sample": 0}
    batches = 20_000 if rate is None else int(rate * 10 / 8)
    with Loader([data], mixture, block_size=2048, vocab_size=32000, **sizes) as loader:
        next(loader)
        began, cpu = time.perf_counter(), time.process_time()
        for i in range(batches):
            next(loader)
            if rate is not None:
                time.sleep(max(0.0, began + (i + 1) * 8 / rate - time.perf_counter()))
    return 8 * batches if rate is None else round(1e6 * (time.process_time() - cpu) / (time.perf_counter() - began))


def measured(pipe, function, arguments) -> None:
    """In a process of its own: what ``function`` returns, CPU and wall seconds, peak memory."""
    wall, cpu = time.perf_counter(), time.process_time()
    count = function(*arguments)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    pipe.send((count, cpu, wall, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def alone(function, *arguments) -> tuple[int, float, float, float]:
    """``measured`` in a new process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measured, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


def whole(folder: Path, tokenizer: Path, output: Path, workers: int) -> int:
    """Tokens of all SlimPajama shards over worker processes."""
    inputs = find_inputs(folder / "slimpajama", (".jsonl.zst",))
    prepare(inputs, SHARDS["slimpajama"][1], Options(tokenizer, output, workers=workers))
    return sum(path.stat().st_size for path in output.glob("*.bin")) // 2


def main() -> None:
    """Write the shards, run the rounds, print."""
    parser = cli.arguments(__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece .model")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are printed (default: 3)")
    parser.add_argument("--megabytes", type=int, default=55, help="of text in a shard (default: 55)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where the shards go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work, prefix="benchmark-data-") as name:
        folder = Path(name)
        write_shards(folder, args.megabytes * 1_000_000, 4)
        variants = {
            f"{kind}: {what}": (function, kind, folder, args.tokenizer, folder / "out", *more)
            for kind in SHARDS
            for what, function, more in (
                ("original", original, ()),
                ("ours, sentencepiece", ours, ("sentencepiece",)),
                ("ours, auto", ours, ("auto",)),
                *([("litdata, sentencepiece", litdata, ())] if importlib.util.find_spec("litdata") else []),
            )
        }
        results: dict[str, list[tuple[int, float, float, float]]] = {}
        (folder / "out").mkdir()
        for number in range(args.rounds):
            for variant, (function, *arguments) in variants.items():
                results.setdefault(variant, []).append(alone(function, *arguments))
            for workers in (1, 2):
                output = folder / f"whole-{workers}-{number}"
                found = alone(whole, folder, args.tokenizer, output, workers)
                results.setdefault(f"whole preparation, {workers} processes", []).append(found)
            packed = folder / f"whole-1-{number}"
            results.setdefault("loader", []).append(alone(load, packed, None))
            results.setdefault("loader at 234 samples/s: millionths of a core", []).append(alone(load, packed, 234.0))
        for variant, rounds in results.items():
            count, cpu, wall, memory = (statistics.median(column) for column in zip(*rounds, strict=True))
            line = {"variant": variant, "count": count, "cpu_s": round(cpu, 2), "wall_s": round(wall, 2)}
            line |= {"per_cpu_s": round(count / cpu), "per_wall_s": round(count / wall), "peak_mb": round(memory)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    cli.run(main)
