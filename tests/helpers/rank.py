"""One rank of a group that many tests share: a command a line on stdin, its answer a line on stdout.

`World` in runs.py starts it, as a fork of a process that has imported what it needs: see warm.py.
"""

import contextlib
import gc
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch_calls import Calls

from tinyllama import InputError
from tinyllama.checkpoint import metadata, reader, writer
from tinyllama.checkpoint.tensors import named_tensors
from tinyllama.config import cli
from tinyllama.config.args import PretrainArgs
from tinyllama.ops import float8
from tinyllama.train import collectives, garbage, step, step_clock
from tinyllama.train import run as run_module
from tinyllama.train.adamw import local
from tinyllama.train.parallel import finish_gradients

sys.path.insert(0, str(Path(__file__).parents[2] / "pretrain"))
import train as recipe


def train(argv: list[str]) -> int:
    """The whole recipe; gives its exit code."""
    return recipe.main(recipe.setup(cli.parse(PretrainArgs, argv)))


def train_with_flags_of_one_rank(argv: list[str]) -> int:
    """The recipe; the rank ``argv[0]`` alone has the flags of the JSON list ``argv[1]``, too."""
    number, flags, *argv = argv
    return train([*argv, *json.loads(flags) * (os.environ["RANK"] == number)])


def train_with_code_of_one_rank(argv: list[str]) -> int:
    """The recipe; the rank ``argv[0]`` alone finds the package's files in the folder ``argv[1]``."""
    number, package, *argv = argv
    its_package = Path(package) if os.environ["RANK"] == number else run_module.PACKAGE
    with mock.patch.object(run_module, "PACKAGE", its_package):
        return train(argv)


def train_float8(argv: list[str]) -> int:
    """The recipe in float8, which train.precision refuses on a CPU: it is slow there, and the same numbers."""
    with mock.patch.object(float8, "problem", return_value=None):
        return train(argv)


def train_counting_parses(argv: list[str]) -> int:
    """The recipe; gives how often this rank unpickled the .metadata of a checkpoint."""
    with mock.patch.object(metadata, "_Unpickler", wraps=metadata._Unpickler) as unpickler:
        train(argv)
    return unpickler.call_count


def train_watched(argv: list[str]) -> dict[str, Any]:
    """The recipe; gives how often a step's passes call each operation, and what Python's collector does at which step.

    ``garbage.GC_INTERVAL`` is 2, so that a run of a few steps has collections.
    """
    gc.unfreeze()
    gc.enable()
    run = recipe.setup(cli.parse(PretrainArgs, argv))
    calls, seen = Calls(), {"steps": [], "graphs": [], "collector": [], "collected_at": []}
    set_lr, check, collect = step.set_lr, recipe.Guard.check, recipe.collect_gc

    def begin(optimizer: Any, lr: float) -> None:
        calls.counts.clear()
        set_lr(optimizer, lr)

    def end(guard: Any, step: int, loss_sum: torch.Tensor, *others: Any) -> Any:
        seen["steps"].append(dict(calls.counts))
        seen["graphs"].append(loss_sum.requires_grad)
        seen["collector"].append([gc.isenabled(), gc.get_freeze_count() > 0])
        return check(guard, step, loss_sum, *others)

    def collecting(step: int) -> None:
        def collected(phase: str, info: dict[str, int]) -> None:
            if phase == "start" and info["generation"] == 2:
                seen["collected_at"].append(step)

        gc.callbacks.append(collected)
        collect(step)
        gc.callbacks.remove(collected)

    with (
        calls,
        mock.patch.object(step, "set_lr", begin),
        mock.patch.object(recipe.Guard, "check", end),
        mock.patch.object(recipe, "collect_gc", collecting),
        mock.patch.object(garbage, "GC_INTERVAL", 2),
    ):
        seen["code"] = recipe.main(run)
    return seen


