"""Second opinions: our losses and gradients against TRL's and Liger's own code, called on the same random
tensors.

Skipped, peer by peer, where one is not installed (docs/drop-in.md says how).  What both sides could get wrong
in the same way is covered elsewhere, against float64 definitions; this file is for what the two words "GRPO"
and "DPO" mean to everybody else.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from configs import configured
from torch import Tensor

from fastrl import ops
from fastrl.algorithms.aggregate import Aggregate, Totals, fixed_length, sequence_mean, token_mean
from fastrl.batch.types import Tokens
from fastrl.config import Grpo
from fastrl.methods.grpo.options import choose_algorithm

try:
    from trl import GRPOTrainer, RLOOTrainer
    from trl.experimental.gmpo import GMPOTrainer
    from trl.trainer import utils

    no_trl = ""
except ImportError as error:
    no_trl = f"no TRL (the peers extra): {error}"
try:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearGRPOLoss
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    no_liger = ""
except ImportError as error:
    no_liger = f"no Liger (the peers extra): {error}"
needs_trl = pytest.mark.skipif(bool(no_trl), reason=no_trl)
needs_liger = pytest.mark.skipif(bool(no_liger), reason=no_liger)

B, L, D, V = 6, 9, 16, 61
BUDGET = 12  # the generation budget, for the losses divided by it
DOUBLE, SINGLE = {"rtol": 1e-10, "atol": 1e-10}, {"rtol": 1e-5, "atol": 1e-6}


class Batch:
    """B sequences of up to L tokens, some ratios far outside every clip,
    one token of a tool's in the middle.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.old = -torch.rand(B, L, dtype=dtype) * 3
        self.logp = self.old + 0.6 * torch.randn(B, L, dtype=dtype)
        self.ref = self.old + 0.3 * torch.randn(B, L, dtype=dtype)
        self.entropy = torch.rand(B, L, dtype=dtype) * 2
        self.advantage = torch.tensor([1.3, -0.7, 0.0, 2.1, -1.9, 0.4], dtype=dtype)
        self.correction = torch.rand(B, L, dtype=dtype) * 2
        self.mask = torch.arange(L) < torch.tensor([9, 1, 4, 7, 9, 3])[:, None]
        self.mask[3, 2] = False
        self.hidden, self.weight, self.bias = (
            torch.randn(s, dtype=dtype) / 2 for s in ((B, L, D), (V, D), (V,))
        )
        self.target = torch.randint(V, (B, L))

    def token_weight(self, aggregate: Aggregate) -> Tensor:
        length = self.mask.sum(1).to(self.logp.dtype)
        per_sample = aggregate(length, Totals(tokens=int(length.sum()), samples=B, max_length=BUDGET))
        return per_sample[:, None].expand(B, L)

    def loss(
        self, logp: Tensor, entropy: Tensor | None, aggregate: Aggregate, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        advantage = self.advantage[:, None].expand(B, L)
        return ops.policy_loss(
            logp,
            self.old,
            advantage,
            token_weight=self.token_weight(aggregate),
            mask=self.mask,
            entropy=entropy,
            **options,
        )


def clip(low: float = 0.2, high: float = 0.2, cap: float = math.inf) -> ops.Surrogate:
    return ops.SURROGATES["clip"].with_params(low=low, high=high, cap=cap)


def differentiated(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves, materialize_grads=True)


# --- TRL's GRPO loss --------------------------------------------------------------------------------
def trl_trainer(given: dict[str, Any], metrics: dict[str, list[float]], logp: Tensor, entropy: Tensor) -> Any:
    """A trainer that is only its settings; its model is said to give these log-probs and entropies."""
    return SimpleNamespace(
        **given,
        top_entropy_quantile=1.0,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        aux_loss_enabled=False,
        max_completion_length=BUDGET,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        use_adaptive_entropy=False,
        model=SimpleNamespace(training=True),
        _entropy_bonus_enabled=given["entropy_coef"] != 0,
        _metrics={"train": metrics},
        args=SimpleNamespace(
            delta=given["delta"],
            use_bias_correction_kl=given["use_bias_correction_kl"],
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=given.get("sapo_temperature_neg"),
            **{name: value for name, value in given.items() if name.startswith("vespo")},
        ),
        accelerator=SimpleNamespace(
            num_processes=1,
            sync_gradients=True,
            gather=lambda x: x,
            gather_for_metrics=lambda x: x,
            reduce=lambda x, reduction: x,
        ),
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logp, entropy, None),
    )


