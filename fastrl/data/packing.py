"""Groups of a reward model on a device, apart from how they are read, which is done without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.batch.transfer import send
from fastrl.data.comparisons import Group


@dataclass(frozen=True, slots=True)
class Packed:
    """Groups on a device.

    tokens      (T,)
    cu_seqlens  (S+1,) int32
    at          (N,) the rows of T at which scores are read
    """

    groups: Sequence[Group]
    tokens: Tensor
    cu_seqlens: Tensor
    at: Tensor


def pack(groups: Sequence[Group], device: torch.device | str = "cpu") -> Packed:
    """The groups' sequences end to end."""
    tokens: list[int] = []
    ends = [0]
    rows = []
    for group in groups:
        for sequence, at in zip(group.tokens, group.at, strict=True):
            rows += [ends[-1] + position for position in at]
            tokens += sequence
            ends.append(len(tokens))
    lists = ((tokens, torch.int64), (ends, torch.int32), (rows, torch.int64))
    host = [torch.tensor(values, dtype=dtype) for values, dtype in lists]
    return Packed(groups, *send(host, torch.device(device)))
