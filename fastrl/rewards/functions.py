"""Reward functions with TRL's signature: loading them, calling them, combining what they return.

    def my_reward(prompts, completions, completion_ids, **columns) -> list[float | None]

One number per completion; None means that the function does not apply to it.  Prompts and completions are
text, or lists of chat messages where the prompt is one; every column of the dataset comes as a list.
log_extra(column, values) adds a value per completion to the saved samples, log_metric(name, value) a number
to the metrics.  A function without **columns gets only what it names.  Nothing a function does wrong becomes
a reward: it is a UserError that names the function and shows the sample.

    model:FOLDER                       a reward model (`fastrl reward`) scores the completions, on the run's
                                       device
    implicit:POLICY,REFERENCE          what a policy trained on preferences prefers, see implicit.py
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl.errors import UserError
from fastrl.files import call_user, load_object, shorten
from fastrl.model.config import is_scoring
from fastrl.model.reward import RewardModel
from fastrl.model.tokenizer import load_tokenizer
from fastrl.model.weights import read_config
from fastrl.rewards.implicit import implicit_reward

Reward = Callable[..., Sequence[float | None]]
Given = dict[str, Sequence[Any]]  # argument name -> one value per sample
_SEARCHED = 64  # samples tried one by one to find the one a function fails on


@dataclass(frozen=True, slots=True)
class Scored:
    """The rewards of S completions.

    reward   (S,) weighted sum of what applies; NaN where no function does
    each     reward -> its weight and (S,) values, NaN for None; empty where there is only `reward`
    parts    metric name -> (S,) values whose mean is the metric: `rewards/<function>/mean` (NaN for None),
             and what was logged
    message  (S,) what a function logged as "message", else empty
    extra    column -> (S,) values, everything else that was logged with log_extra
    """

    reward: list[float]
    parts: dict[str, list[float]] = field(default_factory=dict)
    message: list[str] = field(default_factory=list)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    each: dict[str, tuple[float, list[float]]] = field(default_factory=dict)

    def plus(self, name: str, values: Sequence[float]) -> Scored:
        """With one more reward of weight 1; a sample that no function applies to stays that."""
        total = [r + v for r, v in zip(self.reward, values, strict=True)]
        here = [math.nan if math.isnan(r) else v for r, v in zip(self.reward, values, strict=True)]
        each = self.each or {"reward": (1.0, self.reward)}
        return replace(
            self,
            reward=total,
            parts=self.parts | {f"rewards/{name}/mean": here},
            each=each | {name: (1.0, here)},
        )

    @staticmethod
    def join(parts: Sequence[Scored]) -> Scored:
        """The completions of several calls as those of one, in order; NaN (or None) where a call has not what
        another has.
        """
        if len(parts) == 1:
            return parts[0]

        def columns(tables: list[dict[str, list[Any]]], absent: Any) -> dict[str, list[Any]]:
            names = dict.fromkeys(name for table in tables for name in table)
            return {
                n: [x for t, p in zip(tables, parts, strict=True) for x in t.get(n, [absent] * len(p.reward))]
                for n in names
            }

        weights = {name: weight for p in parts for name, (weight, _) in p.each.items()}
        each = columns([{name: values for name, (_, values) in p.each.items()} for p in parts], math.nan)
        return Scored(
            [x for p in parts for x in p.reward],
            columns([p.parts for p in parts], math.nan),
            [x for p in parts for x in p.message or [""] * len(p.reward)],
            columns([p.extra for p in parts], None),
            {name: (weights[name], values) for name, values in each.items()},
        )


def soft_overlong(length: Sequence[int], budget: int, buffer: int) -> list[float]:
    """DAPO's punishment of completions of `length` tokens: 0 up to budget - buffer, -1 from budget on, linear
    between.
    """
    return [max(-1.0, min(0.0, (budget - buffer - n) / buffer)) for n in length]


def load_reward(
    spec: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Reward:
    """The reward function at `my_rewards.py:fn`, or the models that a prefix of MODELS names, kept on
    `device` in `dtype`.

    Raises UserError for a missing file or name, something that cannot be called, a class, an async function,
    and no reward model.
    """
    kind, colon, names = spec.partition(":")
    if colon and kind in MODELS:
        try:
            return MODELS[kind](names, dtype=dtype, device=device)
        except UserError as error:
            raise UserError(f"--reward: {str(error).removeprefix('--reward: ')}") from error
    function = load_object(spec, "--reward")
    if not callable(function) or inspect.isclass(function):
        raise UserError(f"--reward: expected a function at {spec}, got {shorten(function)}")
    if inspect.iscoroutinefunction(function):
        raise UserError(
            f"--reward: {spec} is async; reward functions are called synchronously: write `def`, "
            "not `async def`"
        )
    return function


def model_reward(
    folder: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Reward:
    """A reward model as a reward function: it reads the text of prompt and completion with its own tokenizer
    and chat template.

    Raises UserError for a folder that holds no trained reward model, or no tokenizer.
    """
    if not Path(folder).is_dir() or not is_scoring(read_config(Path(folder))):
        raise UserError(
            "--reward: expected the folder of a reward model (`fastrl reward` writes one), "
            f"got model:{folder}"
        )
    model = RewardModel.load(folder, dtype, device, tokenizer=load_tokenizer(None, folder))
    model.requires_grad_(False)

    def reward_model(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        return model.score(list(zip(prompts, completions, strict=True)))

    return reward_model


# before the colon of a name
MODELS: dict[str, Callable[..., Reward]] = {
    "model": model_reward,
    "implicit": implicit_reward,
}


def score(
    functions: Sequence[Reward],
    prompts: Sequence[str | list[dict[str, Any]]],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,
    columns: Sequence[Mapping[str, Any]] | None = None,
    *,
    weights: Sequence[float] | None = None,
) -> Scored:
    """The rewards of S completions, whose dataset rows are `columns`: every function's own, and their sum
    weighted by `weights`.

    Raises UserError when a function raises, needs a column that is not there, returns another number of
    rewards than S, or something that is neither a finite number nor None; ValueError when the arguments do
    not fit each other.
    """
    factors = [1.0] * len(functions) if weights is None else [float(w) for w in weights]
    if not functions or len(factors) != len(functions):
        raise ValueError(
            "functions, weights: expected at least one function and a weight for each, "
            f"got {len(functions)} and {len(factors)}"
        )
    given = _given(prompts, completions, completion_ids, columns)
    extra: dict[str, list[Any]] = {}
    parts: dict[str, list[float]] = {}
    hooks = {
        "log_extra": _log_extra(extra, len(completions)),
        "log_metric": _log_metric(parts, len(completions)),
    }
    each = {
        name: _call(name, f, given, hooks)
        for name, f in zip(function_names(functions), functions, strict=True)
    }
    total = [_combine(factors, row) for row in zip(*each.values(), strict=True)]
    message = [str(m) for m in extra.pop("message", [""] * len(total))]
    named = {name: (factor, values) for factor, (name, values) in zip(factors, each.items(), strict=True)}
    return Scored(
        total,
        {f"rewards/{name}/mean": values for name, values in each.items()} | parts,
        message,
        extra,
        named,
    )


def said_to(prompt: Any, completion: str) -> Any:
    """A completion in its prompt's form: text, or a list of one message."""
    return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]


