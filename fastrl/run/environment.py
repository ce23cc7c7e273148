"""`fastrl env`, for bug reports: versions, devices, CPU features, threads, and each op's implementation."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from fastrl import __version__, ops
from fastrl.kernels._backend import BACKENDS, extension
from fastrl.kernels._verdicts.first_use import load
from fastrl.kernels._verdicts.machine import machine
from fastrl.kernels._verdicts.summary import table

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "tyro",
    "flash-attn",
    "kernels",
    "trl",
    "liger-kernel",
)
COMPOSED = {"linear_loss": "token_logp"}  # ops without a kernel of their own -> what they run on
ON_TOKEN_LOGP = ("linear_logp", "linear_cross_entropy")  # the same, where there is no fused kernel
VARIABLES = (
    "FASTRL_BACKEND",
    "FASTRL_CHECK",
    "FASTRL_CPU_ISA",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
)


def environment_text() -> str:
    """The output of `fastrl env`, also a run's environment.txt."""
    parts = {
        "versions": _versions(),
        "devices": _devices(),
        "compiled module": _compiled(),
        "environment": _variables(),
    }
    blocks = []
    for title, rows in parts.items():
        lines = [f"  {name:<22} {value}" for name, value in rows.items()]
        blocks.append("\n".join([title, *lines]))
    verdicts = _verdicts()  # before the table of ops, which shows what they allow
    return "\n\n".join([*blocks, _op_table(), *verdicts])


def run(options: object) -> None:
    """The command `fastrl env`."""
    print(environment_text())


def _versions() -> dict[str, str]:
    versions = {"fastrl": __version__, "python": platform.python_version(), "system": platform.platform()}
    return versions | {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _devices() -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = {
        "cpu": f"{processor()}, {cores} cores usable",
        "torch threads": str(torch.get_num_threads()),
        "torch cpu capability": torch.backends.cpu.get_cpu_capability(),
        "torch cuda": torch.version.cuda or "built without",
    }
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        rows[f"cuda:{i}"] = f"{gpu.name}, compute {gpu.major}.{gpu.minor}, {memory}"
    if not torch.cuda.is_available():
        rows["gpu"] = "none"
    return rows


def processor() -> str:
    """The CPU's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _compiled() -> dict[str, str]:
    module = extension()
    if module is None:
        return {"fastrl._C": "not built: pip install -e . (or python setup.py build_ext --inplace)"}
    has_cuda = any(name.endswith("_cuda") for name in dir(module))
    return {
        "fastrl._C": module.__file__,
        "cuda kernels": "built" if has_cuda else "not built",
        "instruction set": f"{module.cpu_isa()}, of {', '.join(module.cpu_isas())}",
        "threads": module.threads_from() or "one: torch has no OpenMP runtime to share",
    }


def _variables() -> dict[str, str]:
    return {name: os.environ.get(name, "-") for name in VARIABLES}


def _verdicts() -> list[str]:
    """What is known of the kernels on each GPU: nothing is checked here."""
    here = machine()
    blocks = []
    for i in range(here.devices()):
        device = torch.device(here.stands_in or f"cuda:{i}")
        load(device)
        lines = table(device, ops.backend(device)).replace("\n", "\n  ")
        blocks.append(f"kernels on cuda:{i}\n  {lines}")
    return blocks


def _why_reference(op: str, states: Mapping[str, str], chosen: Mapping[str, str]) -> str:
    """Why no kernel of an op is chosen, and what its reference runs on."""
    asked = os.environ.get("FASTRL_BACKEND")
    if asked == "reference":
        return "FASTRL_BACKEND asks for it"
    if op in ON_TOKEN_LOGP:
        return (
            "no kernel of the whole op runs here; it is matrix products, a chunk of rows at a time, and "
            f"token_logp, which runs on {chosen['token_logp']}"
        )
    others = [f"{name} is {states.get(name, '-')}" for name in BACKENDS if name != "reference"]
    return ", ".join(others).replace("is -", "has none")


def _op_table() -> str:
    """A row per op: the chosen backend, and the state of its implementation on every backend."""
    chosen = ops.backend()
    implementations = ops.implementations()
    rows: list[tuple[str, ...]] = [("op", "chosen", *BACKENDS)]
    notes = []
    for op, states in implementations.items():
        rows.append((op, chosen[op], *(states.get(backend, "-") for backend in BACKENDS)))
        notes += [f"{op}: {name}: {state}" for name, state in states.items() if name not in BACKENDS]
        if chosen[op] == "reference":
            notes.append(f"{op}: reference: {_why_reference(op, states, chosen)}")
    for op, on in COMPOSED.items():
        states = implementations[on]
        rows.append((op, chosen[on], *(states.get(backend, "-") for backend in BACKENDS)))
        notes.append(f"{op}: matrix products, a chunk of rows at a time, and the kernels of {on}")
    rows[1:] = sorted(rows[1:])

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *notes])
