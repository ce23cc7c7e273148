"""From what the user named (a task, a dataset, reward functions) to the items that training sources draw
from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from fastrl.config import Dpo, OnPolicy, Sft
from fastrl.data.pairs import LABELLED, PAIRED, Unit, encode_units
from fastrl.data.rows import Row, Sample, encode_all, encode_prompt, read_rows
from fastrl.errors import UserError
from fastrl.files import shorten
from fastrl.parallel.device import place
from fastrl.rewards.functions import Reward, Scored, load_reward, score
from fastrl.sampler.prompts import check_room
from fastrl.tasks import Task, load_task, task_reward

PromptItem = tuple[Any, Mapping[str, Any]]  # a prompt, and its row's columns
TRAIN = "train"
VERIFIER = "task"  # the task's verifier among the reward functions


def load_run_task(name: str | None, options: Sequence[str]) -> Task | None:
    """The task named on the command line with its key=value options, or None.  Raises UserError for an option
    that is not one.
    """
    if name is None:
        return None
    return load_task(
        name, **{key: _value(text, key) for key, text in pairs(options, "--task-options").items()}
    )


def pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """{"key": "value"} of key=value texts.  Raises UserError naming the option."""
    split = [text.partition("=") for text in texts]
    for text, (key, equals, _) in zip(texts, split, strict=True):
        if not key or not equals:
            raise UserError(f"{option}: expected key=value, got {text!r}")
    return {key: value for key, _, value in split}


def demonstrations(
    config: Sft, task: Task | None, tokenizer: Any, context: int, vocab_size: int
) -> tuple[Callable[[Sequence[int]], list[Sample]], int, int]:
    """items(indices), how many there are, and the longest completion to expect; every line of a dataset is
    checked before training.
    """
    limit = min(config.max_tokens or context, context)

    def usable(rows: Sequence[Row]) -> list[Sample]:
        samples = encode_all(rows, tokenizer, max_tokens=limit, turns=config.turns)
        for row, sample in zip(rows, samples, strict=True):
            check_tokens(sample.tokens, row.where, vocab_size)
            check_budget(len(sample.tokens), row.where, config.micro_tokens)
        return (
            [replace(s, weight=_weight(row)) for row, s in zip(rows, samples, strict=True)]
            if config.sample_weights
            else samples
        )

    if config.dataset is not None:
        known = usable(read_rows(config.dataset, pairs(config.columns, "--columns")))
        return lambda indices: [known[i] for i in indices], len(known), limit
    if task is None:
        raise UserError(
            "--dataset or --task: expected one of them, to have demonstrations to train on; got neither"
        )
    named: Task = task
    if named.example(TRAIN, 0).demo is None:
        raise UserError(f"--task: {named.name} has no demonstrations; give a --dataset")

    def items(indices: Sequence[int]) -> list[Sample]:
        examples = [named.example(TRAIN, i) for i in indices]
        fields = [{"prompt": e.prompt, "completion": e.demo} for e in examples]
        return usable(
            [
                Row(f"{named.name} {TRAIN}[{i}]", "prompt-completion", f)
                for i, f in zip(indices, fields, strict=True)
            ]
        )

    return items, named.size(TRAIN), limit


def preferences(
    config: Dpo, task: Task | None, tokenizer: Any, context: int, vocab_size: int, *, paired: bool
) -> tuple[Callable[[Sequence[int]], list[Unit]], int, int]:
    """items(indices), how many pairs (or labelled examples) there are, and the longest completion to expect.

    Every line of a dataset is checked before training.
    """
    limit = min(config.max_tokens or context, context)

    def usable(rows: Sequence[Row]) -> list[Unit]:
        units = encode_units(rows, tokenizer, paired=paired, max_tokens=limit)
        each = len(units) // len(rows)  # 2 where pairs were taken apart
        for i, unit in enumerate(units):
            where = rows[i // each].where
            for one in unit:
                check_tokens(one.sample.tokens, where, vocab_size)
            check_budget(
                sum(len(one.sample.tokens) for one in unit),
                where,
                config.micro_tokens,
                "pair" if paired else "sequence",
            )
        return units

    if config.dataset is not None:
        known = usable(
            read_rows(config.dataset, pairs(config.columns, "--columns"), PAIRED if paired else LABELLED)
        )
        return lambda indices: [known[i] for i in indices], len(known), limit
    if task is None:
        raise UserError(
            "--dataset or --task: expected one of them, to have preferences to train on; got neither"
        )
    if not hasattr(task, "mistakes"):
        raise UserError(
            f"--task: {task.name} has no wrong answers to prefer its demonstrations to; give a --dataset"
        )
    named: Any = task
    sides = 1 if paired else 2

    def items(indices: Sequence[int]) -> list[Unit]:
        rows = []
        for i in [index // sides for index in indices]:
            example, where = named.example(TRAIN, i), f"{named.name} {TRAIN}[{i}]"
            wrong = named.mistakes(example, 1, i)
            if example.demo is None or not wrong:
                raise UserError(
                    f"{where}: expected a demonstration and a wrong answer, "
                    f"got {example.demo!r} and {wrong}; give a --dataset"
                )
            rows.append(
                Row(where, "pair", {"prompt": example.prompt, "chosen": example.demo, "rejected": wrong[0]})
            )
        units = usable(rows) if rows else []
        return units if paired else [units[2 * n + index % 2] for n, index in enumerate(indices)]

    return items, named.size(TRAIN) * sides, limit


def prompts_and_rewards(
    config: OnPolicy, task: Task | None, tokenizer: Any, context: int, vocab_size: int
) -> tuple[Callable[[int], PromptItem], int, Callable[..., Scored]]:
    """prompt(i) -> (prompt, columns), how many there are, and the function that scores completions.

    Every line of a dataset is checked before training.
    """
    device, dtype = place(config.device, config.dtype)
    if VERIFIER in config.reward and task is None:
        raise UserError(f"--reward: expected a --task, whose verifier `{VERIFIER}` is; got none")
    named_verifier = VERIFIER in config.reward
    functions = [
        task_reward(task) if spec == VERIFIER and task else load_reward(spec, dtype=dtype, device=device)
        for spec in config.reward
    ]
    weights = config.reward_weights or None
    if weights is not None and len(weights) != max(len(functions), 1):
        raise UserError(
            f"--reward-weights: expected one per --reward ({max(len(functions), 1)}), got {len(weights)}"
        )
    if weights is not None and not all(map(math.isfinite, weights)):
        raise UserError(
            f"--reward-weights: expected finite numbers, got {' '.join(f'{w:g}' for w in weights)}"
        )
    if config.dataset is not None:
        rows = read_rows(config.dataset, pairs(config.columns, "--columns"))
        if not functions:
            raise UserError(
                "--reward: expected a reward function for the dataset's prompts (my_rewards.py:fn), got none"
            )
        for row in rows:
            _check_prompt(row, config, tokenizer, context, vocab_size)

        def from_dataset(i: int) -> PromptItem:
            return rows[i].fields["prompt"], {
                k: v for k, v in rows[i].fields.items() if k not in ("prompt", "completion")
            }

        return from_dataset, len(rows), Scorer(None, functions, weights)
    if task is None:
        raise UserError(
            "--task or --dataset: expected one of them, to have prompts to sample from; got neither"
        )
    named: Task = task

    def from_task(i: int) -> PromptItem:
        example = named.example(TRAIN, i)
        return example.prompt, {"example": example, **example.fields}

    return from_task, named.size(TRAIN), Scorer(None if named_verifier else named, functions, weights)


class Scorer:
    """Scores completions with the reward functions, or with the task's verifier where there are none; the
    share of them that the verifier calls correct is reported either way.
    """

    def __init__(
        self, task: Task | None, functions: Sequence[Reward], weights: Sequence[float] | None = None
    ) -> None:
        self.verify = [] if task is None else [task_reward(task)]
        self.weights = weights
        self.functions = list(functions)

    def __call__(
        self,
        prompts: Sequence[Any],
        texts: list[str] | None,
        tokens: list[list[int]],
        columns: Sequence[Mapping[str, Any]],
    ) -> Scored:
        if texts is None:
            raise UserError("--tokenizer: rewards read text, and the run has no tokenizer")
        if not texts:  # this process has no share of the prompts
            return Scored([])
        groups = [group for group in (self.verify, self.functions) if group]
        weights = [*[None] * (len(groups) - 1), self.weights]  # the last group rewards, the other is reported
        done = [
            score(g, prompts, texts, tokens, columns, weights=w) for g, w in zip(groups, weights, strict=True)
        ]
        verdict, last = done[0], done[-1]
        message = last.message if any(last.message) else verdict.message
        return replace(
            last, parts=verdict.parts | last.parts, message=message, extra=verdict.extra | last.extra
        )


def _check_prompt(row: Row, config: OnPolicy, tokenizer: Any, context: int, vocab_size: int) -> None:
    if "prompt" not in row.fields:
        raise UserError(f"{row.where}: expected a prompt column to sample from, got {', '.join(row.fields)}")
    tokens = encode_prompt(row.fields["prompt"], tokenizer, where=row.where)
    limit = min(config.max_tokens or context, context)
    check_room(len(tokens), row.where, limit, "the model's context" if limit == context else "--max-tokens")
    check_tokens(tokens, row.where, vocab_size)
    check_budget(min(len(tokens) + config.max_new_tokens, context), row.where, config.micro_tokens)


def _weight(row: Row) -> float:
    value = row.fields.get("weight")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(
            f"{row.where}: weight: expected a number of 0 or more, got {shorten(value)}; "
            "or leave --sample-weights out"
        )
    return float(value)


def check_tokens(tokens: Sequence[int], where: str, vocab_size: int) -> None:
    """Raises UserError, naming `where`, for a token that the model does not have."""
    if max(tokens) >= vocab_size:
        raise UserError(
            f"{where}: the tokenizer gives token {max(tokens)}, "
            f"but the model's vocabulary has {vocab_size}; they do not belong together"
        )


def check_budget(length: int, where: str, micro_tokens: int, what: str = "sequence") -> None:
    """Raises UserError, naming `where`, for what is longer than a micro-batch."""
    if length > micro_tokens:
        raise UserError(
            f"{where}: a {what} of up to {length} tokens exceeds a pass; "
            f"raise --micro-tokens ({micro_tokens}) to at least {length}"
        )


def _value(text: str, key: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--task-options: {key}: expected a YAML value, got {text!r}") from error
    return tuple(value) if isinstance(value, list) else value
