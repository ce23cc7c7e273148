"""Policy and reward model trained in turns: an optimizer step of the policy, and now and then some of the
reward model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from fastrl.batch.types import Batch
from fastrl.methods.joint.groups import under
from fastrl.methods.joint.judge import Judge
from fastrl.methods.reward.objective import RewardBatch
from fastrl.train.learner import Companions, Learner
from fastrl.train.optimizer import NotFinite
from fastrl.train.source import Metrics, State

FOLDER = "reward_model"  # the reward model's, inside a checkpoint


@dataclass(frozen=True, slots=True)
class JointBatch:
    """An optimizer step of the policy, and the comparisons that the reward model learns from after it.

    comparisons  None between the reward model's updates
    """

    policy: Batch
    comparisons: RewardBatch | None = None


@final
class JointLearner:
    """Holds the learners of a policy and of the judge's reward model; neither's loss reaches the other's
    weights.

    epochs  the reward model's optimizer steps per update
    """

    def __init__(
        self, policy: Learner[Batch], reward: Learner[RewardBatch], judge: Judge, *, epochs: int
    ) -> None:
        self.policy, self.reward, self.judge, self.epochs = policy, reward, judge, epochs

    def update(self, batch: JointBatch, step: int) -> Metrics:
        """One optimizer step of the policy, and the reward model's update if one is due; see
        `Learner.update`.
        """
        metrics = self.policy.update(batch.policy, step)
        comparisons = batch.comparisons
        if comparisons is None:
            return metrics

        try:
            first, *_ = [self.reward.update(comparisons, step) for _ in range(self.epochs)]
        except NotFinite as error:
            raise NotFinite(f"the reward model's {error}") from error
        self.judge.calibrate()

        metrics["reward_groups"] = comparisons.total
        if first["num_tokens"]:
            metrics |= {
                "reward_loss": first["loss"],
                "reward_grad_norm": first["grad_norm"],
                "reward_lr": first["learning_rate"],
            }
        return metrics

    def companions(self) -> Companions:
        """The reward model, a folder of its own: what `--reward model:FOLDER` takes."""
        return {FOLDER: (self.judge.model, self.judge.model.tokenizer)}

    def state(self) -> State:
        """`Learner.state`, the reward model's under "reward.", and the judge's under "calibration."."""
        reward = {f"reward.{name}": x for name, x in self.reward.state().items()}
        judge = {f"calibration.{name}": x for name, x in self.judge.state().items()}
        return self.policy.state() | reward | judge

    def load_state(self, state: State) -> None:
        """Restore what `state` returned."""
        self.policy.load_state(state)
        self.reward.load_state(under("reward.", state))
        self.judge.load_state(under("calibration.", state))
