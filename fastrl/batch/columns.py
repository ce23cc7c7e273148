"""Columns of packed sequences: each declares its axis once; whatever moves sequences derives from that.

A packed dataclass holds S sequences with T tokens end to end, `cu_seqlens` (S+1,), and columns:

    reward: Tensor = field(metadata=column("S"))
    ref_logp: Tensor | None = field(default=None, metadata=column("T"))
    images: Ragged | None = field(default=None, metadata=column("ragged"))

Selecting sequences, joining batches, cutting micro-batches, keeping partial rollouts and writing a checkpoint
then carry the new column without another line.  An optional column is None in all sequences or in none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from functools import cache
from itertools import chain
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from fastrl.batch.transfer import fetch, send

Axis = Literal["T", "S", "ragged"]
ENDS = "cu_seqlens"  # the field that marks where sequences end; every packed dataclass has it
KNOWN = "known"  # the field of what the host knows of the others, which follows by itself


@dataclass(frozen=True, slots=True)
class Column:
    """How a field follows its sequences.

    axis         "T": one row for each token.  "S": one row, or one item of a list, for each sequence.
                 "ragged": a `Ragged`, any number of rows for each sequence
    within_call  it counts within one sampling call: joined calls count on, and a checkpoint leaves it out
    """

    axis: Axis
    within_call: bool = False


def column(axis: Axis, *, within_call: bool = False) -> dict[str, Column]:
    """The metadata that makes a dataclass field a column; see `Column`."""
    return {"column": Column(axis, within_call)}


@cache
def columns(kind: type) -> Mapping[str, Column]:
    """The declared columns of a dataclass, in the order of its fields."""
    declared = {}
    for f in fields(kind):
        if "column" in f.metadata:
            declared[f.name] = f.metadata["column"]
    return declared


@cache
def packed_columns(kind: type) -> Mapping[str, Column]:
    """The columns of a packed dataclass.

    Raises TypeError for a field without an axis: it would stay as it is while its sequences move.
    """
    declared = columns(kind)
    for f in fields(kind):
        if f.name not in (ENDS, KNOWN) and f.name not in declared:
            raise TypeError(
                f"{kind.__name__}.{f.name}: expected a declared axis, got a plain field; "
                'add field(metadata=column("T" or "S" or "ragged"))'
            )
    return declared


class Packed(Protocol):
    """A dataclass of packed sequences."""

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]

    @property
    def cu_seqlens(self) -> Tensor: ...


P = TypeVar("P", bound=Packed)


@dataclass(frozen=True, slots=True)
class Ragged:
    """Any number of rows for each of S sequences, such as the patches of its images.

    values  (N, ...)  the rows, sequence by sequence
    ends    (S+1,)    int64, on the host, so that selecting waits for no device: sequence i has the rows
            ends[i] to ends[i+1]
    """

    values: Tensor
    ends: Tensor

    def __post_init__(self) -> None:
        if self.ends.device.type != "cpu":
            raise ValueError(f"ends: expected a tensor on the host, got {self.ends.device}; use .cpu()")

    def select(self, samples: Sequence[int]) -> Ragged:
        """The rows of the named sequences, in the order given."""
        rows = rows_of(self.ends.tolist(), samples)
        (index,) = send([rows], self.values.device)
        lengths = self.ends.diff()[list(samples)]
        return Ragged(self.values[index], _ends_of(lengths))

    @staticmethod
    def join(parts: Sequence[Ragged]) -> Ragged:
        """The sequences of all parts, in order."""
        values = [part.values for part in parts]
        ends = [part.ends for part in parts]
        return Ragged(torch.cat(values), join_ends(ends))


def rows_of(ends: Sequence[int], samples: Sequence[int]) -> Tensor:
    """int64 indices of the rows of the named sequences, in the order given.  Both ways on the host."""
    parts = [torch.arange(ends[i], ends[i + 1]) for i in samples]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def join_ends(parts: Sequence[Tensor]) -> Tensor:
    """The ends (S+1,) of sequences that lie behind each other; waits for no device."""
    shifted = [parts[0]]
    total = parts[0][-1]
    for ends in parts[1:]:
        shifted.append(ends[1:] + total)
        total = total + ends[-1]
    return torch.cat(shifted)


def _ends_of(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


# --- sequences ----------------------------------------------------------------------------------------
def select(packed: P, samples: Sequence[int], ends: Tensor | None = None) -> P:
    """The named sequences, in the order given.  The indices are computed once for all columns.

    ends  `cu_seqlens` on the host; without it, selecting from a device waits for that
    """
    (ends,) = fetch([packed.cu_seqlens]) if ends is None else (ends,)
    rows = rows_of(ends.tolist(), samples)
    places = torch.tensor(list(samples), dtype=torch.int64)
    selected = _ends_of(ends.diff()[places]).to(torch.int32)
    tokens, sequences, cu_seqlens = send([rows, places, selected], packed.cu_seqlens.device)

    taken: dict[str, object] = {ENDS: cu_seqlens}
    for name, declared in packed_columns(type(packed)).items():
        value = getattr(packed, name)
        if value is None:
            continue
        if isinstance(value, Ragged):
            taken[name] = value.select(samples)
        elif isinstance(value, list):
            taken[name] = [value[i] for i in samples]
        else:
            taken[name] = value[tokens if declared.axis == "T" else sequences]
    return replace(packed, **taken)


def join(parts: Sequence[P]) -> P:
    """The sequences of several packed dataclasses as those of one, in order.

    Raises ValueError for an optional column that only some parts have; a list (decoded text) is dropped then.
    """
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, object] = {ENDS: join_ends([part.cu_seqlens for part in parts])}
    if hasattr(parts[0], KNOWN):
        joined[KNOWN] = None
    for name, declared in packed_columns(type(parts[0])).items():
        values = [getattr(part, name) for part in parts]
        if declared.within_call:
            values = _count_on(values)
        joined[name] = _concatenated(name, values)
    return replace(parts[0], **joined)


def _concatenated(name: str, values: Sequence[object]) -> object:
    present = [value for value in values if value is not None]
    lists = [value for value in present if isinstance(value, list)]
    if lists:
        return list(chain(*lists)) if len(lists) == len(values) else None
    if 0 < len(present) < len(values):
        raise ValueError(
            f"{name}: expected a column of every part or of none, got it in {len(present)} of {len(values)}"
        )
    ragged = [value for value in present if isinstance(value, Ragged)]
    tensors = [value for value in present if isinstance(value, Tensor)]
    if ragged:
        return Ragged.join(ragged)
    return torch.cat(tensors) if tensors else None


def _count_on(values: Sequence[Tensor]) -> list[Tensor]:
    """Each part's numbers after those of the parts before it; waits for no device."""
    counted = []
    start = values[0].new_zeros(())
    for numbers in values:
        counted.append(numbers + start)
        if numbers.numel():
            start = start + numbers.amax() + 1
    return counted


