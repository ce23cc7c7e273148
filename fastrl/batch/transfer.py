"""Numbers on their way between host and device: all of them in one copy.

To a GPU they go through pinned memory and the host does not wait: the buffer belongs to torch's cache of
pinned memory, which gives it out again only after the copy that reads it is done.  On a CPU nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes at whose multiples the parts of a buffer begin


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Host tensors on `device`, by one copy for which nobody waits; on CPU the tensors themselves.

    The results are views of one buffer, which lives as long as any of them.
    """
    if device.type == "cpu":
        return list(tensors)
    starts, total = _layout(tensors)
    pinned = torch.empty(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for x, place in zip(tensors, _views(pinned, tensors, starts), strict=True):
        place.copy_(x)
    return _views(pinned.to(device, non_blocking=True), tensors, starts)


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Device tensors on the host, by one copy.  Waits for the device; on CPU the tensors themselves."""
    if not tensors or tensors[0].device.type == "cpu":
        return list(tensors)
    starts, total = _layout(tensors)
    packed = torch.empty(total, dtype=torch.uint8, device=tensors[0].device)
    for x, place in zip(tensors, _views(packed, tensors, starts), strict=True):
        place.copy_(x)
    return _views(packed.cpu(), tensors, starts)


def _layout(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor's bytes begin, and how many there are."""
    sizes = [-(-x.numel() * x.element_size() // ALIGNMENT) * ALIGNMENT for x in tensors]
    ends = [0, *accumulate(sizes)]
    return ends[:-1], ends[-1]


def _views(buffer: Tensor, tensors: Sequence[Tensor], starts: Sequence[int]) -> list[Tensor]:
    """The parts of `buffer` (bytes,) with the shapes and dtypes of `tensors`."""
    views = []
    for x, start in zip(tensors, starts, strict=True):
        part = buffer[start : start + x.numel() * x.element_size()]
        views.append(part.view(x.dtype).view(x.shape))
    return views
