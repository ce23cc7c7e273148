"""Draw one token per row by Gumbel-max, with the log-probabilities that training needs.

    d = (logits - max logits) / temperature
    token = argmax_v (d_v - log E_v)        E_v = -log1p(-u_v)        u_v = (x_v + 1/2) 2^-32
    logp           = log softmax(d)[token]                        (nats: temperature only, full vocabulary)
    behaviour_logp = log softmax(d over the survivors)[token]     (nats: what the token was drawn from)

x_v is a Philox word that depends on (seed, sequence, position, v) alone, so a token does not depend on the
batch it was drawn in.  The same token wins the race argmin_v (E_v / exp(d_v)), which the kernels run: they
have exp(d) already, for the sums.

Filters apply in the order top_k, top_p, min_p, each to the distribution that the one before it left,
renormalised:

    top_k   keep v unless at least top_k tokens are more probable
    top_p   keep v if the tokens more probable than v hold less than top_p of the mass
    min_p   keep v if p_v >= min_p max p

Each is a floor under d, so equally probable tokens survive or fall together and the most probable one always
survives.  The mass of a token is an integer, floor(exp(d) 2^n): sums are the same in any order, and every
implementation keeps the same tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels._backend import is_exact, pick, register, register_triton, route, unbuilt
from fastrl.kernels._check import FLOATS, INTS, compute_dtype, dims, same_device
from fastrl.kernels._contexts import ignore_autocast
from fastrl.kernels._launch import FLOAT_CODES
from fastrl.kernels._native import sample as native
from fastrl.kernels._philox import interleave, philox, split, uniform
from fastrl.kernels.token_logp import forward_op as token_logp_op


class Sample(NamedTuple):
    """One draw per row: token (B,) int64; logp, behaviour_logp, entropy (B,) in nats, fp32 or fp64."""

    token: Tensor
    logp: Tensor
    behaviour_logp: Tensor
    entropy: Tensor


# --- reference --------------------------------------------------------------------------------------
def reference(
    logits: Tensor,
    seed: Tensor,
    sequence: Tensor,
    position: Tensor,
    temperature: Tensor,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition: token, logp, behaviour_logp and entropy, each (B,)."""
    greedy = temperature == 0
    x = logits.to(compute_dtype(logits))
    d = (x - x.amax(-1, keepdim=True)) / torch.where(greedy, 1, temperature)[:, None]
    e = d.exp()
    s = e.sum(-1)
    score = d - exponential(seed, sequence, position, d.shape[1]).log_()
    kept = s
    if top_k or top_p < 1 or min_p:
        keep = d >= _floor(d, top_k, top_p, min_p)
        kept = torch.where(keep, e, 0).sum(-1)
        score = torch.where(keep, score, -torch.inf)
    token = torch.where(greedy, d.argmax(-1), score.argmax(-1))
    at = d.gather(1, token[:, None]).squeeze(1)
    entropy = s.log() - (e * torch.where(e > 0, d, 0)).sum(-1) / s
    return token, at - s.log(), torch.where(greedy, 0, at - kept.log()), entropy


