"""gae in Triton: one program a sequence, blocks of tokens from its end, one launch.

What a token needs of those after it is one number, the state.  For a token with reward r and value v,

    advantage = r + state - v      state' = gamma (v + lam advantage) = c + a state
    a = gamma lam                  c = gamma (lam r + (1 - lam) v)

and an observation leaves it unchanged (a = 1, c = 0).  So a block is a scan of (a, c), in which each place
holds the token *after* its own; the state of the block's first place is carried to the block before it.
c = gamma (v + lam (r - v)) would be equal, but with an error of the size of v at every step where the values
of a long sequence cancel.  Where a is 0, a NaN of a later token must not pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import on_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# least and most tokens that a program holds: a power of two near the mean length, found without the lengths
BLOCKS = (128, 2048)
EACH = 8  # tokens of a thread


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit
def _before(a_later, c_later, a, c):  # type: ignore[no-untyped-def]
    """Two steps as one; the scan runs backwards, so the steps so far are later ones."""
    return a * a_later, tl.where(a == 0, c, c + a * c_later)


@triton.jit
def gae_kernel(  # type: ignore[no-untyped-def]
    reward,
    value,
    cu_seqlens,
    mask,
    advantage,
    returns,
    gamma,
    lam,
    rest,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    start, end = tl.load(cu_seqlens + s).to(tl.int64), tl.load(cu_seqlens + s + 1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    decay = gamma * lam
    carry = gamma * 0.0
    for k in range(0, tl.cdiv(end - start, BLOCK)):
        t = end - (k + 1) * BLOCK + lane
        inside = t >= start
        live, following = inside, inside & (t + 1 < end)
        if MASKED:
            live = tl.load(mask + t, inside, 0) != 0
            following = tl.load(mask + t + 1, following, 0) != 0
        r = tl.load(reward + t + 1, following, 0.0).to(tl.float32)
        v = tl.load(value + t + 1, following, 0.0).to(tl.float32)
        a = tl.where(following, decay, 1.0)
        c = gamma * tl.where(decay == 0, v, lam * r + rest * v)
        a, c = tl.associative_scan((a, c), 0, _before, reverse=True)
        state = tl.where(a == 0, c, c + a * carry)
        carry = tl.sum(tl.where(lane == 0, state, 0.0), 0)
        r = tl.load(reward + t, live, 0.0).to(tl.float32)
        v = tl.load(value + t, live, 0.0).to(tl.float32)
        a = tl.where(live, r + state - v, 0.0)
        tl.store(advantage + t, a, inside)
        tl.store(returns + t, a + v, inside)


# --- launch -----------------------------------------------------------------------------------------
def forward(
    reward: Tensor, value: Tensor, cu_seqlens: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantage and return, each (T,); an empty mask means every token."""
    T, S = reward.shape[0], cu_seqlens.shape[0] - 1
    advantage, returns = (torch.empty(T, dtype=torch.float32, device=reward.device) for _ in range(2))
    if T:
        tokens = block(T, S)
        with on_device(reward):
            gae_kernel[(S,)](
                reward.contiguous(),
                value.contiguous(),
                cu_seqlens.contiguous(),
                mask.contiguous().view(torch.uint8),
                advantage,
                returns,
                gamma,
                lam,
                1 - lam,
                MASKED=mask.numel() > 0,
                BLOCK=tokens,
                **options(tokens),
            )
    return advantage, returns


def block(T: int, S: int) -> int:
    """Tokens a program holds at once."""
    low, high = BLOCKS
    return min(high, max(low, triton.next_power_of_2(-(-T // S))))


def options(tokens: int) -> dict[str, int | bool]:
    """Enough warps for EACH tokens a thread."""
    return {"num_warps": max(1, tokens // (32 * EACH)), "enable_fp_fusion": True}
