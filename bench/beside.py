"""A program of this folder run with another Triton: `make .triton/VERSION` installs it beside the newest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrl.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def with_other(version: str, module: str, argv: Sequence[str]) -> dict[str, Any]:
    """The JSON that `python -m MODULE ARGV --out FILE` writes there; what it prints is shown.

    Raises UserError where that Triton is not installed, or nothing was written.
    """
    folder = ROOT / ".triton" / version
    if not (folder / "triton").is_dir():
        raise UserError(f"--beside {version}: expected a Triton in {folder}; make .triton/{version}")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "found.json"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
        command = [sys.executable, "-m", module, *argv, "--out", str(out)]
        subprocess.run(command, cwd=ROOT, env=environment)
        if not out.exists():
            raise UserError(f"--beside {version}: expected results, got none; the errors stand above")
        return dict(json.loads(out.read_text(encoding="utf-8")))