def trl_loss(
    batch: Batch,
    logp: Tensor,
    entropy: Tensor,
    sampling_per_token_logps: Tensor | None = None,
    of: Any = None,
    **settings: Any,
) -> tuple[Tensor, dict[str, list[float]]]:
    """GRPOTrainer._compute_loss itself (or that of another class), on a trainer that is only its settings."""
    given = {
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
        "importance_sampling_level": "token",
        "use_vllm": False,
        "delta": None,
        "use_bias_correction_kl": False,
        "entropy_coef": 0.0,
        "loss_type": "grpo",
        "off_policy_mask_threshold": None,
    } | settings
    metrics: dict[str, list[float]] = defaultdict(list)
    trainer = trl_trainer(given, metrics, logp, entropy)
    nothing = torch.zeros(B, 0, dtype=torch.int64)
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": batch.target,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantage,
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.ref,
        "num_items_in_batch": batch.mask.sum(),
    }
    if given["use_vllm"]:
        inputs["importance_sampling_ratio"] = batch.correction * batch.mask + ~batch.mask
    if sampling_per_token_logps is not None:
        inputs["sampling_per_token_logps"] = sampling_per_token_logps
    return (of or GRPOTrainer)._compute_loss(trainer, None, inputs), metrics


CASES: dict[
    str, tuple[dict[str, Any], Aggregate, dict[str, Any]]
] = {  # TRL's settings, our aggregate, our options
    "grpo": ({}, sequence_mean, {"surrogate": clip()}),
    "grpo + kl": ({"beta": 0.1}, sequence_mean, {"surrogate": clip(), "kl": "k3", "kl_coef": 0.1}),
    "bnpo": ({"loss_type": "bnpo"}, token_mean, {"surrogate": clip()}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, token_mean, {"surrogate": clip(high=0.28)}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, fixed_length, {"surrogate": clip()}),
    "two-sided": ({"loss_type": "dapo", "delta": 1.5}, token_mean, {"surrogate": clip(cap=1.5)}),
    "gspo": (
        {"importance_sampling_level": "sequence", "epsilon_low": 3e-2, "epsilon_high": 4e-2},
        sequence_mean,
        {"surrogate": clip(3e-2, 4e-2), "ratio": "sequence"},
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.5},
        token_mean,
        {"surrogate": ops.SURROGATES["cispo"].with_params(low=0.0, high=1.5)},
    ),
    "sapo": (  # a temperature that float32 holds exactly: TRL makes a float32 tensor of it
        {"loss_type": "sapo", "sapo_temperature_neg": 1.25},
        sequence_mean,
        {"surrogate": ops.SURROGATES["sapo"].with_params(neg=1.25)},
    ),
    "corrected kl": (
        {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": True},
        token_mean,
        {"surrogate": clip(), "kl": "k3_is", "kl_coef": 0.1},
    ),
    "sampler correction": (
        {"loss_type": "dapo", "use_vllm": True, "beta": 0.1},
        token_mean,
        {"kl": "k3", "kl_coef": 0.1},
    ),
    "entropy bonus": (
        {"loss_type": "dapo", "entropy_coef": 0.3},
        token_mean,
        {"surrogate": clip(), "entropy_coef": 0.3},
    ),
}


@needs_trl
@pytest.mark.parametrize("case", CASES)
def test_policy_loss_is_trls(case):
    """Wrong implementations: a denominator that counts masked tokens; min over clipped terms turned round;
    KL(ref || policy) with its arguments swapped; the correction applied to the KL; a sequence ratio that sums
    instead of averaging.
    """
    settings, aggregate, options = CASES[case]
    batch = Batch(torch.float64)
    kept: dict[str, Any] = {}
    if settings.get("use_vllm"):
        options = {"surrogate": clip(), "correction": batch.correction} | options

    def theirs(logp: Tensor, entropy: Tensor) -> Tensor:
        loss, kept["theirs"] = trl_loss(batch, logp, entropy, **settings)
        return loss

    def ours(logp: Tensor, entropy: Tensor) -> Tensor:
        loss, kept["ours"] = batch.loss(logp, entropy, aggregate, ref_logp=batch.ref, **options)
        return loss

    torch.testing.assert_close(
        differentiated(ours, batch.logp, batch.entropy),
        differentiated(theirs, batch.logp, batch.entropy),
        **DOUBLE,
    )
    names = {"entropy": "entropy", "clip_ratio/low_mean": "clip_low", "clip_ratio/high_mean": "clip_high"}
    if settings.get("beta") and not settings.get("use_bias_correction_kl"):
        names["kl"] = "ref_kl_k3"
    if settings.get("delta") is not None or settings.get("importance_sampling_level") == "sequence":
        names = {"entropy": "entropy"}  # TRL counts clips after the cap, and per sequence
    for name in names.keys() & kept["theirs"].keys():
        assert kept["ours"][names[name]].item() == pytest.approx(kept["theirs"][name][0], rel=1e-6), name


