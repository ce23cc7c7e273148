"""Prompts to sample from, and what scores their completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastrl.config import OnPolicy
from fastrl.data.dataset import Items, read_items
from fastrl.data.encoders import Limits, PromptEncoder, PromptRow
from fastrl.errors import UserError
from fastrl.files import key_values
from fastrl.model.language import Tokenizer
from fastrl.parallel.device import resolve_device
from fastrl.parallel.world import World
from fastrl.rewards.functions import Reward, Scored, load_reward
from fastrl.rewards.scorer import Scorer
from fastrl.sampler.prompts import stop_tokens
from fastrl.tasks import Conversation, Task, task_reward
from fastrl.tasks.returned import LARGEST
from fastrl.tasks.task import TRAIN, is_conversation

PromptItem = tuple[Any, Mapping[str, Any]]  # a prompt, and its row's columns
VERIFIER = "task"  # the task's verifier among the reward functions


@dataclass(frozen=True, slots=True)
class Prompts:
    """What there is to sample from.

    item   number -> the prompt, and its row's columns; out of `size`
    score  (prompts, completions, token lists, columns) -> their rewards
    stop   texts that end a completion, beside the end-of-sequence token
    rows   the dataset's, if that is where they are from
    game   the task that answers the policy's turns; None where a completion is one turn
    """

    item: Callable[[int], PromptItem]
    size: int
    score: Callable[..., Scored]
    stop: tuple[str, ...] = ()
    game: Conversation | None = None
    rows: Items[PromptRow] | None = None


def load_prompts(
    config: OnPolicy,
    task: Task | None,
    tokenizer: Tokenizer,
    context: int,
    vocab_size: int,
    world: World | None = None,
) -> Prompts:
    """The prompts and the rewards that the options name; every line of a dataset is checked before training.

    context, vocab_size  of the model
    """
    functions = _reward_functions(config, task)
    weights = _reward_weights(config, len(functions))
    stop = task.stop if task is not None else ()
    stop_tokens(stop, tokenizer, ())  # a stop of several tokens is told before the model has sampled any
    game = task if is_conversation(task) else None

    if config.dataset is not None:
        if not functions:
            raise UserError(
                "--reward: expected a reward function for the dataset's prompts (my_rewards.py:fn), got none"
            )
        columns = key_values(config.columns, "--columns")
        limit = min(config.max_tokens or context, context)
        limits = Limits(limit, config.micro_tokens, vocab_size)
        encoder = PromptEncoder(limits, context, config.max_new_tokens, columns)
        rows = read_items(config.dataset, encoder, tokenizer, columns=columns, world=world)
        score = Scorer(None, functions, weights)
        return Prompts(partial(_item_of_row, rows), len(rows), score, stop, game, rows)

    if task is None:
        raise UserError(
            "--task or --dataset: expected one of them, to have prompts to sample from; got neither"
        )
    verifier = None if VERIFIER in config.reward else task
    score = Scorer(verifier, functions, weights)
    return Prompts(partial(_item_of_task, task), task.size(TRAIN), score, stop, game)


def _item_of_row(rows: Items[PromptRow], number: int) -> PromptItem:
    fields = rows[number].fields
    columns = {name: value for name, value in fields.items() if name not in ("prompt", "completion")}
    return fields["prompt"], columns


def _item_of_task(task: Task, number: int) -> PromptItem:
    example = task.example(TRAIN, number)
    return example.prompt, {"example": example, **example.fields}


def _reward_functions(config: OnPolicy, task: Task | None) -> list[Reward]:
    """The functions and models that --reward names."""
    device, dtype = resolve_device(config.device, config.dtype)
    if VERIFIER in config.reward and task is None:
        raise UserError(f"--reward: expected a --task, whose verifier `{VERIFIER}` is; got none")

    functions: list[Reward] = []
    for spec in config.reward:
        if task is not None and spec == VERIFIER:
            functions.append(task_reward(task))
        else:
            functions.append(load_reward(spec, dtype=dtype, device=device, trust=config.trust_remote_code))
    return functions


def _reward_weights(config: OnPolicy, functions: int) -> tuple[float, ...] | None:
    """--reward-weights, one per function; None where none is given."""
    weights, count = config.reward_weights or None, max(functions, 1)
    if weights is None:
        return None
    if len(weights) != count:
        raise UserError(f"--reward-weights: expected one per --reward ({count}), got {len(weights)}")
    if not all(abs(weight) <= LARGEST for weight in weights):
        listed = " ".join(f"{w:g}" for w in weights)
        raise UserError(f"--reward-weights: expected finite numbers of at most {LARGEST:g}, got {listed}")
    return weights
