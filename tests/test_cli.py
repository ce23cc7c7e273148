"""The command line: what each kind of failure prints and returns, and that nobody waits for torch to be told
of a typing mistake.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fastrl import cli
from fastrl.config import Sft
from fastrl.config.parse import load
from fastrl.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(monkeypatch):
    """Makes `fastrl sft` call a function of the test."""
    monkeypatch.delenv("RANK", raising=False)

    def install(function):
        module = types.ModuleType("planted_command")
        module.go = function
        monkeypatch.setitem(sys.modules, "planted_command", module)
        monkeypatch.setitem(cli.COMMANDS, "sft", cli.Command(Sft, "planted_command:go"))

    return install


def raises(error: BaseException):
    def function(config):
        raise error

    return function


def test_a_command_gets_its_configuration(command):
    seen = []
    command(seen.append)
    assert cli.main(["sft", "--model", "m", "--steps", "3"]) == 0
    assert seen == [Sft(model="m", steps=3)]


def test_a_result_may_carry_the_exit_code(command):
    command(lambda config: types.SimpleNamespace(exit_code=3))
    assert cli.main(["sft", "--model", "m"]) == 3


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("--task: no such task"), 1, "fastrl: error: --task: no such task"),
        (
            FileNotFoundError(2, "No such file or directory", "a.jsonl"),
            1,
            "fastrl: error: a.jsonl: No such file or directory",
        ),
        (PermissionError(13, "Permission denied", "/runs"), 1, "fastrl: error: /runs: Permission denied"),
        (OSError(28, "No space left on device"), 1, "fastrl: error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "fastrl: interrupted"),
        (
            ZeroDivisionError("division\nby zero"),
            1,
            "fastrl: error: internal error: ZeroDivisionError: "
            "division by zero (run again with --debug for the traceback)",
        ),
    ],
)
def test_a_failure_is_one_line_and_debug_shows_the_traceback(error, code, line, command, capsys):
    """Wrong implementation: a traceback in the user's face, or exit code 0."""
    command(raises(error))
    assert cli.main(["sft", "--model", "m"]) == code
    assert capsys.readouterr().err == line + "\n"
    assert cli.main(["sft", "--model", "m", "--debug"]) == code
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    shown = line.replace("run again with --debug for the", "please report it with this")
    assert told.endswith(shown + "\n")


def test_a_file_cannot_say_how_to_run(capsys, tmp_path):
    """Wrong implementation: `dry_run: true` in a file that is then resumed from would never train."""
    (tmp_path / "run.yaml").write_text("model: m\ndry_run: true\n")
    assert cli.main(["sft", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "'dry_run' says how to run, not what" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, line",
    [
        (["gpro"], "fastrl: error: unknown command 'gpro'; did you mean 'grpo'?"),
        (["xyz"], f"fastrl: error: unknown command 'xyz'; expected one of {', '.join(cli.COMMANDS)}"),
        (["grpo", "--stpes", "3"], "fastrl: error: unknown option --stpes; did you mean --steps?"),
    ],
)
def test_usage_errors_exit_with_2(args, line, capsys):
    assert cli.main(args) == 2
    assert capsys.readouterr().err == line + "\n"


def test_a_bad_value_on_the_command_line_exits_with_2_and_names_the_option(capsys):
    assert cli.main(["sft", "--model", "m", "--steps", "many"]) == 2
    told = capsys.readouterr()
    assert "--steps" in told.err
    assert told.out == ""


def test_a_missing_configuration_file(capsys):
    assert cli.main(["sft", "--config", "/nowhere/run.yaml"]) == 1
    assert capsys.readouterr().err == "fastrl: error: /nowhere/run.yaml: No such file or directory\n"


def test_under_torchrun_rank_0_speaks_for_all_unless_a_rank_fails_alone(command, capsys, monkeypatch):
    """Wrong implementations: N copies of a usage error; a failure on rank 1 that nobody prints."""
    command(raises(UserError("reward failed")))
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["sft", "--stpes", "3"]) == 2
    assert cli.main(["sft", "--model", "m", "--steps", "many"]) == 2
    assert cli.main(["sft", "--model", "m", "--dry-run"]) == 0
    told = capsys.readouterr()
    assert told.out + told.err == ""
    assert cli.main(["sft", "--model", "m"]) == 1
    assert capsys.readouterr().err == "[rank 1] fastrl: error: reward failed\n"


def test_dry_run_prints_a_file_that_gives_the_same_configuration(command, capsys, tmp_path):
    command(raises(AssertionError("a dry run ran")))
    assert cli.main(["sft", "--model", "m", "--optim.lr", "3e-5", "--dry-run"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert load(Sft, tmp_path / "run.yaml") == cli.parse(Sft, ["--model", "m", "--optim.lr", "3e-5"]).config


@pytest.mark.parametrize("given, shown", [(["--exact"], "exact: true"), ([], "exact: false")])
def test_exact_mode_is_an_option_that_a_dry_run_shows(given, shown, command, capsys):
    command(raises(AssertionError("a dry run ran")))
    assert cli.main(["grpo", "--model", "m", "--dry-run", *given]) == 0
    assert shown in capsys.readouterr().out.splitlines()


def test_overview_and_version(capsys):
    assert cli.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n  {name} " in told for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_of_every_command(name, capsys):
    assert cli.main([name, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"usage: fastrl {name}" in told
    assert "--config" in told


def test_nothing_heavy_is_imported_until_a_command_runs():
    """Wrong implementation: `import fastrl.trainer` at the top of cli.py, and every typing mistake costs
    seconds.
    """
    code = (
        "import sys; from fastrl.cli import main; codes = [main(a.split()) for a in "
        "('--help', 'grpo --help', 'grpo --model m --dry-run', 'grpo --stpes 3', 'gpro')]; "
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'tensorboard'} & sys.modules.keys(); "
        "sys.exit(f'{codes} {heavy}' if heavy or codes != [0, 0, 0, 2, 2] else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_early_is_not_an_error():
    """Wrong implementation: `fastrl --help | head -1` ends in a BrokenPipeError traceback."""
    code = (
        "import sys; from fastrl import cli; cli._overview = lambda: 'x' * 10**6; "
        "sys.exit(cli.main(['--help']))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    child.stdout.read(1)
    child.stdout.close()
    assert child.stderr is not None
    told = child.stderr.read()
    child.stderr.close()
    assert child.wait() == cli.BROKEN_PIPE
    assert told == b""


def test_a_run_says_at_once_that_it_starts(monkeypatch, capsys):
    """Wrong: silence for the seconds in which a model is loaded."""
    said = []
    monkeypatch.setattr("fastrl.trainer.train", lambda config: said.append(capsys.readouterr().out))
    assert cli.main(["sft", "--model", "m"]) == 0
    assert said == ["fastrl sft: starting\n"]
    assert cli.main(["sft", "--model", "m", "--dry-run"]) == 0
    assert "starting" not in capsys.readouterr().out
