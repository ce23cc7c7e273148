"""`pa`, which is pyarrow, imported where a dataset is first read: benchmarks and checks of a GPU machine load
the methods, read no dataset, and have no pyarrow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__all__ = ["pa"]


class _Late:
    """A module that is imported when something of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> object:
        return getattr(importlib.import_module(self._name), name)


if TYPE_CHECKING:
    import pyarrow as pa
else:
    pa = _Late("pyarrow")
