"""The kernels of a run: checked where that is still to be done, and the same on every process."""

from __future__ import annotations

import torch

from fastrl.kernels._verdicts.case import Widths
from fastrl.kernels._verdicts.first_use import ensure, passing, restrict
from fastrl.parallel.world import World


def settle_kernels(device: torch.device, widths: Widths, dtype: torch.dtype, world: World) -> None:
    """Have a verdict for every kernel on this process's device, and use those that pass on all processes.

    Processes that run different kernels would break "R processes compute what one would".  Every process of
    the world calls this.
    """
    ensure(device, widths, (torch.float32, dtype))
    if world.size > 1:
        restrict(device, frozenset.intersection(*world.gather([passing(device)])))
