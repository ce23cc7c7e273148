"""Every row of every table is documented, and runs from a recipe by `fastrl COMMAND --algorithm NAME`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from runs import lines, write_model

import fastrl.trainer
from fastrl import cli
from fastrl.algorithms import ALGORITHMS
from fastrl.algorithms.hybrid import HYBRIDS
from fastrl.algorithms.ppo import PPO
from fastrl.algorithms.preference import PREFERENCES
from fastrl.algorithms.reward import REWARD_LOSSES
from fastrl.commands import PARTS, Parts
from fastrl.config import TRAINING
from fastrl.options import load

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "fastrl/recipes"


@dataclass(frozen=True)
class Menu:
    """A command's methods: their table, their page, their recipe, and the recipes of rows that need other settings."""

    rows: tuple[str, ...]
    page: str
    recipe: str
    own: Mapping[str, str] = field(default_factory=dict)


MENU = {
    "sft": Menu(("sft",), "sft", "cards_sft"),
    "grpo": Menu(tuple(name for name in ALGORITHMS if name != "sft"), "methods", "cards_grpo"),
    "ppo": Menu(tuple(PPO), "ppo", "cards_ppo"),
    "hybrid": Menu(
        tuple(HYBRIDS), "hybrid", "cards_hybrid", dict.fromkeys(("luffy", "chord", "chord_phi"), "cards_chord")
    ),
    "dpo": Menu(tuple(PREFERENCES), "preference", "cards_dpo", dict.fromkeys(("kto", "apo_zero_unpaired"), "cards_kto")),
    "reward": Menu(
        tuple(REWARD_LOSSES), "reward", "cards_reward",
        {"plackett_luce": "cards_ranking", "outcome": "cards_outcome", "process": "cards_process"},
    ),
}  # fmt: skip
ROWS = [(command, name) for command, menu in MENU.items() for name in menu.rows]


def words(command: str, name: str) -> list[str]:
    """What a user types."""
    menu = MENU[command]
    chosen = [] if command == "sft" else ["--algorithm", name]
    return [command, "--config", str(RECIPES / f"{menu.own.get(name, menu.recipe)}.yaml"), *chosen]


def entry(page: str, name: str) -> list[str] | None:
    """The cells of a row's line in its page's tables, its name left out."""
    for line in (ROOT / f"docs/{page}.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and cells[0] == f"`{name}`":
            return cells[1:]
    return None


def test_every_training_command_is_on_the_menu():
    assert set(MENU) == set(TRAINING)


@pytest.mark.parametrize(("command", "name"), ROWS)
def test_a_row_has_an_equation_and_a_source(command, name):
    """Wrong implementations: a row that was added without its line; a line that says nothing."""
    cells = entry(MENU[command].page, name)
    assert cells is not None, f"docs/{MENU[command].page}.md has no line for {name}"
    assert len(cells) >= 2 and all(cells), cells


@pytest.mark.parametrize(("command", "name"), ROWS)
def test_a_row_has_a_recipe(command, name, tmp_path, capsys):
    """Wrong implementations: a recipe whose options another row refuses; a name that the command line does not reach."""
    assert cli.main([*words(command, name), "--dry-run"]) == 0
    shown = capsys.readouterr().out.split("\n", 1)[1]
    assert yaml.safe_load(shown).get("algorithm", "sft") == name
    (tmp_path / "c.yaml").write_text(shown)
    kind = TRAINING[command]
    assert PARTS.get(kind, Parts()).choose(load(kind, tmp_path / "c.yaml")) is not None


SMALL = ["--steps", "2", "--prompts", "4", "--threads", "1", "--eval.prompts", "0", "--micro-tokens", "256"]
DRAWN = ["--group", "4", "--max-new-tokens", "6", "--minibatches", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), ROWS)
def test_a_row_runs_from_its_recipe(command, name, tmp_path, monkeypatch):
    """Two steps on the card game of a decoder of random weights.  Wrong implementations: a column that the command does not fill."""
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)
    drawn = DRAWN if command in ("grpo", "ppo", "hybrid") else []
    paths = ["--model", write_model(tmp_path), "--output-dir", str(tmp_path / "run")]
    assert cli.main([*words(command, name), *SMALL, *drawn, *paths]) == 0
    steps = [row for row in lines(tmp_path / "run") if "loss" in row]
    assert len(steps) == 2 and all(row["loss"] == row["loss"] for row in steps)
