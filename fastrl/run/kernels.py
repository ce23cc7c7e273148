"""Which kernels a command runs, checked and said before it begins."""

from __future__ import annotations

import sys

from fastrl import ops
from fastrl.kernels._verdicts.summary import sentence
from fastrl.model.language import LanguageModel
from fastrl.model.widths import kernel_widths
from fastrl.parallel.kernels import settle_kernels
from fastrl.parallel.world import World
from fastrl.sampler.engine import PAGE


def say_kernels(model: LanguageModel) -> None:
    """Check the kernels for this model where that is still to be done; a line on standard error on a GPU."""
    device = model.device
    settle_kernels(device, kernel_widths(model.config, PAGE), model.dtype, World())
    line = sentence(device, ops.backend(device))
    if line:
        print(line, file=sys.stderr)
