"""`fastrl reward`: reward models, from comparisons, rankings, or right and wrong answers."""

from __future__ import annotations

from functools import partial

from fastrl.algorithms.reward import RewardLoss
from fastrl.config import Reward
from fastrl.methods.method import Context, Method, Origin
from fastrl.methods.reward.batches import Comparisons, StatementEncoder, comparable
from fastrl.methods.reward.objective import RewardBatch, ScoreObjective, group_scores
from fastrl.methods.reward.options import choose_reward_loss, separator_of
from fastrl.model.reward import RewardModel
from fastrl.report.metrics import LOGGED
from fastrl.train.learner import Learner, Trainable
from fastrl.train.source import Source

RewardContext = Context[Reward, RewardLoss, RewardModel]


def load(origin: Origin[Reward, RewardLoss]) -> RewardModel:
    """A reward model's folder, or a language model's with a fresh head."""
    steps = separator_of(origin.config) if origin.algorithm.data == "steps" else None
    return RewardModel.load(
        origin.folder,
        dtype=origin.dtype,
        device=origin.device,
        seed=origin.config.seed,
        tokenizer=origin.tokenizer,
        steps=steps,
    )


def learner(context: RewardContext) -> Learner[RewardBatch]:
    """A loss over scores of whole groups."""
    objective = ScoreObjective(context.model, context.algorithm)
    return context.learner(objective, context.weights(context.model))


def source(context: RewardContext, learner: Trainable[RewardBatch]) -> tuple[Source[RewardBatch], int]:
    """Comparisons; a reward model generates nothing, so the longest completion is 0."""
    return comparisons(context), 0


def comparisons(context: RewardContext) -> Comparisons:
    """The groups of the dataset or the task, and those held out."""
    config, algorithm = context.config, context.algorithm
    encode = StatementEncoder(config, algorithm, context.tokenizer, context.model.config)
    scores = partial(group_scores, context.model, micro_tokens=config.micro_tokens)
    data = comparable(encode, context.task, context.world)
    context.tell(data, data.size, "groups")
    return Comparisons(config, algorithm, data, scores, context.world)


METHOD = Method(
    choose=choose_reward_loss,
    load=load,
    learner=learner,
    source=source,
    metrics=LOGGED["reward"],
    held_out=True,
)