def exponential(seed: Tensor, sequence: Tensor, position: Tensor, V: int) -> Tensor:
    """(B, V) float64 draws of a unit exponential; -log of one is a Gumbel draw."""
    block = torch.arange((V + 3) // 4, device=seed.device)
    low, high = split(sequence[:, None])
    k0, k1 = split(seed[:, None])
    words = philox((block[None], position[:, None] & 0xFFFFFFFF, low, high), (k0, k1))
    return uniform(interleave(words, V)).neg_().log1p_().neg_()


def _floor(d: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """(B, 1): tokens with d below it are filtered out."""
    V = d.shape[1]
    floor = d.new_full((d.shape[0], 1), math.log(min_p) if min_p else -math.inf)
    among = d.new_full((), -math.inf)
    if 0 < top_k < V:
        among = d.topk(top_k, dim=-1).values[:, -1:]
        floor = torch.maximum(floor, among)
    if top_p < 1:
        ordered = d.sort(dim=-1, descending=True).values
        mass = torch.where(ordered >= among, ordered.double().exp() * 2.0 ** mass_bits(V), 0).long()
        before = mass.cumsum(-1) - mass
        limit = (top_p * mass.sum(-1, keepdim=True).double()).long().clamp(min=1)
        count = (before < limit).sum(-1, keepdim=True)
        floor = torch.maximum(floor, ordered.gather(1, count - 1))
    return floor


def mass_bits(V: int) -> int:
    """n such that V masses of up to 2^n add up to less than 2^62."""
    return 62 - V.bit_length()


register("sample", "reference", forward=reference)


# --- kernels ----------------------------------------------------------------------------------------
register(
    "sample",
    "cpu",
    dtypes=tuple(FLOAT_CODES),
    missing=unbuilt("sample_forward_cpu"),
    forward=native.forward,
)

register_triton("sample", "sample", "forward")


# --- registration -----------------------------------------------------------------------------------
@torch.library.custom_op("fastrl::sample", mutates_args=())
def forward_op(
    logits: Tensor,
    seed: Tensor,
    sequence: Tensor,
    position: Tensor,
    temperature: Tensor,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return pick("sample", logits, "forward")(
        logits, seed, sequence, position, temperature, top_k, top_p, min_p
    )


@forward_op.register_fake
def _(logits, seed, sequence, position, temperature, top_k, top_p, min_p):  # type: ignore[no-untyped-def]
    B = logits.shape[0]
    return logits.new_empty(B, dtype=torch.int64), *(
        logits.new_empty(B, dtype=compute_dtype(logits)) for _ in range(3)
    )


ignore_autocast("sample")


# --- public -----------------------------------------------------------------------------------------
def sample(
    logits: Tensor,
    *,
    seed: int | Tensor,
    sequence: Tensor,
    position: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Sample:
    """One token per row and its log-probability (nats) before and after the filters; not differentiable.

    The draw is a function of (seed, sequence, position) and the row: `sequence` is the sample's identity (64
    bits), `position` the index of the token drawn (below 2^32).  Never use the same triple for two draws.
    Temperature 0 is greedy: the first of the largest logits, with logp and entropy at temperature 1 and
    behaviour_logp 0.

    In exact mode logp and entropy (and behaviour_logp, without filters) are computed by `token_logp`, which
    reads the logits again: they have the bits of a trainer's log-probs of the same logits.

    Shapes:  logits (B, V) bf16|fp16|fp32|fp64;  sequence, position (B,) int;  seed an int or (B,) int64;
             temperature a float or (B,)
             ->  token (B,) int64;  logp, behaviour_logp, entropy (B,) fp32 (fp64 for fp64 logits).
    Memory:  the results; filters need 8 bytes per token of the vocabulary and thread on CPU, 3 bytes per
             logit on CUDA.  The PyTorch definition (fp16 on CPU, fp64) takes about 50 bytes per logit while
             it runs, and sorts each row for top_p.
    Raises:  ValueError or TypeError naming the argument.
    Source:  Gumbel-max; filters in the order of transformers' logits warpers, ties kept together.
    """
    B, V = dims("logits", logits, "B V", FLOATS)
    dims("sequence", sequence, "B", INTS, B=B)
    dims("position", position, "B", INTS, B=B)
    same_device(logits=logits, sequence=sequence, position=position)
    if V == 0:
        raise ValueError(
            f"logits: expected a vocabulary of at least one token, got shape {tuple(logits.shape)}"
        )
    if top_k < 0:
        raise ValueError(f"top_k: expected 0 (keep all) or a positive count, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a fraction in (0, 1], got {top_p}; 1 keeps all")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p: expected a fraction in [0, 1], got {min_p}; 0 keeps all")
    tau = _per_row("temperature", temperature, B, compute_dtype(logits), logits.device)
    key = _per_row("seed", seed, B, torch.int64, logits.device)
    if not isinstance(temperature, Tensor) and not temperature >= 0:
        raise ValueError(f"temperature: expected 0 (greedy) or a positive number, got {temperature}")

    tensors = (logits.detach(), key, sequence.long(), position.long(), tau)
    run = route(forward_op, "sample", "forward", *tensors)
    drawn = Sample(*run(*tensors, top_k, float(top_p), float(min_p)))
    if not is_exact():
        return drawn
    filtered = 0 < top_k < V or top_p < 1 or min_p > 0
    return _as_scored(drawn, tensors[0], tau, filtered)


def _as_scored(drawn: Sample, logits: Tensor, temperature: Tensor, filtered: bool) -> Sample:
    """The draw with the log-prob and the entropy of `token_logp`, which adds up in another order."""
    greedy = temperature == 0
    logp, entropy, _, _ = token_logp_op(logits, drawn.token, torch.where(greedy, 1, temperature), True, False)
    behaviour = drawn.behaviour_logp if filtered else torch.where(greedy, 0, logp)
    return Sample(drawn.token, logp, behaviour, entropy)


def _per_row(name: str, x: float | Tensor, B: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not isinstance(x, Tensor):
        return torch.full((B,), x, dtype=dtype, device=device)
    if x.shape not in ((), (B,)):
        raise ValueError(f"{name}: expected a number or shape ({B},), got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected it on {device} beside the logits, got {x.device}")
    return x.detach().to(dtype).expand(B).contiguous()
