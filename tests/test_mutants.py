"""The table of planted faults fits the sources, and a fault is planted in a copy alone."""

from __future__ import annotations

from dataclasses import replace

import planting
import pytest
from mutant import Mutant
from mutant_table import MUTANTS

SMALL = Mutant("kernels/gae.py", "gamma * lam", "gamma", ("test_files.py",), "lambda is 1")


def test_every_fault_can_be_planted():
    """Wrong: a row whose text has moved on, which would plant nothing and test nothing."""
    assert planting.misfits(MUTANTS) == []


def test_there_are_enough_of_them_and_each_is_one():
    planted = [(m.file, m.old, m.new) for m in MUTANTS]
    assert len(set(planted)) == len(planted) >= 60
    assert sum("(part B)" in m.meaning for m in MUTANTS) == 11


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"old": "no such text"}, "found it 0 times"),
        ({"old": "gamma"}, "expected 'gamma' once, found it"),
        ({"new": SMALL.old}, "is replaced by itself"),
        ({"file": "kernels/none.py"}, "found it 0 times"),
        ({"tests": ("kernels/test_none.py::test_x",)}, "there is no tests/kernels/test_none.py::test_x"),
    ],
)
def test_a_row_that_does_not_fit_is_named(change, told):
    row = replace(SMALL, **change)
    assert any(told in line for line in planting.misfits([row]))


def test_what_is_wrong():
    """A survivor, one that is said to be equivalent and is killed, and tests that did not run."""
    states = {state: planting.Outcome(SMALL, state, 1.0).wrong for state in ("killed", "survived", "broken")}
    assert states == {"killed": False, "survived": True, "broken": True}
    known = replace(SMALL, equivalent="why")
    assert planting.Outcome(known, "killed", 1.0).wrong
    assert not planting.Outcome(known, "equivalent", 1.0).wrong
    assert (
        planting.report([planting.Outcome(SMALL, "killed", 1.0), planting.Outcome(known, "killed", 1.0)]) == 1
    )
