"""Hugging Face folders: config.json and *.safetensors, one file or shards with their index.

A `Layout` says which tensors of the files make up each parameter of ours: their rows lie end to end.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastrl.errors import UserError
from fastrl.files import decode, parse_json, shorten

Layout = dict[str, dict[str, int]]
"""Our parameter -> {Hugging Face tensor: how many of the parameter's rows it holds}, in the order of the
rows.
"""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NOT_WEIGHTS = ("rotary_emb.inv_freq",)  # buffers that older transformers wrote beside the weights


# --- configuration ----------------------------------------------------------------------------------
def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with the end-of-sequence tokens of generation_config.json where that names them.

    Raises UserError for a folder or file that is not there or cannot be parsed.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: expected a Hugging Face model folder with a config.json, which is not there"
        )
    config = read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        eos = read_json(folder / "generation_config.json").get("eos_token_id")
        config = config if eos is None else config | {"eos_token_id": eos}
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError naming the file when it holds something else."""
    value = parse_json(decode(path.read_bytes(), str(path)), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {shorten(value)}")
    return value


def write_config(folder: Path, config: Mapping[str, Any], eos: tuple[int, ...], dtype: torch.dtype) -> None:
    """config.json in the spelling that transformers 4 and 5 both read, and generation_config.json when `eos`
    is known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    _write_json(folder / "config.json", config)
    if eos:
        special = {k: config[k] for k in ("bos_token_id", "pad_token_id") if config.get(k) is not None}
        _write_json(
            folder / "generation_config.json",
            special | {"eos_token_id": eos[0] if len(eos) == 1 else list(eos)},
        )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- reading ----------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies, and its shape."""

    path: Path
    shape: tuple[int, ...]


def read(folder: Path, parameters: Mapping[str, Tensor], layout: Layout, *, tied: bool) -> None:
    """Fill `parameters` from the folder's files, casting to their dtype.

    With `tied`, an lm_head.weight that repeats the embedding is allowed.
    Raises:  UserError naming file and tensor: missing, unknown, truncated, of the wrong shape, or a tied head
             that differs.
    """
    stored = {n: s for n, s in _inventory(folder).items() if not n.endswith(NOT_WEIGHTS)}
    theirs = {t: p for p, parts in layout.items() for t in parts}
    head = stored.pop("lm_head.weight", None) if tied else None
    for name, p in theirs.items():
        want = (layout[p][name], *parameters[p].shape[1:])
        if name not in stored:
            raise UserError(
                f"{folder}: tensor {name} of shape {want} is missing from its *.safetensors files"
            )
        if stored[name].shape != want:
            raise UserError(
                f"{stored[name].path}: tensor {name}: expected shape {want} by config.json, "
                f"got {stored[name].shape}"
            )
    for name in stored.keys() - theirs.keys():
        raise UserError(
            f"{stored[name].path}: tensor {name} is not part of the model that config.json describes"
        )
    with torch.no_grad():
        for p, parts in layout.items():
            for block, name in zip(parameters[p].split(list(parts.values())), parts, strict=True):
                block.copy_(_tensor(stored[name].path, name))
    if head is not None:
        embedding = next(stored[t] for t in stored if t.endswith("embed_tokens.weight"))
        if not torch.equal(
            _tensor(head.path, "lm_head.weight"), _tensor(embedding.path, "model.embed_tokens.weight")
        ):
            raise UserError(
                f"{head.path}: tensor lm_head.weight differs from the embedding, "
                "but config.json says tie_word_embeddings"
            )


def _inventory(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's files, each file's header checked against its size."""
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX).get("weight_map", {})
        paths = [folder / name for name in sorted(set(listed.values()))]
    else:
        listed, paths = {}, [folder / SINGLE]
    found: dict[str, Stored] = {}
    for path in paths:
        if not path.is_file():
            why = (
                f"{INDEX} names it"
                if listed
                else "convert the weights with transformers' save_pretrained if they are in another format"
            )
            raise UserError(f"{path}: weight file is missing ({why})")
        found |= {name: Stored(path, shape) for name, shape in _header(path).items()}
    for name, file in listed.items():
        if name not in found:
            raise UserError(f"{folder / file}: tensor {name} is missing, though {INDEX} lists it there")
    return found


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name; UserError naming the first tensor that a truncated file cuts off."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length) if length <= size else b"")
        entries.pop("__metadata__", None)
        spans = sorted((entry["data_offsets"][1], name) for name, entry in entries.items())
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    except (struct.error, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path}: not a whole safetensors file: its header cannot be read ({size} bytes)"
        ) from None
    for end, name in spans:
        if 8 + length + end > size:
            raise UserError(
                f"{path}: truncated: tensor {name} ends at byte {8 + length + end}, "
                f"the file at {size}; copy it again"
            )
    return shapes


def _tensor(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path}: tensor {name} cannot be read: {error}") from None


# --- writing ----------------------------------------------------------------------------------------
def write(
    folder: Path, parameters: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Write `parameters` under their names in `layout` as `dtype`: model.safetensors, or shards and an index
    above the limit.
    """
    shards: list[dict[str, tuple[str, int, int]]] = [{}]  # tensor -> parameter, first and last row
    filled = total = 0
    for p, parts in layout.items():
        first = 0
        for name, rows in parts.items():
            size = prod((rows, *parameters[p].shape[1:])) * dtype.itemsize
            if filled and filled + size > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = (p, first, first + rows)
            first, filled, total = first + rows, filled + size, total + size
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, shard in zip(names, shards, strict=True):
        tensors = {
            n: parameters[p].detach()[a:b].to("cpu", dtype, copy=True).contiguous()
            for n, (p, a, b) in shard.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {n: file for file, shard in zip(names, shards, strict=True) for n in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    # of an earlier save with another number of shards
    for old in (
        *folder.glob("model*.safetensors"),
        folder / INDEX,
    ):
        if old.name not in names and not (old.name == INDEX and len(shards) > 1):
            old.unlink(missing_ok=True)
