"""Reward functions with TRL's signature: loading them, calling them, combining what they return.

    def my_reward(prompts, completions, completion_ids, **columns) -> list[float | None]

One number per completion; None means that the function does not apply to it.  Prompts and completions are
text, or lists of chat messages if the prompt is one; every column of the dataset is passed as a list.
In a task of several turns a completion is always messages: the policy's turns are the assistant's, the task's
answers the user's (or of the task's `role`).  completion_ids are the tokens that the policy drew.
log_extra(column, values) adds a value per completion to the saved samples, log_metric(name, value) a number
to the metrics.  A function without **columns gets only the arguments it names.  No mistake of a function
becomes a reward: it is a UserError that names the function and shows the sample.

    model:FOLDER                       a reward model (`fastrl reward`) scores the completions, on the run's
                                       device
    implicit:POLICY,REFERENCE          what a policy trained on preferences prefers, see implicit.py
    math:COLUMN                        whether the marked answer is that of the column, see maths.py
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastrl.errors import UserError
from fastrl.files import call_user, load_object, location, shorten
from fastrl.rewards.models import MODELS
from fastrl.tasks.returned import LARGEST, items, number

Reward = Callable[..., Sequence[float | None]]
Prompt = str | list[dict[str, Any]]  # text, or chat messages
Arguments = dict[str, Sequence[Any]]  # argument name -> one value per sample
Ids = Sequence[Sequence[int]]  # token ids of every completion
Columns = Mapping[str, Any]  # the other columns of a sample, by name
Extra = dict[str, list[Any]]  # column -> what a function logged, one value per sample
T = TypeVar("T")
_SEARCHED = 64  # samples tried one by one to find the one a function fails on


@dataclass(frozen=True, slots=True)
class Scored:
    """The rewards of S completions.

    reward   (S,) weighted sum of what applies; NaN where no function does
    each     reward -> its weight and (S,) values, NaN for None; empty where there is only `reward`
    parts    metric name -> (S,) values whose mean is the metric: `rewards/<function>/mean` (NaN for None),
             and what was logged
    message  (S,) what a function logged as "message", else empty
    extra    column -> (S,) values, all others logged with log_extra
    """

    reward: list[float]
    parts: dict[str, list[float]] = field(default_factory=dict)
    message: list[str] = field(default_factory=list)
    extra: Extra = field(default_factory=dict)
    each: dict[str, tuple[float, list[float]]] = field(default_factory=dict)

    def plus(self, name: str, values: Sequence[float]) -> Scored:
        """With one more reward of weight 1; a sample that no function applies to keeps NaN."""
        total = [reward + value for reward, value in zip(self.reward, values, strict=True)]
        added = [
            math.nan if math.isnan(reward) else value
            for reward, value in zip(self.reward, values, strict=True)
        ]
        each = self.each or {"reward": (1.0, self.reward)}
        return replace(
            self,
            reward=total,
            parts=self.parts | {f"rewards/{name}/mean": added},
            each=each | {name: (1.0, added)},
        )

    @staticmethod
    def join(parts: Sequence[Scored]) -> Scored:
        """The completions of several calls as those of one, in order; NaN (or None) for the names that a call
        lacks.
        """
        if len(parts) == 1:
            return parts[0]

        sizes = [len(part.reward) for part in parts]
        reward: list[float] = []
        message: list[str] = []
        weights: dict[str, float] = {}
        for part, size in zip(parts, sizes, strict=True):
            reward += part.reward
            message += part.message or [""] * size
            weights |= {name: weight for name, (weight, _) in part.each.items()}

        values = [{name: column for name, (_, column) in part.each.items()} for part in parts]
        columns = _columns(values, sizes, math.nan)
        each = {name: (weights[name], column) for name, column in columns.items()}
        metrics = _columns([part.parts for part in parts], sizes, math.nan)
        extra = _columns([part.extra for part in parts], sizes, None)
        return Scored(reward, metrics, message, extra, each)


def _columns(tables: Sequence[dict[str, list[T]]], sizes: Sequence[int], absent: T) -> dict[str, list[T]]:
    """The columns of several tables end to end, `absent` in the rows of a table without one."""
    names = dict.fromkeys(name for table in tables for name in table)
    columns: dict[str, list[T]] = {name: [] for name in names}
    for table, size in zip(tables, sizes, strict=True):
        for name, column in columns.items():
            column += table.get(name, [absent] * size)
    return columns


def soft_overlong(length: Sequence[int], budget: int, buffer: int) -> list[float]:
    """DAPO's length penalty of completions of `length` tokens: 0 up to budget - buffer, -1 from budget on,
    linear between.
    """
    return [max(-1.0, min(0.0, (budget - buffer - n) / buffer)) for n in length]


def load_reward(
    spec: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust: bool = False,
) -> Reward:
    """The reward function at `my_rewards.py:fn`; or that of the models at `PREFIX:...`, a key of MODELS, on
    `device` in `dtype`.

    Raises:  UserError for a missing file or name, for anything but a plain function, and for a folder without
             a reward model.
    """
    kind, colon, names = spec.partition(":")
    if colon and kind in MODELS:
        try:
            return MODELS[kind](names, dtype=dtype, device=device, trust=trust)
        except UserError as error:
            raise UserError(f"--reward: {str(error).removeprefix('--reward: ')}") from error
    if Path(spec).expanduser().is_dir():
        raise UserError(
            f"--reward: {spec} is a folder: model:{spec} scores with the reward model in it, "
            f"implicit:{spec},REFERENCE with how much a policy differs from its reference"
        )
    function = load_object(spec, "--reward")
    if not callable(function) or inspect.isclass(function):
        raise UserError(f"--reward: expected a function at {spec}, got {shorten(function)}")
    if inspect.iscoroutinefunction(function):
        raise UserError(
            f"--reward: {spec} is async; reward functions are called synchronously: write `def`, "
            "not `async def`"
        )
    return function


def score(
    functions: Sequence[Reward],
    prompts: Sequence[Prompt],
    completions: Sequence[Prompt],
    completion_ids: Ids | None = None,
    columns: Sequence[Columns] | None = None,
    *,
    weights: Sequence[float] | None = None,
) -> Scored:
    """The rewards of S completions by every function, and their sum weighted by `weights`; `columns` are the
    completions' dataset rows.

    Raises:  UserError when a function raises, needs a column that does not exist, or returns anything but S
             finite numbers or Nones; ValueError when the arguments do not fit each other.
    """
    factors = [1.0] * len(functions) if weights is None else [float(w) for w in weights]
    if not functions or len(factors) != len(functions):
        raise ValueError(
            "functions, weights: expected at least one function and a weight for each, "
            f"got {len(functions)} and {len(factors)}"
        )
    if not all(abs(factor) <= LARGEST for factor in factors):
        raise ValueError(f"weights: expected finite numbers of at most {LARGEST:g} in size, got {factors}")
    arguments = _arguments(prompts, completions, completion_ids, columns)
    samples = len(completions)
    extra: Extra = {}
    logged: dict[str, list[float]] = {}
    hooks = {"log_extra": _log_extra(extra, samples), "log_metric": _log_metric(logged, samples)}

    each: dict[str, tuple[float, list[float]]] = {}
    names = function_names(functions)
    for name, function, factor in zip(names, functions, factors, strict=True):
        each[name] = factor, _call(name, function, arguments, hooks)

    rows = zip(*(values for _, values in each.values()), strict=True)
    total = [_combine(factors, row) for row in rows]
    largest = max((abs(value) for value in total if value == value), default=0.0)
    if largest > LARGEST:
        expected = f"weights whose sum of rewards is at most {LARGEST:g} in size"
        raise UserError(f"--reward-weights: expected {expected}, got one of {largest:g}")
    parts = {f"rewards/{name}/mean": values for name, (_, values) in each.items()} | logged
    message = [str(m) for m in extra.pop("message", [""] * samples)]
    return Scored(total, parts, message, extra, each)


def as_message(prompt: Prompt, completion: Prompt) -> Prompt:
    """A completion in its prompt's form: text, or a list of one message.  A conversation of several turns
    is messages already, and stays that.
    """
    if isinstance(prompt, str) or not isinstance(completion, str):
        return completion
    return [{"role": "assistant", "content": completion}]


def function_names(functions: Sequence[Reward]) -> list[str]:
    """The functions' names in metrics; a name that repeats gets a number."""
    names: list[str] = []
    for function in functions:
        name: str = getattr(function, "__name__", type(function).__name__)
        candidates = [name, *(f"{name}_{i}" for i in range(2, len(functions) + 1))]
        names.append(next(free for free in candidates if free not in names))
    return names


