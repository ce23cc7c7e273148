"""--help names what an option may be, without torch: the names written there are those of the tables."""

from __future__ import annotations

import contextlib
import io

import pytest

from fastrl import cli
from fastrl.algorithms.advantage import ADVANTAGES
from fastrl.algorithms.correction import CORRECTIONS
from fastrl.algorithms.fusion import FUSIONS
from fastrl.algorithms.hybrid import HYBRIDS
from fastrl.algorithms.ppo import PPO
from fastrl.algorithms.preference import PREFERENCES
from fastrl.algorithms.reward import REWARD_LOSSES
from fastrl.bench.run import names as benchmarks
from fastrl.methods import command_hint, options_of
from fastrl.methods.grpo.options import FAMILY
from fastrl.tasks import TASKS

TABLES = {
    "reward": REWARD_LOSSES,
    "dpo": PREFERENCES,
    "grpo": FAMILY,
    "ppo": PPO,
    "hybrid": {**HYBRIDS, **FUSIONS},
    "joint": FAMILY,
}


@pytest.mark.parametrize("command", TABLES)
def test_the_options_list_every_row_of_the_table(command):
    """Wrong implementation: a row that --help and `fastrl ROW` do not know."""
    assert set(options_of(command).rows) == set(TABLES[command])


@pytest.fixture(scope="module")
def pages():
    told = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        for command in ("grpo", "joint", "hybrid", "eval", "bench"):
            more = ["--algorithm", "grpo_dpo"] if command == "hybrid" else []
            with contextlib.redirect_stdout(io.StringIO()) as page:
                assert cli.main([command, *more, "--help"]) == 0
            told[command] = page.getvalue()
    return told


@pytest.mark.parametrize(
    "command, words",
    [
        ("grpo", [*FAMILY, *ADVANTAGES, *CORRECTIONS, *TASKS]),
        ("joint", [*FAMILY, "bradley_terry", "plackett_luce"]),
        ("hybrid", [*HYBRIDS, *FUSIONS, *FAMILY, *PREFERENCES]),
        ("eval", TASKS),
        ("bench", benchmarks()),
    ],
)
def test_help_names_the_choices(command, words, pages):
    """Wrong implementation: `A row of fastrl.algorithms.ALGORITHMS`."""
    assert [word for word in words if word not in pages[command]] == []


@pytest.mark.parametrize(
    "name, hint",
    [
        ("kto", "it is an algorithm: fastrl dpo --algorithm kto"),
        ("KTO", "fastrl dpo --algorithm kto"),
        ("sigmoid", "fastrl dpo --algorithm sigmoid"),
        ("dr-grpo", "fastrl grpo --algorithm dr_grpo or fastrl joint"),
        ("prm", "fastrl reward --algorithm process"),
        ("luffy", "fastrl hybrid --algorithm luffy"),
        ("dual_clip", "fastrl ppo --algorithm dual_clip"),
        ("gpro", "; did you mean 'grpo'?"),
        ("nothing_like_it", ""),
    ],
)
def test_an_algorithm_typed_as_a_command(name, hint):
    assert hint in command_hint(name) if hint else command_hint(name) == ""


def test_every_algorithm_is_pointed_to():
    for command, table in TABLES.items():
        for name in table:
            assert f"fastrl {command} --algorithm {name}" in command_hint(name)
