"""The pages a user reads: what they tell to type is taken by the command line, and what they point to is
there.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from fastrl import cli
from fastrl.config import TRAINING, WithAlgorithm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    ROOT.glob("docs/*.md")
)
OTHERS = {"--nproc-per-node", "--optim"}  # of torchrun; `--optim.*`, a group
COMMAND = re.compile(rf"^fastrl (?:{'|'.join(cli.COMMANDS)})(?: .*)?$", re.MULTILINE)


def commands(page: str) -> list[str]:
    """The lines of a page's code blocks that are a whole command: none with a gap, a choice or a bracket."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    found = [line for block in blocks for line in COMMAND.findall(block)]
    return [line for line in found if not re.search(r"\.\.\.|\||\[", line.split("#")[0])]


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option of every command, those of single algorithms among them."""
    asked = [[name, "--help"] for name in cli.COMMANDS]
    for name, command in TRAINING.items():
        rows = command.rows if issubclass(command, WithAlgorithm) else {}
        asked += [[name, "--algorithm", row, "--help"] for row in rows]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("COLUMNS", "400")
        assert [cli.main(args) for args in asked] == [0] * len(asked)
    return set(re.findall(r"--[a-z][\w.-]*", said.getvalue()))


@pytest.mark.parametrize(
    "line", dict.fromkeys(line for page in PAGES for line in commands(page.read_text(encoding="utf-8")))
)
def test_a_command_is_taken_as_it_is_written(line, capsys, monkeypatch):
    """Wrong implementations: an option renamed in the code and not on the page; a recipe that is not there; a
    value no longer taken.
    """
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)[1:]
    words = words[: words.index(">")] if ">" in words else words
    if "--resume" in words:
        pytest.skip("it continues a file of an earlier run")
    assert cli.main([*words, "--dry-run"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_and_links_of_a_page_are_there(page, options):
    """Wrong implementations: an option that no command has any more; a link to a page that was moved."""
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])--[a-z](?:[\w.-]*\w)?", text))
    assert {n.replace("_", "-") for n in named} - {o.replace("_", "-") for o in options} <= OTHERS
    links = re.findall(r"\]\(([\w./-]+)\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
