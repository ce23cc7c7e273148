"""One of n answers to a prompt, by a reward or by their vote.  A way to search is a row of SEARCHES; plain
Python, no torch.

What n answers are worth is estimated for every k <= n from the same n: of the best by the share of all
subsets of k in which the right one is chosen, of votes by the share of those subsets that lie next to each
other.  The first k alone would waste the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """n independent answers to one prompt.

    right   what the verifier says of each
    logp    mean log-probability of each one's tokens, nats
    reward  what judges them at inference, NaN where it does not apply; empty where nothing judges them
    answer  what each comes down to, such as a number, None for no answer; empty where the task does not say
    """

    right: Sequence[bool]
    logp: Sequence[float]
    reward: Sequence[float] = ()
    answer: Sequence[Hashable] = ()


def best_of(c: Candidates) -> int:
    """The index of the answer of the highest reward, the first of equal ones."""
    return max(range(len(c.reward)), key=lambda i: _rank(c.reward[i]))


def vote(c: Candidates) -> int:
    """The index of an answer that most come down to; with rewards each counts sigmoid(reward).  Ties: by mean
    log-prob, then the first.

    Answers without one have no vote.
    Source:  Wang et al. 2022 (arXiv 2203.11171); weighted: Li et al. 2022 (arXiv 2206.02336).
    """
    voters = [i for i, answer in enumerate(c.answer) if answer is not None]
    if not voters:
        return 0
    camps: dict[Hashable, list[int]] = {}
    for i in voters:
        camps.setdefault(c.answer[i], []).append(i)

    def strength(camp: list[int]) -> tuple[float, float]:
        votes = math.fsum(_weight(c.reward[i]) for i in camp) if c.reward else float(len(camp))
        return votes, math.fsum(c.logp[i] for i in camp) / len(camp)

    return max(camps.values(), key=strength)[0]


# --- what k answers are worth -----------------------------------------------------------------------
def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that one of k answers is right, by n of which `right` are: 1 - C(n - right, k) / C(n, k),
    unbiased.

    Raises:  ValueError unless 0 <= right <= n and 1 <= k <= n.
    Source:  Chen et al. 2021 (arXiv 2107.03374).  1 - (1 - right/n)^k is biased.
    """
    if not 0 <= right <= n or not 1 <= k <= n:
        raise ValueError(
            f"pass_at_k: expected 0 <= right <= n and 1 <= k <= n, got n={n}, right={right}, k={k}"
        )
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def best_at_k(c: Candidates, k: int) -> float:
    """Probability that the answer of the highest reward of k is right: the mean over all subsets of k; equal
    rewards by lot.

    Raises:  ValueError unless 1 <= k <= n.
    """
    n = len(c.right)
    if not 1 <= k <= n:
        raise ValueError(f"best_at_k: expected 1 <= k <= {n}, got {k}")
    order = sorted(range(n), key=lambda i: _rank(c.reward[i]))
    found, below = 0.0, 0
    while below < n:
        tied = [i for i in order[below:] if _rank(c.reward[i]) == _rank(c.reward[order[below]])]
        top = math.comb(below + len(tied), k) - math.comb(below, k)  # subsets whose best is one of these
        found += top / math.comb(n, k) * sum(c.right[i] for i in tied) / len(tied)
        below += len(tied)
    return found


def vote_at_k(c: Candidates, k: int) -> float:
    """Probability that the vote of k is right: the mean over the n // k runs of k answers that share none."""
    n = len(c.right)
    if not 1 <= k <= n:
        raise ValueError(f"vote_at_k: expected 1 <= k <= {n}, got {k}")
    starts = range(0, n - k + 1, k)
    return sum(c.right[a + vote(_part(c, a, a + k))] for a in starts) / len(starts)


def _part(c: Candidates, a: int, b: int) -> Candidates:
    return Candidates(right=c.right[a:b], logp=c.logp[a:b], reward=c.reward[a:b], answer=c.answer[a:b])


def _rank(reward: float) -> float:
    return -math.inf if math.isnan(reward) else reward


def _weight(reward: float) -> float:
    """sigmoid(reward), 0 where there is none: a vote is never negative."""
    if math.isnan(reward):
        return 0.0
    return 1 / (1 + math.exp(-reward)) if reward >= 0 else math.exp(reward) / (1 + math.exp(reward))


# --- the table --------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A way to choose.

    choose   candidates -> the index of the answer to give
    at_k     (candidates, k) -> probability that what is chosen of k is right
    reward   whether it cannot do without rewards;  answer  without what the answers come down to
    """

    choose: Callable[[Candidates], int]
    at_k: Callable[[Candidates, int], float]
    reward: bool = False
    answer: bool = False


SEARCHES: dict[str, Search] = {
    "best_of": Search(choose=best_of, at_k=best_at_k, reward=True),
    "vote": Search(choose=vote, at_k=vote_at_k, answer=True),
}