def watched(argv: list[str]) -> dict[str, Any]:
    """The recipe as a job of Slurm; gives what watches it, and what it leaves of process groups and of Python's gc."""
    run = recipe.setup(cli.parse(PretrainArgs, argv))
    seen: dict[str, Any] = {"beats": []}
    groups = [None]

    class Watch(recipe.Watchdog):
        def __init__(self, out_dir: Path, **how: Any) -> None:
            seen.update(how, owner=json.loads((run.out_dir / "OWNER.json").read_text()))
            super().__init__(out_dir, **how)

        def beat(self, step: int, phase: Any) -> None:
            if [step, phase] not in seen["beats"]:  # once for all batches of a validation
                seen["beats"].append([step, phase])
            super().beat(step, phase)

    class Saver(recipe.Checkpointer):
        def __init__(self, *args: Any, **how: Any) -> None:
            super().__init__(*args, **how)
            groups.append(self.group)

    gc.enable()
    with (
        mock.patch.object(recipe, "Watchdog", Watch),
        mock.patch.object(recipe, "Checkpointer", Saver),
        mock.patch.dict(os.environ, SLURM_JOB_ID="77"),
    ):
        seen["code"] = recipe.main(run)
    backends = [(group or dist.group.WORLD)._get_backend(torch.device("cpu")) for group in groups]
    return seen | {"collects": gc.isenabled(), "timeouts": [b.options._timeout.total_seconds() for b in backends]}


def train_by_clocks(argv: list[str]) -> int:
    """The recipe, with a clock of the steps that advances by a second on rank 0 and by three on rank 1 at each look.

    Gives how many collectives gathered what the clocks say.
    """
    run = recipe.setup(cli.parse(PretrainArgs, argv))
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])
    looks, gathered, gather = itertools.count(step=1 + 2 * rank), [], step_clock.all_gather

    def gathering(of_all: torch.Tensor, mine: torch.Tensor) -> Any:
        gathered.append(mine)
        return gather(of_all, mine)

    with (
        mock.patch.object(step_clock, "time", mock.Mock(perf_counter=lambda: next(looks))),
        mock.patch.object(step_clock, "all_gather", gathering),
    ):
        assert recipe.main(run) == 0
    return len(gathered)


def resumed_from(argv: list[str]) -> str:
    """Run the recipe up to its summary where rank 1 sees only the step before; return the step that was loaded."""
    run = recipe.setup(cli.parse(PretrainArgs, argv))
    if dist.is_initialized() and dist.get_rank() == 1:
        (*_, before, newest) = sorted(run.resume.parent.iterdir())
        assert newest == run.resume
        run = replace(run, resume=before)
    with mock.patch.object(reader, "load", wraps=reader.load) as load:
        recipe.main(run)
    return load.call_args.args[0].name


def train_signalled(argv: list[str]) -> int | str:
    """The recipe, with a signal to rank ``argv[1]`` in the phase ``argv[0]``; gives its exit code, or "interrupted".

    Phases: a step by its number, ``validation``, ``checkpoint``, or ``both``: a step and the save that it leads to;
    there it is SIGUSR1. ``ctrl-c`` and ``ctrl-c twice`` are SIGINT in step 7.
    """
    phase, rank, *argv = argv
    number, times = (signal.SIGINT, 2 if phase == "ctrl-c twice" else 1) if "ctrl" in phase else (signal.SIGUSR1, 1)
    phase = "7" if "ctrl" in phase else phase
    run = recipe.setup(cli.parse(PretrainArgs, argv))

    def now() -> None:
        if dist.get_rank() == int(rank):
            for _ in range(times):
                os.kill(os.getpid(), number)
                time.sleep(0.02 if times == 2 else 0)

    signalled = contextlib.ExitStack()
    if phase.isdecimal() or phase == "both":
        lr_at, step = recipe.Run.lr_at, 7 if phase == "both" else int(phase)

        def signalling(run: Any, at: int) -> float:
            if at == step - 1:
                now()
            return lr_at(run, at)

        signalled.enter_context(mock.patch.object(recipe.Run, "lr_at", signalling))
    if phase == "validation":
        batches = recipe.validation_batches
        calls = itertools.count()

        def some(*args: Any, **kwargs: Any) -> Any:
            for number, batch in enumerate(batches(*args, **kwargs)):
                if calls_now == 1 and number == 1:
                    now()
                yield batch

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls_now
            calls_now = next(calls)  # the second validation, not the first at step 0
            return some(*args, **kwargs)

        calls_now = -1
        signalled.enter_context(mock.patch.object(recipe, "validation_batches", counted))
    if phase in ("checkpoint", "both"):
        save = recipe.Checkpointer.save
        patched = mock.patch.object(recipe.Checkpointer, "save", lambda *args, **kw: (now(), save(*args, **kw))[1])
        signalled.enter_context(patched)
    with signalled, mock.patch.object(recipe.Preemption, "ONE_PRESS", 0.01):
        try:
            return recipe.main(run)
        except KeyboardInterrupt:
            return "interrupted"


