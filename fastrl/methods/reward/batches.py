"""Where a reward model's data comes from: comparisons or verdicts, of a dataset or a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from fastrl.algorithms.reward import RewardLoss
from fastrl.config import Reward
from fastrl.data.comparisons import Group, LineEncoder, Statement, Texts
from fastrl.data.dataset import read_items
from fastrl.data.encoders import Limits
from fastrl.data.messages import template_columns
from fastrl.errors import UserError
from fastrl.files import key_values, shorten
from fastrl.methods.reward.evaluation import judge_held_out, shown
from fastrl.methods.reward.objective import RewardBatch
from fastrl.methods.reward.options import separator_of
from fastrl.model.language import LanguageConfig, Tokenizer
from fastrl.parallel.world import World
from fastrl.tasks import Task
from fastrl.tasks.extras import TaskWithMistakes, has_mistakes, has_steps
from fastrl.tasks.task import TRAIN, assign_split, draw
from fastrl.train.source import LoggedSample, Metrics, State, Step, order

SHOWN = 4  # held-out groups whose completions are written to samples.jsonl
Scores = Callable[[Sequence[Group]], list[list[float]]]  # groups -> the scores of each, as the model is now


@dataclass(frozen=True, slots=True)
class Comparable:
    """What there is to learn from.

    items     indices -> groups, out of `size`: a pure function
    held_out  the groups to evaluate on, with their texts
    """

    items: Callable[[Sequence[int]], list[Group]]
    size: int
    held_out: Callable[[], list[tuple[Group, Texts]]]


class Comparisons:
    """`config.prompts` groups a step, and a few held-out groups to evaluate on."""

    def __init__(
        self, config: Reward, algorithm: RewardLoss, data: Comparable, scores: Scores, world: World
    ) -> None:
        self.config, self.algorithm, self.data = config, algorithm, data
        self.scores, self.world = scores, world

    def collect(self, step: int, version: int) -> Step[RewardBatch]:
        """The groups of `step`, without those that say nothing: all of their completions tied."""
        count, units = self.config.prompts, self.algorithm.units
        chosen = order(self.data.size, self.config.seed, step * count, count)
        local = self.data.items([chosen[i] for i in self.world.share(count)])

        groups = [g for g in local if units(g.target)]
        (total,) = self.world.sum(float(sum(units(g.target) for g in groups)))
        return Step([RewardBatch(groups, total)])

    def state(self) -> State:
        """Nothing: every step's groups are a function of its number."""
        return {}

    def load_state(self, state: State) -> None:
        """Nothing to restore."""

    def evaluate(self) -> tuple[Metrics, dict[str, object], list[LoggedSample]]:
        """Metrics of the held-out groups, what rewards.json keeps of them, and a few of their completions."""
        held = self.data.held_out()
        groups = [g for g, _ in held]
        local = [groups[i] for i in self.world.share(len(groups))]

        scores = self.world.gather(self.scores(local))
        metrics, table = judge_held_out(self.algorithm, groups, scores)
        few = zip(held[:SHOWN], scores, strict=False)
        return metrics, table, [row for (group, texts), own in few for row in shown(group, texts, own)]


@dataclass(frozen=True, slots=True)
class StatementEncoder:
    """Turns statements into groups of a run, and refuses what its model cannot take."""

    config: Reward
    algorithm: RewardLoss
    tokenizer: Tokenizer
    model: LanguageConfig

    @property
    def encoder(self) -> LineEncoder:
        """What is made of lines, whoever does it."""
        config, algorithm, context = self.config, self.algorithm, self.model.max_position_embeddings
        limits = Limits(
            min(config.max_tokens or context, context), config.micro_tokens, self.model.vocab_size
        )
        shares = {"held out": config.holdout if config.eval.prompts else 0.0, "train": 1.0}
        return LineEncoder(
            limits, algorithm.data, algorithm.margin, separator_of(config), shares, assign_split
        )

    def __call__(self, statements: Sequence[Statement]) -> list[Group]:
        """The groups of statements.  Raises UserError, naming the line, for one that cannot be trained on."""
        return self.encoder.groups(statements, self.tokenizer)


