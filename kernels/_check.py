"""Checks of shapes, dtypes and ranges; a message names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)


def dims(name: str, x: Tensor, spec: str, dtype: tuple[torch.dtype, ...], **known: int) -> tuple[int, ...]:
    """The sizes of `x` named by `spec`: `T, V = dims("logits", logits, "T V", FLOATS)`.

    Sizes given in `known` must match.  Raises TypeError for a non-tensor or a wrong dtype, ValueError for a
    wrong shape.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name}: expected a tensor of shape ({spec.replace(' ', ', ')}), got {type(x).__name__}"
        )
    letters, shape = spec.split(), x.shape
    fits = len(shape) == len(letters)
    if fits and known:
        # all() over a generator would cost more than the rest of the check
        for a, n in zip(letters, shape, strict=True):
            fits = fits and known.get(a, n) == n
    if not fits:
        want = ", ".join(f"{a}={known[a]}" if a in known else a for a in letters)
        raise ValueError(f"{name}: expected shape ({want}), got {tuple(shape)}")
    if x.dtype not in dtype:
        raise TypeError(f"{name}: expected dtype {_names(dtype)}, got {_names((x.dtype,))}")
    return shape


def one_of(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}; got {value!r}")


def same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors live on one device."""
    first = None
    for x in tensors.values():
        if x is None:
            continue
        if first is None:
            first = x.device
        elif x.device != first:
            places = [f"{n} on {x.device}" for n, x in tensors.items() if x is not None]
            raise ValueError(f"expected all tensors on one device, got {', '.join(places)}")


def ends(name: str, cu_seqlens: Tensor, T: int) -> int:
    """The number of sequences S of (S+1,) int ends.

    Raises ValueError for ends that do not go from 0 to T.  The values are checked on CPU only: reading them
    on CUDA would wait for the device.
    """
    (n,) = dims(name, cu_seqlens, "S+1", INTS)
    if n < 1:
        raise ValueError(f"{name}: expected shape (S+1,) with at least one entry, got ({n},)")

    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return n - 1
    complete = int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == T
    if not complete or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"{name}: expected non-decreasing ends from 0 to T={T}, got {cu_seqlens.tolist()[:8]}"
        )
    return n - 1


def no_gradient(op: str, **tensors: Tensor) -> None:
    """Raise ValueError where a gradient of `op` is needed: it has none, and must not silently give zero."""
    forward_mode = forward_ad._current_level >= 0
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if x.requires_grad or (forward_mode and forward_ad.unpack_dual(x).tangent is not None):
                raise ValueError(
                    f"{name}: expected no gradient, {op} has none, got a tensor that requires grad; "
                    "use torch.no_grad()"
                )


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs (gradcheck needs it), else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)