def _arguments(
    prompts: Sequence[Prompt],
    completions: Sequence[Prompt],
    ids: Ids | None,
    rows: Sequence[Columns] | None,
) -> Arguments:
    """Every per-sample argument, by name; its columns are those that any row has."""
    lengths = [len(x) for x in (prompts, completions, ids, rows) if x is not None]
    if len(set(lengths)) > 1:
        raise ValueError(
            "prompts, completions, completion_ids, columns: expected one entry per sample in each, "
            f"got {lengths}"
        )
    names = dict.fromkeys(name for row in rows or () for name in row)
    arguments: Arguments = {name: [row.get(name) for row in rows or ()] for name in names}
    arguments["prompts"] = list(prompts)
    arguments["completions"] = [as_message(p, c) for p, c in zip(prompts, completions, strict=True)]
    if ids is not None:
        arguments["completion_ids"] = list(ids)
    return arguments


def _combine(factors: Sequence[float], values: Sequence[float]) -> float:
    applied = [f * v for f, v in zip(factors, values, strict=True) if not math.isnan(v)]
    return math.fsum(applied) if applied else math.nan


def _call(name: str, function: Reward, given: Arguments, hooks: Mapping[str, object]) -> list[float]:
    """One function's rewards, NaN for None."""
    samples = len(given["completions"])
    arguments = _accepted(name, function, {**given, **hooks})
    try:
        returned = call_user(f"reward {name}", function, **arguments)
    except UserError as error:
        raise UserError(
            f"{error}\n  on {_show(given, _culprit(function, arguments, given))}"
        ) from error.__cause__
    values = items(returned)
    at = f"reward {name}{location(function)}"
    if values is None:
        raise UserError(
            f"{at}: expected a list of {samples} rewards, got {shorten(returned)}\n  on {_show(given, 0)}"
        )
    if len(values) != samples:
        first = min(len(values), samples - 1)
        raise UserError(
            f"{at}: expected {samples} rewards, one per completion; "
            f"got {len(values)}\n  on {_show(given, first)}"
        )
    rewards = [math.nan if value is None else number(value) for value in values]
    for i, (value, reward) in enumerate(zip(values, rewards, strict=True)):
        if reward is None:
            got = f"{shorten(value)}{_too_large(value)}"
            raise UserError(f"{at}: expected a finite number or None, got {got}\n  on {_show(given, i)}")
    return [reward for reward in rewards if reward is not None]


