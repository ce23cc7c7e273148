"""What a run will need, looked at before it begins: options, task, rewards, models, tokenizer, datasets.

A pipeline looks at all its stages this way before the first one trains.  No weights are read and nothing is
tokenised; what only that can find is found when the stage begins.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from fastrl.config import Run
from fastrl.data.comparisons import read_statements
from fastrl.data.pairs import LABELLED, PAIRED
from fastrl.data.rows import read_rows, read_table
from fastrl.errors import UserError
from fastrl.files import hub_advice, key_values
from fastrl.methods import command_of, method_of
from fastrl.methods.grpo.prompts import VERIFIER
from fastrl.model.fields import refuse
from fastrl.model.folder import existing_folder, model_folder
from fastrl.model.weights import read_config
from fastrl.rewards.functions import MODELS, load_reward
from fastrl.run.session import check_options
from fastrl.tasks import load_run_task

FOLDERS = ("model", "reward_model", "critic_model")  # options that name a model


def preflight(config: Run, later: Collection[str] = ()) -> list[str]:
    """Check what `config` names; a line about each thing that was looked at.

    later  checkpoints that will have been written when the run begins

    Raises UserError naming the option for what is missing or does not fit.
    """
    method = method_of(command_of(config))
    check_options(config, method)
    algorithm = method.choose(config)
    found = []

    task = load_run_task(config.task, config.task_options)
    if task is not None:
        found.append(f"task {config.task}: {task.size('train'):,} examples")
    for option in FOLDERS:
        name = getattr(config, option, None)
        if name is not None:
            found.append(f"{option.replace('_', ' ')} {name}: {_model(option, name, later)}")
    if config.tokenizer is not None:
        found.append(f"tokenizer {config.tokenizer}: {_tokenizer(config.tokenizer, later)}")
    for spec in getattr(config, "reward", ()):
        found.append(f"reward {spec}: {_reward(spec, later)}")
    if config.dataset is not None:
        rows = _read(config, config.dataset, algorithm)
        found.append(f"dataset {config.dataset}: {len(rows):,} rows")
    offline = getattr(config, "offline", None)
    if offline is not None:
        found.append(f"offline {offline}: {len(read_table(offline)):,} rows")
    return found


def _model(option: str, name: str, later: Collection[str]) -> str:
    if name in later:
        return "of an earlier stage"
    flag = f"--{option.replace('_', '-')}"
    path = model_folder(name, flag)
    if path.is_dir():
        refuse(read_config(path))
        return "a model"
    if path.exists():
        return "the configuration of one"
    raise UserError(
        f"{flag}: expected a folder, got {name}, which is not there (looked in {Path.cwd()})"
        f"{hub_advice(name, flag)}"
    )


def _tokenizer(name: str, later: Collection[str]) -> str:
    if name in later:
        return "of an earlier stage"
    existing_folder(name, "--tokenizer", "a folder with tokenizer files")
    return "found"


def _reward(spec: str, later: Collection[str]) -> str:
    if spec == VERIFIER:
        return "the task's verifier"
    kind, colon, names = spec.partition(":")
    if not colon or kind not in MODELS:
        load_reward(spec)
        return "a function"
    folders = names.split(",")[:2] if kind == "implicit" else [names]
    for folder in folders:
        _model("reward", folder.strip(), later)
    return "models" if len(folders) > 1 else "a model"


def _read(config: Run, path: str, algorithm: Any) -> Sequence[object]:
    columns = key_values(config.columns, "--columns")
    command = command_of(config)
    special: dict[str, Callable[[], Sequence[object]]] = {
        "dpo": lambda: read_rows(path, columns, {**PAIRED, **LABELLED}),
        "reward": lambda: read_statements(path, algorithm.data, columns, margins=algorithm.margin),
    }
    if command in special:
        return special[command]()

    rows = read_rows(path, columns)
    if command != "sft" and "prompt" not in rows[0].fields:
        listed = ", ".join(rows[0].fields)
        raise UserError(f"{rows[0].where}: expected a prompt column to sample from, got {listed}")
    return rows
