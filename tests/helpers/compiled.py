"""Scripts in a process where Triton compiles: the tests' own decorates kernels for the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def beside(version: str) -> Path | None:
    """The folder of another Triton, installed by `make .triton/VERSION`, if it is there."""
    folder = ROOT / ".triton" / version
    return folder if (folder / "triton").is_dir() else None


def facts(script: str, version: str = "") -> Any:
    """What `script` prints as JSON, run with the installed Triton or with the one beside it."""
    folder = beside(version) if version else None
    path = os.pathsep.join([str(ROOT), *([str(folder)] if folder else [])])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)
