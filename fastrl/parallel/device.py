"""Device, dtype and CPU threads of a run, from their options."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastrl.errors import UserError
from fastrl.kernels._attention.flash import deterministic

WORKSPACES = ":4096:8"  # of cuBLAS: eight of 4 MiB, with which its products have the same bits in every run
WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(device: str | torch.device, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and compute dtype that `--device` and `--dtype` stand for on this machine.

    Raises UserError for a device that this machine does not have.
    """
    unknown = f"--device: expected auto, cpu, cuda or cuda:N; got {device!r}"
    if device == "auto":
        resolved = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            resolved = torch.device(device)
        except (RuntimeError, TypeError):
            raise UserError(unknown) from None
    if resolved.type == "cpu" and not resolved.index:  # tensors on the CPU have no index
        return torch.device("cpu"), DTYPES.get(dtype, torch.float32)
    if resolved.type != "cuda":
        raise UserError(unknown)

    if not torch.cuda.is_available():
        raise UserError(f"--device: got {device!r}, but this machine has no CUDA device; use --device cpu")
    present = torch.cuda.device_count()
    if resolved.index is not None and resolved.index >= present:
        raise UserError(
            f"--device: got {device!r}, but the last CUDA device of this machine is cuda:{present - 1}"
        )
    if resolved.index is None:
        resolved = torch.device("cuda", torch.cuda.current_device())
    return resolved, DTYPES.get(dtype, torch.bfloat16)


@contextmanager
def reproducible() -> Iterator[None]:
    """Two runs of what is inside give the same bits; afterwards torch's settings are what they were.

    cuBLAS reads its setting once, when its first handle is made, so CUDA should not have been used before;
    where it has been, and nobody set it, one warning says so.
    """
    if WORKSPACE_VARIABLE not in os.environ:
        os.environ[WORKSPACE_VARIABLE] = WORKSPACES
        if torch.cuda.is_initialized():
            warnings.warn(
                f"{WORKSPACE_VARIABLE}: expected {WORKSPACES} before CUDA starts, which it has: "
                "matrix products may differ in the last bits between two runs; set it in the environment",
                stacklevel=3,
            )
    with deterministic(warn_only=True):
        yield


def set_threads(threads: int) -> None:
    """Use this many CPU threads; 0 keeps torch's default."""
    if threads > 0:
        torch.set_num_threads(threads)


@contextmanager
def memory_limited_by(option: str, value: int) -> Iterator[None]:
    """Running out of memory inside the block becomes a UserError that names the option to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch.OutOfMemoryError is a RuntimeError; the CPU allocator raises a plain RuntimeError
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not out_of_memory and "DefaultCPUAllocator" not in str(error):
            raise
        reason = " ".join(str(error).split()).partition(". ")[0]
        half = max(1, value // 2)
        raise UserError(f"out of memory at {option} {value}; try {option} {half} ({reason})") from error
