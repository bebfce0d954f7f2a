"""Update by Muon: orthogonalize each hidden matrix's momentum (Jordan et al., kellerjordan.github.io/posts/muon, 2024).

Embedding, output matrix and norms are left to AdamW. An orthogonalized update is scaled to the root mean square of
AdamW's, 0.2, so that one learning rate and weight decay serve both (Moonlight, arXiv:2502.16982).

The iteration needs a matrix in full, of which each rank holds some rows. Every matrix is owned by one rank of the
world, which alone computes its update. A step needs three collectives, however many matrices there are: the shards go
to the owners in one, the updates come back in another, and the replicas (HSDP) exchange theirs in the third.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from tinyllama.config.args import OptimArgs
from tinyllama.config.model import ModelConfig
from tinyllama.model import GPT
from tinyllama.ops import symmetric_matmul
from tinyllama.throughput import newton_schulz_flops
from tinyllama.train.adamw import local

T = TypeVar("T")
Multiply = Callable[..., Tensor]

MOMENTUM = 0.95
ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)
"""coefficients of the iteration, which takes all singular values to about 1: to between 0.7 and 1.2"""
RMS = 0.2
"""root mean square of AdamW's updates"""


@dataclass(frozen=True)
class Matrix:
    """A hidden matrix of one or more parts, each of which is orthogonalized by itself.

    Its rows are ``groups`` groups, in each of which are ``sizes`` rows of the parts, in turn.
    """

    parameter: Tensor
    groups: int
    sizes: tuple[int, ...]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Return the shape of each part, its shorter side first."""
        cols = self.parameter.shape[1]
        rows = [self.groups * size for size in self.sizes]
        return [(min(count, cols), max(count, cols)) for count in rows]

    @property
    def cost(self) -> int:
        """FLOPs of its iterations."""
        return sum(newton_schulz_flops(*shape) for shape in self.shapes)

    @property
    def scale(self) -> float:
        """Return the factor that makes a matrix of orthogonal parts as large as an update of AdamW."""
        return RMS * math.sqrt(max(long for _, long in self.shapes))

    def split(self, full: Tensor) -> list[Tensor]:
        """Return the parts of ``full``, (rows, columns), each with its rows together."""
        if len(self.sizes) == 1:
            return [full]
        by_group = full.unflatten(0, (self.groups, -1))  # (groups, rows of a group, columns)
        return [part.flatten(0, 1) for part in by_group.split(self.sizes, dim=1)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """Return the matrix that ``split`` has split into these parts."""
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], dim=1).flatten(0, 1)


def hidden_matrices(model: GPT) -> list[Matrix]:
    """Return the matrices of the blocks, in the model's order."""
    found = []
    for name, parameter in model.transformer["h"].named_parameters():
        if parameter.ndim == 2:
            fused = name.endswith("attn.attn.weight")
            groups, sizes = qkv_parts(model.config) if fused else (1, (parameter.shape[0],))
            found.append(Matrix(parameter, groups, sizes))
    return found


def qkv_parts(config: ModelConfig) -> tuple[int, tuple[int, ...]]:
    """Return the groups, and the rows of q, k and v in each: attn.attn is three matrices whose rows alternate."""
    queries = config.n_head // config.n_query_groups
    return config.n_query_groups, (queries * config.head_size, config.head_size, config.head_size)


