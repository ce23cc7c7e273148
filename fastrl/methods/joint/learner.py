"""Policy and reward model trained in turns: an optimizer step of the policy, and now and then some of the
reward model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastrl.algorithms.joint import CoTrained, Scale
from fastrl.batch.types import Batch
from fastrl.config import Optim
from fastrl.data.comparisons import Group
from fastrl.errors import UserError
from fastrl.methods.reward.learner import RewardBatch, RewardLearner
from fastrl.model.reward import RewardModel
from fastrl.parallel.world import World
from fastrl.train.learner import Learner, NotFinite

FOLDER = "reward_model"  # the reward model's, inside a checkpoint


@dataclass(frozen=True, slots=True)
class JointBatch:
    """An optimizer step of the policy, and the comparisons that the reward model learns from after it; None
    between its updates.
    """

    policy: Batch
    comparisons: RewardBatch | None = None


class JointLearner(Learner):
    """Trains a policy and a reward model, each with an optimizer of its own; neither's loss reaches the
    other's weights.

    calibration  the sequences on which the reward model's output is kept at mean 0 and deviation 1
    scale        what does it, for the reward model's weights as they are
    """

    algorithm: CoTrained

    def __init__(
        self,
        model: Any,
        algorithm: CoTrained,
        optim: Optim,
        *,
        steps: int,
        micro_tokens: int,
        temperature: float = 1.0,
        world: World | None = None,
    ) -> None:
        options: dict[str, Any] = {"steps": steps, "micro_tokens": micro_tokens, "world": world}
        super().__init__(model, algorithm, optim, temperature=temperature, **options)
        try:
            judge = RewardModel.load(
                algorithm.reward_model, dtype=model.dtype, device=model.device, seed=algorithm.seed
            )
        except UserError as error:
            raise UserError(f"--reward-model: {str(error).removeprefix('--model: ')}") from error
        if judge.steps is not None:
            raise UserError(
                "--reward-model: expected one that judges whole completions, "
                f"{algorithm.reward_model} judges their steps"
            )
        judge.gradient_checkpointing = model.gradient_checkpointing
        own = replace(optim, lr=optim.lr if algorithm.reward_lr is None else algorithm.reward_lr)
        self.reward = RewardLearner(judge, algorithm.reward_loss, own, **options)  # type: ignore[arg-type]
        self.calibration: list[Group] = []
        self.scale = Scale()

    def rewards(self, groups: Sequence[Group]) -> list[float]:
        """The reward of each group, one sequence each: plain numbers without a gradient.  Raises UserError
        where one is not finite.
        """
        return [self.scale(score) for score in self._scores(groups)]

    def calibrate(self) -> None:
        """Measure the scale anew, on the calibration set; every process takes its share of it."""
        mine = [self.calibration[i] for i in self.world.share(len(self.calibration))]
        scores = self.world.gather(self._scores(mine))
        self.scale = Scale.of(scores) if scores else Scale()

    def update(self, batch: JointBatch, step: int) -> dict[str, float]:  # type: ignore[override]
        """One optimizer step of the policy, and the reward model's update if one is due; see
        `Learner.update`.
        """
        metrics = super().update(batch.policy, step)
        if batch.comparisons is None:
            return metrics
        try:
            told, *_ = [
                self.reward.update(batch.comparisons, step)  # type: ignore[arg-type]
                for _ in range(self.algorithm.reward_epochs)
            ]
        except NotFinite as error:
            raise NotFinite(f"the reward model's {error}") from error
        self.calibrate()
        metrics["reward_groups"] = batch.comparisons.total
        if not told["num_tokens"]:
            return metrics
        return metrics | {
            "reward_loss": told["loss"],
            "reward_grad_norm": told["grad_norm"],
            "reward_lr": told["learning_rate"],
        }

    def _scores(self, groups: Sequence[Group]) -> list[float]:
        scores = [score for (score,) in self.reward.scores(groups)]
        # a NaN would be taken for "not scored"
        if wrong := [score for score in scores if not math.isfinite(score)]:
            raise UserError(
                f"the reward model's score of a completion is {wrong[0]}; lower --reward-lr, "
                "or take another --reward-model"
            )
        return scores

    def others(self) -> dict[str, tuple[Any, Any]]:
        """The reward model, a folder of its own: what `--reward model:FOLDER` takes."""
        return {FOLDER: (self.reward.model, self.reward.model.tokenizer)}

    def state(self) -> dict[str, Tensor]:
        """`Learner.state`, the reward model's under "reward.", and the calibration set with its scale."""
        own = {f"reward.{name}": x for name, x in self.reward.state().items()}
        own |= {f"calibration.{name}": x for name, x in as_tensors(self.calibration).items()}
        return super().state() | own | {"calibration.scale": torch.tensor(self.scale, dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        super().load_state(state)
        self.reward.load_state(under("reward.", state))
        held = under("calibration.", state)
        self.calibration, self.scale = as_groups(held), Scale(*held["scale"].tolist())


# --- groups in a checkpoint -------------------------------------------------------------------------
def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def as_tensors(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Groups of whole sequences, each scored at its last token: tokens (T,), lengths (S,), target (S,) and
    sizes (G,) of groups.
    """
    sequences = [s for g in groups for s in g.tokens]
    return {
        "tokens": torch.tensor([t for s in sequences for t in s], dtype=torch.int64),
        "lengths": torch.tensor([len(s) for s in sequences], dtype=torch.int64),
        "target": torch.tensor([t for g in groups for t in g.target], dtype=torch.float64),
        "sizes": torch.tensor([len(g.tokens) for g in groups], dtype=torch.int64),
    }


def as_groups(tensors: dict[str, Tensor]) -> list[Group]:
    """The groups that `as_tensors` took."""
    lengths, sizes = tensors["lengths"].tolist(), tensors["sizes"].tolist()
    sequences = iter([s.tolist() for s in tensors["tokens"].split(lengths)] if lengths else [])
    targets = iter(tensors["target"].tolist())
    return [
        compared("a checkpoint", [next(sequences) for _ in range(n)], [next(targets) for _ in range(n)])
        for n in sizes
    ]


def compared(where: str, tokens: list[list[int]], target: list[float]) -> Group:
    """Whole sequences, each scored at its last token."""
    return Group(where, tokens, [[len(t) - 1] for t in tokens], target)
