"""The pages a user reads: the command line accepts what they say to type, their links lead somewhere, their
code runs.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from fastrl import cli
from fastrl.rewards.functions import load_reward, score
from fastrl.tasks import Transcript, load_task
from fastrl.tasks.checked import turns

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    ROOT.glob("docs/*.md")
)
OTHERS = {  # of torchrun; of hf download; groups of options; of python -m fastrl.bench.gpu_check
    "--local-dir",
    "--nproc-per-node",
    "--optim",
    "--algorithm.OPTION",
    "--rehearse",
}
COMMAND = re.compile(rf"^fastrl (?:{'|'.join(cli.COMMANDS)})(?: .*)?$", re.MULTILINE)


def commands(page: str) -> list[str]:
    """The lines of a page's code blocks that are a whole command: none with a gap, a choice or a bracket."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    found = [line for block in blocks for line in COMMAND.findall(block)]
    return [line for line in found if not re.search(r"\.\.\.|\||\[", line.split("#")[0])]


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option of every command, and of the algorithms that have options of their own."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("COLUMNS", "400")
        for name, command in cli.COMMANDS.items():
            assert cli.main([name, "--help"]) == 0
            for algorithm in getattr(command.config, "rows", ()):
                assert cli.main([name, "--algorithm", algorithm, "--help"]) == 0
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
    links = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def without_a_page(commands: Iterable[str], folder: Path) -> list[str]:
    return [name for name in commands if not (folder / f"{name}.md").exists()]


def test_every_command_has_a_page(tmp_path):
    """Wrong implementation: a page under another name, such as methods.md for grpo."""
    assert without_a_page(cli.COMMANDS, ROOT / "docs") == []
    (tmp_path / "methods.md").touch()
    assert without_a_page(["grpo"], tmp_path) == ["grpo"]


def test_pages_named_in_the_sources_are_there():
    """Wrong implementation: a page that was renamed, with its old name left in a docstring or a help text."""
    suffixes = {".py", ".h", ".cpp", ".cu", ".yaml", ".toml"}
    folders = ("fastrl", "kernels", "csrc", "bench", "tests")
    # The toy method of tests/methods/test_toy.py has its page in a temporary folder.
    made = ("docs/toy.md",)
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in suffixes]
    named = {
        (file.relative_to(ROOT).as_posix(), page)
        for file in [*files, ROOT / "Makefile", ROOT / "pyproject.toml"]
        for page in re.findall(r"docs/[\w-]+\.md", file.read_text(encoding="utf-8"))
    }
    assert len(named) > 5
    assert {(file, page) for file, page in named if page not in made and not (ROOT / page).exists()} == set()


# --- the README -------------------------------------------------------------------------------------
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCREEN = 40  # lines of the first screen


def test_the_first_screen_of_the_readme_has_its_parts():
    """Wrong implementation: a README that grows at the top, with the table of pages out of sight."""
    screen = "\n".join(README.splitlines()[:SCREEN])
    for part in ("pip install", "ops.linear_loss", "| I want to ... |", "fastrl grpo", "make demo", "!["):
        assert part in screen
    code = screen.partition("```python\n")[2].partition("```")[0].strip()
    assert len([line for line in code.splitlines() if line]) <= 12


def test_the_numbers_of_the_readme_are_those_of_the_results():
    """Wrong implementations: new measurements with the old numbers in the README; a number without its
    line in the tables.
    """
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    rows = (("`linear_loss`", "liger"), ("`rollout`", "transformers"), ("`grpo`", "trl"))
    measured = []
    for op, peer in rows:
        (line,) = [x for x in results.splitlines() if x.startswith(f"| {op} |") and f"({peer})" in x]
        measured += re.findall(rf"([\d.]+x) \({peer}\)", line)
    assert re.findall(r"\*\*([\d.]+x)\*\*", README) == measured


def test_the_code_of_the_readme_is_its_before():
    """Value and gradient of the drop-in code against whole logits.  Wrong implementation: code that has not
    run since the interface changed.
    """
    code = README.partition("```python\n")[2].partition("```")[0]
    torch.manual_seed(0)
    tokens, width, vocabulary = 24, 8, 50
    hidden = torch.randn(tokens, width, requires_grad=True)
    lm_head = torch.nn.Linear(width, vocabulary, bias=False)
    target = torch.randint(vocabulary, (tokens,))
    completion_mask = torch.arange(tokens) % 3 > 0
    token_weight = torch.full((tokens,), 1 / completion_mask.sum().item())
    advantage = torch.randn(tokens)

    logp = lm_head(hidden).log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    old_logp = (logp + 0.3 * torch.randn(tokens)).detach()
    ratio = (logp - old_logp).exp()
    per_token = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    expected = -(per_token * token_weight)[completion_mask].sum()
    wanted = torch.autograd.grad(expected, [hidden, lm_head.weight])

    names: dict[str, object] = {
        "hidden": hidden,
        "lm_head": lm_head,
        "target": target,
        "completion_mask": completion_mask,
        "token_weight": token_weight,
        "advantage": advantage,
        "old_logp": old_logp,
    }
    exec(compile(code, "README.md", "exec"), names)
    torch.testing.assert_close(names["loss"], expected.detach(), check_stride=False)
    torch.testing.assert_close([hidden.grad, lm_head.weight.grad], list(wanted))


def test_the_code_of_the_page_on_tasks_runs(tmp_path):
    """A task of one turn, one of several, and rewards, as a reader would save them.  Wrong implementation: an
    example with the members of an earlier version.
    """
    page = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        name = block.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(block)

    doubles = load_task(f"{tmp_path}/doubles.py:Doubles", largest=20)
    examples = [doubles.example("train", i) for i in range(doubles.size("train"))]
    assert all(doubles.verify(e, e.demo).correct and not doubles.verify(e, "").correct for e in examples)

    higher = load_task(f"{tmp_path}/higher.py:Higher")
    example = higher.example("train", 4)
    said = [("3?", "2?"), ("9?",), ("4?",), ("x?",)]
    transcripts = [Transcript(example, words, words[1:]) for words in said]
    heard, rewards, done = turns(higher.step(transcripts), len(said))
    assert heard == [" Higher.", " Lower.", "", " No."]
    assert (rewards, done) == ([0, 0, 1, 0], [False, False, True, False])
    assert higher.verify(example, "3? Higher.4?").correct

    functions = [load_reward(f"{tmp_path}/my_rewards.py:{name}") for name in ("short", "right")]
    columns = [{"answer": 4}, {"answer": None}]
    found = score(functions, ["2+2=", "?"], ["it is 4", "x" * 100], None, columns)
    assert found.reward == pytest.approx([1 - 7 / 200 + 1, 0.5]) and found.extra == {"found": [True, False]}