# a row's name and TRL's settings for its loss; TRL's own defaults where it has no such name
TRL_ROWS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "two_sided": {"loss_type": "dapo", "delta": 4.0},
    "lite_ppo": {"loss_type": "bnpo"},
    "gmpo": {"epsilon_low": 0.4, "epsilon_high": 0.4},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo", "sapo_temperature_neg": 1.05},
    "gspo": {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "luspo": {
        "loss_type": "luspo",
        "importance_sampling_level": "sequence",
        "epsilon_low": 2e-3,
        "epsilon_high": 2.5e-3,
    },
    "vespo": {
        "loss_type": "vespo",
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
    },
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # our options and TRL's
    "plain": ({}, {}),
    "beta": ({"kl_coef": 0.1}, {"beta": 0.1}),
    "corrected kl": ({"kl_coef": 0.1, "kl": "k3_is"}, {"beta": 0.1, "use_bias_correction_kl": True}),
    "entropy": ({"entropy_coef": 0.3}, {"entropy_coef": 0.3}),
    "delta": ({"delta": 1.5}, {"delta": 1.5}),
    "off-policy mask": ({"off_policy_mask_threshold": 0.05}, {"off_policy_mask_threshold": 0.05}),
    "correction": ({"correction": "token_truncate"}, {"use_vllm": True}),
    "sequence correction": ({"correction": "sequence_mask"}, {"use_vllm": True}),
}


def trl_takes(name: str, variant: str) -> bool:
    """What TRL refuses or defines otherwise (presets.py says how) is left out."""
    if name == "gmpo":
        return variant in ("plain", "beta")
    if variant == "corrected kl":
        return name not in ("gspo", "luspo")
    if variant == "delta":
        return name in ("grpo", "bnpo", "dapo", "dr_grpo", "gspo", "luspo")
    if variant == "entropy":
        return name in ("bnpo", "dapo", "cispo", "vespo")
    return (name, variant) not in (
        ("gspo", "correction"),
        ("luspo", "correction"),
        ("vespo", "sequence correction"),
    )


@needs_trl
@pytest.mark.parametrize(("name", "variant"), [(n, v) for n in TRL_ROWS for v in VARIANTS if trl_takes(n, v)])
def test_rows_with_trl_semantics_are_trls(name, variant):
    """The row that `--semantics trl` chooses, with options under TRL's names: loss and gradient of TRL's
    trainer at the same settings.

    Wrong implementations: the paper's clip-higher under TRL's `dapo`; a mask by the wrong log-probs; the
    correction left out of VESPO's weight; an option that changes another column.
    """
    options, settings = VARIANTS[variant]
    row = choose_algorithm(configured(Grpo, model="m", algorithm=name, semantics="trl", **options))
    batch = Batch(torch.float64)
    if name in ("gspo", "luspo"):
        batch.old = batch.logp - (batch.logp - batch.old) / 100
    if name == "sapo":  # TRL makes float32 tensors of its temperatures: ones that float32 holds exactly
        row = replace(row, surrogate=row.surrogate.with_params(neg=1.25))
    settings = TRL_ROWS[name] | settings | ({"sapo_temperature_neg": 1.25} if name == "sapo" else {})
    if row.correction is not None and row.correction.level == "sequence":
        batch.correction = (batch.correction[:, :1] * torch.tensor([1.0, 1, 0, 1, 1, 1])[:, None]).expand(
            B, L
        )
    sampler = batch.old + 0.2 if variant == "off-policy mask" else batch.old
    live = batch.mask.reshape(-1)

    def packed(x: Tensor) -> Tensor:
        return x.expand(B, L).reshape(-1)[live]

    ends = torch.cat([torch.zeros(1, dtype=torch.int64), batch.mask.sum(1).cumsum(0)]).to(torch.int32)
    tokens = Tokens(
        old_logp=packed(batch.old),
        advantage=packed(batch.advantage[:, None]),
        weight=packed(batch.token_weight(row.aggregate)),
        ref_logp=packed(batch.ref),
        sampler_logp=packed(sampler),
        cu_seqlens=ends,
        live=int(live.sum()),
        correction=packed(batch.correction) if row.correction else None,
    )

    def ours(logp: Tensor, entropy: Tensor) -> Tensor:
        return row.loss(tokens.with_(packed(logp), packed(entropy)))

    def theirs(logp: Tensor, entropy: Tensor) -> Tensor:
        of = GMPOTrainer if name == "gmpo" else GRPOTrainer
        return trl_loss(batch, logp, entropy, sampling_per_token_logps=sampler, of=of, **settings)[0]

    torch.testing.assert_close(
        differentiated(ours, batch.logp, batch.entropy),
        differentiated(theirs, batch.logp, batch.entropy),
        **DOUBLE,
    )


