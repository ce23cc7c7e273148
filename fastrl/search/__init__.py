"""Search at inference: which of several answers to give, and how often that is right;
see `choose.SEARCHES`.
"""

from fastrl.search.choose import SEARCHES, Candidates, Search, best_at_k, best_of, pass_at_k, vote

__all__ = ["SEARCHES", "Candidates", "Search", "best_at_k", "best_of", "pass_at_k", "vote"]
