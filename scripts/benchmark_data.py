"""Measure data preparation and loading on this machine: one JSON line for each variant, medians of interleaved rounds.

    python scripts/benchmark_data.py --tokenizer FILE [--rounds 3] [--megabytes 55] [--texts DIR] [--work DIR]

The shards are laid out like SlimPajama (.jsonl.zst) and StarCoder (.parquet): every different text of this Python's
library and packages, docstrings and manuals in the first (or the .txt files of DIR), code in the second. Every variant
runs in its own process; ``cpu_s`` excludes ``set_up_s``, the CPU-seconds of imports and of loading the tokenizer.
``original`` works as upstream's scripts do: text lines, JSON parsed twice, sentencepiece to a list, an array for each
document. LitData and datatrove are measured if they are installed; they and sentencepiece take seconds per megabyte,
so they get a shard of a quarter of the size.
"""

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import zstandard
from pyarrow import parquet

from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.prepare.inputs import Fields, Input, Inputs, find_inputs
from tinyllama.prepare.prepare import Options, _packer, _recipe, prepare
from tinyllama.prepare.readers import DocumentReader
from tinyllama.prepare.workers import huge_pages
from tinyllama.tokenizer import Tokenizer

Work = Callable[[], int]

DOCSTRING = re.compile(r'"""(.{200,20000}?)"""', re.DOTALL)
SHARDS = {
    "slimpajama": (".jsonl.zst", Fields(subsets=True, leave_out=("RedPajamaGithub",))),
    "starcoder": (".parquet", Fields("content")),
}
SLOW = 4  # slow variants get a shard that is smaller by this factor
BLOCK = 2048


def python_texts(endings: set[str]) -> Iterator[str]:
    """Yield each text of this Python's library and packages; with prose among the endings, only docstrings of code."""
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in files(Path(root), endings):
            text = path.read_bytes().decode(errors="ignore")
            yield "\n\n".join(DOCSTRING.findall(text)) if path.suffix == ".py" and ".md" in endings else text


