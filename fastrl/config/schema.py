"""The options of a command by the names a user may call them.

An option's path is its place in the configuration: `steps`, `optim.lr`, and `algorithm.mu` for an option of a
row.  A row's option may also be called by its last name, `mu`, and some options by TRL's name.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass

from fastrl.config.algorithm import AlgorithmChoice, RowOptions, WithAlgorithm
from fastrl.config.dpo import Dpo
from fastrl.config.grpo import Grpo
from fastrl.config.hybrid import Hybrid
from fastrl.config.joint import Joint
from fastrl.config.ppo import Ppo
from fastrl.config.reward import Reward
from fastrl.config.sft import Sft
from fastrl.config.values import Kind

ROW = "algorithm."  # before the name of a row's option
ALIASES = {  # TRL's name -> ours, on the command line and in files
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "reward_funcs": "reward",
    "num_generations": "group",
    "learning_rate": "optim.lr",
    "max_completion_length": "max_new_tokens",
    "max_steps": "steps",
    "loss_type": "algorithm",
    "beta": "kl_coef",
    "neftune_noise_alpha": "neftune_alpha",
    "label_smoothing_factor": "label_smoothing",
    "num_iterations": "epochs",
    "mask_truncated_completions": "overlong_filter",
    "vllm_importance_sampling_mode": "correction",
    "vllm_importance_sampling_clip_min": "correction_min",
    "vllm_importance_sampling_clip_max": "correction_max",
    "center_rewards_coefficient": "center",
    "num_ppo_epochs": "epochs",
    "num_mini_batches": "minibatches",
    "cliprange": "epsilon",
    "cliprange_value": "value_clip",
    "kl_estimator": "kl",
}


@dataclass(frozen=True, slots=True)
class Schema:
    """The options of one configuration class.

    general  path -> type, of what every row of the command takes
    of_rows  name -> declaration, of what some rows have
    """

    general: Mapping[str, Kind]
    of_rows: RowOptions

    @staticmethod
    def of(cls: type) -> Schema:
        """The options of a configuration class."""
        of_rows = cls.all_row_options() if issubclass(cls, WithAlgorithm) else {}
        return Schema(_leaves(cls), of_rows)

    def find(self, name: str) -> str | None:
        """The path of the option that is called `name`; None if there is none."""
        path = self._exact(name)
        if path is None and name in ALIASES:
            path = self._exact(ALIASES[name])
        return path

    def kind(self, path: str) -> Kind:
        """The type of the option at a path."""
        return self.general[path] if path in self.general else self.of_rows[path.removeprefix(ROW)].kind

    def group(self, name: str) -> list[str]:
        """The options of a group, by the last part of their paths."""
        return [path.removeprefix(f"{name}.") for path in self.general if path.startswith(f"{name}.")]

    def aliases(self) -> dict[str, str]:
        """TRL's names that are understood here -> our names."""
        ours = {alias: self.find(alias) for alias in ALIASES if self._exact(alias) is None}
        return {alias: path.removeprefix(ROW) for alias, path in ours.items() if path is not None}

    def nearest(self, name: str, more: typing.Iterable[str] = ()) -> str | None:
        """The option whose path, last name or TRL's name comes closest to `name`."""
        last = {path.split(".")[-1]: path for path in reversed(list(self.general)) if "." in path}
        ours = {path: path for path in [*self.general, *self.of_rows, *more]}
        table = self.aliases() | last | ours
        if name.startswith(ROW):
            table = {option: option for option in self.of_rows}
        for typed in (name.removeprefix(ROW), name.split(".")[-1]):
            near = difflib.get_close_matches(typed, table, n=1, cutoff=0.6)
            if near:
                return table[near[0]]
        return None

    def _exact(self, name: str) -> str | None:
        if name in self.general:
            return name
        if name == f"{ROW}name" and "algorithm" in self.general:
            return "algorithm"
        last = name.removeprefix(ROW)
        return f"{ROW}{last}" if last in self.of_rows else None


def owners(name: str) -> str:
    """`; it is an option of fastrl ...` where training commands have the option, else the empty string."""
    commands = (Sft, Reward, Dpo, Grpo, Ppo, Hybrid, Joint)
    having = [c.__name__.lower() for c in commands if Schema.of(c).find(name) is not None]
    return f"; it is an option of fastrl {', '.join(having)}" if having else ""


def _leaves(cls: type, prefix: str = "") -> dict[str, Kind]:
    """Every option of a configuration class: path -> type."""
    hints = typing.get_type_hints(cls)
    flat: dict[str, Kind] = {}
    for field in dataclasses.fields(cls):
        path, kind = prefix + field.name, hints[field.name]
        nested = dataclasses.is_dataclass(kind) and kind is not AlgorithmChoice
        if nested:
            flat |= _leaves(kind, f"{path}.")
        else:
            flat[path] = str if kind is AlgorithmChoice else kind
    return flat
