"""From what the user named (a task, a dataset, reward functions) to the items that training sources draw from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from fastrl.config import Grpo, Sft
from fastrl.data import Row, encode, read_rows
from fastrl.errors import UserError
from fastrl.experience import Scored
from fastrl.rewards import load_reward, score
from fastrl.tasks import Example, Task, load_task

Demonstration = tuple[list[int], list[bool]]
TRAIN = "train"


def load_run_task(name: str | None, options: Sequence[str]) -> Task | None:
    """The task named on the command line with its key=value options, or None.  Raises UserError for an option that is not one."""
    if name is None:
        return None
    return load_task(name, **{key: _value(text, key) for key, text in pairs(options, "--task-options").items()})


def pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """{"key": "value"} of key=value texts.  Raises UserError naming the option."""
    split = [text.partition("=") for text in texts]
    for text, (key, equals, _) in zip(texts, split, strict=True):
        if not key or not equals:
            raise UserError(f"{option}: expected key=value, got {text!r}")
    return {key: value for key, _, value in split}


def demonstrations(config: Sft, task: Task | None, tokenizer: Any, context: int) -> tuple[Callable[[int], Demonstration], int, int]:
    """item(i), how many there are, and the longest completion to expect; every line of a dataset is checked before training."""
    limit = min(config.max_tokens or context, context)
    if config.dataset is not None:
        rows = read_rows(config.dataset, pairs(config.columns, "--columns"))
        samples = [encode(row, tokenizer, max_tokens=limit, turns=config.turns) for row in rows]
        return lambda i: (samples[i].tokens, samples[i].mask), len(samples), limit
    if task is None:
        raise UserError("--dataset or --task: expected one of them, to have demonstrations to train on; got neither")
    named: Task = task
    if named.example(TRAIN, 0).demo is None:
        raise UserError(f"--task: {named.name} has no demonstrations; give a --dataset")

    def item(i: int) -> Demonstration:
        example = named.example(TRAIN, i)
        row = Row(f"{named.name} {TRAIN}[{i}]", "prompt-completion", {"prompt": example.prompt, "completion": example.demo})
        sample = encode(row, tokenizer, max_tokens=limit)
        return sample.tokens, sample.mask

    return item, named.size(TRAIN), limit


def prompts_and_rewards(config: Grpo, task: Task | None) -> tuple[Callable[[int], tuple[Any, Mapping[str, Any]]], int, Callable[..., Scored]]:
    """prompt(i) -> (prompt, columns), how many there are, and the function that scores completions."""
    functions = {spec: load_reward(spec) for spec in config.reward}
    if config.dataset is not None:
        rows = read_rows(config.dataset, pairs(config.columns, "--columns"))
        if not functions:
            raise UserError("--reward: expected a reward function for the dataset's prompts (my_rewards.py:fn), got none")
        for row in rows:
            if "prompt" not in row.fields:
                raise UserError(f"{row.where}: expected a prompt column to sample from, got {', '.join(row.fields)}")

        def from_dataset(i: int) -> tuple[Any, Mapping[str, Any]]:
            return rows[i].fields["prompt"], {k: v for k, v in rows[i].fields.items() if k not in ("prompt", "completion")}

        return from_dataset, len(rows), Scorer(None, list(functions.values()))
    if task is None:
        raise UserError("--task or --dataset: expected one of them, to have prompts to sample from; got neither")
    named: Task = task

    def from_task(i: int) -> tuple[Any, Mapping[str, Any]]:
        example = named.example(TRAIN, i)
        return example.prompt, {"example": example, **example.fields}

    return from_task, named.size(TRAIN), Scorer(named, list(functions.values()))


class Scorer:
    """Scores completions with the reward functions, or with the task's verifier where there are none; a task's verdict is
    reported as accuracy either way."""

    def __init__(self, task: Task | None, functions: Sequence[Callable[..., Any]]) -> None:
        self.task, self.functions = task, functions

    def __call__(self, prompts: Sequence[Any], texts: list[str] | None, tokens: list[list[int]], columns: Sequence[Mapping[str, Any]]) -> Scored:
        if texts is None:
            raise UserError("--tokenizer: rewards read text, and the run has no tokenizer")
        reward, parts, message = [math.nan] * len(texts), dict[str, list[float]](), [""] * len(texts)
        if self.task is not None:
            examples: list[Example] = [c["example"] for c in columns]
            scores = [self.task.verify(e, t) for e, t in zip(examples, texts, strict=True)]
            reward, message = [s.reward for s in scores], [s.message for s in scores]
            parts = {"accuracy": [float(s.correct) for s in scores], "well_formed": [float(s.well_formed) for s in scores]}
        if self.functions:
            names = dict.fromkeys(k for c in columns for k in c)
            named = {k: [c.get(k) for c in columns] for k in names}
            done = score(self.functions, prompts, texts, completion_ids=tokens, columns=named)
            reward = done.total.tolist()
            parts |= {f"rewards/{k}/mean": v.tolist() for k, v in done.each.items()}
        return Scored(reward, parts, message)


def _value(text: str, key: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--task-options: {key}: expected a YAML value, got {text!r}") from error
    return tuple(value) if isinstance(value, list) else value
