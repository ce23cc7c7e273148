"""The parent's side of the checks: children, their time limits, and what their deaths mean."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fastrl.kernels._registry import op_modules
from fastrl.kernels._verdicts.case import Widths
from fastrl.kernels._verdicts.machine import CHILD, Machine
from fastrl.kernels._verdicts.table import Verdict

# a child checks nothing on first use, and its references run no kernel that is preferred by name
CHANGES = {"FASTRL_CHECK": "0", "FASTRL_BACKEND": ""}
LAST_WORDS = 300  # characters of a child's standard error that are kept


@dataclass(frozen=True, slots=True)
class Job:
    """One (op, backend, dtype) to check."""

    op: str
    backend: str
    dtype: torch.dtype

    def request(self) -> dict[str, str]:
        return {"op": self.op, "backend": self.backend, "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass(slots=True)
class Progress:
    """What a job's cases have shown so far."""

    cases: int = 0
    worst: float = 0.0
    variants: set[str] = field(default_factory=set)
    reason: str = ""

    def verdict(self, date: str, widths: str) -> Verdict:
        return Verdict(
            passed=self.cases > 0 and not self.reason,
            reason=self.reason,
            cases=self.cases,
            worst=self.worst,
            date=date,
            variants=frozenset(self.variants),
            widths=frozenset({"", widths}),
        )


@dataclass(slots=True)
class Answers:
    """What is known of the jobs; a job that is in neither was not reached."""

    done: dict[Job, Verdict] = field(default_factory=dict)
    trouble: str = ""  # why some were not reached


def check(machine: Machine, index: int, jobs: Sequence[Job], widths: Widths) -> Answers:
    """Run the jobs in children, `machine.lanes` at a time.  Takes at most `limits.total` seconds."""
    until = time.monotonic() + machine.limits.total
    lanes = [list(jobs[i :: machine.lanes]) for i in range(min(machine.lanes, len(jobs)))]
    answers = Answers()
    with ThreadPoolExecutor(max(len(lanes), 1)) as pool:
        started = [pool.submit(Lane(machine, index, widths, until).run, lane) for lane in lanes]
        for one in started:
            found = one.result()
            answers.done |= found.done
            answers.trouble = answers.trouble or found.trouble
    return answers


class Lane:
    """Jobs in order, in as many children as it takes."""

    def __init__(self, machine: Machine, index: int, widths: Widths, until: float) -> None:
        self.machine, self.index, self.widths, self.until = machine, index, widths, until
        self.date = time.strftime("%Y-%m-%d")
        self.answers = Answers()

    def run(self, jobs: list[Job]) -> Answers:
        left = list(enumerate(jobs))
        while left and not self.answers.trouble:
            fatal = self._child(left)
            finished = {job.op: job.backend for job in fatal}
            left = [
                (n, job)
                for n, job in left
                if job not in self.answers.done and finished.get(job.op) != job.backend
            ]
        return self.answers

    def _child(self, left: list[tuple[int, Job]]) -> list[Job]:
        """One child; returns the job that it died of, if it did."""
        process = self.machine.start(["-m", CHILD], CHANGES)
        talk = Conversation(process, self._request(left))
        current, progress, case = 0, Progress(), ""
        limit, ready = self.machine.limits.start, False
        try:
            while True:
                line = talk.line(min(limit, self.until - time.monotonic()))
                if line is None:
                    break
                if "ready" in line:
                    ready, limit = True, self.machine.limits.case
                elif "case" in line:
                    case = line["case"]
                elif "job" in line:
                    self._finish(left[current][1], progress)
                    current, progress, case = current + 1, Progress(), ""
                else:
                    self._note(progress, case, line)
        finally:
            talk.close()
        if current == len(left):
            return []
        if not ready or time.monotonic() >= self.until:
            self.answers.trouble = talk.last_words() if not ready else "the time for the checks was over"
            return []
        job = left[current][1]
        progress.reason = f"{case or 'before its first case'}: {talk.last_words()}"
        self._finish(job, progress)
        return [job]

    def _request(self, left: list[tuple[int, Job]]) -> str:
        machine = self.machine
        return json.dumps(
            {
                "modules": [*op_modules(), *machine.modules],
                "device": machine.place(self.index),
                "small": machine.small,
                "widths": asdict(self.widths),
                "jobs": [(n, job.request()) for n, job in left],
            }
        )

    def _note(self, progress: Progress, case: str, line: dict[str, Any]) -> None:
        progress.cases += 1
        progress.worst = max(progress.worst, line["fraction"])
        progress.variants.add(line["variant"])
        if line["reason"]:
            progress.reason = f"{case}: {line['reason']}"

    def _finish(self, job: Job, progress: Progress) -> None:
        self.answers.done[job] = progress.verdict(self.date, self.widths.text())


class Conversation:
    """A child's lines, each waited for no longer than its limit."""

    def __init__(self, process: subprocess.Popen[str], request: str) -> None:
        self.process, self.timed_out = process, 0.0
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors: list[str] = []
        self.readers = [
            threading.Thread(target=self._read_lines, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self.readers:
            reader.start()
        try:
            assert process.stdin is not None
            process.stdin.write(request)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died while starting: its last words say why

    def _read_lines(self) -> None:
        for line in self.process.stdout or ():
            self.lines.put(line)
        self.lines.put(None)

    def _read_errors(self) -> None:
        for line in self.process.stderr or ():
            if line.strip():
                self.errors.append(line.strip())

    def line(self, limit: float) -> dict[str, Any] | None:
        """The next line; None at the end, or after `limit` seconds without one."""
        try:
            line = self.lines.get(timeout=max(limit, 0.01))
        except queue.Empty:
            self.timed_out = limit
            return None
        return None if line is None else json.loads(line)

    def close(self) -> None:
        """End the child, if it has not ended by itself."""
        if self.timed_out:
            self.process.kill()
        self.process.wait()
        for reader in self.readers:
            reader.join()

    def last_words(self) -> str:
        """Why it ended."""
        code = self.process.returncode
        if self.timed_out:
            return f"no answer within {self.timed_out:.0f} s"
        if code < 0:
            return f"the process was ended by {signal.Signals(-code).name}"
        return (self.errors[-1] if self.errors else f"exit status {code}")[:LAST_WORDS]
