"""The judge: a reward model whose scores are kept at mean 0 and deviation 1 on a calibration set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch

from fastrl.algorithms.joint import Scale
from fastrl.data.comparisons import Group
from fastrl.errors import UserError
from fastrl.methods.joint.groups import as_groups, as_tensors
from fastrl.methods.reward.objective import group_scores
from fastrl.model.reward import RewardModel
from fastrl.parallel.world import World
from fastrl.train.source import State


@final
class Judge:
    """Turns a reward model's scores into rewards: plain numbers without a gradient.

    The first completions it is asked about become its calibration set, at most `size` of them over all
    processes.

    calibration  that set, empty before it is known
    scale        what standardises scores on it, for the reward model's weights as they are
    """

    def __init__(self, model: RewardModel, *, size: int, micro_tokens: int, world: World) -> None:
        self.model, self.size, self.micro_tokens, self.world = model, size, micro_tokens, world
        self.calibration: list[Group] = []
        self.scale = Scale()

    def rewards(self, groups: Sequence[Group]) -> list[float]:
        """The reward of each group, one sequence each.  Raises UserError where a score is not finite."""
        if not self.calibration:
            self.calibration = self.world.gather(list(groups))[: self.size]
            self.calibrate()
        return [self.scale(score) for score in self._scores(groups)]

    def calibrate(self) -> None:
        """Measure the scale anew; every process takes its share of the calibration set."""
        local = [self.calibration[i] for i in self.world.share(len(self.calibration))]
        scores = self.world.gather(self._scores(local))
        self.scale = Scale.of(scores) if scores else Scale()

    def state(self) -> State:
        """The calibration set with its scale."""
        return as_tensors(self.calibration) | {"scale": torch.tensor(self.scale, dtype=torch.float64)}

    def load_state(self, state: State) -> None:
        """Restore what `state` returned."""
        self.calibration = as_groups(state)
        self.scale = Scale(*state["scale"].tolist())

    def _scores(self, groups: Sequence[Group]) -> list[float]:
        scores = [score for (score,) in group_scores(self.model, groups, self.micro_tokens)]
        # A NaN would be taken for "not scored".
        if wrong := [score for score in scores if not math.isfinite(score)]:
            raise UserError(
                f"the reward model's score of a completion is {wrong[0]}; "
                "lower --reward-lr, or take another --reward-model"
            )
        return scores