def train_on_a_full_disk(argv: list[str]) -> int:
    """The recipe, on a disk that is full from the middle of the second save to the beginning of the third."""
    run = recipe.setup(cli.parse(PretrainArgs, argv))
    ballast = run.out_dir.parent / "ballast"
    write_data, save = writer._Writer.write_data, recipe.Checkpointer.save
    writes, saves = itertools.count(1), itertools.count(1)

    def fill(*args: Any) -> Any:
        if next(writes) == 2 and dist.get_rank() == 1:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1024))
        return write_data(*args)

    def empty(*args: Any, **kwargs: Any) -> Any:
        if next(saves) == 3 and run.args.checkpoint.on_failure == "continue":
            ballast.unlink(missing_ok=True)
        return save(*args, **kwargs)

    with (
        mock.patch.object(writer._Writer, "write_data", fill),
        mock.patch.object(recipe.Checkpointer, "save", empty),
    ):
        return recipe.main(run)


def train_without_room(argv: list[str]) -> int:
    """The recipe; there is no room on the disk for the saves whose numbers are ``argv[0]``, as in 2,3."""
    numbers, *argv = argv
    saves, save, usage = itertools.count(1), recipe.Checkpointer.save, shutil.disk_usage("/")._replace(free=0)

    def saving(*args: Any, **how: Any) -> Any:
        full = mock.patch("shutil.disk_usage", return_value=usage)
        with full if str(next(saves)) in numbers.split(",") else contextlib.nullcontext():
            return save(*args, **how)

    with mock.patch.object(recipe.Checkpointer, "save", saving):
        return train(argv)


def train_told_late(argv: list[str]) -> int:
    """The recipe, whose first save fails in the background, in step 7."""
    run = recipe.setup(cli.parse(PretrainArgs, argv))
    lr_at, save = recipe.Run.lr_at, recipe.Checkpointer.save
    savers: list[Any] = []
    now = threading.Event()

    def waiting(run: Any, at: int) -> float:
        if at == 6 and savers:
            now.set()
            while not savers[0].done():
                time.sleep(0.01)
        return lr_at(run, at)

    def fail(*args: Any) -> None:
        now.wait()
        raise OSError("broken")

    def failing(saver: Any, *args: Any, **how: Any) -> Any:
        savers.append(saver)
        with mock.patch.object(saver, "_publish", fail if len(savers) == 1 else saver._publish):
            return save(saver, *args, **how)

    with (
        mock.patch.object(recipe.Run, "lr_at", waiting),
        mock.patch.object(recipe.Checkpointer, "save", failing),
    ):
        return recipe.main(run)


def train_stopped_in_a_save(argv: list[str]) -> list[Any]:
    """The recipe, with a NaN in step 6 while step 5 is being saved, which ends when somebody waits for it.

    Gives the exit code and the checkpoints that are there then.
    """
    waited, wait, write_data = threading.Event(), recipe.Checkpointer.wait, writer._Writer.write_data

    def waiting(saver: Any) -> Any:
        if saver._in_flight is not None:
            waited.set()
        return wait(saver)

    def writing(*args: Any) -> Any:
        waited.wait()
        return write_data(*args)

    with (
        mock.patch.object(recipe.Checkpointer, "wait", waiting),
        mock.patch.object(writer._Writer, "write_data", writing),
    ):
        try:
            code = train_poisoned(["0", "6", *argv])
            folder = Path(cli.parse(PretrainArgs, argv).out_dir) / "checkpoints"
            return [code, sorted(path.name for path in folder.iterdir())]
        finally:
            waited.set()


