"""The command `fastrl`: which commands there are, and what becomes of their errors.

Only the command that runs is imported: --help, --dry-run and usage errors never wait for torch.

Exit codes: 0 done, 1 failed, 2 used wrongly, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tyro.conf import Positional

from fastrl import __version__
from fastrl.config import Dpo, Evaluate, Generate, Grpo, Hybrid, Joint, Ppo, Reward, Sft
from fastrl.config.parse import UsageError, dump, parse
from fastrl.errors import UserError, nearest

BROKEN_PIPE = 141  # what a shell reports for a program ended by SIGPIPE
INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Write report.html and plots/ from the files of a run; several folders are compared in one report."""

    folders: Positional[tuple[str, ...]]
    """Run folders."""
    output: str | None = None
    """Folder to write to; defaults to the run's own, and must be given for a comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Run the stages of a file one after the other, each from the last one's checkpoint; again, to go on
    where it stopped.
    """

    file: Positional[str]
    """A YAML file; see docs/pipelines.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Time the kernels against their peers and against the hardware's limit."""

    ops: Positional[tuple[str, ...]] = ()
    """Names of ops; none means all."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    quick: bool = False
    """Few shapes and repetitions."""
    output: str | None = None
    """A .json file for the measurements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Env:
    """Print versions, devices and the backend of each op: what a bug report needs."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command: the dataclass that holds its options, and "module:function" to call with an instance of
    it.
    """

    config: type[Any]
    target: str


COMMANDS = {
    "sft": Command(Sft, "fastrl.trainer:train"),
    "reward": Command(Reward, "fastrl.trainer:train"),
    "dpo": Command(Dpo, "fastrl.trainer:train"),
    "grpo": Command(Grpo, "fastrl.trainer:train"),
    "ppo": Command(Ppo, "fastrl.trainer:train"),
    "hybrid": Command(Hybrid, "fastrl.trainer:train"),
    "joint": Command(Joint, "fastrl.trainer:train"),
    "run": Command(Pipeline, "fastrl.pipeline:run"),
    "eval": Command(Evaluate, "fastrl.run.evaluate:run"),
    "generate": Command(Generate, "fastrl.run.generate:run"),
    "report": Command(Report, "fastrl.report.report:run"),
    "bench": Command(Bench, "fastrl.bench.run:main"),
    "env": Command(Env, "fastrl.run.environment:run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of the command line and return its exit code; whatever fails becomes one line on
    standard error.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args)
    except SystemExit as stop:  # tyro has said why
        return stop.code if isinstance(stop.code, int) else 2
    except UsageError as error:
        return _fail(args, str(error), code=2, usage=True)
    except KeyboardInterrupt:
        return _fail(args, "interrupted", code=INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, as in `fastrl generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except UserError as error:
        return _fail(args, str(error))
    except OSError as error:
        return _fail(
            args, f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        )
    except (
        Exception
    ) as error:  # the outermost frame: a bug of ours must still end in one line that says what to do
        return _fail(
            args,
            f"internal error: {type(error).__name__}: "
            f"{_one_line(error)} (run again with --debug for the traceback)",
        )


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        _say(_overview())
        return 0 if args else 2
    if args[0] == "--version":
        _say(f"fastrl {__version__}")
        return 0
    name, *rest = args
    if name not in COMMANDS:
        raise UsageError(
            f"unknown command {name!r}"
            + (nearest(name, COMMANDS) or f"; expected one of {', '.join(COMMANDS)}")
        )
    command = COMMANDS[name]
    asked = parse(command.config, rest, prog=f"fastrl {name}", quiet=_rank() != 0)
    if asked.dry_run:
        _say(f"# fastrl {name}\n{dump(asked.config)}".rstrip())
        return 0
    module, _, function = command.target.partition(":")
    result = getattr(importlib.import_module(module), function)(asked.config)
    return int(getattr(result, "exit_code", 0))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(c.config.__doc__ or '').splitlines()[0]}" for name, c in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastrl COMMAND [OPTIONS]",
            "",
            "Post-training for language models at the speed of the hardware.",
            "",
            "commands:",
            *lines,
            "",
            "`fastrl COMMAND --help` shows a command's options; "
            "every one of them can also stand in a file given by --config.",
        ]
    )


def _say(text: str) -> None:
    if _rank() == 0:
        print(text)


def _fail(args: Sequence[str], message: str, *, code: int = 1, usage: bool = False) -> int:
    """Report a failure on standard error.

    Under torchrun every rank makes the same usage error, so rank 0 speaks for all; another failure may be one
    rank's alone.
    """
    if usage and _rank() != 0:
        return code
    if "--debug" in args:
        traceback.print_exc()
    rank = f"[rank {_rank()}] " if _rank() else ""
    print(f"{rank}fastrl: {'interrupted' if code == INTERRUPTED else f'error: {message}'}", file=sys.stderr)
    return code


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _rank() -> int:
    """This process's rank under torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0"))
