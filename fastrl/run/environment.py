"""What a bug report needs: versions, devices, CPU features, threads, and the implementation of each op."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from fastrl import __version__, ops
from fastrl.kernels._backend import BACKENDS, extension

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
VARIABLES = (
    "FASTRL_BACKEND",
    "FASTRL_CPU_ISA",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
)


def report() -> str:
    """The text of `fastrl env`."""
    parts = {
        "versions": _versions(),
        "devices": _devices(),
        "compiled module": _compiled(),
        "environment": _variables(),
    }
    blocks = [
        f"{title}\n" + "\n".join(f"  {k:<22} {v}" for k, v in rows.items()) for title, rows in parts.items()
    ]
    return "\n\n".join([*blocks, _table()])


def run(options: object) -> None:
    """`fastrl env`: print the report."""
    print(report())


def _versions() -> dict[str, str]:
    here = {"fastrl": __version__, "python": platform.python_version(), "system": platform.platform()}
    return here | {name: _version(name) for name in PACKAGES}


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
        rows[f"cuda:{i}"] = f"{gpu.name}, compute {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    return rows if torch.cuda.is_available() else rows | {"gpu": "none"}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _compiled() -> dict[str, str]:
    module = extension()
    if module is None:
        return {"fastrl._C": "not built: pip install -e . (or python setup.py build_ext --inplace)"}
    return {
        "fastrl._C": module.__file__,
        "cuda kernels": "built" if any(name.endswith("_cuda") for name in dir(module)) else "not built",
        "instruction set": f"{module.cpu_isa()}, of {', '.join(module.cpu_isas())}",
        "threads": module.threads_from() or "one: torch has no OpenMP runtime to share",
    }


def _variables() -> dict[str, str]:
    return {name: os.environ.get(name, "-") for name in VARIABLES}


def _table() -> str:
    chosen, have = ops.backend(), ops.implementations()
    rows: list[tuple[str, ...]] = [("op", "chosen", *BACKENDS)]
    rows += [(op, chosen[op], *(have[op].get(b, "-") for b in BACKENDS)) for op in have]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [
        f"{op}: {name}: {state}"
        for op, table in have.items()
        for name, state in table.items()
        if name not in BACKENDS
    ]
    return "\n".join(lines)
