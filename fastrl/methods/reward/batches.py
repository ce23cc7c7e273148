"""Where a reward model's data comes from, a dataset or a task, and how it does on what was held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.algorithms.reward import RewardLoss
from fastrl.config import Reward
from fastrl.data.comparisons import Group, Statement, encode_statements, read_statements
from fastrl.errors import UserError
from fastrl.files import shorten
from fastrl.methods.grpo.prompts import TRAIN, pairs
from fastrl.methods.grpo.rollouts import Step, order
from fastrl.methods.reward.learner import RewardBatch, RewardLearner
from fastrl.methods.reward.options import separator_of
from fastrl.parallel.world import World
from fastrl.report.stats import Estimate, calibration, share_interval, wilson
from fastrl.tasks import Task
from fastrl.tasks.task import bucket, draw

SHOWN = 4  # held-out groups whose completions are written to samples.jsonl
Items = Callable[[Sequence[int]], list[Group]]  # indices -> groups: a pure function


class Comparisons:
    """Batches of `config.prompts` groups a step, and a few held-out groups to evaluate on.

    items(indices) -> the groups of `size` lines or examples; held_out() -> (groups, statements) to evaluate
    on
    """

    def __init__(
        self,
        config: Reward,
        row: RewardLoss,
        items: Items,
        size: int,
        held_out: Callable[[], list[tuple[Group, Statement]]],
        world: World,
    ) -> None:
        self.config, self.row, self.items, self.size, self.held_out, self.world = (
            config,
            row,
            items,
            size,
            held_out,
            world,
        )

    def collect(self, step: int, version: int) -> Step:
        """The groups of `step`; those that say nothing (all of their completions tied) are left out."""
        chosen = order(self.size, self.config.seed, step * self.config.prompts, self.config.prompts)
        every = self.items([chosen[i] for i in self.world.share(self.config.prompts)])
        groups = [g for g in every if self.row.units(g.target)]
        (total,) = self.world.sum(float(sum(self.row.units(g.target) for g in groups)))
        return Step([RewardBatch(groups, total)])  # type: ignore[list-item]

    def state(self) -> dict[str, Tensor]:
        """Nothing: every step's groups are a function of its number."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""

    def evaluate(
        self, learner: RewardLearner
    ) -> tuple[dict[str, float], dict[str, Any], list[dict[str, Any]]]:
        """Metrics of the held-out groups, what rewards.json says of them, and a few of their completions."""
        held = self.held_out()
        mine = [held[i] for i in self.world.share(len(held))]
        scores = self.world.gather(learner.scores([g for g, _ in mine]))
        metrics, table = judge_held_out(self.row, [g for g, _ in held], scores)
        return (
            metrics,
            table,
            [row for (_, s), r in zip(held[:SHOWN], scores, strict=False) for row in _shown(s, r)],
        )


