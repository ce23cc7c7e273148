"""One folder per training command, and the table of them.

A line says where a command's options and its method are.  Nothing is imported before it is asked for, so that
`fastrl --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
    """The command that a configuration is of."""
    return next(name for name in METHODS if options_of(name) is type(config))


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
