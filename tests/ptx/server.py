"""The gate's child processes, one for each version of Triton and worker of pytest, each kept for many cases.

Kernels are compiled only in a process that was started without TRITON_INTERPRET, which the tests set; and a
process has one version of Triton.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OLDEST = ROOT / ".triton" / "3.6.0"  # pip install --target, see the Makefile
NEWEST = "newest"
VERSIONS = {NEWEST: None, "3.6.0": OLDEST}


class Server:
    """A child that judges one case after another; it is started when it is needed, and anew if it dies."""

    def __init__(self, version: str, cache: Path) -> None:
        self.version, self.cache = version, cache
        self.process: subprocess.Popen[str] | None = None

    def ask(self, name: str) -> dict[str, Any]:
        """The verdict on a case.  Raises AssertionError with what the child wrote where it died."""
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.process = None
            said = self.errors.read_text(errors="replace")[-4000:]
            raise AssertionError(f"{name}: the child ended with {status}:\n{said}")
        return json.loads(line)

    def _start(self) -> subprocess.Popen[str]:
        with self.errors.open("w") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", "ptx.child"],
                cwd=ROOT,
                env=environment(self.version, self.cache),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    @property
    def errors(self) -> Path:
        """What the child writes to its standard error."""
        self.cache.mkdir(parents=True, exist_ok=True)
        return self.cache / f"errors-{self.version}-{os.getpid()}"

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def environment(version: str, cache: Path) -> dict[str, str]:
    """Of a child: a version of Triton first on the path, no interpreter."""
    own = VERSIONS[version]
    paths = [*([str(own)] if own else []), str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]
    changed = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache)}
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTRL_BACKEND")}
    return kept | changed


@contextmanager
def servers(cache: Path) -> Iterator[dict[str, Server]]:
    """One for each version, by name."""
    found = {version: Server(version, cache) for version in VERSIONS}
    try:
        yield found
    finally:
        for server in found.values():
            server.close()
