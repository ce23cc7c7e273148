"""The command `fastrl`: the table of its commands, and how their errors are reported.

Only the command that runs is imported, so that --help, --dry-run and usage errors never wait for torch.

Exit codes: 0 done, 1 failed, 2 used wrongly, 128 + N ended by signal N: 130 Ctrl-C, 143 SIGTERM, 129 a closed
terminal, 141 a reader of the output that left.  A training run that a signal stops has been saved by then.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from tyro.conf import Positional

from fastrl import __version__
from fastrl.config import Evaluate, Generate
from fastrl.config.parse import UsageError, dump, parse
from fastrl.errors import Interrupted, UserError
from fastrl.methods import METHODS, command_hint, options_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

BROKEN_PIPE = 141  # what a shell reports for a program ended by SIGPIPE
INTERRUPTED = 130
ENDING = (signal.SIGTERM, signal.SIGHUP)  # like Ctrl-C: a command closes its files and says how to continue
VARIABLES = "FASTRL_"  # how the variables of the environment that we read begin


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Write report.html and plots/ from the files of a run; several runs are compared in one report."""

    folders: Positional[tuple[str, ...]]
    """Run folders."""
    output: str | None = None
    """Folder to write to; defaults to the run's own folder, required for a comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Run the stages of a file in order, each from the checkpoint of the one before.

    A pipeline that was stopped continues when it is run again.  --dry-run checks the whole file and what it
    names, and prints the stages.
    """

    file: Positional[str]
    """A YAML file; see docs/run.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Time the kernels against their peers and against the hardware's limit."""

    ops: Positional[tuple[str, ...]] = ()
    """Names of ops and systems (token_logp, linear_logp, linear_loss, linear_cross_entropy, policy_loss,
    decode_attention, rollout, train, advance, attention, decoder_layer, gae, group_advantage, grpo,
    linear, perturb, rms_norm, rope, sample, swiglu); without any, all.
    """
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    quick: bool = False
    """Few shapes and repetitions."""
    output: str | None = None
    """A .json file for the measurements, or a folder for one; plots lie beside it.  Without it, nothing is
    written.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Check the GPU kernels now, each against its reference; exit status 1 if one fails."""

    device: str = "auto"
    """auto, cuda or cuda:N."""
    model: str | None = None
    """A folder whose config.json gives the widths to check, beside the fixed ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Env:
    """Print versions, devices and the backend of each op, for a bug report."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command.

    config   the dataclass of its options
    target   "module:function", called with an instance of it
    preview  the same for --dry-run, where that is more than printing the options
    alone    under torchrun the first process does all of it
    """

    config: type[DataclassInstance]
    target: str
    preview: str = ""
    alone: bool = False


COMMANDS = {
    **{name: Command(options_of(name), "fastrl.trainer:train") for name in METHODS},
    "run": Command(Pipeline, "fastrl.pipeline:run", preview="fastrl.pipeline:preview"),
    "eval": Command(Evaluate, "fastrl.run.accuracy:run"),
    "generate": Command(Generate, "fastrl.run.generate:run"),
    "report": Command(Report, "fastrl.report.report:run", alone=True),
    "bench": Command(Bench, "fastrl.bench.run:main", alone=True),
    "check": Command(Check, "fastrl.run.check:run", alone=True),
    "env": Command(Env, "fastrl.run.environment:run", alone=True),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a failure becomes one line on standard error."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        with _ending_signals():
            return _dispatch(args)
    except SystemExit as stop:  # tyro has printed the reason
        return stop.code if isinstance(stop.code, int) else 2
    except UsageError as error:
        return _fail(args, str(error), code=2, shared=True)
    except Interrupted as error:
        return _fail(args, "", code=128 + error.number, outcome=f"ended by {error}")
    except KeyboardInterrupt:
        return _fail(args, "", code=INTERRUPTED, outcome="interrupted")
    except BrokenPipeError:  # the reader of our output has exited, as in `fastrl generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except UserError as error:
        return _fail(args, str(error), shared=error.of_all)
    except OSError as error:
        named = error.filename and error.strerror
        return _fail(args, f"{error.filename}: {error.strerror}" if named else str(error))
    except Exception as error:  # the outermost frame: even a bug must end in one line with advice
        if isinstance(error, ValueError) and str(error).startswith(VARIABLES):
            return _fail(args, str(error))  # of the kernels, which know no UserError
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        advice = "please report it with this traceback"
        if not _debugging(args):
            advice = "run again with --debug for the traceback"
        return _fail(args, f"internal error: {message} ({advice})")


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        _print(_overview())
        return 0 if args else 2
    if args[0] == "--version":
        _print(f"fastrl {__version__}")
        return 0

    name, *rest = args
    if name not in COMMANDS:
        advice = command_hint(name, COMMANDS) or f"; expected one of {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command {name!r}{advice}")
    command = COMMANDS[name]
    parsed = parse(
        command.config,
        rest,
        prog=f"fastrl {name}",
        quiet=_rank() != 0,
    )
    if _rank() != 0 and (command.alone or parsed.dry_run):
        return 0
    if parsed.dry_run and not command.preview:
        _print(f"# fastrl {name}\n{dump(parsed.config)}".rstrip())
        return 0

    if name in METHODS and not parsed.dry_run:
        _print(f"fastrl {name}: starting")  # a model takes seconds to load

    target = command.preview if parsed.dry_run else command.target
    module, _, function = target.partition(":")
    result = getattr(importlib.import_module(module), function)(parsed.config)
    return int(getattr(result, "exit_code", 0))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = []
    for name, command in COMMANDS.items():
        summary = (command.config.__doc__ or "").splitlines()[0]
        lines.append(f"  {name:<{width}}  {summary}")
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
            "each of them can also be set in a file given by --config.",
        ]
    )


def _print(text: str) -> None:
    if _rank() == 0:
        print(text, flush=True)


def _fail(
    args: Sequence[str],
    message: str,
    *,
    code: int = 1,
    shared: bool = False,
    outcome: str = "",
) -> int:
    """Report a failure (or another outcome) on standard error.

    Under torchrun only rank 0 reports a failure that all ranks share, like a usage error; any other may be
    that of a single rank.
    """
    if shared and _rank() != 0:
        return code
    if _debugging(args):
        traceback.print_exc()
    rank = f"[rank {_rank()}] " if _rank() else ""
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"{rank}fastrl: {outcome or f'error: {message}'}", file=sys.stderr)
    return code


def _debugging(args: Sequence[str]) -> bool:
    """Whether tracebacks are asked for."""
    return "--debug" in args


@contextlib.contextmanager
def _ending_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP unwind the program as Ctrl-C does, unless nohup has them ignored."""
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise Interrupted(number)
        signal.signal(number, signal.SIG_DFL)  # a worker that was forked inside user code
        os.kill(os.getpid(), number)

    old = {}
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:
                old[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _rank() -> int:
    """This process's rank under torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0"))