def _accepted(name: str, function: Reward, given: Mapping[str, object]) -> dict[str, Any]:
    """The arguments `function` takes: all of them if it has **columns, else those it names."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some compiled callables have no signature
        return dict(given)
    for p in parameters:
        named = p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if named and p.default is p.empty and p.name not in given:
            raise UserError(
                f"reward {name}{location(function)}: it needs {p.name!r}, "
                f"and there is only {', '.join(given)}"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(given)
    return {p.name: given[p.name] for p in parameters if p.name in given}


def _culprit(function: Reward, arguments: Mapping[str, Any], given: Arguments) -> int | None:
    """The first sample that the function fails on alone; None where it fails on none."""
    for i in range(min(len(given["completions"]), _SEARCHED)):
        alone = {name: value[i : i + 1] if name in given else _ignore for name, value in arguments.items()}
        try:
            call_user("", function, **alone)
        except UserError:
            return i
    return None


def _show(given: Arguments, index: int | None) -> str:
    samples = len(given["completions"])
    if not samples:
        return "an empty batch"
    which = f"a batch of {samples} (no sample fails alone), starting with"
    if index is not None:
        which = f"sample {index} of {samples}"
    prompt, completion = (shorten(given[name][index or 0]) for name in ("prompts", "completions"))
    return f"{which}:\n    prompt:     {prompt}\n    completion: {completion}"


def _too_large(value: object) -> str:
    """Why a number is none of the rewards that advantages can be computed of."""
    if not isinstance(value, int | float) or value != value or abs(value) == math.inf:
        return ""
    return f", which is beyond {LARGEST:g}: advantages in float32 would have no digits left"


# --- what a function may log, as in TRL --------------------------------------------------------------
def _log_extra(extra: Extra, samples: int) -> Callable[[str, Sequence[object]], None]:
    def log_extra(column: str, values: Sequence[object]) -> None:
        if not isinstance(column, str):
            raise TypeError(f"log_extra: expected a column's name, got {shorten(column)}")
        if len(values) != samples:
            raise ValueError(
                f"log_extra: expected {samples} values for {column!r}, one per completion; got {len(values)}"
            )
        extra[column] = list(values)

    return log_extra


def _log_metric(parts: dict[str, list[float]], samples: int) -> Callable[[str, float], None]:
    def log_metric(name: str, value: float) -> None:
        if not isinstance(name, str):
            raise TypeError(f"log_metric: expected a metric's name, got {shorten(name)}")
        parts[name] = [float(value)] * samples

    return log_metric


def _ignore(name: str, value: object) -> None:
    """Replaces both hooks during the search for the sample that fails."""
