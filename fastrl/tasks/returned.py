"""What a function of the user returned, as plain Python values: numbers, verdicts, texts."""

from __future__ import annotations

import math
import numbers

LARGEST = 1e15
"""Rewards beyond this are refused: the squares of a group's differences would leave float32."""
NUMBER = f"a finite number of at most {LARGEST:g} in size"


def number(value: object) -> float | None:
    """A finite number within LARGEST, of Python, numpy or torch, as a float; None for anything else."""
    plain = _plain(value)
    if not isinstance(plain, numbers.Real):
        return None
    try:
        converted = float(plain)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return converted if math.isfinite(converted) and abs(converted) <= LARGEST else None


def truth(value: object) -> bool | None:
    """A truth value, of Python, numpy or torch, or the number 0 or 1; None for anything else."""
    plain = _plain(value)
    return bool(plain) if isinstance(plain, numbers.Real) and plain in (0, 1) else None


def items(value: object) -> list[object] | None:
    """The items of a list, a tuple, or a numpy array or tensor; None for anything else."""
    to_list = getattr(value, "tolist", None)
    if callable(to_list):
        value = to_list()
    return list(value) if isinstance(value, list | tuple) else None


def is_text(value: object) -> bool:
    """Whether it is a text that can be written as UTF-8: no half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: object) -> object:
    """The Python number in an array or a tensor of one element."""
    shape, item = getattr(value, "shape", None), getattr(value, "item", None)
    if callable(item) and isinstance(shape, tuple) and math.prod(shape) == 1:
        return item()
    return value
