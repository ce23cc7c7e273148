"""The tables of policy_loss: surrogates, and estimators of the KL to the reference.

    d = logp - old_logp, or its mean over the sequence where the ratio is per sequence
    r = exp d        e = logp - ref_logp        A the advantage

An entry gives a value and its derivative with respect to the token's logp, where d, e and logp all move one
for one.  The fused op uses the derivative; autograd through the value (and its detaches) gives the same,
which a test checks for every row.

|d| and |e| are bounded by 20 before any exponential, and their derivatives are not: where the policy has
drifted far, the gradient is the one at the bound, not 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

EXPONENT = 20.0

Terms = tuple[Tensor, Tensor | None]  # value, derivative
Gate = tuple[Tensor, Tensor, Tensor]  # bool: held at the lower bound, at the upper bound, at the cap


def bounded(x: Tensor) -> Tensor:
    """x within +-20, with the derivative of x; NaN for an infinity, as for NaN."""
    return x.detach().clamp(-EXPONENT, EXPONENT) + (x - x.detach())


@dataclass(frozen=True, slots=True)
class Surrogate:
    """One way to weigh a token by its advantage.

    torch   `torch(d, logp, advantage, **params) -> (value, derivative)`, all (T,); the loss contains -value.
            In a surrogate of your own the derivative may be None: autograd then differentiates the value, and
            its detached parts count as constants.
    triton  the formula inside the Triton kernel: the name of a function in kernels/_triton/surrogates.py, or
            a @triton.jit function of your own with the same signature
    cpu_id  the formula inside the C++ kernel: its number in csrc/cpu/policy_loss_rows.h
    params  its parameters, at most three inside a kernel
    gate    `gate(r, advantage, **params)`: which tokens a bound holds, for the clip fractions only
    check   `check(**params)` raises ValueError for invalid parameters

    Kernels run rows of SURROGATES.  A row without an implementation for the device, and a surrogate that is
    not in the table, run `torch`.
    """

    torch: Callable[..., Terms]
    triton: str | Callable[..., object] | None = None
    cpu_id: int | None = None
    params: Mapping[str, float] = field(default_factory=dict)
    gate: Callable[..., Gate] | None = None
    check: Callable[..., None] | None = None

    def __post_init__(self) -> None:
        if self.check:
            self.check(**self.params)

    def with_params(self, **changes: float) -> Surrogate:
        """The same surrogate with some parameters changed; an unknown name is a ValueError."""
        for name in changes:
            if name not in self.params:
                known = ", ".join(self.params) or "none"
                raise ValueError(f"{name}: not a parameter of this surrogate, which has: {known}")
        return replace(self, params={**self.params, **{n: float(x) for n, x in changes.items()}})


# --- surrogates -------------------------------------------------------------------------------------
def _nll(d: Tensor, logp: Tensor, advantage: Tensor) -> Terms:
    return logp, torch.ones_like(logp)


def _pg(d: Tensor, logp: Tensor, advantage: Tensor) -> Terms:
    return advantage * logp, advantage


def _ratio(d: Tensor, logp: Tensor, advantage: Tensor) -> Terms:
    value = d.exp() * advantage
    return value, value


def _clip(d: Tensor, logp: Tensor, advantage: Tensor, *, low: float, high: float, cap: float) -> Terms:
    _clip_check(low=low, high=high, cap=cap)
    r = d.exp()
    value = torch.minimum(r.clamp(max=cap) * advantage, r.clamp(1 - low, 1 + high) * advantage)
    below, above, capped = _clip_gate(r, advantage, low=low, high=high, cap=cap)
    return value, torch.where(below | above | capped, 0, r * advantage)


def _clip_check(*, low: float, high: float, cap: float) -> None:
    if not cap > 1 + high:  # a lower cap would also cut tokens with a positive advantage
        raise ValueError(f"cap: expected more than 1 + high = {1 + high:g}, got {cap:g}")


def _clip_gate(r: Tensor, advantage: Tensor, *, low: float, high: float, cap: float) -> Gate:
    worse, better = advantage < 0, advantage > 0
    return worse & (r < 1 - low), better & (r > 1 + high), worse & (r > cap)


def _cispo(d: Tensor, logp: Tensor, advantage: Tensor, *, low: float, high: float) -> Terms:
    weight = (d.exp().clamp(low, high) * advantage).detach()
    return weight * logp, weight


def _cispo_gate(r: Tensor, advantage: Tensor, *, low: float, high: float) -> Gate:
    return r < low, r > high, torch.zeros_like(r, dtype=torch.bool)


def _sapo(d: Tensor, logp: Tensor, advantage: Tensor, *, pos: float, neg: float) -> Terms:
    r = d.exp()
    tau = torch.where(advantage > 0, torch.full_like(r, pos), neg)
    s = torch.sigmoid(tau * (r - 1))
    return 4 / tau * s * advantage, 4 * s * (1 - s) * r * advantage


def _dro(d: Tensor, logp: Tensor, advantage: Tensor, *, beta: float) -> Terms:
    return advantage * logp - 0.5 * beta * d.square(), advantage - beta * d


def _luffy_off(d: Tensor, logp: Tensor, advantage: Tensor, *, gamma: float) -> Terms:
    p = logp.exp()
    return advantage * p / (p + gamma), advantage * gamma * p / (p + gamma).square()


SURROGATES = {  # name: torch, triton, cpu_id, params
    "nll": Surrogate(_nll, "nll", 0),  # logp: supervised tokens; the advantage is ignored
    "pg": Surrogate(_pg, "pg", 1),  # A logp: REINFORCE, RLOO, GPG
    "ratio": Surrogate(_ratio, "ratio", 2),  # r A: importance weighted, unclipped
    # min(min(r, cap) A, clip(r, 1 - low, 1 + high) A): PPO, GRPO, DAPO; with ratio="sequence" GSPO.
    # cap is the dual clip of negative advantages, which is INTELLECT-2's two-sided clip
    "clip": Surrogate(
        _clip,
        "clip",
        3,
        params={"low": 0.2, "high": 0.2, "cap": math.inf},
        gate=_clip_gate,
        check=_clip_check,
    ),
    # stop(clip(r, low, high)) A logp; absolute bounds
    "cispo": Surrogate(_cispo, "cispo", 4, params={"low": 0.0, "high": 5.0}, gate=_cispo_gate),
    # 4/tau sigmoid(tau (r - 1)) A, tau by the sign of A
    "sapo": Surrogate(_sapo, "sapo", 5, params={"pos": 1.0, "neg": 1.05}),
    "dro": Surrogate(_dro, "dro", 6, params={"beta": 0.1}),  # A logp - beta/2 d^2
    # A p / (p + gamma): tokens of demonstrations
    "luffy_off": Surrogate(_luffy_off, "luffy_off", 7, params={"gamma": 0.1}),
}


def name_of(surrogate: Surrogate) -> str | None:
    """The name of a surrogate in the table, whatever its parameters; None for one of the user's own."""
    for name, row in SURROGATES.items():
        if row.torch is surrogate.torch and row.gate is surrogate.gate:
            return name
    return None