def function_names(functions: Sequence[Reward]) -> list[str]:
    """What the functions are called in metrics; a name that comes again gets a number."""
    names: list[str] = []
    for function in functions:
        name = getattr(function, "__name__", type(function).__name__)
        free = (n for n in (name, *(f"{name}_{i}" for i in range(2, len(functions) + 1))) if n not in names)
        names.append(next(free))
    return names


def _given(
    prompts: Sequence[Any],
    completions: Sequence[str],
    ids: Sequence[Any] | None,
    rows: Sequence[Mapping[str, Any]] | None,
) -> Given:
    """Every per-sample argument, by name; the columns are those any row has."""
    lengths = [len(x) for x in (prompts, completions, ids, rows) if x is not None]
    if len(set(lengths)) > 1:
        raise ValueError(
            "prompts, completions, completion_ids, columns: expected one entry per sample in each, "
            f"got {lengths}"
        )
    names = dict.fromkeys(name for row in rows or () for name in row)
    given: Given = {name: [row.get(name) for row in rows or ()] for name in names}
    said = [said_to(p, c) for p, c in zip(prompts, completions, strict=True)]
    return (
        given
        | {"prompts": list(prompts), "completions": said}
        | ({} if ids is None else {"completion_ids": list(ids)})
    )


def _combine(factors: Sequence[float], values: Sequence[float]) -> float:
    known = [f * v for f, v in zip(factors, values, strict=True) if not math.isnan(v)]
    return math.fsum(known) if known else math.nan


