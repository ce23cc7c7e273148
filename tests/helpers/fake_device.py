"""A CUDA machine that is not there: one GPU whose kernels run in a real child process, through Triton's
interpreter on CPU tensors, and then count as chosen for CPU tensors.

    with fake_device(tmp_path):                  # an H200 with an empty cache of verdicts in tmp_path
        ensure(torch.device("cpu"))              # a child checks every Triton kernel
        ops.rms_norm(x, w)                       # the interpreted kernel, if it has passed

`break_kernels` makes chosen kernels wrong in the child, in one of the ways of `FAULTS`.  As a program it runs
another one on such a machine, with its cache in FASTRL_FAKE_CACHE:

    FASTRL_FAKE_CACHE=/tmp/x TRITON_INTERPRET=1 PYTHONPATH=. python tests/helpers/fake_device.py fastrl check
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fastrl.kernels.advance
import fastrl.kernels.decoder_layer
import fastrl.ops
from fastrl.kernels import _registry
from fastrl.kernels._verdicts import cache, first_use
from fastrl.kernels._verdicts.machine import Limits, Machine, pretend, start_child
from fastrl.kernels._verdicts.table import TABLE

assert fastrl.kernels.advance and fastrl.kernels.decoder_layer and fastrl.ops  # which register the ops
H200 = {"gpu": "NVIDIA H200", "capability": "9.0", "driver": "580.159"}
FAULTS_VARIABLE = "FASTRL_FAKE_FAULTS"  # "op=fault,op=fault": read by the child when it imports this module
ONLY_VARIABLE = "FASTRL_FAKE_OPS"  # ops whose kernels are checked; all where it is empty

Part = Callable[..., Any]


# --- kernels that are broken on purpose -------------------------------------------------------------
def _first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def wrong_value(run: Part) -> Part:
    def broken(*args: Any) -> Any:
        result = run(*args)
        _first(result).view(-1)[-1:].add_(0.5)
        return result

    return broken


def out_of_bounds(run: Part) -> Part:
    """Right results, and one number written after the end of the first."""

    def broken(*args: Any) -> Any:
        result = run(*args)
        x = _first(result)
        x.as_strided((1,), (1,), x.storage_offset() + x.numel()).zero_()
        return result

    return broken


def uneven(run: Part) -> Part:
    """Right within any budget, and other bits at every call."""
    calls = iter(range(1 << 30))

    def broken(*args: Any) -> Any:
        result = run(*args)
        _first(result).mul_(1 + 2e-7 * (next(calls) % 2))
        return result

    return broken


def illegal_address(run: Part) -> Part:
    def broken(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGSEGV)

    return broken


def aborted(run: Part) -> Part:
    def broken(*args: Any) -> Any:
        os.abort()

    return broken


def hang(run: Part) -> Part:
    def broken(*args: Any) -> Any:
        time.sleep(600)

    return broken


def compile_error(run: Part) -> Part:
    def broken(*args: Any) -> Any:
        raise AttributeError("module 'triton.language' has no attribute 'to_tensor'")

    return broken


FAULTS: dict[str, Callable[[Part], Part]] = {
    f.__name__: f for f in (wrong_value, out_of_bounds, uneven, illegal_address, aborted, hang, compile_error)
}


def plant(op: str, fault: str) -> None:
    """Replace the Triton kernels of `op` by broken ones, in this process."""
    impl = _registry.registered(op)["triton"]
    parts = {name: FAULTS[fault](run) for name, run in impl.parts.items()}
    _registry.registered(op)["triton"] = replace(impl, parts=parts)


def _in_child() -> None:
    """What the child does when it imports this module: keep the ops that are wanted, break those to break."""
    for pair in filter(None, os.environ.get(FAULTS_VARIABLE, "").split(",")):
        plant(*pair.split("="))


# A child that has checked everything in no time: every job passes, or fails for FASTRL_FAKE_REASON; a line
# goes to FASTRL_FAKE_LOG.
CANNED = """
import json, os, sys, time
request, reason = json.load(sys.stdin), os.environ.get("FASTRL_FAKE_REASON", "")
with open(os.environ["FASTRL_FAKE_LOG"], "a") as log:
    log.write("started\\n")
time.sleep(float(os.environ.get("FASTRL_FAKE_SECONDS", "0")))
print(json.dumps({"ready": True}))
for number, job in request["jobs"]:
    print(json.dumps({"case": "forward a case"}))
    print(json.dumps({"reason": reason, "fraction": 0.5, "variant": "forward "}))
    print(json.dumps({"job": number}))
"""


def canned(log: Path, seconds: float = 0.0) -> Callable[..., Any]:
    """A way to start such a child."""
    changes = {"FASTRL_FAKE_LOG": str(log), "FASTRL_FAKE_SECONDS": str(seconds)}
    return lambda command, environment: start_child(["-c", CANNED], {**environment, **changes})


# --- the machine ------------------------------------------------------------------------------------
def machine(**changes: Any) -> Machine:
    """One H200, played by the CPU."""

    def start(command: Sequence[str], environment: Mapping[str, str]) -> Any:
        here = str(Path(__file__).parent)
        paths = os.pathsep.join([str(Path(__file__).parents[2]), here, os.environ.get("PYTHONPATH", "")])
        return start_child(command, {"TRITON_INTERPRET": "1", "PYTHONPATH": paths, **environment})

    usual: dict[str, Any] = {
        "devices": lambda: 1,
        "identity": lambda index: H200,
        "start": start,
        "place": lambda index: "cpu",
        "backends": ("triton",),
        "stands_in": "cpu",
        "small": True,
        "lanes": 1,
        "limits": Limits(start=240, case=240, total=900),
        "modules": ("fake_device",),
    }
    return Machine(**{**usual, **changes})


@contextlib.contextmanager
def only(*ops: str) -> Iterator[None]:
    """Check the kernels of these ops alone: an interpreter takes seconds for each."""
    checks = dict(first_use.CHECKS)
    for op in set(checks) - set(ops):
        del first_use.CHECKS[op]
    try:
        yield
    finally:
        first_use.CHECKS.update(checks)


@contextlib.contextmanager
def fake_device(folder: Path, *ops: str, **changes: Any) -> Iterator[Machine]:
    """A machine with one GPU and its cache of verdicts under `folder`; with `ops`, only theirs are checked.

    What this process knew before comes back afterwards.
    """
    made = machine(**changes)
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    forget()
    try:
        with pretend(made), only(*ops) if ops else contextlib.nullcontext():
            yield made
    finally:
        forget()
        os.environ.pop("XDG_CACHE_HOME")
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


def forget() -> None:
    """As in a new process: no verdict is known, nothing was said."""
    TABLE.clear()
    first_use._warned.clear()
    cache._said.clear()


@contextlib.contextmanager
def break_kernels(**faults: str) -> Iterator[None]:
    """Break kernels in the child: break_kernels(swiglu="hang")."""
    os.environ[FAULTS_VARIABLE] = ",".join(f"{op}={fault}" for op, fault in faults.items())
    try:
        yield
    finally:
        del os.environ[FAULTS_VARIABLE]


def main() -> None:
    sys.argv = sys.argv[1:]
    with fake_device(Path(os.environ["FASTRL_FAKE_CACHE"]), *os.environ.get(ONLY_VARIABLE, "").split()):
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
elif os.environ.get(FAULTS_VARIABLE):
    _in_child()
