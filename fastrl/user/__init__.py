"""The user's own Python files as modules `fastrl.user.NAME`, which worker processes can import, too.

A pool that is spawned, not forked, sends a function as the name of its module and imports that in the child.
A file named by --reward or --task has no name that a fresh interpreter would know, so the names and their
files are in the environment, which children inherit, and importing this package is enough to find them.  Two
files of one name, and two versions of one file, are different modules.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

VARIABLE = "FASTRL_USER_FILES"  # JSON: module name -> file
__path__ = []  # no file of this folder: what is in the package is found below


def module_name(file: Path) -> str:
    """The module that a file is, here and in every process started from now on."""
    stamp = file.stat()
    digest = hashlib.sha256(f"{file} {stamp.st_mtime_ns} {stamp.st_size}".encode()).hexdigest()[:12]
    name = f"{__name__}.{file.stem}_{digest}"
    os.environ[VARIABLE] = json.dumps(_files() | {name: str(file)})
    return name


def _files() -> dict[str, str]:
    files: dict[str, str] = json.loads(os.environ.get(VARIABLE, "{}"))
    return files


class _Loader(SourceFileLoader):
    """Runs a file with its folder on the path: it can import its neighbours, as a script can."""

    def exec_module(self, module: ModuleType) -> None:
        folder = str(Path(self.path).parent)
        if folder not in sys.path:
            sys.path.append(folder)  # for workers that are sent functions of the neighbours

        in_main = threading.current_thread() is threading.main_thread()
        if multiprocessing.parent_process() is not None and in_main:
            # a terminal sends Ctrl-C to the workers as well: without them the step could not be finished
            signal.signal(signal.SIGINT, signal.SIG_IGN)

        sys.path.insert(0, folder)
        try:
            super().exec_module(module)
        finally:
            sys.path.remove(folder)


class _Finder:
    """Finds the files that module_name has named, in this process or in one that it comes from."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        file = _files().get(name)
        return spec_from_file_location(name, file, loader=_Loader(name, file)) if file else None


if _Finder not in sys.meta_path:
    sys.meta_path.append(_Finder)
