"""Checkpoints: a Hugging Face folder plus the trainer's state, complete or absent.

A checkpoint is written under a temporary name, synced to disk and renamed, so that a crash at any moment
leaves earlier checkpoints as they were.  `trainer.json` lists every file with its size; loading names the
file that is missing or truncated.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastrl.errors import UserError
from fastrl.files import JsonObject
from fastrl.model.folder import META, checkpoints_of
from fastrl.model.language import Tokenizer
from fastrl.model.tokenizer import save_tokenizer
from fastrl.run.remembered import RUN

STATE = "trainer.safetensors"
TEMPORARY = "temporary"  # in trainer.json: the next checkpoint replaces this one
ADVICE = "remove the folder to use an older checkpoint"


class Savable(Protocol):
    """A model."""

    def save_pretrained(self, folder: Path, /) -> object: ...


Models = Mapping[str, tuple[Savable, Tokenizer | None]]  # folder inside the checkpoint -> model, tokenizer


def save(
    run: Path,
    step: int,
    model: Savable,
    tokenizer: Tokenizer | None,
    state: Mapping[str, Tensor],
    meta: Mapping[str, object],
    *,
    keep: int = 0,
    others: Models | None = None,
    temporary: bool = False,
) -> Path:
    """Write `run/checkpoints/step_N`, then remove all but the newest `keep` (0 keeps all).

    state      the trainer's tensors
    meta       the trainer's plain values
    others     more models with their tokenizers, by the name of their subfolder
    temporary  the next checkpoint replaces this one; it does not count as kept

    Raises UserError, naming the folder and the bytes that were missing, when writing fails.
    """
    final = folder_of(run, step)
    root = final.parent
    partial = root / f".step_{step}.partial"
    meta = {"step": step, **meta, **({TEMPORARY: True} if temporary else {})}
    models = {"": (model, tokenizer), **(others or {})}
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_partial(run)

        partial.mkdir()
        _write(partial, models, state, meta)
        _sync(partial)
        if final.exists():
            _discard(final)
        os.rename(partial, final)
        _sync_folder(root)

        for old in _superseded(run, final, keep):
            _discard(old)
    except (OSError, SafetensorError) as error:
        room = _room(root, models, state)
        with contextlib.suppress(OSError):  # what was written of it would keep a full disk full
            remove_partial(run)
        raise UserError(
            f"checkpoint {final}: could not be written ({error}); earlier checkpoints are untouched; {room}"
        ) from error
    return final


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step_{step}"


def number_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step_"))


def remove_partial(run: Path) -> None:
    """Remove what a crash or a full disk left of unfinished checkpoints."""
    for leftover in (run / "checkpoints").glob(".*.partial"):
        shutil.rmtree(leftover)


def complete_checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    return checkpoints_of(run)


def load(path: Path) -> tuple[dict[str, Tensor], JsonObject]:
    """The trainer's tensors and plain values of a checkpoint.

    Raises UserError naming the file that is missing or damaged.
    """
    try:
        meta = json.loads((path / META).read_text())
        sizes = dict(meta.pop("files"))
        meta.pop(RUN, None)  # not the trainer's: its options, which remembered.py reads
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {path}: {META} is missing or damaged ({error}); {ADVICE}") from error

    for name, size in sizes.items():
        file = path / name
        if not file.exists():
            raise UserError(f"checkpoint {path}: {name} is missing; {ADVICE}")
        actual = file.stat().st_size
        if actual != size:
            raise UserError(f"checkpoint {path}: {name} has {actual} bytes, expected {size}; {ADVICE}")
    try:
        return load_file(path / STATE), meta
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: {STATE} is damaged ({error}); {ADVICE}") from error


def _write(
    folder: Path,
    models: Models,
    state: Mapping[str, Tensor],
    meta: Mapping[str, object],
) -> None:
    """Write the files of a checkpoint; trainer.json, which lists the others, comes last."""
    for name, (model, tokenizer) in models.items():
        model.save_pretrained(folder / name)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder / name)
    save_file({k: v.detach().contiguous().cpu() for k, v in state.items()}, folder / STATE)

    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / META).write_text(json.dumps({**meta, "files": sizes}, indent=1))


def _superseded(run: Path, newest: Path, keep: int) -> list[Path]:
    """The checkpoints that `newest` makes superfluous, oldest first."""
    complete = complete_checkpoints(run)
    temporary = [path for path in complete if path != newest and _is_temporary(path)]
    kept = [path for path in complete if path not in temporary]
    return temporary + (kept[:-keep] if keep else [])


def _is_temporary(path: Path) -> bool:
    try:
        return bool(json.loads((path / META).read_text()).get(TEMPORARY))
    except (OSError, ValueError, AttributeError):
        return False  # damaged: whoever resumes is told, and nothing is removed


def _room(root: Path, models: Models, state: Mapping[str, Tensor]) -> str:
    """How much a checkpoint needs and how much there is, as a sentence."""
    needed = sum(x.nbytes for x in state.values())
    for model, _ in models.values():
        if isinstance(model, nn.Module):
            needed += sum(x.nbytes for x in model.parameters())
    try:
        free = shutil.disk_usage(root).free
    except OSError:
        return f"it takes about {needed:,} bytes"
    return f"it takes about {needed:,} bytes, {free:,} are free at {root}"


def _discard(folder: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that a crash leaves no partial one under its name."""
    nameless = folder.with_name(f".{folder.name}.discarded.partial")
    os.rename(folder, nameless)
    shutil.rmtree(nameless)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
