"""The folder of a training run: a new one for a run that names none, and one writer at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from fastrl.config import Run
from fastrl.config.run import LATEST
from fastrl.errors import UserError
from fastrl.methods import command_of
from fastrl.parallel.world import World
from fastrl.run.lock import claimed

C = TypeVar("C", bound=Run)


@contextlib.contextmanager
def run_folder(config: C, world: World) -> Iterator[C]:
    """`config` with the folder that its run writes to, which no other run can claim meanwhile.

    Raises UserError, on every process, for a folder in use, and for --resume where there is no run.
    """
    folder = world.from_main(lambda: _folder_of(config))
    try:
        with claimed(Path(folder), "--output-dir", world, folder=True):
            yield dataclasses.replace(config, output_dir=folder)
    finally:
        if world.is_main and config.output_dir == LATEST:
            with contextlib.suppress(OSError):  # it is empty only where nothing began
                os.rmdir(folder)


def link_latest(folder: str) -> str:
    """Let runs/latest be a run that named no folder; "" or, where it cannot be, a sentence that says so."""
    path, link = Path(folder), Path(LATEST)
    if path.parent != link.parent or not path.name.rpartition("-")[2].isdigit():
        return ""
    if link.exists() and not link.is_symlink():
        return f"{link} is a folder of its own, so that it cannot link to {path}"
    draft = link.with_name(f".{link.name}.{os.getpid()}")
    try:
        draft.symlink_to(path.name)
        draft.replace(link)
    except OSError as error:
        return f"{link} could not be made a link to {path} ({error.strerror})"
    return ""


def _folder_of(config: Run) -> str:
    """The run's folder; one that is not named is made here, so that no other run takes its number."""
    if config.output_dir != LATEST:
        return config.output_dir
    root, command = Path(LATEST).parent, command_of(config)
    if config.resume:
        return str(_newest(root, command))

    number = 1 + max(_numbers(root, command), default=0)
    root.mkdir(parents=True, exist_ok=True)
    while True:
        folder = root / f"{command}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return str(folder)


def _newest(root: Path, command: str) -> Path:
    """The run that --resume without a folder means: the command's newest, which runs/latest may be."""
    numbers = _numbers(root, command)
    if numbers:
        return root / f"{command}-{max(numbers)}"
    latest = Path(LATEST)
    if not latest.exists():
        raise UserError(f"--resume: {root} holds no run of fastrl {command}; start without --resume")
    return latest.parent / latest.readlink() if latest.is_symlink() else latest


def _numbers(root: Path, command: str) -> list[int]:
    endings = (path.name.removeprefix(f"{command}-") for path in root.glob(f"{command}-*"))
    return [int(ending) for ending in endings if ending.isdigit()]
