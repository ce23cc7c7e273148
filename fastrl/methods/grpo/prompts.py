"""Prompts to sample from, and what scores their completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import yaml

from fastrl.config import Grpo
from fastrl.data.rows import Row, encode_prompt, read_rows
from fastrl.errors import UserError
from fastrl.model.language import Tokenizer
from fastrl.parallel.device import place
from fastrl.rewards.functions import Reward, Scored, load_reward, score
from fastrl.sampler.prompts import check_room
from fastrl.tasks import Conversation, Task, load_task, task_reward

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


@dataclass(frozen=True, slots=True)
class Prompts:
    """What there is to sample from.

    item   number -> the prompt, and its row's columns; out of `size`
    score  (prompts, completions, token lists, columns) -> their rewards
    stop   texts that end a completion, beside the end-of-sequence token
    game   the task that answers the policy's turns; None where a completion is one turn
    """

    item: Callable[[int], PromptItem]
    size: int
    score: Callable[..., Scored]
    stop: tuple[str, ...] = ()
    game: Conversation | None = None


def load_prompts(
    config: Grpo, task: Task | None, tokenizer: Tokenizer, context: int, vocab_size: int
) -> Prompts:
    """The prompts and the rewards that the options name; every line of a dataset is checked before training.

    context, vocab_size  of the model
    """
    functions = _reward_functions(config, task)
    weights = _reward_weights(config, len(functions))
    stop = task.stop if task is not None else ()
    game = task if isinstance(task, Conversation) else None

    if config.dataset is not None:
        rows = read_rows(config.dataset, pairs(config.columns, "--columns"))
        if not functions:
            raise UserError(
                "--reward: expected a reward function for the dataset's prompts (my_rewards.py:fn), got none"
            )
        for row in rows:
            _check_prompt(row, config, tokenizer, context, vocab_size)
        items = [_item_of_row(row) for row in rows]
        return Prompts(items.__getitem__, len(items), Scorer(None, functions, weights), stop, game)

    if task is None:
        raise UserError("--task or --dataset: expected one of them, to have prompts to sample from; got neither")
    verifier = None if VERIFIER in config.reward else task
    score = Scorer(verifier, functions, weights)
    return Prompts(partial(_item_of_task, task), task.size(TRAIN), score, stop, game)


def _item_of_row(row: Row) -> PromptItem:
    columns = {name: value for name, value in row.fields.items() if name not in ("prompt", "completion")}
    return row.fields["prompt"], columns


def _item_of_task(task: Task, number: int) -> PromptItem:
    example = task.example(TRAIN, number)
    return example.prompt, {"example": example, **example.fields}


def _reward_functions(config: Grpo, task: Task | None) -> list[Reward]:
    """The functions and models that --reward names."""
    device, dtype = place(config.device, config.dtype)
    if VERIFIER in config.reward and task is None:
        raise UserError(f"--reward: expected a --task, whose verifier `{VERIFIER}` is; got none")

    functions = []
    for spec in config.reward:
        verifier = task is not None and spec == VERIFIER
        functions.append(task_reward(task) if verifier else load_reward(spec, dtype=dtype, device=device))
    return functions


def _reward_weights(config: Grpo, functions: int) -> tuple[float, ...] | None:
    """--reward-weights, one per function; None where none is given."""
    weights, count = config.reward_weights or None, max(functions, 1)
    if weights is None:
        return None
    if len(weights) != count:
        raise UserError(f"--reward-weights: expected one per --reward ({count}), got {len(weights)}")
    if not all(map(math.isfinite, weights)):
        listed = " ".join(f"{w:g}" for w in weights)
        raise UserError(f"--reward-weights: expected finite numbers, got {listed}")
    return weights


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


def _check_prompt(row: Row, config: Grpo, tokenizer: Tokenizer, context: int, vocab_size: int) -> None:
    if "prompt" not in row.fields:
        raise UserError(f"{row.where}: expected a prompt column to sample from, got {', '.join(row.fields)}")
    tokens = encode_prompt(row.fields["prompt"], tokenizer, where=row.where)
    limit = min(config.max_tokens or context, context)
    check_room(len(tokens), row.where, limit, "the model's context" if limit == context else "--max-tokens")
    check_tokens(tokens, row.where, vocab_size)
    check_budget(min(len(tokens) + config.max_new_tokens, context), row.where, config.micro_tokens)


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
