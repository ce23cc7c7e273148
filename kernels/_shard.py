"""A vocabulary split over the processes of a group: each holds some rows of the head's weight, and all hold
the hidden states.

    m = max_r m_r        w_r = exp(log s_r + m_r - m)        s = sum_r w_r
    z_target - m = sum_r [target in shard r] (logp_r + log s_r + m_r - m)
    entropy = log s + sum_r w_r (entropy_r - log w_r) / s

where m_r, log s_r, logp_r, entropy_r are the statistics of rank r's shard alone, as the row op returns them.
A maximum and one sum over the group for each chunk of rows, and one sum of the gradient of hidden; the
gradient of the weight stays where its rows are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl.kernels._chunks import logits_budget


@dataclass(frozen=True, slots=True)
class Shard:
    """The vocabulary rows [first, first + here) of `total`.

    `most` is the size of the largest shard, `budget` the smallest default budget of logits in bytes: they set
    the chunks of all processes, whose devices may differ.
    """

    group: Any
    first: int
    here: int
    most: int
    total: int
    budget: int

    @classmethod
    def of(cls, weight: Tensor, group: Any) -> Shard:
        """This process's shard.  Waits for the device once, to gather the sizes and budgets of all.

        Raises:  TypeError for what is not a group, ValueError for a group without this process.
        """
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group: expected a torch.distributed.ProcessGroup, got {type(group).__name__}")
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(
                "group: this process is not in it; call the op on the group's own processes only"
            )
        facts = torch.zeros(2, dist.get_world_size(group), dtype=torch.int64, device=weight.device)
        facts[0, rank], facts[1, rank] = weight.shape[0], logits_budget(weight.device)
        dist.all_reduce(facts, group=group)
        sizes, budgets = facts.tolist()
        return cls(group, sum(sizes[:rank]), sizes[rank], max(sizes), sum(sizes), min(budgets))

    def local(self, target: Tensor) -> Tensor:
        """Targets counted from this shard's first row; those of other shards lie outside [0, here)."""
        return target.long() - self.first

    def combine(
        self, target: Tensor, logp: Tensor, entropy: Tensor, m: Tensor, log_s: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The statistics of the whole vocabulary, the same on every rank, from those of this shard.

        `target` holds global ids.
        """
        m_all = m.clone()
        dist.all_reduce(m_all, dist.ReduceOp.MAX, group=self.group)
        # a shard of nothing but -inf has no probability, and no distribution of its own
        empty = m == -torch.inf
        log_w = torch.where(empty & (m_all > -torch.inf), -torch.inf, log_s + (m - m_all))
        w = log_w.exp()

        here = (target >= self.first) & (target < self.first + self.here)
        shares = [w, torch.where(here, torch.where(empty, -torch.inf, logp + log_w), 0)]
        if entropy.numel():
            shares.append(torch.where(w > 0, w * (entropy - log_w), torch.where(w == 0, 0, w)))
        summed = torch.stack(shares)
        dist.all_reduce(summed, group=self.group)

        log_s_all = summed[0].log()
        inside = (target >= 0) & (target < self.total)
        logp_all = torch.where(inside, summed[1] - log_s_all, torch.nan)
        entropy_all = log_s_all + summed[2] / summed[0] if entropy.numel() else entropy
        return logp_all, entropy_all, m_all, log_s_all

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the group, in place."""
        dist.all_reduce(x, group=self.group)
        return x
