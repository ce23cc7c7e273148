"""Checkpoints: a Hugging Face folder plus the trainer's state, whole or not there at all.

A checkpoint is written under a temporary name, synced to disk and renamed, so a crash at any moment leaves
the checkpoints before it as they were.  `trainer.json` lists every file and its size; one that is missing or
cut short is named when it is loaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastrl.errors import UserError

META, STATE = "trainer.json", "trainer.safetensors"
INSTEAD = "remove the folder to use an older checkpoint"
_NAME = re.compile(r"step_(\d+)")


def save(
    run: Path,
    step: int,
    model: Any,
    tokenizer: Any,
    state: dict[str, Tensor],
    meta: dict[str, Any],
    *,
    keep: int = 0,
    others: Mapping[str, tuple[Any, Any]] | None = None,
) -> Path:
    """Write `run/checkpoints/step_N`, then remove all but the newest `keep` (0 keeps every one).

    `state` holds the trainer's tensors, `meta` its plain values; `others` are more models with their
    tokenizers, by the name of their folder inside it.  Raises UserError, naming the folder, when the disk
    refuses.
    """
    root = run / "checkpoints"
    final, partial = root / f"step_{step}", root / f".step_{step}.partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(".*.partial"):
            shutil.rmtree(left)
        partial.mkdir()
        for folder, (one, reads) in {"": (model, tokenizer), **(others or {})}.items():
            one.save_pretrained(partial / folder)
            if reads is not None:
                reads.save_pretrained(partial / folder)
        save_file({k: v.detach().contiguous().cpu() for k, v in state.items()}, partial / STATE)
        sizes = {
            str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()
        }
        (partial / META).write_text(json.dumps({"step": step, **meta, "files": sizes}, indent=1))
        _sync(partial)
        if final.exists():
            _discard(final)
        os.rename(partial, final)
        _sync_folder(root)
        for old in complete_checkpoints(run)[:-keep] if keep else []:
            _discard(old)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {final}: could not be written ({error}); earlier checkpoints are untouched"
        ) from error
    return final


def complete_checkpoints(run: Path) -> list[Path]:
    """The run's finished checkpoints, oldest first."""
    found = [(int(m[1]), p) for p in (run / "checkpoints").glob("step_*") if (m := _NAME.fullmatch(p.name))]
    return [p for _, p in sorted(found)]


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trainer's tensors and plain values of one checkpoint.  Raises UserError naming the file that is
    missing or damaged.
    """
    try:
        meta = json.loads((path / META).read_text())
        files = meta.pop("files")
        sizes = dict(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {path}: {META} is missing or damaged ({error}); {INSTEAD}") from error
    for name, size in sizes.items():
        there = (path / name).stat().st_size if (path / name).exists() else None
        if there != size:
            got = "is missing" if there is None else f"has {there} bytes, expected {size}"
            raise UserError(f"checkpoint {path}: {name} {got}; {INSTEAD}")
    try:
        return load_file(path / STATE), meta
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: {STATE} is damaged ({error}); {INSTEAD}") from error


def _discard(folder: Path) -> None:
    """Remove a checkpoint; it loses its name first, so that a crash half-way never leaves a part under it."""
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
