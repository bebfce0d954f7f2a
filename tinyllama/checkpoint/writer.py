"""Write checkpoints atomically, in the background if asked, and prune old ones.

Every rank's files go into ``step-00005000.tmp``. When all of them have reached the disk, rank 0 adds what makes them a
checkpoint (see reader.py) and gives the directory its name: a kill at any moment leaves the one before, or this.
"""

import contextlib
import functools
import json
import platform
import secrets
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
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import WriteResult

from tinyllama import __version__, atomic
from tinyllama.checkpoint import names, reader
from tinyllama.checkpoint.state import TrainState

# what a file takes beyond the numbers, a tensor of a rank; measured: 1.3 kB
OVERHEAD = 4096


class CheckpointError(RuntimeError):
    """A step could not be saved. Every rank raises it, the checkpoints before are untouched, and saving can go on."""


@dataclass
class Checkpointer:
    """Saves steps of one run, at most one at a time. Every rank makes one, in the same order.

    The run must hold its lock (train/lock.py): temporary directories of an earlier run are removed.
    """

    folder: Path
    _: KW_ONLY
    config: str
    """the run's resolved YAML"""
    facts: dict[str, Any]
    """what state.json holds beside the numbers of a TrainState"""
    keep_last: int | None
    """newest complete steps that a save does not remove; None: all"""
    keep_every: int | None
    """multiples of this are never removed"""
    asynchronous: bool
    """write while training goes on"""

    def __post_init__(self) -> None:
        # the collectives of a save run in a thread of their own and must not mix with those of a training step
        self.group = dist.new_group(backend="gloo")
        self._is_writer = dist.get_rank() == 0
        # copies are complete when it returns, and a GPU's are made into pinned memory that is allocated once
        self._stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())
        self._in_flight: tuple[Path, Future] | None = None
        if self._is_writer and self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.suffix == ".tmp" and _is_ours(path.with_suffix("")):
                    shutil.rmtree(path, ignore_errors=True)

    def save(
        self, state: TrainState, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, wait: bool = False
    ) -> Path | None:
        """Save ``state`` and the tensors as they are now. Collective.

        Waits for the save before. Gives the step directory if it is complete on return: if not asynchronous, or with
        ``wait``; else None, and what follows may change every tensor. Raises CheckpointError when it fails, and when
        the one before failed and nobody has waited for it: then this one goes on all the same.
        """
        failed = None
        try:
            self.wait()
        except CheckpointError as error:
            failed = error
        final = names.step_dir(self.folder, state.step)
        reader.materialize_optimizer_state(optimizer)  # of an optimizer that has taken no step yet
        tensors = reader.tensors(model, optimizer)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())  # of the whole world
        self._make_room(final, num_bytes + OVERHEAD * len(tensors) * dist.get_world_size())
        writer = _Writer(_unfinished(final), functools.partial(self._publish, final, self._files(state)))
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
        """Whether a save is in flight and has come to its end on this rank: then wait() does not wait."""
        return self._in_flight is not None and self._in_flight[1].done()

    def wait(self) -> Path | None:
        """Return when nothing is in flight; gives the step directory of what was. Raises CheckpointError if it failed.

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
        problem = None
        if self._is_writer:
            unfinished = _unfinished(final)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(unfinished, ignore_errors=True)
                free = shutil.disk_usage(self.folder).free
                if free < num_bytes:
                    problem = f"it takes {num_bytes / 1e9:,.3f} GB and {free / 1e9:,.3f} GB are free"
                else:
                    unfinished.mkdir()
            except OSError as error:
                problem = str(error)
        shared = [problem]
        dist.broadcast_object_list(shared, src=0, group=self.group)
        if shared[0] is not None:
            raise CheckpointError(f"{final} is not saved: {shared[0]}")

    def _files(self, state: TrainState) -> dict[str, bytes]:
        """What makes the tensors a checkpoint, by file name; made now, for ``state`` goes on."""
        versions = {"tinyllama": __version__, "torch": torch.__version__, "python": platform.python_version()}
        content = {"format_version": reader.FORMAT_VERSION, **asdict(state), **self.facts}
        content |= {"world_size": dist.get_world_size(), "versions": versions}
        return {"config.yaml": self.config.encode(), "state.json": json.dumps(content, indent=2).encode()}

    def _publish(self, final: Path, files: dict[str, bytes]) -> None:
        """Rank 0, when every rank's files have reached the disk."""
        unfinished = _unfinished(final)
        for name, payload in files.items():
            atomic.write(unfinished / name, payload)  # and the names of all files with it
        if final.exists():  # broken, or the run would have gone on from it
            final.rename(final.with_name(f"{final.name}.broken-{secrets.token_hex(4)}"))
        unfinished.rename(final)
        atomic.sync(self.folder)
        if self.keep_last is not None:
            prune(self.folder, self.keep_last, self.keep_every)

    @contextlib.contextmanager
    def _all_or_nothing(self, final: Path) -> Iterator[None]:
        """Turn what DCP raises, on every rank and when none writes any more, into CheckpointError; leave no files."""
        try:
            yield
        except CheckpointException as error:
            if self._is_writer:
                shutil.rmtree(_unfinished(final), ignore_errors=True)
            rank = min(error.failures)
            cause = error.failures[rank][0]
            text = f"{final} is not saved: rank {rank}: {type(cause).__name__}: {cause}"
            if isinstance(cause, RuntimeError):  # torch.save's own, which does not say why it could not write
                text += " (is the disk full?)"
            raise CheckpointError(text) from error


def prune(folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove the complete steps in ``folder`` but the newest ``keep_last`` and all multiples of ``keep_every``.

    Whatever is not a complete step by our naming is left alone.
    """
    found = [(step, path) for step, path in names.step_dirs(folder) if _is_ours(path) and not path.is_symlink()]
    complete = [(step, path) for step, path in reversed(found) if reader.problem(path) is None]
    for step, path in complete[max(keep_last, 1) :]:
        if keep_every is None or step % keep_every:
            with contextlib.suppress(OSError):  # the save has succeeded, and the next one tries this again
                removed = path.rename(_unfinished(path))  # a kill halfway leaves nothing that looks like a step
                shutil.rmtree(removed)


def _is_ours(path: Path) -> bool:
    """Whether ``path`` is named as a Checkpointer names its steps; step-5 is somebody else's."""
    step = names.step_of(path)
    return step is not None and path == names.step_dir(path.parent, step)


def _unfinished(final: Path) -> Path:
    return final.with_name(f"{final.name}.tmp")


class _Writer(dcp.FileSystemWriter):
    def __init__(self, path: Path, publish: Callable[[], None]) -> None:
        # copying ahead from the GPU would, in the thread of a save, take memory of the first GPU for every rank
        super().__init__(path, sync_files=True, per_thread_copy_ahead=0)
        self._publish = publish

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # the usual one names the path of the day, as a pickled Path

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        # DCP calls this on rank 0 when it has the results of all ranks, which each gave after its fsync; what it
        # raises is raised on all of them
        super().finish(metadata, results)
        self._publish()
