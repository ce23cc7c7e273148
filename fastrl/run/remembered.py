"""How a run evaluated, as its checkpoints remember it, and what `fastrl eval` makes of that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fastrl.config import Evaluate, Run, Sampling
from fastrl.config.parse import dump
from fastrl.errors import notice
from fastrl.files import JsonObject, key_values
from fastrl.model.folder import CHECKPOINTS, META, model_folder

RUN = "run"  # in trainer.json: the options of its run that decide what an evaluation finds
KEPT = ("task", "task_options", "eval", "max_new_tokens", "sampling", "dtype", "exact")
LONGEST = "max_new_tokens"  # and the longest completion of its evaluations, tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """What `fastrl eval` does: its options, with every default settled, and how the run computed.

    config    the options, with the model's folder, the task and its options
    sampling  the settings of the run's sampler
    exact     whether the run's arithmetic was batch-invariant
    """

    config: Evaluate
    split: str
    prompts: int
    samples: int
    max_new_tokens: int
    sampling: Sampling
    exact: bool


def to_remember(config: Run, max_new_tokens: int) -> JsonObject:
    """What a checkpoint keeps of its run, plain values; a task of the user's own by its absolute path."""
    whole = yaml.safe_load(dump(config))
    options = {name: whole[name] for name in KEPT if name in whole}
    options["task"] = _absolute(config.task)
    return {RUN: options, LONGEST: max_new_tokens}


def as_remembered(config: Evaluate) -> Plan:
    """The options of an evaluation: those given, else those of the checkpoint's run, else the defaults.

    Two lines say what was taken from the run, and what differs from it.
    """
    config = replace(config, model=str(model_folder(config.model)))
    run, longest = _run_of(Path(config.model))
    own = _of_evaluations(run, longest)
    differs = []
    if config.task is not None and own and _absolute(config.task) != own["task"]:
        differs = [f"--task {config.task}, where the run had {own['task']}: nothing else is taken from it"]
        run, own = {}, {}

    options = key_values(own.get("task_options", ()), "--task-options")
    given = key_values(config.task_options, "--task-options")
    changed = {key: value for key, value in given.items() if key in options and options[key] != value}
    differs += [f"--task-options {key}={value}, not {options[key]}" for key, value in changed.items()]
    settled: dict[str, Any] = {"split": "test", "prompts": 512, "samples": 4, "max_new_tokens": 256}
    for name in settled:
        asked = getattr(config, name)
        if asked is not None and own.get(name, asked) != asked:
            differs.append(f"--{name.replace('_', '-')} {asked}, not {own[name]}")
        settled[name] = own.get(name, settled[name]) if asked is None else asked

    if own:
        config = replace(config, task=own["task"] if config.task is None else config.task)
    config = replace(config, task_options=tuple(f"{k}={v}" for k, v in (options | given).items()))
    if config.dtype == "auto":
        config = replace(config, dtype=run.get("dtype", "auto"))
    if own:
        _say(config, settled, differs)
    elif differs:
        notice(f"otherwise than the checkpoint's run: {'; '.join(differs)}")
    sampling = _sampling(run.get("sampling") or {})
    return Plan(config, **settled, sampling=sampling, exact=bool(run.get("exact", False)))


def _say(config: Evaluate, settled: Mapping[str, object], differs: list[str]) -> None:
    options = " ".join(config.task_options)
    task = f"--task {config.task}" + (f" --task-options {options}" if options else "")
    rest = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settled.items())
    notice(f"as the checkpoint's run evaluated: {task} {rest}")
    if differs:
        notice(f"otherwise than the checkpoint's run: {'; '.join(differs)}")


def _of_evaluations(run: JsonObject, longest: int) -> dict[str, Any]:
    """The run's values under the names of `Evaluate`; none where it had no task."""
    if not run.get("task"):
        return {}
    evaluation = run.get("eval") or {}
    own = {"task": run["task"], "task_options": run.get("task_options") or ()}
    tokens = evaluation.get("max_new_tokens") or longest or run.get("max_new_tokens")
    if tokens:
        own["max_new_tokens"] = tokens
    if evaluation.get("prompts"):
        own |= {name: evaluation[name] for name in ("split", "prompts", "samples") if name in evaluation}
    return own


def _run_of(folder: Path) -> tuple[JsonObject, int]:
    """The options of the run that wrote a folder and its longest completion; none and 0 for other folders."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if RUN in meta:
            return dict(meta[RUN]), int(meta.get(LONGEST, 0))
        # a checkpoint from before they remembered it lies in its run's folder
        written = folder.parent.parent / "config.yaml"
        if folder.parent.name == CHECKPOINTS and written.is_file():
            options = yaml.safe_load(written.read_text(encoding="utf-8"))
            options["task"] = _absolute(options.get("task"))
            return options, 0
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        return {}, 0
    return {}, 0


def _sampling(of_run: Mapping[str, Any]) -> Sampling:
    """The run's sampler, as far as it decides what an evaluation draws."""
    known = {name: of_run[name] for name in ("logits_dtype", "max_rows") if name in of_run}
    return Sampling(**known)


def _absolute(task: str | None) -> str | None:
    """`my_task.py:MyTask` with the file's absolute path, so that it is found from any folder."""
    file, colon, name = (task or "").rpartition(":")
    if not colon or not Path(file).expanduser().is_file():
        return task
    return f"{Path(file).expanduser().resolve()}:{name}"
