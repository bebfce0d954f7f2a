"""Write checkpoints atomically, in the background if asked, and prune old ones.

Every rank's files go into ``step-00005000.tmp``. When all of them have reached the disk, rank 0 adds what makes them a
checkpoint (see reader.py) and gives the directory its name: a kill at any moment leaves the one before, or this.
"""

import contextlib
import errno
import functools
import io
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from tinyllama import InputError, __version__, atomic
from tinyllama.checkpoint import hashes, metadata, names, reader
from tinyllama.checkpoint.state import TrainState
from tinyllama.checkpoint.tensors import materialize_optimizer_state, named_tensors

TENSOR_OVERHEAD = 4096
"""bytes allowed for what torch.save adds to each tensor of each rank; measured: 1.3 kB"""

MOST_FAILURES = 3
"""consecutive failed saves that end a run; fewer may be due to a disk that is full for a while"""


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved. Every rank raises it; earlier checkpoints are untouched."""

    def __init__(self, text: str, fatal: bool) -> None:
        super().__init__(text)
        self.fatal = fatal
        """whether the next save is expected to fail, too"""


@dataclass
class Checkpointer:
    """Saves the checkpoints of one run, at most one at a time. Every rank must construct it at the same point.

    The run must hold its lock (train/lock.py): temporary directories of an earlier run are removed.
    """

    folder: Path
    _: KW_ONLY
    config: str
    """the run's resolved YAML"""
    metadata: dict[str, Any]
    """what state.json holds beside the numbers of a TrainState"""
    keep_last: int | None
    """newest complete steps that a save does not remove; None: all"""
    keep_every: int | None
    """multiples of this are never removed"""
    asynchronous: bool
    """write while training goes on"""
    say: Callable[[str], None] = print
    """rank 0 calls it, in any thread, with what a person should know"""

    def __post_init__(self) -> None:
        # the collectives of a save run in a thread of their own and must not mix with those of a training step
        self.group = dist.new_group(backend="gloo")
        self._is_writer = dist.get_rank() == 0
        # copies are complete when it returns, and a GPU's are made into pinned memory that is allocated once
        self._stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())
        self._in_flight: tuple[Path, Future] | None = None
        self._failures = 0  # in a row
        if self._is_writer and self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.suffix == ".tmp" and _is_ours(path.with_suffix("")):
                    shutil.rmtree(path, ignore_errors=True)
            self._keep_one_aside()

    def save(
        self, state: TrainState, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, wait: bool = False
    ) -> Path | None:
        """Save ``state`` and the tensors as they are now. Collective.

        Waits for the previous save first. Returns the checkpoint's directory if the checkpoint is complete: if not
        ``asynchronous``, or with ``wait``. Otherwise returns None, and the caller may change the tensors at once.
        Raises CheckpointError if this save fails, or if the previous one did unnoticed: then this one is made as well.
        """
        failed = None
        try:
            self.wait()
        except CheckpointError as error:
            failed = error
        final = names.step_dir(self.folder, state.step)
        materialize_optimizer_state(optimizer)  # of an optimizer that has taken no step yet
        tensors = named_tensors(model, optimizer)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())  # of the whole world
        self._make_room(final, num_bytes + TENSOR_OVERHEAD * len(tensors) * dist.get_world_size())
        publish = functools.partial(self._publish, final, self._state_json(state))
        writer = _Writer(_unfinished(final), publish)
        published = None
        if self.asynchronous and not wait:
            future = dcp.async_save(tensors, storage_writer=writer, process_group=self.group, async_stager=self._stager)
            self._in_flight = final, cast(Future, future)
        else:
            with self._all_or_nothing(final):
                dcp.save(tensors, storage_writer=writer, process_group=self.group)
            published = final
        if failed is not None:
            raise failed
        return published

    def done(self) -> bool:
        """Return whether a background save has ended on this rank, so that ``wait`` returns at once."""
        return self._in_flight is not None and self._in_flight[1].done()

    def wait(self) -> Path | None:
        """Wait for the save in flight, if any, and return its directory. Raises CheckpointError if it failed.

        Every rank must call it before the process group ends.
        """
        if self._in_flight is None:
            return None
        (final, future), self._in_flight = self._in_flight, None
        with self._all_or_nothing(final):
            future.result()
        return final

    def _make_room(self, final: Path, num_bytes: int) -> None:
        """Make the empty folder for the files of ``final``; raises CheckpointError on all ranks when it cannot be."""
        problem: tuple[str, int | None] | None = None
        if self._is_writer:
            unfinished = _unfinished(final)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(unfinished, ignore_errors=True)
                free = shutil.disk_usage(self.folder).free
                if free < num_bytes:
                    problem = f"it takes {num_bytes / 1e9:,.3f} GB and {free / 1e9:,.3f} GB are free", errno.ENOSPC
                else:
                    unfinished.mkdir()
            except OSError as error:
                problem = str(error), error.errno
        shared = [problem]
        dist.broadcast_object_list(shared, src=0, group=self.group)
        if shared[0] is not None:
            raise self._failure(final, *shared[0])

    def _state_json(self, state: TrainState) -> dict[str, Any]:
        """Return what state.json will hold; made now, for ``state`` goes on."""
        versions = {"tinyllama": __version__, "torch": torch.__version__, "python": platform.python_version()}
        content = {"format_version": reader.FORMAT_VERSION, **asdict(state), **self.metadata}
        return content | {"world_size": dist.get_world_size(), "versions": versions}

    def _publish(self, final: Path, state: dict[str, Any], hashed: dict[str, str]) -> None:
        """Complete the checkpoint on rank 0, once every rank's files (those in ``hashed``) have reached the disk."""
        unfinished = _unfinished(final)
        for name, payload in hashes.last_files(state, self.config, hashed).items():
            atomic.write(unfinished / name, payload)  # and the names of all files with it
        is_in_the_way = os.path.lexists(final)  # broken, or the run would have resumed from it
        if is_in_the_way:
            final.rename(names.broken_dir(final))
        unfinished.rename(final)
        atomic.sync(self.folder)
        with contextlib.suppress(OSError, InputError):  # the step is saved, and the next save tries this again
            if self.keep_last is not None:
                prune(self.folder, self.keep_last, self.keep_every, upto=state["step"])
            if is_in_the_way:
                self._keep_one_aside()

    def _keep_one_aside(self) -> None:
        """Remove all broken checkpoints that were set aside, except the newest, and report the size of that one."""
        aside = names.broken_dirs(self.folder)
        aside.sort(key=lambda path: path.lstat().st_ctime_ns)  # the time of its renaming
        for path in aside[:-1]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in aside[-1:]:
            num_bytes = sum(file.lstat().st_size for file in [path, *path.rglob("*")])
            self.say(f"set aside: {path} was not a complete checkpoint; it takes {num_bytes / 1e9:.3f} GB: remove it")

    @contextlib.contextmanager
    def _all_or_nothing(self, final: Path) -> Iterator[None]:
        """Turn what DCP raises, on every rank and when none writes any more, into CheckpointError; leave no files."""
        try:
            yield
            self._failures = 0
        except CheckpointException as error:
            if self._is_writer:
                shutil.rmtree(_unfinished(final), ignore_errors=True)
            rank = min(error.failures)
            cause = error.failures[rank][0]
            why = f"rank {rank}: {type(cause).__name__}: {cause}"
            if isinstance(cause, RuntimeError):  # torch.save's own, which does not say why it could not write
                why += " (is the disk full?)"
            raise self._failure(final, why, getattr(cause, "errno", None)) from error

    def _failure(self, final: Path, why: str, number: int | None) -> CheckpointError:
        self._failures += 1
        too_many = self._failures >= MOST_FAILURES
        if too_many:
            why += f"; {self._failures} saves in a row have failed"
        return CheckpointError(f"{final} is not saved: {why}", fatal=too_many or number == errno.EROFS)


