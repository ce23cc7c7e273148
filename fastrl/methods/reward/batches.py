"""Where a reward model's data comes from: comparisons or verdicts, of a dataset or a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastrl.algorithms.reward import RewardLoss
from fastrl.config import Reward
from fastrl.data.comparisons import Group, Statement, encode_statements, read_statements
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
    held_out: Callable[[], list[tuple[Group, Statement]]]


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
        return metrics, table, [row for (_, statement), own in few for row in shown(statement, own)]


@dataclass(frozen=True, slots=True)
class StatementEncoder:
    """Turns statements into groups of a run, and refuses what its model cannot take."""

    config: Reward
    tokenizer: Tokenizer
    model: LanguageConfig

    def __call__(self, statements: Sequence[Statement]) -> list[Group]:
        """The groups of statements.  Raises UserError, naming the line, for one that cannot be trained on."""
        config, context = self.config, self.model.max_position_embeddings
        limit = min(config.max_tokens or context, context)
        separator = separator_of(config)
        groups = encode_statements(statements, self.tokenizer, max_tokens=limit, separator=separator)
        for g in groups:
            check_group(g, self.model.vocab_size, config.micro_tokens)
        return groups


def comparable(encode: StatementEncoder, algorithm: RewardLoss, task: Task | None) -> Comparable:
    """What the options name; every line of a dataset is checked before training.

    Raises:  UserError where there is nothing to learn from.
    """
    config = encode.config
    if config.dataset is not None:
        return _of_dataset(encode, algorithm, config.dataset)
    if task is None:
        raise UserError(
            "--dataset or --task: expected one of them, to have something to learn from; got neither"
        )
    if not has_mistakes(task):
        raise UserError(f"--task: expected one with wrong answers, got {task.name}; give a --dataset")
    if algorithm.data == "steps" and not has_steps(task):
        raise UserError(f"--task: expected one that judges steps, got {task.name}; give a --dataset")
    return _of_task(encode, algorithm, task)


def _of_dataset(encode: StatementEncoder, algorithm: RewardLoss, path: str) -> Comparable:
    config, units = encode.config, algorithm.units
    columns = key_values(config.columns, "--columns")
    statements = read_statements(path, algorithm.data, columns, margins=algorithm.margin)
    groups = encode(statements)

    shares = {"held out": config.holdout if config.eval.prompts else 0.0, "train": 1.0}
    train: list[Group] = []
    held: list[tuple[Group, Statement]] = []
    for group, statement in zip(groups, statements, strict=True):
        # Lines of one prompt stay together, so that no held-out prompt is trained on.
        key = statement.completions[0] if statement.prompt is None else statement.prompt
        if assign_split(shares, "reward", key) == "train":
            train.append(group)
        elif units(group.target):
            held.append((group, statement))

    if not any(units(g.target) for g in train):
        raise UserError(
            f"dataset {path}: expected a training line that the loss can learn from, "
            f"got {len(train)} lines, all ties, and {len(held)} held out"
        )
    if config.eval.prompts and not held:
        raise UserError(
            f"--holdout: none of the {len(groups)} lines of {path} falls into the {config.holdout:.0%} "
            "held out; raise it, or turn evaluation off with --eval.prompts 0"
        )
    few = held[: config.eval.prompts]
    return Comparable(lambda some: [train[i] for i in some], len(train), lambda: few)


def _of_task(encode: StatementEncoder, algorithm: RewardLoss, task: TaskWithMistakes) -> Comparable:
    config = encode.config

    def statements(split: str, indices: Sequence[int]) -> list[Statement]:
        return [_statement(config, algorithm, task, split, i) for i in indices]

    def held_out() -> list[tuple[Group, Statement]]:
        split = config.eval.split
        known = statements(split, range(min(config.eval.prompts, task.size(split))))
        return list(zip(encode(known), known, strict=True))

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