@needs_trl
def test_rloo_is_trls_on_its_first_update():
    """Before the weights have moved TRL's ratio of whole sequences is 1, and its gradient the policy
    gradient.  Values differ: A log p, A.

    Wrong implementation: a mean over tokens, or over a sequence's.
    """
    batch = Batch(torch.float64)
    row = choose_algorithm(Grpo(model="m", algorithm="rloo", semantics="trl"))
    trainer = SimpleNamespace(
        epsilon_low=0.2,
        epsilon_high=0.2,
        aux_loss_enabled=False,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
    )
    nothing = torch.zeros(B, 0, dtype=torch.int64)

    def theirs(logp: Tensor) -> Tensor:
        trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logp, batch.entropy, None)
        return RLOOTrainer._compute_loss(
            trainer,
            None,
            {
                "prompt_ids": nothing,
                "prompt_mask": nothing,
                "completion_ids": batch.target,
                "completion_mask": batch.mask.long(),
                "advantages": batch.advantage,
                "old_logps": (logp.detach() * batch.mask).sum(1),
            },
        )

    def ours(logp: Tensor) -> Tensor:
        return batch.loss(logp, None, row.aggregate, surrogate=row.surrogate)[0]

    torch.testing.assert_close(
        differentiated(ours, batch.logp)[1], differentiated(theirs, batch.logp)[1], **DOUBLE
    )


# --- Liger's fused linear losses --------------------------------------------------------------------
@needs_liger
@pytest.mark.parametrize(
    "case", ["grpo", "grpo + kl", "dapo", "dr_grpo", "two-sided", "gspo", "cispo", "sapo", "corrected kl"]
)
def test_linear_loss_with_policy_loss_is_ligers_fused_grpo(case):
    """Wrong implementations: temperature missing from the gradient; a bias without gradient; chunks with
    denominators of their own.
    """
    settings, aggregate, options = CASES[case]
    batch = Batch(torch.float32)
    liger = LigerFusedLinearGRPOLoss(
        compiled=False,
        use_ref_model=True,
        temperature=0.8,
        max_completion_length=BUDGET,
        chunk_size=2,
        **{"beta": 0.0, "loss_type": "grpo", **settings},
    )
    mask = batch.mask.reshape(-1)
    advantage, old, ref = (
        x.reshape(-1) for x in (batch.advantage[:, None].expand(B, L), batch.old, batch.ref)
    )
    token_weight = batch.token_weight(aggregate).reshape(-1)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), batch.mask.sum(1).cumsum(0)])
    sequence = options.get("ratio") == "sequence"

    def callback(logp: Tensor, entropy: Tensor | None, rows: Tensor) -> Tensor:
        return ops.policy_loss(
            logp,
            old[rows],
            advantage[rows],
            token_weight=token_weight[rows],
            ref_logp=ref[rows],
            cu_seqlens=ends if sequence else None,
            **options,
        )[0]

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.linear_loss(
            hidden.view(B * L, D),
            weight,
            batch.target.reshape(-1),
            callback,
            mask=mask,
            bias=bias,
            temperature=0.8,
            level="sequence" if sequence else "token",
            logits_bytes=5 * V * 4,
        )[0]

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        arguments = (batch.target, batch.mask.float(), batch.advantage)
        return liger(
            hidden,
            weight,
            *arguments,
            bias=bias,
            ref_per_token_logps=batch.ref,
            old_per_token_logps=batch.old,
        )[0]

    inputs = (batch.hidden, batch.weight, batch.bias)
    torch.testing.assert_close(differentiated(ours, *inputs), differentiated(theirs, *inputs), **SINGLE)


