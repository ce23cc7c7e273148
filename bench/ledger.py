"""The results of a benchmark run: rows, what they were measured on, and their JSON file.

Times are milliseconds of one call; rates and ratios are computed from them when shown, so none can disagree.
Nothing here names a machine: the model of the device, versions and the commit are enough to repeat a run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastrl.bench.common import OURS
from fastrl.bench.timing import Ceilings
from fastrl.errors import UserError
from fastrl.run.environment import processor

SCHEMA = 1
QUICK = "-quick-"  # in the name of a file with sizes that are not published
MEASURED, SUFFIXES = ("kernels", "csrc", "bench"), (".py", ".h", ".cpp", ".cu", ".cuh")
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "flash-attn",
    "quack-kernels",
)
ALL = "all providers"  # the provider of a row for a whole case
OK, UNAVAILABLE, FAILED, LEFT_OUT = "ok", "unavailable", "failed", "left out"
Percentiles = tuple[float, float, float]  # 20, 50, 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One provider on one case.

    status, reason      "ok", or why there are no numbers
    default             whether it is our implementation that runs by default
    ms                  "cold" (L2 flushed before each call; CUDA) or "warm" -> milliseconds, percentiles 20,
                        50 and 80
    samples             how many of each
    bytes, flops        the least cost of the case
    tokens              that the case yields
    peak_bytes          the most memory held beyond that held before, as counted by torch's allocator
    error               largest absolute error of the first output against float64, on a slice
    relative_error      largest error of any output or gradient, over that tensor's largest true value
    details             what only this benchmark measures, by name and unit
    """

    op: str
    case: str
    shape: dict[str, int]
    dtype: str
    mode: str
    headline: bool
    provider: str
    status: str
    reason: str = ""
    default: bool = False
    ms: dict[str, Percentiles] = field(default_factory=dict)
    samples: int = 0
    bytes: int = 0
    flops: int = 0
    tokens: int = 0
    peak_bytes: int | None = None
    error: float | None = None
    relative_error: float | None = None
    details: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> float | None:
        """The median that is compared: cold if measured, else warm; None without numbers."""
        found = self.ms.get("cold") or self.ms.get("warm")
        return found[1] if found else None

    @property
    def own(self) -> bool:
        return self.provider.startswith(OURS)


@dataclass(slots=True)
class Results:
    """A run: what it was measured on, the measured limits, and the rows.

    context_lost  whether a kernel broke the CUDA context of this process, which can measure nothing more
    """

    identity: dict[str, Any]
    ceilings: Ceilings
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    context_lost: bool = False

    @property
    def exit_code(self) -> int:
        """1 when one of our own implementations or a whole case failed; a peer's failure is only a row."""
        return int(any((r.own or r.provider == ALL) and r.status == FAILED for r in self.rows))

    def share_of_limit(self, row: Row) -> float | None:
        """The least time that the measured limits allow, over the time taken."""
        return None if row.best is None else self.ceilings.floor_ms(row.bytes, row.flops) / row.best

    def save(self, path: Path) -> None:
        """Write the JSON file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "schema": SCHEMA,
            "identity": self.identity,
            "ceilings": asdict(self.ceilings),
            "settings": self.settings,
        }
        rows = ",\n".join("  " + json.dumps(asdict(r), allow_nan=False) for r in self.rows)
        text = json.dumps(content, indent=1)
        whole = path.with_name(path.name + ".part")
        whole.write_text(f'{text[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
        whole.replace(path)  # a run that is stopped leaves the rows before

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote.  Raises UserError for another file."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise UserError(f"{path}: expected schema {SCHEMA}, got {content['schema']}; measure again")
            rows = [Row(**{**r, "ms": {k: tuple(v) for k, v in r["ms"].items()}}) for r in content["rows"]]
            return cls(content["identity"], Ceilings(**content["ceilings"]), content["settings"], rows)
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not the results of a benchmark run ({type(error).__name__}: {error})"
            ) from None

    def file_name(self) -> str:
        """<device>-<date>.json, or <device>-quick-<date>.json."""
        device = "".join(c if c.isalnum() else "-" for c in self.identity["device"].lower())
        quick = QUICK if self.settings["quick"] else "-"
        return f"{'-'.join(filter(None, device.split('-')))}{quick}{self.identity['date'][:10]}.json"


# --- identity ---------------------------------------------------------------------------------------
def identity(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    cuda = device.type == "cuda"
    root = Path(__file__).resolve().parents[1]
    dirty = _output("git", "-C", str(root), "status", "--porcelain")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(root), "rev-parse", "HEAD"),
        "dirty": None if dirty is None else bool(dirty),
        "sources": _digest(root),
        "kind": device.type,
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "driver": _driver(device) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _digest(root: Path) -> str:
    """A hash of the sources measured, committed or not: the kernels and the benchmarks."""
    digest = hashlib.sha256()
    found = (p for folder in MEASURED for p in (root / folder).rglob("*") if p.suffix in SUFFIXES)
    for path in sorted(found):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _output(*command: str) -> str | None:
    """The output of a program, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else None


def _driver(device: torch.device) -> str | None:
    return _output(
        "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", str(device.index or 0)
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
