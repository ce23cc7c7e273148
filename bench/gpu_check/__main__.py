"""`make gpu-check`: everything that a GPU has to show, in one command of bounded time.

    python -m fastrl.bench.gpu_check [--budget 480] [--out DIR] [--resume DIR] [--rehearse]

Builds the extension, warms Triton's cache, checks every kernel against its reference, runs the GPU tests in
the order of their value, then the headline benchmarks.  Each stage is stopped at its share of the budget,
whatever it was at; what is done is written as it is done:

    DIR/progress.jsonl   stages and tests
    DIR/<device>.json    benchmark rows
    DIR/log.txt          the output of all stages
    DIR/summary.txt      the table that is printed at the end

The same command again continues: it skips what passed and what was measured, as long as the sources and the
device are the same.  The exit status is 0 when all stages are done and nothing failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fastrl.bench.gpu_check import summary
from fastrl.bench.gpu_check.progress import Progress, digest
from fastrl.bench.gpu_check.pytest_progress import FILE
from fastrl.bench.gpu_check.stages import STAGES, Check, Stage
from fastrl.bench.run import LOST_CONTEXT
from fastrl.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DONE, FAILED, STOPPED = "done", "failed", "out of time"
GRACE_SECONDS = 5.0  # between asking a stage to end and ending it
LEAST_SECONDS = 10.0  # a stage with less is not started


@dataclass(frozen=True, slots=True)
class Clock:
    """The budget, in seconds from the start."""

    began: float
    budget: float

    def left(self, share: float = 1.0) -> float:
        return self.began + share * self.budget - time.monotonic()


def main(argv: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Run the stages; the exit status."""
    options = _options(argv)
    clock = Clock(time.monotonic(), options.budget)
    out = Path(options.out)
    header = {"kind": "check", "sources": digest(ROOT), "device": _device(options.rehearse)}
    progress = Progress.open(out, header, options.resume)
    _carry_rows(options.resume, out)

    with (out / "log.txt").open("ab") as log:
        for stage in stages:
            status = run_stage(stage, progress, clock, log, options.rehearse)
            if stage.needed and status != DONE:
                break

    progress.reload()
    table = summary.table(progress, out)
    (out / "summary.txt").write_text(table + "\n", encoding="utf-8")
    print(table)
    return summary.exit_code(progress, out, stages)


def run_stage(stage: Stage, progress: Progress, clock: Clock, log: IO[bytes], rehearse: bool) -> str:
    """Run one stage up to its time, and record how it ended."""
    before = progress.stage(stage.name)
    if before is not None and before["status"] == DONE and not stage.resumes:
        return DONE

    began = time.monotonic()
    status = STOPPED
    while (seconds := clock.left(stage.until)) >= LEAST_SECONDS:
        check = Check(ROOT, progress.path.parent, seconds, rehearse)
        print(f"--- {stage.name}: at most {seconds:.0f} s", flush=True)
        code = run_command(stage.command(check), progress.path, seconds, log)
        status = STOPPED if code is None else DONE if code == 0 else FAILED
        if code != LOST_CONTEXT:
            break

    progress.reload()
    progress.add(kind="stage", name=stage.name, status=status, seconds=round(time.monotonic() - began, 1))
    return status


def run_command(command: list[str], progress: Path, seconds: float, log: IO[bytes]) -> int | None:
    """Run a command in a process group of its own, its output shown and kept; None when its time was over."""
    shutil.copyfile(progress, progress.with_suffix(".start"))  # what every pytest worker leaves out
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", FILE: str(progress)}
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    copier = threading.Thread(target=_copy, args=(child.stdout, log), daemon=True)
    copier.start()
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(child)
        copier.join(GRACE_SECONDS)


def _copy(output: IO[bytes], log: IO[bytes]) -> None:
    """Show a child's output, and keep it."""
    for line in output:
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
        log.write(line)
        log.flush()


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    for how, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience)


def _device(rehearse: bool) -> str:
    """The name of the GPU, asked for without a CUDA context in this process."""
    if rehearse:
        return "a stand-in for CUDA on the CPU"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i", "0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"gpu-check: expected a GPU that nvidia-smi lists, got {type(error).__name__}: {error}; "
            "--rehearse runs every stage on the CPU"
        ) from None


def _carry_rows(earlier: Path | None, out: Path) -> None:
    """Copy the benchmark rows of an earlier check, which the benchmarks then continue."""
    if earlier is None or earlier.resolve() == out.resolve():
        return
    for path in earlier.glob("*.json"):
        if not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastrl.bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--budget", type=float, default=480.0, help="seconds, the build included; default: 480"
    )
    parser.add_argument(
        "--out", default="runs/gpu-check", help="folder of the results; default: runs/gpu-check"
    )
    parser.add_argument("--resume", type=Path, help="folder of an earlier check to continue; default: --out")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, with a stand-in for CUDA, at sizes of a test"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