@needs_liger
def test_linear_loss_with_a_dpo_callback_is_ligers_fused_dpo():
    """Wrong implementations: per-token means for sums; chosen and rejected swapped; the prompt's tokens
    counted.
    """
    batch, beta = Batch(torch.float32), 0.3
    reference = torch.randn(B, L, D) / 2, torch.randn(V, D) / 2
    target = torch.where(batch.mask, batch.target, -100)
    liger = LigerFusedLinearDPOLoss(beta=beta, compiled=False, use_ref_model=True)
    live = batch.mask.reshape(-1).nonzero().squeeze(1)
    ref_logp = ops.linear_logp(reference[0].view(-1, D), reference[1], batch.target.reshape(-1)).logp

    def dpo(logp: Tensor, entropy: Tensor | None, rows: Tensor) -> Tensor:
        ratio = F.one_hot(rows // L, B).to(logp.dtype).T @ (logp - ref_logp[rows])
        chosen, rejected = ratio.chunk(2)
        return -F.logsigmoid(beta * (chosen - rejected)).mean()

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return ops.linear_loss(
            hidden.view(-1, D), weight, batch.target.reshape(-1), dpo, mask=live, level="sequence"
        )[0]

    def theirs(hidden: Tensor, weight: Tensor) -> Tensor:
        return liger(weight, hidden, target, ref_input=reference[0], ref_weight=reference[1])[0]

    inputs = (batch.hidden, batch.weight)
    torch.testing.assert_close(differentiated(ours, *inputs), differentiated(theirs, *inputs), **SINGLE)


# --- log-probs and cross-entropy --------------------------------------------------------------------
@needs_liger
def test_linear_logp_is_ligers_chunked_log_prob():
    """Wrong implementations: the bias divided by no temperature; dW in the order of the chunks' own rows."""
    batch, upstream = Batch(torch.float32), torch.randn(B, L)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        stats = ops.linear_logp(
            hidden.view(-1, D),
            weight,
            batch.target.view(-1),
            bias=bias,
            temperature=0.7,
            logits_bytes=7 * V * 4,
        )
        return (stats.logp.view(B, L) * upstream).sum()

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (
            LigerFusedLinearPPOBase.chunk_forward(hidden, weight, batch.target, bias=bias, temperature=0.7)
            * upstream
        ).sum()

    inputs = (batch.hidden, batch.weight, batch.bias)
    torch.testing.assert_close(differentiated(ours, *inputs), differentiated(theirs, *inputs), **SINGLE)


@needs_trl
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_linear_cross_entropy_is_trls_fused_head(softcap):
    """Wrong implementations: the softcap's derivative missing; the mean over all tokens instead of those that
    count.
    """
    batch = Batch(torch.float32)
    target = torch.where(batch.mask, batch.target, -100).view(-1)
    live = batch.mask.view(-1)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.linear_cross_entropy(hidden.view(-1, D), weight, target, bias=bias, softcap=softcap)

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        outputs = utils._ChunkedLogProbFunction.apply(
            hidden.view(-1, D)[live], weight, bias, target[live], 1.0, 1 << 15, softcap, 1.0, ("log_probs",)
        )
        return -outputs[0].mean()

    inputs = (batch.hidden * 3, batch.weight, batch.bias)
    torch.testing.assert_close(differentiated(ours, *inputs), differentiated(theirs, *inputs), **SINGLE)


@needs_trl
def test_token_logp_is_trls_in_float64():
    """Wrong implementation: any float32 on the way."""
    logits, target, upstream = (
        torch.randn(B, L, V, dtype=torch.float64) * 5,
        torch.randint(V, (B, L)),
        torch.randn(2, B, L).double(),
    )

    def ours(logits: Tensor) -> Tensor:
        stats = ops.token_logp(logits, target, temperature=0.6, entropy=True)
        assert stats.entropy is not None
        return (torch.stack([stats.logp, stats.entropy]) * upstream).sum()

    def theirs(logits: Tensor) -> Tensor:
        return (
            torch.stack(utils.selective_log_softmax_and_entropy(logits, target, temperature=0.6)) * upstream
        ).sum()

    torch.testing.assert_close(differentiated(ours, logits), differentiated(theirs, logits), **DOUBLE)
