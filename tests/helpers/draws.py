"""What every implementation of sample owes, judged against float64 and against the survivors of the
definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl.kernels.sample import _floor, exponential, sample

FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 5},
    {"top_p": 0.9},
    {"min_p": 0.02},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.01},
    {"top_k": 1},
    {"top_p": 1e-9},
)


def keys(B: int) -> dict[str, Tensor]:
    """Identities that use all 64 bits of the seed and of the sequence, and 32 of the position."""
    low, high = -(2**63), 2**63 - 1
    return {
        "seed": torch.randint(low, high, (B,)),
        "sequence": torch.randint(low, high, (B,)),
        "position": torch.randint(2**32, (B,)),
    }


def distances(logits: Tensor, temperature: Tensor) -> Tensor:
    x = logits if logits.dtype == torch.float64 else logits.float()
    return (x - x.amax(-1, keepdim=True)) / torch.where(temperature == 0, 1, temperature).to(x.dtype)[:, None]


def survivors(
    logits: Tensor, temperature: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """(B, V): what the definition keeps, of the fp32 distances that it computes."""
    d = distances(logits, temperature)
    return d >= _floor(d, top_k, top_p, min_p)


def judge(
    logits: Tensor, temperature: Tensor | None = None, key: dict[str, Tensor] | None = None, **filters: Any
) -> Any:
    """Draw, and hold the draw to its definition: the best score among the survivors to 1e-5, the numbers to
    1e-5 of float64.
    """
    B, V = logits.shape
    tau = torch.ones(B) if temperature is None else temperature
    key = keys(B) if key is None else key
    out = sample(logits, **key, temperature=tau, **filters)
    assert out.token.dtype == torch.int64 and ((out.token >= 0) & (out.token < V)).all()
    greedy, at = tau == 0, out.token[:, None]
    d = distances(logits.double(), tau)
    keep = survivors(logits, tau, **filters) | greedy[:, None]
    assert keep.gather(1, at).all(), "a token that the filters leave out"
    noise = -exponential(key["seed"], key["sequence"], key["position"], V).log()
    score = torch.where(keep, d + torch.where(greedy[:, None], 0, noise), -torch.inf)
    assert (score.amax(-1) - score.gather(1, at)[:, 0]).max() <= 1e-5, "another token has the best score"
    assert torch.equal(out.token[greedy], logits[greedy].argmax(-1))
    log_p = d.log_softmax(-1)
    kept = torch.where(keep, d, -torch.inf).log_softmax(-1).gather(1, at)[:, 0]
    truth = (log_p.gather(1, at)[:, 0], torch.where(greedy, 0, kept), torch.special.entr(log_p.exp()).sum(-1))
    for mine, right in zip(out[1:], truth, strict=True):
        assert mine.dtype == torch.float32 and (mine.double() - right).abs().max() <= 1e-5
    return out


def tied(B: int, V: int) -> Tensor:
    """Logits of a few values each, zeros of both signs among them: ties that straddle every floor."""
    return torch.randint(-2, 3, (B, V)).float() * torch.tensor([1.0, -0.5])[torch.randint(2, (B, 1))]


def noise_is_the_definition(V: int) -> None:
    """Every token of a row scores the same, but for one that is 2e-5 above the others: it must win, whichever
    it is.

    This holds every noise, and so every Philox word, to 2e-5 of itself: a word out of place is off by far
    more.
    """
    key = {name: x.expand(V) for name, x in keys(1).items()}
    even = exponential(*key.values(), V)[0].log()
    logits = (even + 2e-5 * torch.eye(V, dtype=torch.float64)).float()
    assert torch.equal(sample(logits, **key).token, torch.arange(V))


def independent_of_the_batch(B: int, V: int, **filters: Any) -> None:
    """Rows in another order, alone, and in a batch of another size: the same bits."""
    logits, key, tau = 2 * torch.randn(B, V), keys(B), torch.rand(B) + 0.5
    whole = sample(logits, **key, temperature=tau, **filters)
    for order in (torch.randperm(B)[: B // 2], torch.tensor([B - 1])):
        part = sample(
            logits[order], **{n: x[order] for n, x in key.items()}, temperature=tau[order], **filters
        )
        assert all(torch.equal(a[order], b) for a, b in zip(whole, part, strict=True))


def banned_are_never_drawn(B: int, V: int, **filters: Any) -> None:
    """Half of the tokens are -inf, among them the first and the last, and in one row all but one."""
    logits = torch.randn(B, V)
    logits[:, torch.arange(V) % 2 == 0] = -torch.inf
    logits[:, -1] = -torch.inf
    logits[0], logits[0, V // 2] = -torch.inf, -50.0
    out = judge(logits, **filters)
    assert (logits.gather(1, out.token[:, None]) > -torch.inf).all() and out.token[0] == V // 2
    assert out.logp[0] == out.behaviour_logp[0] == 0 and out.entropy[0] <= 1e-30
