"""Partial rollouts: a group with unfinished completions waits, and the next step's weights resume it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fastrl.batch.columns import as_tensors, from_tensors
from fastrl.batch.types import Rollouts
from fastrl.sampler.state import REASONS, UNFINISHED


class Decodes(Protocol):
    """What is asked of a tokenizer here."""

    def batch_decode(self, ids: list[list[int]], *, skip_special_tokens: bool) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class PendingGroup:
    """A group with unfinished completions: the prompt's number, and its rollouts so far."""

    number: int
    rollouts: Rollouts

    @property
    def unfinished(self) -> list[int]:
        """Which of its sequences a later call resumes."""
        reasons = self.rollouts.finish_reason
        return [i for i, reason in enumerate(reasons) if reason == REASONS[UNFINISHED]]


class PartialRollouts:
    """The groups kept from step to step, of `group` sequences each.

    A group is trained on in the step in which its last completion ends.  Its earlier tokens keep the
    log-probs and the weight version they were drawn with.
    """

    def __init__(self, group: int) -> None:
        self.group = group
        self.pending: list[PendingGroup] = []

    def unfinished(self) -> Rollouts | None:
        """Unfinished sequences to resume in the next call, or None."""
        if not self.pending:
            return None
        parts = [group.rollouts.select(group.unfinished) for group in self.pending]
        return Rollouts.join(parts)

    def take_finished(self, drawn: Rollouts, items: Sequence[int]) -> tuple[list[int], Rollouts]:
        """Merge resumed sequences into their groups; return the numbers and rollouts of finished groups
        (those that waited first), and keep the others for the next step.

        `drawn` holds the resumed sequences, in the order of `unfinished`, then the new groups of `items`.
        """
        groups = []
        first = 0
        for pending in self.pending:
            groups.append(self._resumed(pending, drawn, first))
            first += len(pending.unfinished)
        starts = range(first, len(drawn), self.group)
        for item, start in zip(items, starts, strict=True):
            samples = range(start, start + self.group)
            groups.append(PendingGroup(item, drawn.select(samples)))

        self.pending = [group for group in groups if group.unfinished]
        done = [group for group in groups if not group.unfinished]
        if not done:
            return [], drawn.select([])
        parts = []
        for group in done:
            # `join` counts on from group to group: each is one prompt of the step
            prompt_index = torch.zeros_like(group.rollouts.prompt_index)
            parts.append(replace(group.rollouts, prompt_index=prompt_index))
        return [group.number for group in done], Rollouts.join(parts)

    def _resumed(self, pending: PendingGroup, drawn: Rollouts, first: int) -> PendingGroup:
        """The group with its unfinished sequences as they are now: from `first` on in `drawn`."""
        places = {i: first + k for k, i in enumerate(pending.unfinished)}
        sequences = []
        for i in range(self.group):
            if i in places:
                sequences.append(drawn.select([places[i]]))
            else:
                sequences.append(pending.rollouts.select([i]))
        return PendingGroup(pending.number, Rollouts.join(sequences))

    def state(self) -> dict[str, Tensor]:
        """The pending groups as tensors, for a checkpoint."""
        if not self.pending:
            return {}
        rollouts = Rollouts.join([group.rollouts for group in self.pending])
        codes = torch.tensor([REASONS.index(reason) for reason in rollouts.finish_reason])
        items = torch.tensor([group.number for group in self.pending])
        return as_tensors(rollouts) | {"finish": codes, "items": items}

    def load_state(self, state: dict[str, Tensor], tokenizer: Decodes | None, device: torch.device) -> None:
        """Restore what `state` returned."""
        self.pending = []
        if not state:
            return
        reasons = [REASONS[code] for code in state["finish"].tolist()]
        prompts = torch.zeros(len(reasons), dtype=torch.int64, device=device)
        rollouts = from_tensors(Rollouts, state, device, prompt_index=prompts, finish_reason=reasons)
        if tokenizer is not None:
            completions = rollouts.completions()
            text = tokenizer.batch_decode(completions, skip_special_tokens=True)
            rollouts = replace(rollouts, text=text)

        for place, item in enumerate(state["items"].tolist()):
            first = place * self.group
            samples = range(first, first + self.group)
            self.pending.append(PendingGroup(item, rollouts.select(samples)))
