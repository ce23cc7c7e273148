"""Data parallelism: who this process is, its share of the work, and sums over all processes.

Under torchrun every process runs the same program; alone, the world has one member and every function is the
identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class World:
    """R processes, of which this is number `rank`."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, n: int) -> range:
        """This process's contiguous part of n items; parts differ by at most one item."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64."""
        return self._reduce(values, torch_dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        return self._reduce(values, torch_dist.ReduceOp.MAX)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients over the processes, in place; a parameter without one counts as zeros."""
        if self.size == 1:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            torch_dist.all_reduce(p.grad)

    def gather(self, rows: list[Any]) -> list[Any]:
        """The lists of all processes, joined in rank order."""
        if self.size == 1:
            return rows
        parts: list[list[Any]] = [[] for _ in range(self.size)]
        torch_dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

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
    """Enter the process group torchrun describes in the environment; alone without one.

    Tensors on CUDA go through nccl, and everything on CPU, plain numbers above all, through gloo.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not torch_dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch_dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return World(torch_dist.get_rank(), size)