def train_set_up_before_another(argv: list[str]) -> list[int]:
    """The recipe, twice: the second run has been set up before the first was begun; gives how both ended."""
    second = recipe.setup(cli.parse(PretrainArgs, argv))
    return [recipe.main(recipe.setup(cli.parse(PretrainArgs, argv))), recipe.main(second)]


def train_ending_late(argv: list[str]) -> bool:
    """The recipe, whose first rank takes its time for its last word; gives whether it has had it on return."""
    done = Path(cli.parse(PretrainArgs, argv).out_dir) / "the last word"
    end = recipe.RunLog.end

    def late(*args: Any) -> None:
        end(*args)
        if dist.get_rank() == 0:
            time.sleep(0.3)
            done.touch()

    with mock.patch.object(recipe.RunLog, "end", late):
        train(argv)
    return done.exists()


def train_poisoned(argv: list[str]) -> int:
    """The recipe, with a NaN in a gradient of the rank ``argv[0]`` at the steps ``argv[1]``; minus: from there on."""
    rank, steps, *argv = argv
    poisons = [int(step) for step in steps.split(",")]
    run = recipe.setup(cli.parse(PretrainArgs, argv))
    check = recipe.Guard.check
    calls = itertools.count(1)

    def poisoned(guard: Any, at: int, loss_sum: Any, num_tokens: int, gradients: list[torch.Tensor]) -> Any:
        call = next(calls)
        if dist.get_rank() == int(rank) and (call in poisons or call >= -poisons[0] > 0):
            gradients[0].view(-1)[0] = torch.nan
        return check(guard, at, loss_sum, num_tokens, gradients)

    with mock.patch.object(recipe.Guard, "check", poisoned):
        return recipe.main(run)


def last_beats_of_poisoned(argv: list[str]) -> list[list[Any]]:
    """What the watchdog was last told by a run of train_poisoned: step and phase of two beats."""
    beats: list[list[Any]] = []
    beat = recipe.Watchdog.beat

    def recorded(watchdog: Any, *what: Any) -> None:
        beats.append([*what])
        beat(watchdog, *what)

    with mock.patch.object(recipe.Watchdog, "beat", recorded):
        train_poisoned(argv)
    return beats[-2:]


def start_hash(argv: list[str]) -> str:
    """Hash of every start weight, gathered."""
    run = recipe.setup(cli.parse(PretrainArgs, argv))
    fabric = recipe.build_fabric(run.world, run.args.parallel, run.args.train)
    fabric.launch()
    gpt, _, _ = recipe.build(run, fabric)
    digest = hashlib.blake2b()
    for name, parameter in gpt.named_parameters():
        digest.update(name.encode() + parameter.full_tensor().detach().numpy().tobytes())
    return digest.hexdigest()


