"""Choosing one of n answers to a prompt, by a reward or by their vote.  Each search is a row of SEARCHES;
plain Python, no torch.

The accuracy of a search over k answers is estimated for every k <= n from the same n answers.  For the best
of k it is the share of all subsets of k in which a right answer is chosen; for votes, the share over disjoint
runs of k answers.  The first k alone would waste the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """n independent answers to one prompt.

    right   the verifier's verdict on each
    logp    mean log-probability of each one's tokens, nats
    reward  of each at inference, NaN where it does not apply; empty without a reward
    answer  the final answer of each, such as a number, None for no answer; empty where the task extracts none
    """

    right: Sequence[bool]
    logp: Sequence[float]
    reward: Sequence[float] = ()
    answer: Sequence[Hashable] = ()


def best_of(c: Candidates) -> int:
    """The index of the answer with the highest reward, the first of equal ones."""
    ranks = [_rank(reward) for reward in c.reward]
    return ranks.index(max(ranks))


def vote(c: Candidates) -> int:
    """The index of an answer that most agree on; with rewards, each vote weighs sigmoid(reward).  Ties: by
    mean log-prob, then the first.

    Candidates without a final answer have no vote.
    Source:  Wang et al. 2022 (arXiv 2203.11171); weighted: Li et al. 2022 (arXiv 2206.02336).
    """
    camps: dict[Hashable, list[int]] = {}
    for i, answer in enumerate(c.answer):
        if answer is not None:
            camps.setdefault(answer, []).append(i)
    if not camps:
        return 0

    def strength(camp: list[int]) -> tuple[float, float]:
        votes = float(len(camp))
        if c.reward:
            votes = math.fsum(_weight(c.reward[i]) for i in camp)
        mean_logp = math.fsum(c.logp[i] for i in camp) / len(camp)
        return votes, mean_logp

    winner = max(camps.values(), key=strength)
    return winner[0]


# --- accuracy with k answers -------------------------------------------------------------------------
def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that one of k answers is right, estimated from n answers with `right` right ones: 1 - C(n -
    right, k) / C(n, k), unbiased.

    Raises:  ValueError unless 0 <= right <= n and 1 <= k <= n.
    Source:  Chen et al. 2021 (arXiv 2107.03374).  1 - (1 - right/n)^k is biased.
    """
    if not 0 <= right <= n or not 1 <= k <= n:
        raise ValueError(
            f"pass_at_k: expected 0 <= right <= n and 1 <= k <= n, got n={n}, right={right}, k={k}"
        )
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def best_at_k(c: Candidates, k: int) -> float:
    """Probability that the answer with the highest reward of k is right: the mean over all subsets of k;
    equal rewards are drawn by lot.

    Raises:  ValueError unless 1 <= k <= n.
    """
    n = len(c.right)
    if not 1 <= k <= n:
        raise ValueError(f"best_at_k: expected 1 <= k <= {n}, got {k}")

    ranks = [_rank(reward) for reward in c.reward]
    order = sorted(range(n), key=lambda i: ranks[i])
    probability, below = 0.0, 0
    while below < n:
        tied = [i for i in order[below:] if ranks[i] == ranks[order[below]]]
        through = below + len(tied)
        top = math.comb(through, k) - math.comb(below, k)  # subsets with one of these as their best
        right = sum(c.right[i] for i in tied)
        probability += top / math.comb(n, k) * right / len(tied)
        below = through
    return probability


def vote_at_k(c: Candidates, k: int) -> float:
    """Probability that the vote of k is right: the mean over the n // k disjoint runs of k answers."""
    n = len(c.right)
    if not 1 <= k <= n:
        raise ValueError(f"vote_at_k: expected 1 <= k <= {n}, got {k}")
    starts = range(0, n - k + 1, k)
    right = [c.right[start + vote(_part(c, start, start + k))] for start in starts]
    return sum(right) / len(starts)


def _part(c: Candidates, a: int, b: int) -> Candidates:
    part = slice(a, b)
    return Candidates(right=c.right[part], logp=c.logp[part], reward=c.reward[part], answer=c.answer[part])


def _rank(reward: float) -> float:
    return -math.inf if math.isnan(reward) else reward


def _weight(reward: float) -> float:
    """sigmoid(reward), 0 without one: a vote is never negative."""
    if math.isnan(reward):
        return 0.0
    if reward >= 0:
        return 1 / (1 + math.exp(-reward))
    return math.exp(reward) / (1 + math.exp(reward))


# --- the table --------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A way to choose.

    choose   candidates -> the index of the answer to give
    at_k     (candidates, k) -> probability that the one chosen of k is right
    reward   whether it needs rewards
    answer   whether it needs final answers
    """

    choose: Callable[[Candidates], int]
    at_k: Callable[[Candidates, int], float]
    reward: bool = False
    answer: bool = False


SEARCHES: dict[str, Search] = {
    "best_of": Search(choose=best_of, at_k=best_at_k, reward=True),
    "vote": Search(choose=vote, at_k=vote_at_k, answer=True),
}
