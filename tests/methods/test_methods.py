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
from fastrl.algorithms.fusion import FUSIONS
from fastrl.algorithms.hybrid import HYBRIDS
from fastrl.algorithms.ppo import PPO
from fastrl.algorithms.preference import PREFERENCES
from fastrl.algorithms.reward import REWARD_LOSSES
from fastrl.config.parse import load
from fastrl.methods import METHODS, method_of, options_of

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "fastrl/recipes"


@dataclass(frozen=True)
class Menu:
    """Methods of a command: their table, their page, their recipe, and the recipes of rows that need other
    settings.
    """

    command: str
    rows: tuple[str, ...]
    page: str
    recipe: str
    own: Mapping[str, str] = field(default_factory=dict)


MENUS = (
    Menu("sft", ("sft",), "sft", "cards_sft"),
    Menu("grpo", tuple(name for name in ALGORITHMS if name != "sft"), "grpo", "cards_grpo"),
    Menu(
        "joint",
        tuple(name for name, row in ALGORITHMS.items() if row.advantage and row.advantage.signed),
        "grpo",
        "cards_joint",
    ),
    Menu("ppo", tuple(PPO), "ppo", "cards_ppo"),
    Menu(
        "hybrid",
        tuple(HYBRIDS),
        "hybrid",
        "cards_hybrid",
        dict.fromkeys(("luffy", "chord", "chord_phi"), "cards_chord"),
    ),
    Menu(
        "hybrid",
        tuple(FUSIONS),
        "hybrid",
        "cards_contrast",
        {"grpo_dpo": "cards_fusion", "grpo_pairs": "cards_chord", "luffy_pairs": "cards_chord"},
    ),
    Menu(
        "dpo",
        tuple(PREFERENCES),
        "dpo",
        "cards_dpo",
        dict.fromkeys(("kto", "apo_zero_unpaired"), "cards_kto"),
    ),
    Menu(
        "reward",
        tuple(REWARD_LOSSES),
        "reward",
        "cards_reward",
        {"plackett_luce": "cards_ranking", "outcome": "cards_outcome", "process": "cards_process"},
    ),
)
ROWS = [pytest.param(menu, name, id=f"{menu.command}-{name}") for menu in MENUS for name in menu.rows]


def words(menu: Menu, name: str) -> list[str]:
    """What a user types."""
    chosen = [] if menu.command == "sft" else ["--algorithm", name]
    return [menu.command, "--config", str(RECIPES / f"{menu.own.get(name, menu.recipe)}.yaml"), *chosen]


def entry(page: str, name: str) -> str | None:
    """What a page says of a row: its line in a table, or the section whose heading names it."""
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and cells[0] == f"`{name}`":
            return line if len(cells) >= 3 and all(cells) else None
    sections = re.split(r"\n#{2,3} ", text)
    found = (part for part in sections if f"`{name}`" in part.splitlines()[0])
    return next((part for part in found if re.search(r"^    .*=", part, flags=re.MULTILINE)), None)


def test_every_training_command_is_on_a_menu():
    assert {menu.command for menu in MENUS} == set(METHODS)


@pytest.mark.parametrize(("menu", "name"), ROWS)
def test_a_row_is_in_the_docs(menu, name):
    """With its equation: a line of a table whose cells are all filled, or a section with a formula.  Wrong
    implementations: a row that was added without its line; a line that says nothing.
    """
    assert entry(menu.page, name), (
        f"docs/{menu.page}.md has neither a whole line nor a section with an equation for {name}"
    )


@pytest.mark.parametrize(("menu", "name"), ROWS)
def test_a_row_has_a_recipe(menu, name, tmp_path, capsys):
    """Wrong implementations: a recipe whose options another row refuses; a name that the command line does
    not reach.
    """
    assert cli.main([*words(menu, name), "--dry-run"]) == 0
    shown = capsys.readouterr().out.split("\n", 1)[1]
    algorithm = yaml.safe_load(shown).get("algorithm", "sft")
    assert (algorithm["name"] if isinstance(algorithm, dict) else algorithm) == name
    (tmp_path / "c.yaml").write_text(shown)
    config = load(options_of(menu.command), tmp_path / "c.yaml")
    assert method_of(menu.command).choose(config) is not None


SMALL = ["--steps", "2", "--prompts", "4", "--threads", "1", "--eval.prompts", "0", "--micro-tokens", "256"]
DRAWN = ["--group", "4", "--max-new-tokens", "6", "--minibatches", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(("menu", "name"), ROWS)
def test_a_row_runs_from_its_recipe(menu, name, tmp_path, monkeypatch):
    """Two steps on the card game of a decoder of random weights.  Wrong implementations: a column that the
    command does not fill.
    """
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)
    drawn = DRAWN if menu.command in ("grpo", "ppo", "hybrid", "joint") else []
    paths = ["--model", write_model(tmp_path), "--output-dir", str(tmp_path / "run")]
    paths += ["--reward-model", write_model(tmp_path)] if menu.command == "joint" else []
    assert cli.main([*words(menu, name), *SMALL, *drawn, *paths]) == 0
    steps = [row for row in lines(tmp_path / "run") if "loss" in row]
    assert len(steps) == 2 and all(row["loss"] == row["loss"] for row in steps)
