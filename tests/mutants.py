"""Are the tests worth anything: plant faults, one at a time, and see that a test fails.

    python tests/mutants.py [WORD ...] [--jobs 2] [--native] [--list]

The faults are rows of tests/helpers/mutant_table.py.  Each is planted in a copy of the tree, in a temporary
folder; the work tree is never touched.  First the tests of all rows must pass there without a fault; then
each row's tests run with it, up to the first that fails.  Words choose rows whose file or meaning contains
one.  Rows of csrc/ need a build and are run with --native alone.

Exit status 1 if a fault survives that is not known to be equivalent, if one that is said to be equivalent
is killed, or if a row no longer fits the sources.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))

from planting import main

if __name__ == "__main__":
    sys.exit(main())
