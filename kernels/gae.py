"""Generalised advantage estimation over packed sequences.

Backwards over the tokens of a sequence that the policy chose, with next_value = next_advantage = 0 after the
last one:

    delta[t]     = reward[t] + gamma next_value - value[t]
    advantage[t] = delta[t] + gamma lam next_advantage
    return[t]    = advantage[t] + value[t]

A token that is masked out (an observation) is skipped: the carries pass it unchanged, and its reward and
value are not read.

The reference solves advantage[t] = b[t] + a[t] advantage[t+1] by doubling: log2 T steps over all tokens, no
loop over time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels._backend import pick, register, register_triton, unbuilt
from fastrl.kernels._check import FLOATS, compute_dtype, dims, ends, same_device
from fastrl.kernels._contexts import ignore_autocast
from fastrl.kernels._native import gae as native


class Gae(NamedTuple):
    """Advantages and returns (T,), in the reward's unit; 0 where masked out.  fp32, or float64 for float64
    inputs.
    """

    advantage: Tensor
    returns: Tensor


# --- reference --------------------------------------------------------------------------------------
def reference(
    reward: Tensor, value: Tensor, cu_seqlens: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """The definition: advantage and return, each (T,); an empty mask means every token."""
    T = reward.shape[0]
    reward, value = reward.to(compute_dtype(reward)), value.to(compute_dtype(reward))
    t = torch.arange(T, device=reward.device)
    end = cu_seqlens[1:].long()[torch.searchsorted(cu_seqlens[1:].long(), t, right=True)]
    live = mask if mask.numel() else torch.ones_like(t, dtype=torch.bool)
    reward, value = torch.where(live, reward, 0), torch.where(live, value, 0)
    # the next live token, T if there is none
    following = torch.cat([_next_live(t, live)[1:], t.new_full((min(T, 1),), T)])
    follows = following < end
    next_value = torch.where(follows, value[torch.where(follows, following, 0)], 0)
    b = torch.where(live, reward + gamma * next_value - value, 0)
    a = torch.where(live, torch.full_like(b, gamma * lam), 1)
    advantage = torch.where(live, _scan(torch.where(t + 1 < end, a, 0), b), 0)
    return advantage, advantage + value


def _next_live(t: Tensor, live: Tensor) -> Tensor:
    """(T,) index of the first live token at or after each, T if there is none."""
    return torch.where(live, t, t.shape[0]).flip(0).cummin(0).values.flip(0)


def _scan(a: Tensor, b: Tensor) -> Tensor:
    """x with x[t] = b[t] + a[t] x[t+1] and x[T] = 0."""
    step = 1
    while step < b.shape[0]:
        # then (a, b)[t] spans 2 step tokens; where a is 0, a NaN of the next sequence must not pass
        reach = a[:-step]
        b = torch.cat([torch.where(reach == 0, b[:-step], b[:-step] + reach * b[step:]), b[-step:]])
        a = torch.cat([reach * a[step:], torch.zeros_like(a[-step:])])
        step *= 2
    return b


register("gae", "reference", forward=reference)


# --- kernels ----------------------------------------------------------------------------------------
register("gae", "cpu", missing=unbuilt("gae_cpu"), forward=native.forward)
register_triton("gae", "gae", "forward")


# --- registration -----------------------------------------------------------------------------------
# defined by its schema: a call of a `custom_op` costs 17 us more on the host
torch.library.define(
    "fastrl::gae",
    "(Tensor reward, Tensor value, Tensor cu_seqlens, Tensor mask, float gamma, "
    "float lam) -> (Tensor, Tensor)",
)
forward_op = torch.ops.fastrl.gae.default


@torch.library.impl("fastrl::gae", "default")
def _run(
    reward: Tensor, value: Tensor, cu_seqlens: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    # in the op: torch.compile cannot trace code that reads values
    ends("cu_seqlens", cu_seqlens, reward.shape[0])
    return pick("gae", reward, "forward")(reward, value, cu_seqlens, mask, gamma, lam)


@torch.library.register_fake("fastrl::gae")
def _(reward, value, cu_seqlens, mask, gamma, lam):  # type: ignore[no-untyped-def]
    return tuple(reward.new_empty(reward.shape, dtype=compute_dtype(reward)) for _ in range(2))


ignore_autocast("gae")


# --- public -----------------------------------------------------------------------------------------
def gae(
    reward: Tensor, value: Tensor, cu_seqlens: Tensor, *, gamma: float, lam: float, mask: Tensor | None = None
) -> Gae:
    """Advantage and return of every token, in the reward's unit, before any whitening; not differentiable.

    `value[t]` is predicted from the tokens before t.  A sequence's end is terminal: to bootstrap a truncated
    one, add gamma times the value of its last state to its last reward.

    Shapes:  reward, value (T,) bf16|fp16|fp32|fp64;  cu_seqlens (S+1,) int32;  mask (T,) bool, False for
             observation tokens
             ->  advantage, returns (T,) fp32 (fp64 for fp64 rewards), 0 where mask is False.
    Memory:  nothing beside the results; the reference: a dozen (T,) vectors.
    Raises:  ValueError or TypeError naming the argument.
    Source:  Schulman et al. 2016, "High-dimensional continuous control using generalized advantage
             estimation", eq. 16.
    """
    (T,) = dims("reward", reward, "T", FLOATS)
    dims("value", value, "T", FLOATS, T=T)
    dims("cu_seqlens", cu_seqlens, "S+1", (torch.int32, torch.int64))
    if mask is not None:
        dims("mask", mask, "T", (torch.bool,), T=T)
    same_device(reward=reward, value=value, cu_seqlens=cu_seqlens, mask=mask)
    for name, x in (("gamma", gamma), ("lam", lam)):
        if not 0 <= x <= 1:
            raise ValueError(f"{name}: expected a discount in [0, 1], got {x}")
    absent = torch.empty(0, dtype=torch.bool, device=reward.device)
    live = absent if mask is None else mask
    return Gae(*forward_op(reward.detach(), value.detach(), cu_seqlens, live, float(gamma), float(lam)))
