"""Search at inference: which of several answers to give, and how often it is right; see `choose.SEARCHES`."""

from fastrl.search.choose import SEARCHES, Candidates, Search, best_at_k, best_of, pass_at_k, vote

__all__ = ["SEARCHES", "Candidates", "Search", "best_at_k", "best_of", "pass_at_k", "vote"]
