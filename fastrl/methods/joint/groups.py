"""Groups of whole sequences in a checkpoint, and a group made of judged completions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastrl.data.comparisons import Group
from fastrl.train.source import State


def under(prefix: str, state: State) -> State:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def as_tensors(groups: Sequence[Group]) -> State:
    """Groups of whole sequences, each scored at its last token: tokens (T,), lengths (S,), target (S,) and
    sizes (G,) of groups.
    """
    sequences = [sequence for g in groups for sequence in g.tokens]
    integers = {
        "tokens": [t for s in sequences for t in s],
        "lengths": [len(s) for s in sequences],
        "sizes": [len(g.tokens) for g in groups],
    }
    target = [t for g in groups for t in g.target]
    tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in integers.items()}
    return tensors | {"target": torch.tensor(target, dtype=torch.float64)}


def as_groups(tensors: State) -> list[Group]:
    """The groups that `as_tensors` took."""
    lengths, sizes = tensors["lengths"].tolist(), tensors["sizes"].tolist()
    sequences = iter([s.tolist() for s in tensors["tokens"].split(lengths)] if lengths else [])
    targets = iter(tensors["target"].tolist())

    groups = []
    for size in sizes:
        tokens = [next(sequences) for _ in range(size)]
        groups.append(compared("a checkpoint", tokens, [next(targets) for _ in range(size)]))
    return groups


def compared(where: str, tokens: list[list[int]], target: list[float]) -> Group:
    """Whole sequences, each scored at its last token."""
    return Group(where, tokens, [[len(t) - 1] for t in tokens], target)
