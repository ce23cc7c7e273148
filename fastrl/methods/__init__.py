"""One folder per training command, and the table of them.

A line says where a command's options and its method are.  Nothing is imported before it is asked for, so that
`fastrl --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from fastrl.config.algorithm import WithAlgorithm
from fastrl.errors import nearest

if TYPE_CHECKING:
    from fastrl.config.run import Run
    from fastrl.methods.method import AnyMethod

METHODS = {  # command -> (its options, its method)
    "sft": ("fastrl.config.sft:Sft", "fastrl.methods.sft.method:METHOD"),
    "reward": ("fastrl.config.reward:Reward", "fastrl.methods.reward.method:METHOD"),
    "dpo": ("fastrl.config.dpo:Dpo", "fastrl.methods.dpo.method:METHOD"),
    "grpo": ("fastrl.config.grpo:Grpo", "fastrl.methods.grpo.method:METHOD"),
    "ppo": ("fastrl.config.ppo:Ppo", "fastrl.methods.ppo.method:METHOD"),
    "hybrid": ("fastrl.config.hybrid:Hybrid", "fastrl.methods.hybrid.method:METHOD"),
    "joint": ("fastrl.config.joint:Joint", "fastrl.methods.joint.method:METHOD"),
}


def options_of(command: str) -> type[Run]:
    """The dataclass that holds a command's options."""
    options: type[Run] = _load(METHODS[command][0])
    return options


def method_of(command: str) -> AnyMethod:
    """A command's method."""
    method: AnyMethod = _load(METHODS[command][1])
    return method


def command_of(config: Run) -> str:
    """The command that a configuration is of.  Raises TypeError for anything else."""
    for name in METHODS:
        if options_of(name) is type(config):
            return name
    known = ", ".join(options_of(name).__name__ for name in METHODS)
    raise TypeError(
        f"config: expected a configuration of fastrl.config ({known}), got {type(config).__name__}"
    )


# what other trainers call a command that is an algorithm here
OTHER_COMMANDS = {"rm": "bradley_terry", "orm": "outcome", "prm": "process", "reinforce": "reinforce++"}


def command_hint(name: str, commands: Collection[str] = METHODS) -> str:
    """What to type where a command called `name` is an algorithm here, or close to one or to a command; else
    the empty string.
    """
    plain = name.lower().replace("-", "_")
    plain = OTHER_COMMANDS.get(plain, plain)
    algorithms: dict[str, list[str]] = {}
    for command, algorithm in _algorithms():
        algorithms.setdefault(algorithm, []).append(f"fastrl {command} --algorithm {algorithm}")
    if plain in algorithms:
        return f"; it is an algorithm: {' or '.join(algorithms[plain])}"

    return nearest(plain, commands) or nearest(plain, algorithms)


def _algorithms() -> Iterator[tuple[str, str]]:
    """Every (command, algorithm), TRL's names included."""
    for command in METHODS:
        options = options_of(command)
        if issubclass(options, WithAlgorithm):
            for name in (*options.rows, *options.other_names):
                yield command, name


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
