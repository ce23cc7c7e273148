"""Number formats of PTX as numpy sees them, and the roundings between them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LANES = 32
LANE = np.arange(LANES)
Array = NDArray[Any]
Mask = NDArray[np.bool_]

TYPES: dict[str, type[np.generic]] = {
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.uint16,  # the bits: arithmetic widens them first
    "bf16": np.uint16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "f32": np.float32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
    "pred": np.bool_,
}
DTYPES: dict[str, np.dtype[np.generic]] = {name: np.dtype(t) for name, t in TYPES.items()}
SIZES = {name: d.itemsize for name, d in DTYPES.items()}  # bytes
RAW = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}  # unsigned integers of so many bytes
FLOATS = ("f32", "f64")
HALVES = ("f16", "bf16")
PAIRS = ("f16x2", "bf16x2")

SMALLEST_NORMAL = np.float32(2.0**-126)


def flush(x: Array) -> Array:
    """Subnormal numbers become zeros of the same sign, as `.ftz` says."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def widen(bits: Array, kind: str) -> Array:
    """The float32 values of 16-bit numbers."""
    if kind.startswith("bf16"):
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def narrow(x: Array, kind: str) -> Array:
    """The bits of float32 or float64 values rounded to 16 bits, to nearest even."""
    if not kind.startswith("bf16"):
        return x.astype(np.float16).view(np.uint16)

    single = to_odd(x) if x.dtype == np.float64 else x
    u = single.view(np.uint32)
    last = (u >> np.uint32(16)) & np.uint32(1)
    rounded = ((u + np.uint32(0x7FFF) + last) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FFF), rounded)


def to_odd(x: Array) -> Array:
    """float64 to float32, to odd: rounding the result once more then rounds rightly."""
    single = x.astype(np.float32)
    back = single.astype(np.float64)
    bits = single.view(np.int32)
    even = (back != x) & ((bits & 1) == 0) & np.isfinite(x)
    toward = np.where(np.abs(back) < np.abs(x), 1, -1)
    return np.where(even, (bits + toward).astype(np.int32).view(np.float32), single)


def bytes_of(x: Array) -> NDArray[np.uint8]:
    """(LANES, bytes of an element)."""
    return np.ascontiguousarray(x).view(np.uint8).reshape(LANES, -1)


def of_bytes(data: NDArray[np.uint8], dtype: np.dtype[np.generic]) -> Array:
    """The elements that rows of bytes are."""
    return np.ascontiguousarray(data).view(dtype).reshape(-1)


def halves(x: Array) -> tuple[Array, Array]:
    """The low and the high 16 bits of 32."""
    return (x & np.uint32(0xFFFF)).astype(np.uint16), (x >> np.uint32(16)).astype(np.uint16)


def joined(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))