def _call(name: str, function: Reward, given: Given, hooks: Mapping[str, Any]) -> list[float]:
    """One function's rewards, NaN for None."""
    samples = len(given["completions"])
    arguments = _accepted(name, function, {**given, **hooks})
    try:
        returned = call_user(f"reward {name}", function, **arguments)
    except UserError as error:
        raise UserError(
            f"{error}\n  on {_show(given, _culprit(function, arguments, given))}"
        ) from error.__cause__
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    at = f"reward {name}{_location(function)}"
    if not isinstance(values, list | tuple):
        raise UserError(
            f"{at}: expected a list of {samples} rewards, got {shorten(returned)}\n  on {_show(given, 0)}"
        )
    if len(values) != samples:
        first = min(len(values), samples - 1)
        raise UserError(
            f"{at}: expected {samples} rewards, one per completion; "
            f"got {len(values)}\n  on {_show(given, first)}"
        )
    for i, value in enumerate(values):
        if value is not None and not _is_number(value):
            raise UserError(
                f"{at}: expected a finite number or None, got {shorten(value)}\n  on {_show(given, i)}"
            )
    return [math.nan if v is None else float(v) for v in values]


def _accepted(name: str, function: Reward, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments `function` takes: all that is given when it has **columns, else those it names."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some compiled callables have no signature
        return dict(given)
    for p in parameters:
        if (
            p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            and p.default is p.empty
            and p.name not in given
        ):
            raise UserError(
                f"reward {name}{_location(function)}: it needs {p.name!r}, "
                f"and there is only {', '.join(given)}"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(given)
    return {p.name: given[p.name] for p in parameters if p.name in given}


def _culprit(function: Reward, arguments: Mapping[str, Any], given: Given) -> int | None:
    """The first sample the function fails on when it is called with that one alone."""
    for i in range(min(len(given["completions"]), _SEARCHED)):
        alone = {name: value[i : i + 1] if name in given else _ignore for name, value in arguments.items()}
        try:
            call_user("", function, **alone)
        except UserError:
            return i
    return None


def _show(given: Given, index: int | None) -> str:
    samples = len(given["completions"])
    if not samples:
        return "an empty batch"
    which = (
        f"sample {index} of {samples}"
        if index is not None
        else f"a batch of {samples} (no sample fails alone), whose first is"
    )
    i = index or 0
    return (
        f"{which}:\n    prompt:     {shorten(given['prompts'][i])}\n    completion: "
        f"{shorten(given['completions'][i])}"
    )


def _location(function: Reward) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f" ({code.co_filename}:{code.co_firstlineno})" if code else ""


def _is_number(value: Any) -> bool:
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    return isinstance(value, numbers.Real) and math.isfinite(value)


# --- what a function may log, as in TRL --------------------------------------------------------------
def _log_extra(extra: dict[str, list[Any]], samples: int) -> Callable[[str, Sequence[Any]], None]:
    def log_extra(column: str, values: Sequence[Any]) -> None:
        if len(values) != samples:
            raise ValueError(
                f"log_extra: expected {samples} values for {column!r}, one per completion; got {len(values)}"
            )
        extra[column] = list(values)

    return log_extra


def _log_metric(parts: dict[str, list[float]], samples: int) -> Callable[[str, float], None]:
    def log_metric(name: str, value: float) -> None:
        parts[name] = [float(value)] * samples

    return log_metric


def _ignore(name: str, value: Any) -> None:
    """Stands in for both hooks when a failure is looked for."""
