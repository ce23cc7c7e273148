"""The machine that the verdicts are about, and the seam by which a test or a rehearsal puts in another.

Everything that the checks ask of the outside goes through a `Machine`: how many devices there are, what each
is called, how a child process is started, where the child puts its tensors, and whose tensors count as those
of the device.  `pretend(machine)` replaces it inside a `with` block:

    with pretend(Machine(devices=lambda: 1, identity=lambda i: h200, place="cpu", stands_in="cpu", ...)):
        ...                                       # tests/helpers/fake_device.py has one that is complete

Such a machine checks the Triton kernels in a real child process, through Triton's interpreter on CPU tensors,
and `stands_in="cpu"` lets those that pass be chosen for CPU tensors, as they would be for CUDA's.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fastrl

CHILD = "fastrl.kernels._verdicts.child"


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds until a child is given up: before its first case, within a case, and for all cases."""

    start: float = 90.0
    case: float = 60.0
    total: float = 180.0


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as the checks see it.

    devices     how many GPUs there are
    identity    index -> what a verdict depends on: gpu, capability, driver
    start       command, environment changes -> a started child with pipes for stdin, stdout and stderr
    place       index -> the device on which the child runs the kernels
    backends    the backends that can be checked
    stands_in   a device type whose tensors also count as the GPU's, for rehearsals; "" for none
    small       few and small cases, for Triton's interpreter
    lanes       children at a time
    modules     more modules that the child imports, which may register or replace implementations
    """

    devices: Callable[[], int]
    identity: Callable[[int], Mapping[str, str]]
    start: Callable[[Sequence[str], Mapping[str, str]], subprocess.Popen[str]]
    place: Callable[[int], str] = "cuda:{}".format
    backends: tuple[str, ...] = ("cuda", "triton")
    stands_in: str = ""
    small: bool = False
    lanes: int = 4
    limits: Limits = field(default_factory=Limits)
    modules: tuple[str, ...] = ()


def start_child(command: Sequence[str], changes: Mapping[str, str]) -> subprocess.Popen[str]:
    """A process of this interpreter; what `changes` maps to "" is left out of its environment."""
    environment = {**child_environment(), **changes}
    return subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in environment.items() if value},
    )


def child_environment() -> dict[str, str]:
    """This process's environment, with its own fastrl first on the path."""
    root = Path(fastrl.__file__).resolve().parents[1]
    paths = [str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


# --- this machine -----------------------------------------------------------------------------------
def _devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _identity(index: int) -> dict[str, str]:
    gpu = torch.cuda.get_device_properties(index)
    return {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "driver": driver_version()}


def driver_version() -> str:
    """The version of NVIDIA's kernel module, as in 580.159; empty where there is none."""
    file = Path("/proc/driver/nvidia/version")
    if not file.is_file():
        return ""
    found = re.search(r"(\d+\.\d+(?:\.\d+)?)", file.read_text(encoding="utf-8"))
    return found[1] if found else ""


# a child compiles most of the time, on a core of its own
LANES = max(1, min(8, (os.cpu_count() or 2) // 2))
HERE = Machine(devices=_devices, identity=_identity, start=start_child, lanes=LANES)
pretended = [HERE]  # the innermost `pretend` last


def machine() -> Machine:
    """The machine in force."""
    return pretended[-1]


@contextlib.contextmanager
def pretend(other: Machine) -> Iterator[None]:
    """Take another machine for this one inside the `with` block."""
    pretended.append(other)
    try:
        yield
    finally:
        pretended.pop()
