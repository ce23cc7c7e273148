"""One planted fault: what is replaced by what, where, and which tests run (see tests/mutants.py).

A fault is one plausible slip: off by one, a wrong mask, denominator, sign or order, something forgotten.  The
old text occurs exactly once in its file, which tests/test_mutants.py holds it to.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault.

    tests       files or ids under tests/ that should fail
    meaning     what is wrong with it
    equivalent  why no test can see it, for a row that is kept to say so
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    meaning: str
    equivalent: str = ""

    @property
    def native(self) -> bool:
        """Whether it needs a build."""
        return self.file.startswith("csrc/")


def rows_of(file: str, tests: str, *faults: tuple[str, ...]) -> list[Mutant]:
    """Faults of one file with the same tests: (old, new, meaning[, why it is equivalent])."""
    return [Mutant(file, old, new, tuple(tests.split()), *rest) for old, new, *rest in faults]