# --- KL to the reference ----------------------------------------------------------------------------
def _k1(e: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    return e, torch.ones_like(e)


def _k2(e: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * e.square(), e


def _k3(e: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.expm1(-bounded(e))
    return x + e, -x


def _k3_cut(e: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = _k3(e, d)
    return value.clamp(max=10.0), torch.where(value.detach() > 10.0, 0, slope)


def _k3_plus_cut(e: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = _k3_plus(e, d)
    return value.clamp(max=10.0), torch.where(value.detach() > 10.0, 0, slope)


def _k3_plus(e: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    k2 = 0.5 * e.square()
    return k2 + (_k3(e, d)[0] - k2).detach(), e


def _k1_is(e: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    r = d.exp()
    return r * e, r * (1 + e)


def _k3_is(e: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    r = d.exp()
    return r * _k3(e, d)[0], r * e  # the exponentials of k3 cancel in the derivative


def _absolute(e: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    return e.abs(), e.sign()


Kl = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (e, token-level d) -> value, derivative
KLS: dict[str, Kl] = {
    "k1": _k1,  # e; its expected gradient is 0, so it belongs in the reward, not in a loss
    "k2": _k2,  # e^2 / 2; its gradient is that of KL(policy || reference)
    "k3": _k3,  # exp(-e) - 1 + e, as in the GRPO paper; its gradient is that of KL(reference || policy)
    "k3+": _k3_plus,  # the value of k3 with the gradient of k2
    "k1_is": _k1_is,  # r k1: unbiased when the tokens came from the old policy
    "k3_is": _k3_is,  # r k3: as well
    "abs": _absolute,  # |e|
    "k3_cut": _k3_cut,  # min(k3, 10), as in verl: no gradient where the policy is furthest
    "k3+_cut": _k3_plus_cut,  # the same with the gradient of k2 where it is not cut off, as in NeMo-RL
}
