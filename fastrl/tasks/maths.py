"""Whether two mathematical answers are the same: fractions, roots, sets, intervals, expressions.

Plain numbers are compared exactly, here.  All else goes to math-verify (the extra `math`), in a process of
its own with a limit of time and memory: an answer that exceeds it is not the same as anything.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from select import select

from fastrl.errors import UserError
from fastrl.tasks.number import WINDOW, read_number

SECONDS = 5  # of one comparison
START = 60  # seconds that importing sympy may take on a busy machine
WORKER = Path(__file__).with_name("math_worker.py")


def check_math_verify(option: str) -> None:
    """UserError that names `option` where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            f"{option}: mathematical answers are compared by math-verify, which is not installed; "
            "pip install fastrl-kernels[math]"
        )


def same_answer(gold: str, said: str) -> bool:
    """Whether `said` is the answer `gold`, both plain text or LaTeX without dollar signs around it.  Total,
    in bounded time; two calls differ only where one of them ran into the limit of time.
    """
    gold, said = (text.strip().removesuffix(".").strip(" $") for text in (gold, said))
    if not gold or not said or max(len(gold), len(said)) > WINDOW:
        return False
    numbers = read_number(gold, alone=True), read_number(said, alone=True)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _WORKER.ask(gold, said)


class Worker:
    """The process that compares; started at the first question, again after one that was too much for it, and
    anew in a forked process.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.owner = 0
        self.lock = threading.Lock()

    def ask(self, gold: str, said: str) -> bool:
        """What math-verify says; False where it does not answer in time."""
        with self.lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([gold, said]) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                self.stop()
                return False
            answer = _line(process, SECONDS + 2)
            if not answer:
                self.stop()
            return answer == "true"

    def stop(self) -> None:
        """End the process, if it is this process's own."""
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        self.process = None

    def _running(self) -> subprocess.Popen[str]:
        if self.process is not None and self.owner == os.getpid() and self.process.poll() is None:
            return self.process
        check_math_verify("math-verify")
        process = subprocess.Popen(
            [sys.executable, "-I", str(WORKER), json.dumps(sys.path), str(SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.process, self.owner = process, os.getpid()
        if _line(process, START) != "ready":
            self.stop()
            raise UserError(
                "math-verify: it does not start; try `python -c 'import math_verify'`, "
                "and pip install fastrl-kernels[math]"
            )
        return process


def _line(process: subprocess.Popen[str], seconds: float) -> str:
    """The process's next line; empty where it ends, or says nothing in time."""
    assert process.stdout is not None
    ready, _, _ = select([process.stdout], [], [], seconds)
    return process.stdout.readline().strip() if ready else ""


_WORKER = Worker()
atexit.register(_WORKER.stop)
