"""Where a run computes: device, dtype and threads from their options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastrl.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and compute dtype that `--device` and `--dtype` mean here.  Raises UserError for a device
    that is not there.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        where = torch.device(kind)
    except RuntimeError:
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N; got {device!r}") from None
    if where.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N; got {device!r}")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device: {device!r} was asked for, but this machine has no CUDA device; use --device cpu"
        )
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    auto = torch.bfloat16 if where.type == "cuda" else torch.float32
    return where, DTYPES.get(dtype, auto)


def set_threads(threads: int) -> None:
    """Use this many CPU threads; 0 leaves torch's own choice."""
    if threads > 0:
        torch.set_num_threads(threads)


@contextmanager
def memory_limited_by(option: str, value: int) -> Iterator[None]:
    """Running out of memory inside the block becomes a UserError that names the option to lower."""
    try:
        yield
    except (
        RuntimeError,
        MemoryError,
    ) as error:  # torch.OutOfMemoryError is a RuntimeError; CPU's allocator raises a plain one
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(
            error
        ):
            raise
        said = " ".join(str(error).split())
        raise UserError(
            f"out of memory at {option} {value}; "
            f"try {option} {max(1, value // 2)} ({said.partition('. ')[0]})"
        ) from error
