"""From what a user names to a folder: a model's own, or a run's newest checkpoint; or advice what to name."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fastrl.errors import UserError, notice
from fastrl.files import hub_advice

CHECKPOINTS = "checkpoints"  # inside a run's folder
META = "trainer.json"  # of a checkpoint: it lists every other file with its size
_NAME = re.compile(r"step_(\d+)")


def checkpoints_of(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = []
    for path in (run / CHECKPOINTS).glob("step_*"):
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that the checkpoint lists is there, in its size."""
    try:
        sizes = json.loads((checkpoint / META).read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def model_folder(name: str | Path, option: str = "--model") -> Path:
    """The path that is meant by a name: itself, or the newest whole checkpoint where it is a run's folder (or
    its checkpoints/), which a line then says.

    Raises:  UserError for a run without a whole checkpoint.
    """
    path = Path(name).expanduser()
    if not path.is_dir() or (path / "config.json").is_file():
        return path
    run = path.parent if path.name == CHECKPOINTS else path
    found = checkpoints_of(run)
    if not found:
        return path
    whole = [checkpoint for checkpoint in found if is_whole(checkpoint)]
    if not whole:
        raise UserError(f"{option}: {name} is the folder of a run, but none of its checkpoints is whole")
    notice(f"{option}: {name} is the folder of a run; its newest checkpoint is taken: {whole[-1]}")
    return whole[-1]


def existing_folder(name: str | Path, option: str, what: str) -> Path:
    """`model_folder`, where there has to be one; `what` is expected there.

    Raises:  UserError that says what to type where the name is one of the Hugging Face Hub.
    """
    path = model_folder(name, option)
    if not path.is_dir():
        raise UserError(
            f"{option}: expected {what}, got {name}, which is no folder{hub_advice(str(name), option)}"
        )
    return path