class Assignment:
    """Which rank computes the update of which matrix, and which rows of each matrix a rank holds.

    Each rank is one shard of one replica of the model: ``owned[replica][shard]`` lists the numbers of its matrices.
    """

    def __init__(self, matrices: Sequence[Matrix], replicas: int, shards: int) -> None:
        self.replicas, self.shards = replicas, shards
        self._shapes = [tuple(matrix.parameter.shape) for matrix in matrices]
        self.owned: list[list[list[int]]] = [[[] for _ in range(shards)] for _ in range(replicas)]
        loads = [0] * (replicas * shards)
        # the most expensive first, each to the rank that has least to do
        for index in sorted(range(len(matrices)), key=lambda index: -matrices[index].cost):
            rank = loads.index(min(loads))
            loads[rank] += matrices[index].cost
            self.owned[rank // shards][rank % shards].append(index)
        self.loads = loads

    def rows(self, index: int, shard: int) -> int:
        """Return how many rows of a matrix a shard has: FSDP gives all the same number, but the last what is left."""
        total = self._shapes[index][0]
        most = -(-total // self.shards)
        return max(0, min(most, total - shard * most))

    def numel(self, index: int, shard: int) -> int:
        """Return how many numbers of a matrix a shard has."""
        return self.rows(index, shard) * self._shapes[index][1]


class Muon(torch.optim.Optimizer):
    """Muon for the hidden matrices of a GPT, sharded or not, and torch's fused AdamW for its other parameters.

    ``dtype`` is that of the directions, which go to a matrix's owner; iterations are in ``iteration_dtype(dtype)``,
    weights and momenta in fp32. As fused AdamW does, ``step`` obeys ``found_inf``: where it is 1, weights and state
    stay as they are, and the host does not wait to learn it.
    """

    found_inf: Tensor | None = None

    def __init__(self, model: GPT, args: OptimArgs, dtype: torch.dtype) -> None:
        self._matrices = hidden_matrices(model)
        self._dtype = dtype
        self._multiply = symmetric_matmul.BACKENDS[model.ops["symmetric_matmul"]].call
        hidden = [matrix.parameter for matrix in self._matrices]
        of_muon = set(hidden)
        others = [parameter for parameter in model.parameters() if parameter not in of_muon]
        super().__init__([{"params": hidden}], {"lr": args.lr, "weight_decay": args.weight_decay})
        betas = (args.beta1, args.beta2)
        self._adamw = torch.optim.AdamW(others, args.lr, betas, weight_decay=args.weight_decay, fused=True)
        # one optimizer to whoever sets the learning rate, clears gradients or saves the state
        self._adamw.state = self.state
        self.param_groups += self._adamw.param_groups

        device = hidden[0].device
        self._scales = torch.tensor([matrix.scale for matrix in self._matrices], device=device)
        self._accept = torch.zeros((), device=device)
        self._mesh = hidden[0].device_mesh if isinstance(hidden[0], DTensor) else None
        replicas, shards = self._mesh.shape if self._mesh is not None else (1, 1)
        self._replica, self._shard = cast(list[int], self._mesh.get_coordinate()) if self._mesh is not None else (0, 0)
        self.assignment = Assignment(self._matrices, replicas, shards)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch overloads it by the closure
        """Update every parameter. Collective."""
        self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        found_inf = self._accept if self.found_inf is None else self.found_inf
        directions = self._directions(found_inf)
        updates = self._send_back(self._orthogonalized(self._collect(directions)))
        group = self.param_groups[0]
        lr = group["lr"] * (1 - found_inf)
        decay = 1 - lr * group["weight_decay"]
        move = in_one_pass(move_weights, self._scales.is_cuda)
        for matrix, update, factor in zip(self._matrices, updates, (-lr * self._scales).unbind(), strict=True):
            move(local(matrix.parameter).view(-1), update, decay, factor)

    def _directions(self, found_inf: Tensor) -> list[Tensor]:
        """Take the gradients into the momenta, and return the direction of this rank's shard of each matrix."""
        skip, weight = found_inf.bool(), (1 - MOMENTUM) * (1 - found_inf)
        directions = []
        direct = in_one_pass(take_direction, self._scales.is_cuda)
        for parameter in (matrix.parameter for matrix in self._matrices):
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            assert parameter.grad is not None
            momentum, gradient = local(state["momentum"]), local(parameter.grad)
            direction = direct(momentum.view(-1), gradient.view(-1), skip, weight, self._dtype)
            directions.append(direction.view(momentum.shape))
        return directions

    def _orthogonalized(self, owned: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return the updates of these matrices, by number."""
        parts = [part for index, full in owned.items() for part in self._matrices[index].split(full)]
        done = iter(orthogonalize_all(parts, self._multiply))
        matrices = {index: self._matrices[index] for index in owned}
        return {index: matrix.join([next(done) for _ in matrix.sizes]) for index, matrix in matrices.items()}

    def _collect(self, shards: list[Tensor]) -> dict[int, Tensor]:
        """Return the matrices that this rank owns, in full and by number, from every rank's ``shards`` of each."""
        assignment = self.assignment
        owners = assignment.owned[self._replica]
        mine = owners[self._shard]
        numels = [[assignment.numel(index, shard) for index in mine] for shard in range(assignment.shards)]
        outgoing = [[shards[index] for index in owner] for owner in owners]
        received = self._all_to_all(outgoing, numels, self._dtype)
        full = {
            index: torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            for index, *pieces in zip(mine, *received, strict=True)
        }
        return {index: flat.view(self._matrices[index].parameter.shape) for index, flat in full.items()}

    def _send_back(self, updates: dict[int, Tensor]) -> list[Tensor]:
        """Send the ``updates`` that this rank computed; return its shard of every matrix's update, flat."""
        assignment = self.assignment
        cut = [
            update.split([assignment.rows(index, shard) for shard in range(assignment.shards)])
            for index, update in updates.items()
        ]
        numels = [
            [[assignment.numel(index, self._shard) for index in owner] for owner in replica]
            for replica in assignment.owned
        ]
        outgoing = [[rows[shard] for rows in cut] for shard in range(assignment.shards)]
        dtype = iteration_dtype(self._dtype)
        received = self._all_to_all(outgoing, numels[self._replica], dtype)
        by_replica = self._all_gather(joined(received), [joined(replica) for replica in numels], dtype)
        order = joined(joined(assignment.owned))
        found = dict(zip(order, joined(by_replica), strict=True))
        return [found[index] for index in range(len(self._matrices))]

    def _all_to_all(
        self, outgoing: list[list[Tensor]], numels: list[list[int]], dtype: torch.dtype
    ) -> list[list[Tensor]]:
        """Send ``outgoing[shard]`` to each shard of this replica; return what each sends here, flat, in these sizes."""
        if self.assignment.shards == 1:
            return [[tensor.flatten() for tensor in outgoing[0]]]
        sent = self._flat(joined(outgoing), dtype)
        sizes = [sum(of_shard) for of_shard in numels]
        received = sent.new_empty(sum(sizes))
        sent_sizes = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
        dist.all_to_all_single(received, sent, sizes, sent_sizes, self._group("shard"))
        return [list(one.split(of_shard)) for one, of_shard in zip(received.split(sizes), numels, strict=True)]

    def _all_gather(self, tensors: list[Tensor], numels: list[list[int]], dtype: torch.dtype) -> list[list[Tensor]]:
        """Return the tensors of every replica, flat, in these sizes; sent padded, as all_gather takes equal ones."""
        if self.assignment.replicas == 1:
            return [tensors]
        flat = self._flat(tensors, dtype)
        padded = F.pad(flat, (0, max(sum(of_replica) for of_replica in numels) - len(flat)))
        gathered = [torch.empty_like(padded) for _ in numels]
        dist.all_gather(gathered, padded, self._group("replicate"))
        by_replica = zip(gathered, numels, strict=True)
        return [list(one[: sum(of_replica)].split(of_replica)) for one, of_replica in by_replica]

    def _flat(self, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Return one vector of all tensors, of which there may be none."""
        empty = torch.empty(0, device=self._scales.device, dtype=dtype)
        return torch.cat([empty, *(tensor.flatten() for tensor in tensors)])

    def _group(self, name: str) -> dist.ProcessGroup:
        assert self._mesh is not None
        return self._mesh.get_group(name)


def orthogonalize_all(matrices: list[Tensor], multiply: Multiply = symmetric_matmul.reference) -> list[Tensor]:
    """Orthogonalize each of these matrices, those of one shape in one batch."""
    batches = defaultdict(list)
    for number, matrix in enumerate(matrices):
        batches[matrix.shape].append(number)
    done: dict[int, Tensor] = {}
    for numbers in batches.values():
        batch = orthogonalize([matrices[number] for number in numbers], multiply)
        done |= zip(numbers, batch.unbind(), strict=True)
    return [done[number] for number in range(len(matrices))]


def orthogonalize(matrices: Sequence[Tensor], multiply: Multiply = symmetric_matmul.reference) -> Tensor:
    """Take all singular values of B matrices (m, n) to about 1 by Newton-Schulz -> (B, m, n); bf16 becomes fp16.

    ``multiply`` is a backend of ops/symmetric_matmul.py.
    """
    rows, cols = matrices[0].shape
    # bfloat16 rounds too much for iterations on x x^T; float16 does not, if x x^T is computed anew after two of them
    dtype = iteration_dtype(matrices[0].dtype)
    x = torch.empty(len(matrices), rows, cols, dtype=dtype, device=matrices[0].device)
    norms = torch._foreach_norm(list(matrices), dtype=torch.promote_types(dtype, torch.float32))
    into = in_one_pass(normalize_into, x.is_cuda)
    for slot, matrix, norm in zip(x, matrices, norms, strict=True):
        into(slot.view(-1), matrix.reshape(-1), norm)
    if max(rows, cols) >= 2 * min(rows, cols):
        return iterate_on_gram(x, multiply)
    return iterate_on_matrix(x.mT, multiply).mT if rows > cols else iterate_on_matrix(x, multiply)


def iteration_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that the iterations on matrices of ``dtype`` are computed in."""
    return torch.float16 if dtype == torch.bfloat16 else dtype


def iterate_on_matrix(x: Tensor, multiply: Multiply) -> Tensor:
    """Return p(x) x, (B, s, l), after all iterations, p being the polynomial of x x^T."""
    for _ in range(ITERATIONS):
        x = polynomial(multiply(x, x.mT), multiply) @ x
    return x


def iterate_on_gram(x: Tensor, multiply: Multiply) -> Tensor:
    """Return what ``iterate_on_matrix`` returns, for x (B, m, n), mostly by matmuls of (B, s, s), s = min(m, n).

    That takes fewer operations if s is much shorter than the other side. The polynomials are those of one symmetric
    matrix, so they and their products commute and are symmetric (Gram Newton-Schulz,
    dao-lab.ai/blog/2026/gram-newton-schulz).
    """
    tall = x.shape[1] > x.shape[2]
    for iterations in (2, ITERATIONS - 2):
        square = multiply(x.mT, x) if tall else multiply(x, x.mT)
        product = factor = polynomial(square, multiply)
        for _ in range(iterations - 1):
            square = multiply(multiply(factor, square), factor)
            factor = polynomial(square, multiply)
            product = multiply(factor, product)
        x = x @ product if tall else product @ x
    return x


def polynomial(square: Tensor, multiply: Multiply) -> Tensor:
    """Return a + b square + c square^2 of symmetric matrices, (B, s, s)."""
    a, b, c = QUINTIC
    result = multiply(square, square, square, alpha=c, beta=b)
    result.diagonal(dim1=1, dim2=2).add_(a)
    return result


def take_direction(momentum: Tensor, gradient: Tensor, skip: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Take a gradient into the momentum, in place, and return Nesterov's direction up to a factor.

    Where ``skip`` is true the momentum takes in 0 with a ``weight`` of 0, which leaves it as it is, bit for bit.
    """
    gradient = gradient.masked_fill(skip, 0)
    momentum.lerp_(gradient, weight)
    return torch.add(momentum, gradient, alpha=(1 - MOMENTUM) / MOMENTUM).to(dtype)


def normalize_into(out: Tensor, matrix: Tensor, norm: Tensor) -> None:
    """Write a matrix, divided by its norm, to ``out``."""
    out.copy_(matrix / (norm + 1e-7))


def move_weights(weight: Tensor, update: Tensor, decay: Tensor, factor: Tensor) -> None:
    """Multiply a weight by ``decay`` and add ``factor`` times its update, in place."""
    weight.mul_(decay).addcmul_(update, factor)


@functools.cache
def in_one_pass(function: Callable[..., Any], cuda: bool) -> Callable[..., Any]:
    """Return ``function`` of flat tensors; on a GPU it is one kernel, which reads and writes each tensor only once."""
    return torch.compile(function, dynamic=True, fullgraph=True) if cuda else function


def joined(lists: Iterable[list[T]]) -> list[T]:
    """Return one list of all items."""
    return list(itertools.chain.from_iterable(lists))
