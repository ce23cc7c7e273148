"""Data parallelism: this process's rank, its share of the work, and sums over all processes.

Under torchrun every process runs the same program.  A single process is a world of size 1, in which every
collective is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fastrl.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """`size` processes, of which this one is number `rank`."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, n: int) -> range:
        """This process's contiguous part of n items; the parts' lengths differ by at most one."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64."""
        return self._reduce(values, torch_dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        """The largest of each value over the processes, in float64."""
        return self._reduce(values, torch_dist.ReduceOp.MAX)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients over the processes, in place; a parameter without one counts as zeros."""
        if self.size == 1:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            torch_dist.all_reduce(p.grad)

    def gather(self, rows: list[T]) -> list[T]:
        """The lists of all processes, joined in rank order."""
        if self.size == 1:
            return rows
        parts: list[list[T]] = [[] for _ in range(self.size)]
        torch_dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first process, on all of them; only that process calls it.

        Raises UserError on every process where it fails on the first, so that all of them stop together.
        """
        if self.size == 1:
            return make()
        made: list[T | None] = [None]
        failure: UserError | None = None
        if self.is_main:
            try:
                made = [make()]
            except (UserError, OSError) as error:
                failure = UserError(str(error))
                failure.__cause__ = error

        box: list[object] = [failure and str(failure), *made]
        torch_dist.broadcast_object_list(box)
        if box[0] is not None:
            failure = failure or UserError(str(box[0]))
            failure.of_all = True
            raise failure
        return cast(T, box[1])

    def barrier(self) -> None:
        if self.size > 1:
            torch_dist.barrier()

    def _reduce(self, values: Iterable[float], op: torch_dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(values)
        x = torch.tensor(list(values), dtype=torch.float64)
        torch_dist.all_reduce(x, op)
        return x.tolist()


def init_world() -> World:
    """Join the process group that torchrun describes in the environment; without one, a world of one process.

    CUDA tensors are reduced by nccl, CPU tensors and plain numbers by gloo.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not torch_dist.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        torch_dist.init_process_group(backend)
    return World(torch_dist.get_rank(), size)