def take_tokens(source: object, kind: type, index: Tensor | slice) -> dict[str, Any]:
    """The per-token columns that `kind` declares, read from `source` at `index`, by name."""
    taken = {}
    for name, declared in columns(kind).items():
        if declared.axis == "T":
            value = getattr(source, name)
            if value is not None:
                value = value[index]
            taken[name] = value
    return taken


# --- a checkpoint -------------------------------------------------------------------------------------
def as_tensors(packed: Packed) -> dict[str, Tensor]:
    """What a checkpoint keeps of the columns; lists are the caller's to encode."""
    out = {ENDS: packed.cu_seqlens}
    for name, declared in packed_columns(type(packed)).items():
        value = getattr(packed, name)
        if isinstance(value, Ragged):
            out |= {name: value.values, _ends_name(name): value.ends}
        elif isinstance(value, Tensor) and not declared.within_call:
            out[name] = value
    return out


def from_tensors(kind: type[P], tensors: Mapping[str, Tensor], device: torch.device, **others: object) -> P:
    """What `as_tensors` took, on `device`; `others` are the columns that it leaves out."""
    found: dict[str, object] = {ENDS: tensors[ENDS].to(device)}
    for name, declared in packed_columns(kind).items():
        if name not in tensors:
            continue
        values = tensors[name].to(device)
        if declared.axis == "ragged":
            ends = tensors[_ends_name(name)]
            found[name] = Ragged(values, ends.cpu())
        else:
            found[name] = values
    return kind(**found, **others)


def _ends_name(name: str) -> str:
    return f"{name}.ends"