# --- evaluation -------------------------------------------------------------------------------------
def judge_held_out(
    row: RewardLoss, groups: Sequence[Group], scores: Sequence[Sequence[float]]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Accuracy with its interval, calibration and means of scored groups; and the same as rewards.json has
    it.

    A comparison counts for each pair of a better and a worse completion, a verdict for each score.  Those of
    one group are not independent: where a group has several, accuracy and its interval are of the groups' own
    accuracies.
    """
    logits = [_logits(row, g.target, s) for g, s in zip(groups, scores, strict=True)]
    pooled = [z for own in logits for z, _ in own]
    hits = [[z > 0 if row.compares or y >= 0.5 else z < 0 for z, y in own] for own in logits if own]
    per_group = [sum(h) / len(h) for h in hits]
    won = sum(map(sum, hits))
    several = any(len(h) > 1 for h in hits)
    accuracy = (
        share_interval(per_group) if several else Estimate(won / len(pooled), *wilson(won, len(pooled)))
    )
    said = [(_sigmoid(z), y) for own in logits for z, y in own]
    if row.compares:  # each pair both ways round: else every outcome is 1
        said += [(_sigmoid(-z), 0.0) for z in pooled]
    ece, bins = calibration([p for p, _ in said], [y for _, y in said])
    flat = [r for own in scores for r in own]
    best = [
        r
        for g, own in zip(groups, scores, strict=True)
        for r, t in zip(own, g.target, strict=True)
        if t == _top(row, g.target)
    ]
    rest = [
        r
        for g, own in zip(groups, scores, strict=True)
        for r, t in zip(own, g.target, strict=True)
        if t != _top(row, g.target)
    ]
    signed = pooled if row.compares else [z if y >= 0.5 else -z for own in logits for z, y in own]
    metrics = {
        "eval/accuracy": accuracy.mean,
        "eval/accuracy_lo": accuracy.lo,
        "eval/accuracy_hi": accuracy.hi,
        "eval/ece": ece,
        "eval/margin": sum(signed) / max(len(signed), 1),
        "eval/mean_reward": sum(flat) / max(len(flat), 1),
    }
    names = ("better", "worse") if row.compares else ("right", "wrong")
    return metrics, {"names": names, "better": best, "worse": rest, "bins": bins, "ece": ece}


def _logits(row: RewardLoss, target: Sequence[float], score: Sequence[float]) -> list[tuple[float, float]]:
    """(log-odds, outcome) of everything a group lets us check."""
    if not row.compares:
        return list(zip(score, target, strict=True))
    n = range(len(score))
    return [(score[i] - score[j], 1.0) for i in n for j in n if target[i] > target[j]]


def _top(row: RewardLoss, target: Sequence[float]) -> float:
    return max(target) if row.compares else 1.0


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def _shown(s: Statement, rewards: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {"prompt": s.prompt or "", "completion": c, "reward": r, "target": t}
        for c, r, t in zip(s.completions, rewards, s.target, strict=True)
    ]


# --- what there is to learn from --------------------------------------------------------------------
def comparisons(
    config: Reward,
    task: Task | None,
    tokenizer: Any,
    sampler: Any,
    learner: RewardLearner,
    row: RewardLoss,
    device: torch.device,
) -> tuple[Comparisons, int]:
    """The source that the configuration describes, and no length of a completion; every line of a dataset is
    checked before training.
    """
    model, world, shape = learner.model, learner.world, learner.model.config
    model.tokenizer, model.steps = tokenizer, separator_of(config) if row.data == "steps" else None
    limit = min(config.max_tokens or shape.max_position_embeddings, shape.max_position_embeddings)

    def usable(statements: Sequence[Statement]) -> list[Group]:
        groups = encode_statements(statements, tokenizer, max_tokens=limit, separator=separator_of(config))
        for g in groups:
            check_group(g, shape.vocab_size, config.micro_tokens)
        return groups

    if config.dataset is not None:
        return _from_dataset(config, row, config.dataset, usable, world), 0
    if task is None:
        raise UserError(
            "--dataset or --task: expected one of them, to have something to learn from; got neither"
        )
    return _from_task(config, row, task, usable, world), 0


def _from_dataset(
    config: Reward,
    row: RewardLoss,
    path: str,
    usable: Callable[[Sequence[Statement]], list[Group]],
    world: World,
) -> Comparisons:
    statements = read_statements(path, row.data, pairs(config.columns, "--columns"), margins=row.margin)
    groups = usable(statements)
    shares = {"held out": config.holdout if config.eval.prompts else 0.0, "train": 1.0}
    homes = [
        bucket(shares, "reward", s.prompt if s.prompt is not None else s.completions[0]) for s in statements
    ]
    train = [g for g, home in zip(groups, homes, strict=True) if home == "train"]
    held = [
        (g, s)
        for g, s, home in zip(groups, statements, homes, strict=True)
        if home != "train" and row.units(g.target)
    ]
    if not any(row.units(g.target) for g in train):
        raise UserError(
            f"dataset {path}: expected a line in which one completion is better than another, "
            "all of them are ties or held out"
        )
    if config.eval.prompts and not held:
        mend = "raise it, or turn evaluation off with --eval.prompts 0"
        raise UserError(
            f"--holdout: none of the {len(groups)} lines of {path} falls into the "
            f"{config.holdout:.0%} held out; {mend}"
        )
    return Comparisons(
        config,
        row,
        lambda some: [train[i] for i in some],
        len(train),
        lambda: held[: config.eval.prompts],
        world,
    )


def _from_task(
    config: Reward,
    row: RewardLoss,
    task: Task,
    usable: Callable[[Sequence[Statement]], list[Group]],
    world: World,
) -> Comparisons:
    for method, what in {"mistakes": "wrong answers", "steps": "steps"}.items():
        if not hasattr(task, method) and (method == "mistakes" or row.data == "steps"):
            raise UserError(f"--task: {task.name} gives no {what} to learn from; give a --dataset")

    def statements(split: str, indices: Sequence[int]) -> list[Statement]:
        return [_statement(config, row, task, split, i) for i in indices]

    def held_out() -> list[tuple[Group, Statement]]:
        split = config.eval.split
        said = statements(split, range(min(config.eval.prompts, task.size(split))))
        return list(zip(usable(said), said, strict=True))

    return Comparisons(
        config, row, lambda some: usable(statements(TRAIN, some)), task.size(TRAIN), held_out, world
    )


def _statement(config: Reward, row: RewardLoss, task: Any, split: str, index: int) -> Statement:
    """The right answer and wrong ones, by the verifier's reward; for verdicts, one of them by a throw of the
    dice.
    """
    example, where = task.example(split, index), f"{task.name} {split}[{index}]"
    texts = [example.demo, *task.mistakes(example, config.group - 1, index)]
    if not row.compares:
        texts = [texts[draw("verdict", config.seed, split, index) % 2]]
    if row.data == "steps":
        parts, right = task.steps(example, texts[0])
        separator = separator_of(config)
        if separator.join(parts) != texts[0]:
            raise UserError(
                f"--step-separator: {separator!r} does not join the steps of {task.name} "
                f"to {shorten(texts[0])}"
            )
        return Statement(where, row.data, example.prompt, parts, [float(r) for r in right])
    score = [task.verify(example, text) for text in texts]
    target = [s.reward for s in score] if row.compares else [float(s.correct) for s in score]
    return Statement(where, row.data, example.prompt, texts, target)


def check_group(group: Group, vocab_size: int, micro_tokens: int) -> None:
    """Refuse a group that the model cannot read, or not in one pass."""
    top = max(t for tokens in group.tokens for t in tokens)
    if top >= vocab_size:
        raise UserError(
            f"{group.where}: the tokenizer gives token {top}, "
            f"but the model's vocabulary has {vocab_size}; they do not belong together"
        )
    if group.length > micro_tokens:
        raise UserError(
            f"{group.where}: {group.length} tokens to compare exceed a pass; "
            f"raise --micro-tokens from {micro_tokens} to {group.length}"
        )
