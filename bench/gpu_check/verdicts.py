"""`fastrl check` on a GPU machine, without the packages of the command line."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from fastrl.run import check


@dataclass(slots=True)
class Options:
    """The options of `fastrl check`, at their defaults."""

    device: str = "auto"
    model: str | None = None


if __name__ == "__main__":
    sys.exit(check.run(Options()).exit_code)
