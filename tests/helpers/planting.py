"""Planting faults in a copy of the tree, and running the tests that find them.  See tests/mutants.py."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutant import Mutant
from mutant_table import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300  # for the tests of one fault; a fault that makes them hang is killed
ENVIRONMENT = {  # read when torch and Triton are imported: see tests/conftest.py
    "OMP_NUM_THREADS": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "MKL_CBWR": "AUTO,STRICT",
    "TRITON_INTERPRET": "1",
}
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", ".triton", "runs", "demo", "build", "__pycache__", "*.egg-info", ".*_cache"
)
PASSED, FAILED = 0, 1  # exit codes of pytest
UNMARKED = "not gpu and not slow and not multigpu and not ptx"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a fault: "killed", "survived", "equivalent", or "broken" where its tests did not run."""

    mutant: Mutant
    state: str
    seconds: float
    told: str = ""

    @property
    def wrong(self) -> bool:
        """Whether the table or the tests are to be mended."""
        expected = "equivalent" if self.mutant.equivalent else "killed"
        return self.state != expected


# --- the copy ---------------------------------------------------------------------------------------
class Copy:
    """A copy of the tree in which one fault at a time is planted."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        shutil.copytree(ROOT, self.root, symlinks=True, ignore=IGNORED)
        shared = ROOT.parent / "shared"  # data that some tests read
        if shared.is_dir():
            (folder / "shared").symlink_to(shared)
        self.clock = itertools.count(int(time.time()) + 60, 60)
        self.log = folder / "told.txt"
        self.environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(self.root)}
        self.server: subprocess.Popen[str] | None = None

    def test(self, tests: Sequence[str], seconds: float = SECONDS) -> tuple[int | None, str]:
        """Run tests up to the first that fails: the exit code, None after `seconds`; what was printed."""
        options = ["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=no", "-m", UNMARKED]
        asked = json.dumps([[*options, *(f"tests/{test}" for test in tests)], str(self.log)])
        server = self._server()
        assert server.stdin is not None and server.stdout is not None
        print(asked, file=server.stdin, flush=True)

        alarm = threading.Timer(seconds, self.close)
        alarm.start()
        answer = server.stdout.readline()
        alarm.cancel()
        told = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return (int(answer), told) if answer else (None, f"no end after {seconds:.0f} s")

    def _server(self) -> subprocess.Popen[str]:
        if self.server is None:
            command = [sys.executable, str(ROOT / "tests" / "helpers" / "warm_pytest.py")]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.server = subprocess.Popen(
                command, cwd=self.root, env=self.environment, start_new_session=True, **pipes
            )
        return self.server

    def close(self) -> None:
        """End the server and what it runs."""
        server, self.server = self.server, None
        if server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    def build(self) -> str:
        """Build the extension; what went wrong."""
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)
        return "" if done.returncode == 0 else done.stdout + done.stderr

    def judge(self, mutant: Mutant) -> Outcome:
        """Plant a fault, run its tests, and take it out again."""
        path, began = self.root / mutant.file, time.monotonic()
        sound = path.read_text(encoding="utf-8")
        self._write(path, sound.replace(mutant.old, mutant.new))
        try:
            problem = self.build() if mutant.native else ""
            code, told = (2, problem) if problem else self.test(mutant.tests)
        finally:
            self._write(path, sound)
        seconds = time.monotonic() - began
        last = told.strip().splitlines()[-1:]
        if code is None or code == FAILED or code < 0:  # a signal: the fault crashes Python
            return Outcome(mutant, "killed", seconds, *last)
        if code == PASSED:
            return Outcome(mutant, "equivalent" if mutant.equivalent else "survived", seconds)
        return Outcome(mutant, "broken", seconds, told[-2000:])

    def _write(self, path: Path, text: str) -> None:
        """Bytecode is renewed by a source's time in seconds, so every version gets a time of its own."""
        path.write_text(text, encoding="utf-8")
        now = next(self.clock)
        os.utime(path, (now, now))


# --- the table --------------------------------------------------------------------------------------
def misfits(mutants: Sequence[Mutant]) -> list[str]:
    """Rows that do not fit the sources: a text that is not there exactly once, tests that are not there."""
    found = []
    for m in mutants:
        path = ROOT / m.file
        times = path.read_text(encoding="utf-8").count(m.old) if path.is_file() else 0
        if times != 1:
            found.append(f"{m.file}: expected {m.old!r} once, found it {times} times")
        if m.old == m.new:
            found.append(f"{m.file}: {m.old!r} is replaced by itself")
        missing = [t for t in m.tests if not (ROOT / "tests" / t.partition("::")[0]).is_file()]
        found += [f"{m.file}: {m.meaning}: there is no tests/{test}" for test in missing]
    return found


def chosen(words: Sequence[str]) -> list[Mutant]:
    """The rows whose file or meaning contains one of the words; all of them without any."""
    if not words:
        return list(MUTANTS)
    return [m for m in MUTANTS if any(word in f"{m.file} {m.meaning}" for word in words)]


# --- a run ------------------------------------------------------------------------------------------
def outcomes(mutants: Sequence[Mutant], jobs: int, folder: Path, *, trust: bool) -> Iterator[Outcome]:
    """The outcome of each row, in the order of the table."""
    free = [Copy(folder / str(i)) for i in range(jobs)]
    tests = sorted({test for m in mutants for test in m.tests})
    code, told = (PASSED, "") if trust else free[0].test(tests, SECONDS * len(tests))
    if code != PASSED:
        raise SystemExit(f"mutants: the tests fail without a fault:\n{told[-4000:]}")

    lock = threading.Lock()

    def judge(mutant: Mutant) -> Outcome:
        with lock:
            copy = free.pop()
        try:
            return copy.judge(mutant)
        finally:
            with lock:
                free.append(copy)

    copies = list(free)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(judge, mutants)
    finally:
        for copy in copies:
            copy.close()


def line(outcome: Outcome) -> str:
    m = outcome.mutant
    reason = f" ({m.equivalent})" if m.equivalent else ""
    return f"{outcome.state:<10} {outcome.seconds:6.1f} s  {m.file}: {m.meaning}{reason}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/mutants.py", description="Plant faults; tests must fail.")
    parser.add_argument("words", nargs="*", help="only rows whose file or meaning contains one of them")
    parser.add_argument("--jobs", type=int, default=2, help="faults tried at once")
    parser.add_argument("--native", action="store_true", help="also rows of csrc/, each of which is a build")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without a fault first")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    given = parser.parse_args(argv)

    wrong = misfits(MUTANTS)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    mutants = [m for m in chosen(given.words) if given.native or not m.native]
    if given.list:
        print("\n".join(f"{m.file}: {m.meaning}" for m in mutants))
        return 0

    found = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for outcome in outcomes(mutants, given.jobs, Path(folder), trust=given.trust):
            found.append(outcome)
            print(line(outcome), flush=True)
            if outcome.wrong and outcome.told:
                print(f"           {outcome.told}", flush=True)
    return report(found)


def report(found: Sequence[Outcome]) -> int:
    """The totals, and the exit status."""
    states = [outcome.state for outcome in found]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(f"\n{len(found)} faults: {counts}")
    return int(any(outcome.wrong for outcome in found))
