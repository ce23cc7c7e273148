"""The stages of a GPU check: what each runs, and when it is stopped.

A stage is a child process, so that a lost CUDA context, a hang or a compiler that dies ends that stage alone.
Their order is that of value: nothing is worth measuring before it is right, and a budget that ends early
loses the benchmarks of the last ops only.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ORDER = (
    "vocabulary",
    "decode",
    "engine",
    "sample",
    "model_ops",
    "exact",
    "policy",
    "advantage",
    "perturb",
    "reward",
)
WORKERS = 8  # each holds a CUDA context and some GiB of tensors
MAX_FAILURES = 40
TEST_SECONDS = 90


@dataclass(frozen=True, slots=True)
class Check:
    """What the commands of the stages depend on.

    root      the checkout
    out       the folder of the results
    seconds   left for the stage
    rehearse  run every stage on the CPU, with a stand-in for CUDA, at sizes of a test
    """

    root: Path
    out: Path
    seconds: float
    rehearse: bool


Command = Callable[[Check], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage.

    until    the share of the budget after which it is stopped
    needed   whether the check ends when it fails
    resumes  whether a later run continues it, without what is done; other stages run once for each state of
             the sources
    """

    name: str
    until: float
    command: Command
    needed: bool = False
    resumes: bool = False


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def build(check: Check) -> list[str]:
    return python("setup.py", "build_ext", "--inplace")


def warm(check: Check) -> list[str]:
    """Compile what the ops launch, on all cores, into Triton's cache on disk."""
    jobs = str(os.cpu_count() or 1)
    target = ["--triton-cache", "--jobs", jobs]
    return python("-m", "fastrl.bench.compile_table", *target, *(["swiglu"] if check.rehearse else []))


def verdicts(check: Check) -> list[str]:
    """`fastrl check`; in a rehearsal, of one op on a GPU that is not there."""
    module = "fastrl.bench.gpu_check.verdicts"
    if not check.rehearse:
        return python("-m", module)
    settings = {
        "TRITON_INTERPRET": "1",
        "FASTRL_FAKE_CACHE": check.out / "cache",
        "FASTRL_FAKE_OPS": "swiglu",
    }
    return [
        "env",
        *(f"{n}={v}" for n, v in settings.items()),
        *python("tests/helpers/fake_device.py", module),
    ]


def gpu_tests(root: Path) -> list[str]:
    """Files with tests for a GPU, in the order of their value.

    Others are not read: they may import what a GPU machine lacks.
    """
    marked = [
        p for p in sorted((root / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")
    ]

    def rank(path: Path) -> int:
        name = path.stem.removeprefix("test_").removesuffix("_gpu")
        return ORDER.index(name) if name in ORDER else len(ORDER)

    return [p.relative_to(root).as_posix() for p in sorted(marked, key=rank)]


def tests(check: Check) -> list[str]:
    command = python("-m", "pytest", "-q", "-m", "gpu", "-p", "fastrl.bench.gpu_check.pytest_progress")
    command += ["--maxfail", str(MAX_FAILURES), "--tb", "short"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", str(TEST_SECONDS)]
    if importlib.util.find_spec("xdist"):  # one test at a time to each worker keeps the order of value
        workers = min(WORKERS, os.cpu_count() or 1)
        command += ["-n", str(workers), "--dist", "load", "--maxschedchunk", "1"]
    if check.rehearse:
        command += ["-p", "fastrl.bench.gpu_check.fake_cuda"]
    return command + gpu_tests(check.root)


def bench(check: Check) -> list[str]:
    command = python("-m", "fastrl.bench.run", "--out", str(check.out), "--resume")
    command += ["--seconds", f"{check.seconds:.0f}"]
    return command + (["--device", "cpu", "--rehearse"] if check.rehearse else ["--gpu-check"])


STAGES = (
    Stage(name="build", until=0.30, command=build, needed=True),
    Stage(name="warm", until=0.40, command=warm),
    Stage(name="verdicts", until=0.52, command=verdicts),
    Stage(name="tests", until=0.72, command=tests, resumes=True),
    Stage(name="bench", until=0.97, command=bench, resumes=True),
)
