"""Methods as rows of a table; see `objective.ALGORITHMS`."""

from fastrl.algorithms.aggregate import Totals
from fastrl.algorithms.objective import ALGORITHMS, Algorithm
from fastrl.methods.grpo.options import choose_algorithm

__all__ = ["ALGORITHMS", "Algorithm", "Totals", "choose_algorithm"]