def files(folder: Path, endings: set[str]) -> list[Path]:
    """Return the files in and below ``folder`` whose names end so, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix in endings and path.is_file())


def different(texts: Iterator[str], size: int) -> Iterator[str]:
    """Yield the texts without duplicates, up to ``size`` characters."""
    seen = set()
    for text in texts:
        if text.strip() and text not in seen:
            seen.add(text)
            size -= len(text)
            yield text
        if size < 0:
            return


def write_shards(folder: Path, size: int, copies: int, prose: Iterator[str]) -> None:
    """Write ``copies`` of a shard of each kind, ``size`` characters each, and one that is smaller."""
    names = [f"RedPajama{name}" for name in ("CommonCrawl", "C4", "Wikipedia", "Github")]
    rows = [
        json.dumps({"text": text, "meta": {"redpajama_set_name": names[3 if i % 20 == 19 else i % 3]}}) + "\n"
        for i, text in enumerate(different(prose, size))
    ]
    code = list(different(python_texts({".py"}), size))
    for name in [*map(str, range(copies)), "small"]:
        part = SLOW if name == "small" else 1
        for kind in SHARDS:
            (folder / name / kind).mkdir(parents=True)
        text = "".join(rows[::part]).encode()
        (folder / name / "slimpajama/a.jsonl.zst").write_bytes(zstandard.compress(text))
        parquet.write_table(
            pyarrow.table({"content": code[::part]}), folder / name / "starcoder/a.parquet", compression="zstd"
        )


def original(kind: str, shard: Path, tokenizer: Path, output: Path) -> Work:
    """Prepare with a loop like upstream's."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))

    def documents() -> Iterator[str]:
        if kind == "starcoder":
            yield from parquet.read_table(shard, columns=["content"])["content"].to_pylist()
            return
        with zstandard.open(shard, "rt", encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"]
                if json.loads(line)["meta"]["redpajama_set_name"] != "RedPajamaGithub":
                    yield text

    def work() -> int:
        tokens = 0
        with open(output / "original.bin", "wb") as file:
            for text in documents():
                ids = np.array([*processor.encode(text), processor.eos_id()], dtype=np.uint16)
                file.write(ids.tobytes())
                tokens += ids.size
        return tokens

    return work


def ours(kind: str, shard: Path, tokenizer: Path, output: Path, encoder: str) -> Work:
    """Prepare with one of our workers, hashes and metadata included."""
    pack = _packer(_recipe(SHARDS[kind][1], Options(tokenizer, output, encoder=encoder)))  # type: ignore[arg-type]
    return lambda: pack(Input(str(shard), shard.name, 0))["tokens"]


def ids_for_litdata(kind: str, tokenizer: Path, shard: str) -> Iterator[Any]:
    """Yield a tensor of token ids for each document."""
    import sentencepiece
    import torch

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    for text in DocumentReader(Path(shard), SHARDS[kind][1]):
        yield torch.tensor([*processor.encode(text), processor.eos_id()], dtype=torch.uint16)


def litdata(kind: str, shard: Path, tokenizer: Path, output: Path) -> Work:
    """Prepare with LitData's optimize and sentencepiece, from our reader."""
    # without these it empties $TMPDIR/data and $TMPDIR/chunks
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = str(output / "cache")
    import litdata as library

    ids = functools.partial(ids_for_litdata, kind, tokenizer)

    def work() -> int:
        with tempfile.TemporaryDirectory(dir=output) as folder:
            library.optimize(
                ids, [str(shard)], folder, chunk_bytes="64MB", item_loader=library.TokensLoader(), num_workers=1
            )
            return sum(path.stat().st_size for path in Path(folder).glob("*.bin")) // 2

    return work


def datatrove(kind: str, shard: Path, tokenizer: Path, output: Path) -> Work:
    """Prepare with datatrove's DocumentTokenizer, which takes a tokenizer.json, and its reader."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import JsonlReader, ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    (output / "tokenizer.json").write_text(Tokenizer(tokenizer).json_for_text(), encoding="utf-8")

    def wanted(document: Any) -> bool:
        return document.metadata.get("meta", {}).get("redpajama_set_name") != "RedPajamaGithub"

    def work() -> int:
        with tempfile.TemporaryDirectory(dir=output) as folder:
            parquets = functools.partial(ParquetReader, text_key="content", doc_progress=False)
            reader = parquets if kind == "starcoder" else functools.partial(JsonlReader, compression="zstd")
            steps = [
                reader(str(shard.parent)),
                LambdaFilter(wanted),
                DocumentTokenizer(folder, tokenizer_name_or_path=str(output / "tokenizer.json"), eos_token="</s>"),
            ]
            LocalPipelineExecutor(steps, logging_dir=f"{folder}/logs").run()
            return sum(path.stat().st_size for path in Path(folder).glob("*.ds")) // 2

    return work


def whole(folder: Path, tokenizer: Path, output: Path, workers: int) -> Work:
    """Prepare all SlimPajama shards with worker processes."""
    inputs = Inputs(one for one in find_inputs(folder, (".jsonl.zst",)) if not one.name.startswith("small"))

    def work() -> int:
        prepare(inputs, SHARDS["slimpajama"][1], Options(tokenizer, output, workers=workers))
        return sum(path.stat().st_size for path in output.glob("*.bin")) // 2

    return work


def load(folder: Path, on_cpu: bool, rate: float | None = None) -> Work:
    """Load samples in batches of 8, as a device receives them or widened on the CPU; ``rate`` sets the samples/s."""
    import torch

    from tinyllama.data.loader import Loader, on_device
    from tinyllama.data.mixture import Mixture
    from tinyllama.data.packed import open_packed

    torch.set_num_threads(1)
    data = open_packed(folder)
    data.read(0, data.tokens)  # into the page cache
    mixture = Mixture([data.num_blocks(BLOCK)], [1.0], 0, [data.fingerprint])
    sizes = {"global_batch_size": 1024, "micro_batch_size": 8, "rank": 0, "world_size": 1, "start_sample": 0}
    loader = Loader([data], mixture, block_size=BLOCK, vocab_size=32000, **sizes)
    batches: Iterator[Any] = on_device(loader, torch.device("cpu")) if on_cpu else loader

    def work() -> int:
        count, began = 20_000 if rate is None else int(rate * 10 / 8), time.perf_counter()
        for i in range(count):
            next(batches)
            if rate is not None:
                time.sleep(max(0.0, began + (i + 1) * 8 / rate - time.perf_counter()))
        return 8 * count

    return work


def measured(pipe: Any, function: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    """Send the result of ``function``, CPU-seconds, seconds, CPU-seconds of set-up and peak MB through ``pipe``."""
    cpu = lambda: sum(os.times()[:4])  # noqa: E731 (children included, once they have ended)
    started = cpu()
    work = function(*arguments)
    set_up, began, wall = cpu() - started, cpu(), time.perf_counter()
    count = work()
    wall = time.perf_counter() - wall
    used = cpu() - began
    # getrusage would include the parent's
    memory = int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))[0]) / 1024
    pipe.send((count, used, wall, set_up, memory))
    pipe.close()
    os._exit(0)  # a loader's thread never ends


def alone(function: Callable[..., Work], arguments: tuple[Any, ...]) -> list[tuple[float, ...]]:
    """Run ``measured`` in a new process; return [] for a peer that fails, which prints its own error."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=measured, args=(there, function, arguments))
    with huge_pages() if function is ours else contextlib.nullcontext():  # as a worker has it
        process.start()
    there.close()
    try:
        return [here.recv()]
    except EOFError:
        return []
    finally:
        process.join()


def variants(folder: Path, tokenizer: Path) -> Iterator[tuple[str, Callable[..., Work], tuple[Any, ...]]]:
    """Yield name, function and arguments of each variant, in the order of a round."""
    output = folder / "output"
    for kind, (ending, _) in SHARDS.items():
        large, small = (folder / size / kind / f"a{ending}" for size in ("0", "small"))
        yield f"{kind}: original", original, (kind, large, tokenizer, output)
        yield f"{kind}: ours", ours, (kind, large, tokenizer, output, "auto")
        yield f"{kind}: ours, sentencepiece", ours, (kind, small, tokenizer, output, "sentencepiece")
        for peer in (litdata, datatrove):
            if importlib.util.find_spec(peer.__name__):
                yield f"{kind}: {peer.__name__}", peer, (kind, small, tokenizer, output)
    for workers in (1, 2):
        name = f"whole preparation, {workers} worker{'s'[: workers - 1]}"
        yield name, whole, (folder, tokenizer, folder / f"packed-{workers}", workers)
    yield "loader", load, (folder / "packed-1", False)
    yield "loader, widened on the CPU", load, (folder / "packed-1", True)
    yield "loader at 234 samples/s", load, (folder / "packed-1", False, 234.0)


def main() -> None:
    """Parse the flags, write the shards, run the rounds and print."""
    parser = cli.arguments(__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece .model")
    parser.add_argument("--rounds", type=cli.count, default=3, help="rounds, whose medians are printed (default: 3)")
    parser.add_argument("--megabytes", type=cli.count, default=55, help="megabytes of text in a shard (default: 55)")
    parser.add_argument("--texts", type=Path, help="folder whose .txt files are the prose (default: this Python's own)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="folder for the shards (default: the system's for temporary files)",
    )
    args = parser.parse_args()
    tokenizer = Tokenizer(args.tokenizer)
    if tokenizer.encoder != "sentencepiece":
        raise InputError(f"--tokenizer {args.tokenizer} is not a sentencepiece .model: give one")
    prose = python_texts({".py", ".md", ".rst", ".txt"})
    if args.texts is not None:
        if not (given := files(args.texts, {".txt"})):
            raise InputError(f"--texts {args.texts} has no .txt files: give a folder that has some")
        prose = (path.read_bytes().decode(errors="ignore") for path in given)
    results: dict[str, list[tuple[float, ...]]] = {}
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work, prefix="benchmark-data-") as name:
        folder = Path(name)
        write_shards(folder, args.megabytes * 1_000_000, 8, prose)
        (folder / "output").mkdir()
        for _ in range(args.rounds):
            for packed in folder.glob("packed-*"):
                shutil.rmtree(packed)
            for variant, function, arguments in variants(folder, tokenizer.path):
                for result in alone(function, arguments):
                    results.setdefault(variant, []).append(result)
    for variant, rounds in results.items():
        count, cpu, wall, set_up, memory = (statistics.median(column) for column in zip(*rounds, strict=True))
        cpu = max(cpu, 0.01)  # what os.times() counts in
        line = {"variant": variant, "count": count, "cpu_s": round(cpu, 2), "wall_s": round(wall, 2)}
        line |= {"per_cpu_s": round(count / cpu), "per_wall_s": round(count / wall), "core": round(cpu / wall, 4)}
        print(json.dumps(line | {"set_up_s": round(set_up, 2), "peak_mb": round(memory)}), flush=True)


if __name__ == "__main__":
    cli.run(main)
