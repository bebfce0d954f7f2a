"""Collectives by their names in any version of torch, several launched as one, their timeouts, and what ranks share."""

import contextlib
import socket
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from tinyllama import InputError

T = TypeVar("T")

# torch 2.13 has renamed them, and warns of the old names
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def coalesced(group: dist.ProcessGroup, *, async_ops: bool = False) -> AbstractContextManager[Any]:
    """Launch the collectives of a ``with`` block, all of one kind, as one.

    With ``async_ops`` the block yields what to ``wait`` for. With TORCH_DISTRIBUTED_DEBUG=DETAIL, for which torch 2.11
    cannot coalesce, it yields None, and each collective is launched and waited for by itself.
    """
    if dist.get_debug_level() == dist.DebugLevel.DETAIL:
        return contextlib.nullcontext()
    return dist._coalescing_manager(group, async_ops=async_ops)


def from_rank_zero(call: Callable[[], T]) -> T:
    """Collective. Return what ``call`` returns on rank 0; every rank raises its InputError."""
    shared: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            shared[0] = call()
        except InputError as error:
            shared[1] = error.args
    dist.broadcast_object_list(shared, src=0)
    found, refusal = shared
    if refusal is not None:
        raise InputError(*refusal)
    return cast(T, found)


def rank_map() -> list[str]:
    """Collective. Return which ranks run where, a line for each host."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    numbers = {host: [str(rank) for rank, where in enumerate(hosts) if where == host] for host in hosts}
    return [f"{host}: {'rank' if len(of) == 1 else 'ranks'} {' '.join(of)}" for host, of in numbers.items()]


def refuse_differences(shared: Mapping[str, Any]) -> None:
    """Collective. Raise InputError on every rank, naming what differs, if a rank's ``shared`` is not that of rank 0.

    Another node may have other settings, code, packed data or packages: the run would hang, or be wrong silently.
    """
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (socket.gethostname(), dict(shared)))
    first_host, first = of_ranks[0]
    for rank, (host, other) in enumerate(of_ranks):
        keys = [key for key in first | other if first.get(key) != other.get(key)]
        if keys:
            values = (f"{key} is {first.get(key, 'absent')} and {other.get(key, 'absent')}" for key in keys)
            raise InputError(
                f"rank 0 ({first_host}) and rank {rank} ({host}) differ: {'; '.join(values)}: "
                "start every rank with the same command, code, packed data and packages"
            )


def set_timeout(seconds: float, *, keep: Collection[dist.ProcessGroup] = ()) -> None:
    """Let collectives that start from now on fail after ``seconds``, in every process group but those of ``keep``.

    It is a second line of defence behind the watchdog, so it should be longer by a minute: a collective that fails only
    says that some rank did not take part. Every rank must call it, at a moment when none is still busy with what may
    take longer.
    """
    for group in dist.distributed_c10d._pg_map:  # as torch's own dist.breakpoint does: there is no public way
        if group not in keep:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
