"""The policy loss of a packed batch: one formula, with its parts taken from tables.

    loss = sum_t weight_t ( -correction_t S_t + kl_coef KL_t - entropy_coef H_t )

S is the surrogate and KL the estimator (kernels/surrogates.py), H the entropy; `weight` holds the aggregate
with its global denominators, so the loss of a batch is the sum of the losses of its parts.

    d loss / d logp_t    = weight_t ( -correction_t dS_t + kl_coef dKL_t )
    d loss / d entropy_t = -weight_t entropy_coef

With ratio="sequence" a token's d = logp - old_logp is replaced by its sequence's mean over live tokens, which
moves one for one with the token's own logp (GSPO-token): advantages may differ within a sequence, and where
they do not this is GSPO.

Masked-out tokens are replaced before anything is computed: whatever they hold, they add exactly 0.

The fused op computes loss, metrics and both derivatives at once: one pass on CPU (csrc/cpu/policy_loss.cpp),
one kernel and its second stage in Triton.  A surrogate that is not in the table runs the same formula through
autograd.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastrl.kernels._backend import pick, register, register_triton, transformed, unbuilt
from fastrl.kernels._check import ends
from fastrl.kernels._contexts import final, ignore_autocast, kept
from fastrl.kernels._launch import gpu
from fastrl.kernels._native import policy_loss as native
from fastrl.kernels._policy_arguments import RATIOS, Columns, Options, policy_arguments
from fastrl.kernels._policy_metrics import METRICS, merge_metrics, policy_metrics
from fastrl.kernels.surrogates import KLS, SURROGATES, Surrogate, bounded

__all__ = ["KLS", "METRICS", "RATIOS", "SURROGATES", "Surrogate", "merge_metrics", "policy_loss", "reference"]


# --- reference --------------------------------------------------------------------------------------
def _formula(row: Surrogate, c: Columns, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (T,), its derivative with respect to logp (T,), and the metrics (M,).

    The derivative is NaN where the surrogate does not state one.
    """
    mask = c.mask
    if mask.numel():
        columns = zip(c._fields[:7], c, strict=False)
        c = c._replace(**{name: torch.where(mask, x, 0) for name, x in columns if x.numel()})

    token_d = c.logp - c.old_logp
    d = bounded(_sequence_mean(token_d, c) if o.ratio == "sequence" else token_d)
    value, slope = row.torch(d, c.logp, c.advantage, **row.params)
    slope = torch.full_like(d, torch.nan) if slope is None else slope
    if c.correction.numel():
        value, slope = value * c.correction, slope * c.correction
    loss, slope = -value, -slope

    e = c.logp - c.ref_logp if c.ref_logp.numel() else None
    if o.kl and e is not None:
        kl, kl_slope = KLS[o.kl](e, bounded(token_d))
        loss, slope = loss + o.kl_coef * kl, slope + o.kl_coef * kl_slope
    if o.entropy_coef and c.entropy.numel():
        loss = loss - o.entropy_coef * c.entropy

    with torch.no_grad():
        gate = row.gate(d.exp(), c.advantage, **row.params) if row.gate else None
        metrics = policy_metrics(d, token_d, e, gate, c.advantage, c.correction, c.entropy, mask)
    return loss * c.weight, slope * c.weight, metrics


def _sequence_mean(d: Tensor, c: Columns) -> Tensor:
    """The mean of d over the live tokens of each token's sequence; it has the derivative of the token's d."""
    T, cu = d.shape[0], c.cu_seqlens.long()
    of = torch.searchsorted(cu[1:], torch.arange(T, device=d.device), right=True)
    fixed = d.detach()
    total = torch.segment_reduce(fixed.double(), "sum", offsets=cu, unsafe=True)  # masked-out tokens hold 0
    live = c.mask.double() if c.mask.numel() else torch.ones_like(fixed, dtype=torch.float64)
    count = torch.segment_reduce(live, "sum", offsets=cu, unsafe=True)
    mean = (total / count.clamp(min=1)).to(d.dtype)[of]
    return mean + (d - fixed)