def gradient(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    """What optimizer_steps takes for the gradient of a parameter: random numbers that name and step decide."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode())))


def coalesced(argv: list[str]) -> list[list[float]]:
    """What coalesced collectives make of this rank's numbers, at torch's debug level ``argv[0]``."""
    if not dist.is_initialized():  # an earlier command's group
        dist.init_process_group("gloo")
    previous = dist.get_debug_level()
    dist.set_debug_level(getattr(dist.DebugLevel, argv[0]))
    try:
        return _coalesced(dist.new_group(backend="gloo"))
    finally:
        dist.set_debug_level(previous)


def _coalesced(group: dist.ProcessGroup) -> list[list[float]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    tensors = [torch.arange(size * n) + 100.0 * rank for n in (1, 2)]
    owned = [tensor.chunk(size)[rank] for tensor in tensors]
    with collectives.coalesced(group):
        for part, tensor in zip(owned, tensors, strict=True):
            collectives.reduce_scatter(part, tensor, dist.ReduceOp.SUM, group)
    with collectives.coalesced(group, async_ops=True) as reduction:
        for part in owned:
            dist.all_reduce(part, dist.ReduceOp.MAX, group)
    if reduction:
        reduction.wait()
    with collectives.coalesced(group):
        for part, tensor in zip(owned, tensors, strict=True):
            collectives.all_gather(tensor, part, group)
    return [tensor.tolist() for tensor in tensors]


def optimizer_steps(argv: list[str]) -> list[dict[str, int]]:
    """Ten steps of the run's optimizer on given gradients; the fourth, of NaNs, is rejected and must change nothing.

    Rank 0 saves the full tensors to the file ``argv[0]``. Gives the collectives of each step.
    """
    file, *argv = argv
    run = recipe.setup(cli.parse(PretrainArgs, argv))
    fabric = recipe.build_fabric(run.world, run.args.parallel, run.args.train)
    fabric.launch()
    gpt, _, optimizer = recipe.build(run, fabric)
    counted = []
    for number in range(10):
        for name, parameter in gpt.named_parameters():
            full = gradient(name, parameter.shape, number)
            full = torch.full_like(full, torch.nan) if number == 3 else full
            mesh, placements = parameter.device_mesh, parameter.placements
            parameter.grad = distribute_tensor(full, mesh, placements, src_data_rank=None)
        optimizer.optimizer.found_inf = torch.tensor(float(number == 3))
        before = [local(tensor).clone() for tensor in named_tensors(gpt, optimizer.optimizer).values()]
        with Calls() as calls:
            optimizer.step()
        after = [local(tensor) for tensor in named_tensors(gpt, optimizer.optimizer).values()]
        if number > 0:  # the first step makes the state
            assert all(map(torch.equal, before, after)) == (number == 3)
        counted.append({name: count for name, count in calls.counts.items() if "c10d" in name})
    tensors = named_tensors(gpt, optimizer.optimizer)
    full = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}
    if fabric.is_global_zero:
        torch.save(full, file)
    return counted


def dtypes(argv: list[str]) -> dict[str, list[str]]:
    """What a bf16 step is made of: dtypes of master weights, gradients, moments, and of what a Block is given."""
    run = recipe.setup(cli.parse(PretrainArgs, argv))
    fabric = recipe.build_fabric(run.world, run.args.parallel, run.args.train)
    fabric.launch()
    gpt, model, optimizer = recipe.build(run, fabric)
    seen: dict[str, set[str]] = {"stream": set(), "tables": set(), "computed": set()}

    def look(block: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen["stream"].add(str(inputs[0].dtype))
        seen["tables"] |= {str(table.dtype) for table in inputs[1:] if table is not None}
        seen["computed"] |= {str(parameter.dtype) for parameter in block.parameters()}

    for block in gpt.transformer["h"].children():
        block.norm_1.register_forward_pre_hook(lambda norm, inputs, block=block: look(block, (inputs[0],)))
        block.attn.register_forward_pre_hook(lambda attn, inputs: look(attn, inputs))
    ids = torch.zeros(1, run.config.block_size, dtype=torch.int64)
    fabric.backward(model(ids, ids))
    finish_gradients(gpt)
    optimizer.step()
    seen["gradients"] = {str(parameter.grad.dtype) for parameter in gpt.parameters()}
    seen["master"] = {str(parameter.dtype) for parameter in gpt.parameters()}
    state = optimizer.optimizer.state
    seen["moments"] = {str(moments[key].dtype) for moments in state.values() for key in ("exp_avg", "exp_avg_sq")}
    return {name: sorted(found) for name, found in seen.items()}


def release_groups() -> None:
    """Destroy every process group but the default one: a run keeps its own until its process ends, and we run many.

    Their sockets close when the last reference goes, which may be in a run's frozen garbage. Looking through all of
    that takes a second, so it waits until there are many.
    """
    if dist.is_initialized():
        for group in set(dist.distributed_c10d._pg_map) - {dist.group.WORLD}:
            dist.destroy_process_group(group)
        _clear_sharding_prop_cache()  # it holds the meshes of a run, which equal the next one's, with their groups
    if len(os.listdir("/proc/self/fd")) > 100:  # a process may have 256 where the limit is low
        gc.unfreeze()
        gc.collect()
        gc.freeze()


def main() -> None:
    """Answer commands until stdin ends."""
    for line in sys.stdin:
        name, argv = json.loads(line)
        answer: dict[str, Any] = {}
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                answer["result"] = globals()[name](argv)
        except InputError as error:
            answer["problems"] = error.args
        except BaseException:
            answer["defect"] = traceback.format_exc()
        answer["said"] = said.getvalue()
        release_groups()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
