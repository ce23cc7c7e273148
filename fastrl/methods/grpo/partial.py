"""Partial rollouts: groups of which some completions are unfinished wait, and go on with the next step's
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastrl.batch.types import Rollouts
from fastrl.sampler.state import REASONS, UNFINISHED

_TENSORS = (
    "tokens",
    "cu_seqlens",
    "completion_mask",
    "prompt_lengths",
    "sequence",
    "logp",
    "behaviour_logp",
    "entropy",
    "weight_version",
)


@dataclass(frozen=True, slots=True)
class Held:
    """A group that is not done: the dataset's item, and its rollouts so far."""

    item: int
    rollouts: Rollouts

    @property
    def unfinished(self) -> list[int]:
        """Which of its sequences are to go on."""
        return [i for i, reason in enumerate(self.rollouts.finish_reason) if reason == REASONS[UNFINISHED]]


class Carry:
    """The groups held from step to step.  A group is trained on in the step in which its last completion
    ends.

    Its earlier tokens keep the log-probs and the weight version they were drawn with.
    """

    def __init__(self, group: int) -> None:
        self.group = group
        self.held: list[Held] = []

    def unfinished(self) -> Rollouts | None:
        """What the next call is to go on with; None for nothing."""
        return Rollouts.join([h.rollouts.select(h.unfinished) for h in self.held]) if self.held else None

    def sort(self, drawn: Rollouts, items: Sequence[int]) -> tuple[list[int], Rollouts]:
        """Items and rollouts of the groups that are done: held ones first, then of `items`, whose samples end
        `drawn`; hold the others.
        """
        groups, first = [], 0
        for held in self.held:
            left = held.unfinished
            went_on = {i: drawn.select([first + k]) for k, i in enumerate(left)}
            whole = Rollouts.join([went_on.get(i) or held.rollouts.select([i]) for i in range(self.group)])
            groups.append(Held(held.item, whole))
            first += len(left)
        groups += [
            Held(item, drawn.select(range(a, a + self.group)))
            for item, a in zip(items, range(first, len(drawn), self.group), strict=True)
        ]
        done = [g for g in groups if not g.unfinished]
        self.held = [g for g in groups if g.unfinished]
        same = [replace(g.rollouts, prompt_index=torch.zeros_like(g.rollouts.prompt_index)) for g in done]
        return [g.item for g in done], Rollouts.join(same) if same else drawn.select([])

    def state(self) -> dict[str, Tensor]:
        """The held groups as tensors, for a checkpoint."""
        if not self.held:
            return {}
        rollouts = Rollouts.join([h.rollouts for h in self.held])
        codes = torch.tensor([REASONS.index(reason) for reason in rollouts.finish_reason])
        return {name: getattr(rollouts, name) for name in _TENSORS} | {
            "finish": codes,
            "items": torch.tensor([h.item for h in self.held]),
        }

    def load_state(self, state: dict[str, Tensor], tokenizer: Any, device: torch.device) -> None:
        """What `state` returned."""
        self.held = []
        if not state:
            return
        tensors: dict[str, Any] = {name: state[name].to(device) for name in _TENSORS}
        reasons = [REASONS[code] for code in state["finish"].tolist()]
        rollouts = Rollouts(
            **tensors,
            prompt_index=torch.zeros(len(reasons), dtype=torch.int64, device=device),
            finish_reason=reasons,
        )
        if tokenizer is not None:
            rollouts = replace(
                rollouts, text=tokenizer.batch_decode(rollouts.completions(), skip_special_tokens=True)
            )
        for i, item in enumerate(state["items"].tolist()):
            self.held.append(Held(item, rollouts.select(range(i * self.group, (i + 1) * self.group))))