def reference(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, **arguments: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The definition of `policy_loss`, with its arguments: plain PyTorch, differentiable through the
    surrogate's value.
    """
    return _by_autograd(*policy_arguments(logp, old_logp, advantage, **arguments))


def _by_autograd(row: Surrogate, c: Columns, o: Options) -> tuple[Tensor, dict[str, Tensor]]:
    if o.ratio == "sequence" and not torch.compiler.is_compiling():
        ends("cu_seqlens", c.cu_seqlens, c.logp.shape[0])
    loss, _, metrics = _formula(row, c, o)
    return loss.sum(), dict(zip(METRICS, metrics.unbind(), strict=True))


def _fused(c: Columns, o: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), metrics (M,), d loss / d logp (T,) and d loss / d entropy (T,), empty without entropy."""
    named = SURROGATES[o.surrogate]
    row = replace(named, params=dict(zip(named.params, o.params, strict=True)))
    loss, slope, metrics = _formula(row, c, o)
    weight = torch.where(c.mask, c.weight, 0) if c.mask.numel() else c.weight
    dentropy = weight * -o.entropy_coef if c.entropy.numel() else c.entropy.new_empty(0)
    return loss.sum(), metrics, slope, dentropy


# "columns" serves surrogates without an implementation in the device's kernel
register("policy_loss", "reference", forward=_fused, columns=_fused)


# --- kernels ----------------------------------------------------------------------------------------
register(
    "policy_loss",
    "cpu",
    dtypes=(torch.float32,),
    missing=unbuilt("policy_loss_cpu"),
    forward=native.forward,
)
register_triton("policy_loss", "policy_loss", "forward")


# --- registration and autograd ----------------------------------------------------------------------
def _forward(
    logp: Tensor,
    entropy: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    weight: Tensor,
    ref_logp: Tensor,
    correction: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    surrogate: str,
    params: list[float],
    ratio: str,
    kl: str,
    kl_coef: float,
    entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = Columns(logp, entropy, old_logp, advantage, weight, ref_logp, correction, mask, cu_seqlens)
    if ratio == "sequence":  # in the op: torch.compile cannot trace code that reads values
        ends("cu_seqlens", cu_seqlens, logp.shape[0])
    row = SURROGATES[surrogate]
    in_kernel = row.cpu_id if gpu(logp) is None else row.triton
    run = pick("policy_loss", logp, "columns" if in_kernel is None else "forward")
    return run(c, Options(surrogate, tuple(params), ratio, kl, kl_coef, entropy_coef))


# not custom_op: its wrapper costs as much as the arithmetic of ten thousand tokens
torch.library.define("fastrl::policy_loss", torch.library.infer_schema(_forward, mutates_args=()))
torch.library.impl("fastrl::policy_loss", "CompositeExplicitAutograd", _forward)
forward_op = torch.ops.fastrl.policy_loss.default
ignore_autocast("policy_loss")


@torch.library.register_fake("fastrl::policy_loss")
def _(logp, entropy, *rest):  # type: ignore[no-untyped-def]
    return (
        logp.new_empty(()),
        logp.new_empty(len(METRICS)),
        logp.new_empty(logp.shape),
        logp.new_empty(entropy.shape),
    )


def _run(
    logp: Tensor, entropy: Tensor, rest: tuple[Tensor, ...], o: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward_op(logp, entropy, *rest, o.surrogate, o.params, o.ratio, o.kl, o.kl_coef, o.entropy_coef)


class _PolicyLoss(torch.autograd.Function):
    """The op with its gradient.

    It is not registered with register_autograd: linear_loss calls it under torch.func.vjp, which ignores a
    registered backward.
    """

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, entropy: Tensor, rest: tuple[Tensor, ...], o: Options
    ) -> tuple[Tensor, Tensor]:
        loss, metrics, dlogp, dentropy = _run(logp, entropy, rest, o)
        ctx.mark_non_differentiable(metrics)
        ctx.save_for_backward(dlogp, dentropy)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dlogp, dentropy = final("policy_loss", saved[:2], saved[2:])
        return dlogp * dloss, dentropy * dloss if ctx.needs_input_grad[1] else None, None, None


class _Transformed(_PolicyLoss):
    """The form that torch.func and torch.compile require; a call of it takes 25 us longer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logp: Tensor, entropy: Tensor, rest: tuple[Tensor, ...], o: Options) -> tuple[Tensor, ...]:  # type: ignore[override]
        return _run(logp, entropy, rest, o)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, metrics, dlogp, dentropy = output
        ctx.mark_non_differentiable(metrics, dlogp, dentropy)
        ctx.save_for_backward(dlogp, dentropy, *kept(*inputs[:2]))


def _differentiable(c: Columns, o: Options) -> tuple[Tensor, ...]:
    """Loss and metrics first."""
    if transformed():
        return _Transformed.apply(c.logp, c.entropy, c[2:], o)
    if torch.is_grad_enabled():
        return _PolicyLoss.apply(c.logp, c.entropy, c[2:], o)
    return _run(c.logp, c.entropy, c[2:], o)


# --- public -----------------------------------------------------------------------------------------
def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    *,
    surrogate: str | Surrogate,
    token_weight: Tensor,
    ratio: str = "token",
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    kl: str | None = None,
    kl_coef: float = 0.0,
    ref_logp: Tensor | None = None,
    correction: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (a sum over tokens, in nats times advantage) and its metrics.

    It is differentiable in `logp` and `entropy` only.

    `surrogate` is a row of SURROGATES or its name; `token_weight` holds the aggregate with its denominators,
    counted over the whole optimizer step; `correction` (sampler against trainer) multiplies the surrogate
    only.  ratio="sequence" takes `cu_seqlens`, the ends of whole sequences among these T tokens.  `kl` is a
    row of KLS.  Metrics are detached: see METRICS.

    Shapes:  every vector (T,), or (B, L) with one sequence a row; bf16|fp16|fp32|fp64, mask bool (True
             counts; None counts all)
             ->  loss () and metrics () in fp32 (fp64 for fp64 logp).
    Memory:  the derivative, (T,), kept for the backward, and one more with an entropy; in Triton, a third
             where the ratio is per sequence.  Float64, and surrogates that the device's kernel does not
             have, take about forty (T,) vectors while they run.
    Raises:  ValueError or TypeError naming the argument.
    Source:  Schulman et al. 2017 (PPO); Shao et al. 2024 (GRPO); Yu et al. 2025 (DAPO); Zheng et al. 2025
             (GSPO); MiniMax 2025 (CISPO); SAPO 2511.20347; Yan et al. 2025 (LUFFY).  Second derivatives are
             not provided.
    """
    row, c, o = policy_arguments(
        logp,
        old_logp,
        advantage,
        surrogate=surrogate,
        token_weight=token_weight,
        ratio=ratio,
        cu_seqlens=cu_seqlens,
        mask=mask,
        kl=kl,
        kl_coef=kl_coef,
        ref_logp=ref_logp,
        correction=correction,
        entropy=entropy,
        entropy_coef=entropy_coef,
    )
    if not o.surrogate:
        return _by_autograd(row, c, o)
    loss, metrics = _differentiable(c, o)[:2]
    return loss, dict(zip(METRICS, metrics.unbind(), strict=True))