def prune(folder: Path, keep_last: int, keep_every: int | None, upto: int | None = None) -> None:
    """Remove the complete steps in ``folder`` but the newest ``keep_last`` and all multiples of ``keep_every``.

    Whatever is not a complete step by our naming is left alone, and so are steps after ``upto``: the run has resumed
    from an earlier one because they are damaged.
    """
    found = [(step, path) for step, path in names.step_dirs(folder) if _is_ours(path) and not path.is_symlink()]
    kept, keep_last = 0, max(keep_last, 1)
    for step, path in reversed(found):
        if upto is not None and step > upto:
            continue
        if kept == keep_last and keep_every is not None and step % keep_every == 0:
            continue
        if reader.problem(path) is not None:
            continue
        if kept < keep_last:
            kept += 1
            continue
        with contextlib.suppress(OSError):  # the save has succeeded, and the next one tries this again
            removed = path.rename(_unfinished(path))  # a kill halfway leaves nothing that looks like a step
            shutil.rmtree(removed)
    metadata.forget()


def _is_ours(path: Path) -> bool:
    """Return whether ``path`` is named as a Checkpointer names its steps; step-5 is somebody else's."""
    step = names.step_of(path)
    return step is not None and path == names.step_dir(path.parent, step)


def _unfinished(final: Path) -> Path:
    return final.with_name(f"{final.name}.tmp")


class HashingWriter(dcp.FileSystemWriter):
    """Writes a checkpoint's tensors and .metadata, and hashes them while they are written."""

    def __init__(self, path: Path) -> None:
        # copying ahead from the GPU would, in the thread of a save, take memory of the first GPU for every rank
        super().__init__(path, sync_files=True, per_thread_copy_ahead=0)
        self.fs = self._written = _HashingFileSystem()
        self.hashes: dict[str, str] = {}
        """on rank 0, once it has finished: those of all ranks' files"""

    def storage_meta(self) -> StorageMeta:
        """Return an empty one: the usual one names the path of the day, as a pickled Path."""
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Write this rank's tensors. DCP takes the results, and in them the hash of their file, to rank 0."""
        written = super().write_data(plan, planner).wait()
        of_files = self._written.hashes
        hashed: TorchFuture[list[WriteResult]] = TorchFuture()
        hashed.set_result(
            [_HashedResult(**vars(one), file_hash=of_files[one.storage_data.relative_path]) for one in written]
        )
        return hashed

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Write .metadata, on rank 0, when it has the results of all ranks; what this raises is raised on all."""
        super().finish(metadata, results)
        of_ranks = {one.storage_data.relative_path: one.file_hash for result in results for one in result}
        self.hashes = of_ranks | {".metadata": self._written.hashes[".metadata.tmp"]}


class _Writer(HashingWriter):
    def __init__(self, path: Path, publish: Callable[[dict[str, str]], None]) -> None:
        super().__init__(path)
        self._publish = publish

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        self._publish(self.hashes)


class _HashingFileSystem(FileSystem):
    def __init__(self) -> None:
        self.hashes: dict[str, str] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with hashes.HashedFile(Path(path)) as file:
            yield file
        self.hashes[Path(path).name] = file.hexdigest()


@dataclass(frozen=True)
class _HashedResult(WriteResult):
    file_hash: str
