"""The command `fastrl check`: check the GPU kernels now, against their references in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from fastrl import ops
from fastrl.kernels._verdicts.case import Widths
from fastrl.kernels._verdicts.first_use import number_of, recheck
from fastrl.kernels._verdicts.machine import machine
from fastrl.kernels._verdicts.summary import rows, sentence, table, where
from fastrl.model.config import ModelConfig
from fastrl.model.folder import model_folder
from fastrl.model.weights import read_config
from fastrl.model.widths import kernel_widths
from fastrl.parallel.device import resolve_device
from fastrl.sampler.engine import PAGE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Options(Protocol):
    """What the command line gives."""

    device: str
    model: str | None


@dataclass(frozen=True, slots=True)
class Checked:
    """How the checks ended: 1 if a kernel failed or could not be checked."""

    exit_code: int


def run(options: Options) -> Checked:
    """Check every kernel anew, print a line for each, and write the verdicts down.

    Raises UserError for a device that is not there, and for a model whose widths cannot be read.
    """
    device = _device(options.device)
    if number_of(device) is None:
        reason = "--device cpu runs none" if torch.cuda.is_available() else "this machine has no CUDA device"
        print(f"fastrl check: {reason}; there are no kernels to check")
        return Checked(0)

    trouble = recheck(device, _widths(options.model), DTYPES)
    chosen = ops.backend(device)
    print(f"{where(device)}\n\n{table(device, chosen)}\n\n{sentence(device, chosen)}")
    if trouble:
        print(f"not all kernels could be checked: {trouble}")
    failed = [row.op for row in rows(device) if row.failed]
    return Checked(1 if failed or trouble else 0)


def _device(name: str) -> torch.device:
    stands_in = machine().stands_in
    return torch.device(stands_in) if stands_in else resolve_device(name, "auto")[0]


def _widths(model: str | None) -> Widths:
    if model is None:
        return Widths()
    return kernel_widths(ModelConfig.from_dict(read_config(model_folder(model))), PAGE)
