"""Methods as rows of a table; see `objective.ALGORITHMS`."""

from fastrl.algorithms.aggregate import Totals
from fastrl.algorithms.objective import ALGORITHMS, Algorithm

__all__ = ["ALGORITHMS", "Algorithm", "Totals"]
