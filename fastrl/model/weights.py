"""Hugging Face folders: config.json and *.safetensors, one file or shards with their index.

A `Layout` says which tensors of the files make up each parameter of ours, their rows end to end.
"""

from __future__ import annotations

import json
import pickle
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
from fastrl.model.config import Settings

Layout = dict[str, dict[str, int]]
"""Our parameter -> {Hugging Face tensor: how many of the parameter's rows it holds}, in row order."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
FLOATS = ("F64", "F32", "F16", "BF16")
NOT_WEIGHTS = ("rotary_emb.inv_freq",)  # buffers that older transformers wrote beside the weights


# --- configuration ----------------------------------------------------------------------------------
def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with the end-of-sequence tokens of generation_config.json where that names them.

    Raises:  UserError for a folder or file that does not exist or cannot be parsed.
    """
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        why = (
            "; it holds an adapter: merge it into its model first (peft: merge_and_unload)" if adapter else ""
        )
        raise UserError(
            f"{folder}: expected a Hugging Face model folder with a config.json, which is not there{why}"
        )
    config = read_json(folder / "config.json")
    eos = read_generation(folder).get("eos_token_id")
    return config if eos is None else config | {"eos_token_id": eos}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.  Raises UserError naming the file if it holds anything else."""
    value = parse_json(decode(path.read_bytes(), str(path)), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {shorten(value)}")
    return value


def read_generation(folder: Path) -> dict[str, Any]:
    """generation_config.json, empty where there is none.  Raises UserError as `read_json` does."""
    path = folder / GENERATION
    return read_json(path) if path.is_file() else {}


def write_config(
    folder: Path,
    config: Settings,
    eos: tuple[int, ...],
    dtype: torch.dtype,
    generation: Settings | None = None,
) -> None:
    """config.json in the spelling that transformers 4 and 5 both read; and generation_config.json: what
    `generation` holds, with the end-of-sequence tokens `eos`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    _write_json(folder / "config.json", config)
    settings = dict(generation or {})
    if eos:
        special = {k: config[k] for k in ("bos_token_id", "pad_token_id") if config.get(k) is not None}
        settings = special | settings
        settings["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos)
    if settings:
        _write_json(folder / GENERATION, settings)


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- reading ----------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies, its shape, and its dtype in safetensors' spelling."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def read(folder: Path, parameters: Mapping[str, Tensor], layout: Layout, *, tied: bool) -> None:
    """Fill `parameters` from the folder's files, casting to their dtype.

    With `tied`, an lm_head.weight that repeats the embedding is allowed.
    Raises:  UserError naming file and tensor: missing, unknown, truncated, of the wrong shape, or a tied head
             that differs.
    """
    stored = {name: at for name, at in _inventory(folder).items() if not name.endswith(NOT_WEIGHTS)}
    head = stored.pop("lm_head.weight", None) if tied else None
    _check(folder, stored, parameters, layout)

    with torch.no_grad():
        for name, parts in layout.items():
            blocks = parameters[name].split(list(parts.values()))
            for block, part in zip(blocks, parts, strict=True):
                block.copy_(_tensor(stored[part].path, part))

    if head is not None:
        embedding = next(stored[name] for name in stored if name.endswith("embed_tokens.weight"))
        of_head = _tensor(head.path, "lm_head.weight")
        if not torch.equal(of_head, _tensor(embedding.path, "model.embed_tokens.weight")):
            raise UserError(
                f"{head.path}: tensor lm_head.weight differs from the embedding, "
                "but config.json says tie_word_embeddings"
            )


def _check(
    folder: Path, stored: Mapping[str, Stored], parameters: Mapping[str, Tensor], layout: Layout
) -> None:
    """Every tensor of the layout is stored, in its shape, and nothing else."""
    expected = {part: name for name, parts in layout.items() for part in parts}
    for part, name in expected.items():
        shape = (layout[name][part], *parameters[name].shape[1:])
        if part not in stored:
            raise UserError(
                f"{folder}: tensor {part} of shape {shape} is missing from its *.safetensors files"
            )
        if stored[part].shape != shape:
            raise UserError(
                f"{stored[part].path}: tensor {part}: expected shape {shape} by config.json, "
                f"got {stored[part].shape}"
            )
        _check_dtype(part, stored[part])
    for part in stored.keys() - expected.keys():
        raise UserError(
            f"{stored[part].path}: tensor {part} is not part of the model that config.json describes"
        )


def _check_dtype(name: str, stored: Stored) -> None:
    """Refuse numbers that mean something else than what they say: codes of a quantised weight."""
    if stored.dtype not in FLOATS:
        raise UserError(
            f"{stored.path}: tensor {name}: expected float32, bfloat16 or float16, got {stored.dtype}: codes "
            "of quantised weights, without the scales that give them a value; name the folder of the model "
            "that was quantised"
        )


def check_dtypes(folder: Path) -> None:
    """Refuse a folder whose safetensors hold matrices of integers or of 8-bit numbers, whatever model they
    are of.  Raises UserError.
    """
    files = sorted(folder.glob("*.safetensors"))
    stored = {name: at for path in files for name, at in _header(path).items()}
    if not files:
        for path in sorted(folder.glob("pytorch_model*.bin")):
            stored |= _pickled(path)
    for name, at in stored.items():
        narrow = at.dtype.startswith(("F8", "F4", "F6"))
        if narrow or (len(at.shape) > 1 and name.endswith("weight")):
            _check_dtype(name, at)


def _pickled(path: Path) -> dict[str, Stored]:
    """The tensors of a PyTorch file by name, none of them read; what cannot be read is left to its reader."""
    try:
        tensors = torch.load(path, map_location="meta", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        return {}
    spelling = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    stored = {}
    for name, x in tensors.items():
        if isinstance(x, Tensor):
            dtype = str(x.dtype).removeprefix("torch.").replace("float8", "F8")
            stored[name] = Stored(path, tuple(x.shape), spelling.get(x.dtype, dtype))
    return stored


def _inventory(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's files, each file's header checked against its size."""
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX).get("weight_map", {})
        paths = [folder / name for name in sorted(set(listed.values()))]
    else:
        listed, paths = {}, [folder / SINGLE]

    stored: dict[str, Stored] = {}
    for path in paths:
        if not path.is_file():
            why = "convert the weights with transformers' save_pretrained if they are in another format"
            if listed:
                why = f"{INDEX} names it"
            raise UserError(f"{path}: weight file is missing ({why})")
        stored |= _header(path)

    for name, file in listed.items():
        if name not in stored:
            raise UserError(f"{folder / file}: tensor {name} is missing, though {INDEX} lists it there")
    return stored


def _header(path: Path) -> dict[str, Stored]:
    """The tensors by name; UserError naming the first tensor that a truncated file cuts off."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length) if length <= size else b"")
        entries.pop("__metadata__", None)
        spans = sorted((entry["data_offsets"][1], name) for name, entry in entries.items())
        stored = {
            name: Stored(path, tuple(entry["shape"]), str(entry["dtype"])) for name, entry in entries.items()
        }
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
    return stored


def _tensor(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path}: tensor {name} cannot be read: {error}") from None


# --- writing ----------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Block:
    """Rows [first, end) of a parameter: one tensor of a file."""

    parameter: str
    first: int
    end: int


def write(
    folder: Path, parameters: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Write `parameters` under their names in `layout` as `dtype`: model.safetensors, or shards and an index
    above the limit.
    """
    shards, total = _shards(parameters, layout, dtype.itemsize, max_shard_bytes)
    count = len(shards)
    names = [SINGLE]
    if count > 1:
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]

    folder.mkdir(parents=True, exist_ok=True)
    for file, shard in zip(names, shards, strict=True):
        tensors = {}
        for name, block in shard.items():
            rows = parameters[block.parameter].detach()[block.first : block.end]
            tensors[name] = rows.to("cpu", dtype, copy=True).contiguous()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if count > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    # what an earlier save with another number of shards left
    kept = {*names, INDEX} if count > 1 else {*names}
    for old in (*folder.glob("model*.safetensors"), folder / INDEX):
        if old.name not in kept:
            old.unlink(missing_ok=True)


def _shards(
    parameters: Mapping[str, Tensor], layout: Layout, itemsize: int, max_bytes: int
) -> tuple[list[dict[str, Block]], int]:
    """The tensors of every file, in order, and the bytes of all of them."""
    shards: list[dict[str, Block]] = [{}]
    filled = total = 0
    for parameter, parts in layout.items():
        first = 0
        for name, rows in parts.items():
            size = prod((rows, *parameters[parameter].shape[1:])) * itemsize
            if filled and filled + size > max_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = Block(parameter, first, first + rows)
            first, filled, total = first + rows, filled + size, total + size
    return shards, total