def comparable(encode: StatementEncoder, task: Task | None, world: World | None = None) -> Comparable:
    """What the options name; every line of a dataset is checked before training.

    Raises:  UserError where there is nothing to learn from.
    """
    config, algorithm = encode.config, encode.algorithm
    if config.dataset is not None:
        return _of_dataset(encode, config.dataset, world)
    if task is None:
        raise UserError(
            "--dataset or --task: expected one of them, to have something to learn from; got neither"
        )
    if not has_mistakes(task):
        raise UserError(f"--task: expected one with wrong answers, got {task.name}; give a --dataset")
    if algorithm.data == "steps" and not has_steps(task):
        raise UserError(f"--task: expected one that judges steps, got {task.name}; give a --dataset")
    return _of_task(encode, task)


def _of_dataset(encode: StatementEncoder, path: str, world: World | None) -> Comparable:
    config, units = encode.config, encode.algorithm.units
    columns = key_values(config.columns, "--columns")
    lines = read_items(path, encode.encoder, encode.tokenizer, columns=columns, world=world)
    apart = lines.firsts() > 0
    train, aside = np.flatnonzero(~apart), np.flatnonzero(apart)
    held = (number for number in aside.tolist() if units(lines[number].group.target))
    few = list(islice(held, config.eval.prompts))

    if not any(units(lines[number].group.target) for number in train.tolist()):
        raise UserError(
            f"dataset {path}: expected a training line that the loss can learn from, "
            f"got {len(train)} lines, all ties, and {len(few) + sum(1 for _ in held)} held out"
        )
    if config.eval.prompts and not few:
        raise UserError(
            f"--holdout: none of the {len(lines)} lines of {path} falls into the {config.holdout:.0%} "
            "held out; raise it, or turn evaluation off with --eval.prompts 0"
        )
    known = [(line.group, line.held) for line in lines(few) if line.held is not None]

    def items(some: Sequence[int]) -> list[Group]:
        return [lines[number].group for number in train[list(some)].tolist()]

    return Comparable(items, len(train), lambda: known)


def _of_task(encode: StatementEncoder, task: TaskWithMistakes) -> Comparable:
    config, algorithm = encode.config, encode.algorithm

    def statements(split: str, indices: Sequence[int]) -> list[Statement]:
        return [_statement(config, algorithm, task, split, i) for i in indices]

    def held_out() -> list[tuple[Group, Texts]]:
        split = config.eval.split
        known = statements(split, range(min(config.eval.prompts, task.size(split))))
        return [(g, Texts(s.prompt, s.completions)) for g, s in zip(encode(known), known, strict=True)]

    return Comparable(lambda some: encode(statements(TRAIN, some)), task.size(TRAIN), held_out)


def _statement(
    config: Reward, algorithm: RewardLoss, task: TaskWithMistakes, split: str, index: int
) -> Statement:
    """The right answer and wrong ones, ranked by the verifier's reward; for verdicts, one of them chosen at
    random.
    """
    example, where = task.example(split, index), f"{task.name} {split}[{index}]"
    extras = template_columns(example.fields)
    texts = [example.demo or "", *task.mistakes(example, config.group - 1, index)]
    if not algorithm.compares:
        texts = [texts[draw("verdict", config.seed, split, index) % 2]]

    if algorithm.data == "steps":
        assert has_steps(task), "comparable() takes no other task here"
        parts, right = task.steps(example, texts[0])
        separator = separator_of(config)
        if separator.join(parts) != texts[0]:
            raise UserError(
                f"--step-separator: {separator!r} does not join the steps of {task.name} "
                f"to {shorten(texts[0])}"
            )
        target = [float(r) for r in right]
        return Statement(where, algorithm.data, example.prompt, parts, target, columns=extras)

    verdicts = [task.verify(example, text) for text in texts]
    target = [v.reward if algorithm.compares else float(v.correct) for v in verdicts]
    return Statement(where, algorithm.data, example.prompt, texts, target, columns=extras)
