"""Memory with red zones: every tensor of a case lies between bytes that nobody may change.

All bytes start as 0xFF, which is NaN in every float dtype and -1 as an integer: what is read outside a
tensor, or before it was written, spoils the result.  Tensors that the kernel's launcher allocates itself are
placed in the same way (`allocations`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ZONE = 512  # bytes before and after a tensor: tensors stay aligned to as much
POISON = 0xFF

_aten = torch.ops.aten
_EMPTY = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_like.default,
        _aten.empty_strided.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    }
)
_FILLED = frozenset(
    {_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default, _aten.full.default}
)


class RedZones:
    """The buffers of one call."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []  # all bytes, and how many of them are a tensor's own

    def like(self, x: Tensor) -> Tensor:
        """Poisoned memory in the shape and strides of `x`, between red zones."""
        if not x.numel():
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        size = span * x.element_size()
        buffer = torch.full((size + 2 * ZONE,), POISON, dtype=torch.uint8, device=x.device)
        self.buffers.append((buffer, size))
        return (
            buffer[ZONE : ZONE + size].view(x.dtype).as_strided(x.shape, x.stride(), ZONE // x.element_size())
        )

    def copy(self, x: Tensor) -> Tensor:
        """`x` between red zones."""
        return self.like(x).copy_(x.detach())

    def intact(self) -> bool:
        """Whether every red zone holds what it held.  Waits for the device, once."""
        whole = []
        for buffer, size in self.buffers:
            zones = torch.cat([buffer[:ZONE], buffer[ZONE + size :]])
            whole.append((zones == POISON).all())
        return bool(torch.stack(whole).all()) if whole else True


class allocations(TorchDispatchMode):
    """Inside the `with` block, new tensors lie between the red zones of `zones`."""

    def __init__(self, zones: RedZones) -> None:
        super().__init__()
        self.zones = zones

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            return self.zones.like(made)
        return self.zones.copy(made) if func in _FILLED else made
