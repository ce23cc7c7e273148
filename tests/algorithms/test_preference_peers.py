"""Second opinions on preference losses: TRL's own loss methods on the same random log-probs, loss, gradient
and metrics, per option.

What differs, and is taken out here:
- TRL's NLL terms (RPO's `sft`, CPO, ORPO) are means over the tokens of a micro-batch, ORPO's over those of
  the prompt too; ours are means over pairs of the chosen completion's mean over tokens, as in the papers.
  They are compared on chosen completions of one length.
- TRL estimates KTO's z0 on each process's micro-batch, ours on the whole optimizer step; both get the same
  number here.
- TRL reports rewards of summed log-ratios whatever the loss; ours are of what the loss compares, so for
  averaged scores (ipo, sigmoid_norm) they are per token, and are not compared.  ORPO's and SimPO's logps are
  averages there, sums here.
- AOT sorts the margins of a micro-batch, so that its loss depends on how a batch is cut; we have no such row.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from preferences import Side, ours, packed, random_side
from torch import Tensor

from fastrl.algorithms.preference import PREFERENCES, Preference

try:
    from trl import DPOTrainer, KTOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
except ImportError as error:
    pytest.skip(f"no TRL (the peers extra): {error}", allow_module_level=True)

CHOSEN, REJECTED = (5, 1, 3, 8), (2, 7, 3, 1)
SMOOTHING = 2.0**-6  # a number that float32 holds exactly: TRL makes a float32 tensor of it
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


def sequences(sides: list[Side]) -> tuple[Tensor, Tensor]:
    """TRL's batch: all chosen completions, then all rejected ones, padded to one length after one prompt
    token; log-probs and mask.
    """
    width = max(side.mask.shape[1] for side in sides)
    pad = [torch.nn.functional.pad(side.mask, (0, width - side.mask.shape[1])) for side in sides]
    logp = [torch.nn.functional.pad(side.logp, (0, width - side.logp.shape[1])) for side in sides]
    mask = torch.cat(pad)
    return torch.where(mask, torch.cat(logp), 0), torch.nn.functional.pad(mask, (1, 0)).long()


def trl_dpo(
    sides: list[Side], ref: list[Tensor], loss_type: str, **settings: Any
) -> tuple[Tensor, dict[str, list[float]], Tensor]:
    """DPOTrainer._compute_loss itself, on a trainer that is only its settings: loss, metrics, and the
    gradient by our packed log-probs.
    """
    metrics: dict[str, list[float]] = defaultdict(list)
    logp, mask = sequences(sides)
    leaf = logp.clone().requires_grad_()
    zeros = torch.zeros_like(logp)
    outputs = SimpleNamespace(log_probs=leaf, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    types = [loss_type] if isinstance(loss_type, str) else loss_type
    given = {
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "label_smoothing": 0.0,
    } | settings
    trainer = SimpleNamespace(
        **given,
        model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        loss_types=types,
        loss_weights=[1.0] * len(types),
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"train": metrics},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
    }
    inputs |= {"ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1]}
    loss = DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, False)
    return loss.detach(), metrics, in_our_order(torch.autograd.grad(loss, leaf)[0], sides)


def in_our_order(grad: Tensor, sides: list[Side]) -> Tensor:
    N = len(sides[0].logp)
    return torch.cat(
        [
            grad[k * N + i, : side.mask.shape[1]][side.mask[i]]
            for i in range(N)
            for k, side in enumerate(sides)
        ]
    )


CASES: dict[str, tuple[Any, dict[str, Any], Preference]] = {  # TRL's loss type and settings, our row
    "sigmoid": ("sigmoid", {}, PREFERENCES["dpo"]),
    "robust": (
        "robust",
        {"label_smoothing": SMOOTHING},
        PREFERENCES["robust"].with_params(label_smoothing=SMOOTHING),
    ),
    "hinge": ("hinge", {}, PREFERENCES["hinge"]),
    "ipo": ("ipo", {}, PREFERENCES["ipo"]),
    "sigmoid_norm": ("sigmoid_norm", {"beta": 5.0}, PREFERENCES["dpo_norm"]),
    "exo_pair": (
        "exo_pair",
        {"label_smoothing": SMOOTHING},
        PREFERENCES["exo"].with_params(label_smoothing=SMOOTHING),
    ),
    "nca_pair": ("nca_pair", {"beta": 0.01}, PREFERENCES["nca"]),
    "bco_pair": ("bco_pair", {"beta": 0.01}, PREFERENCES["bco"]),
    "sppo_hard": ("sppo_hard", {"beta": 0.001}, PREFERENCES["sppo"]),
    "apo_zero": ("apo_zero", {}, PREFERENCES["apo_zero"]),
    "apo_down": ("apo_down", {}, PREFERENCES["apo_down"]),
    "discopop": ("discopop", {"beta": 0.05}, PREFERENCES["discopop"]),
    "forward_kl": ("sigmoid", {"f_divergence_type": "forward_kl"}, PREFERENCES["dpo_forward_kl"]),
    "js_divergence": ("sigmoid", {"f_divergence_type": "js_divergence"}, PREFERENCES["dpo_js"]),
    "alpha_divergence": ("sigmoid", {"f_divergence_type": "alpha_divergence"}, PREFERENCES["dpo_alpha"]),
    "js and ipo": (
        "ipo",
        {"f_divergence_type": "js_divergence"},
        replace(PREFERENCES["ipo"], transform=PREFERENCES["dpo_js"].transform),
    ),
    "ld_alpha": ("sigmoid", {"ld_alpha": 0.5}, PREFERENCES["ld_dpo"]),
    "sigmoid and sft": (["sigmoid", "sft"], {}, PREFERENCES["rpo"]),
}
SINGLE = {"exo_pair", "alpha_divergence"}  # TRL computes part of these in float32, whatever the log-probs are


@pytest.mark.parametrize("case", CASES)
def test_pairs_are_trls(case):
    """Wrong implementations: every one that a row's equation could be mistaken for; see TRL's options."""
    loss_type, settings, row = CASES[case]
    dtype = torch.float32 if case in SINGLE else torch.float64
    lengths = (4, 4, 4, 4) if row.nll else CHOSEN
    sides = [random_side(lengths, 0.5, dtype), random_side(REJECTED, 0.5, dtype)]
    shorter = torch.minimum(sides[0].n, sides[1].n)
    sums = [replace(side, logp=side.ref, ref=torch.zeros_like(side.ref)) for side in sides]
    ref = [side.ld(shorter) if row.tail != 1 else side.s for side in sums]
    loss, metrics, grad = trl_dpo(sides, ref, loss_type, **({"beta": 0.1} | settings))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if case in SINGLE else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(ours(row, sides), (loss, grad), **tolerance)
    tokens, logp = packed(sides, (True, False), 4)
    measured = row.merge([row.measure(tokens.with_(logp, None)).tolist()])
    names = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    names = [] if row.average else names
    names += ["logps/chosen", "logps/rejected"] if row.tail == 1 else []
    for name in names:
        assert measured[name] == pytest.approx(
            metrics[name][0], rel=1e-6, abs=1e-6 if case in SINGLE else 1e-12
        ), name


@pytest.mark.parametrize(("loss_type", "name"), [("kto", "kto"), ("apo_zero_unpaired", "apo_zero_unpaired")])
def test_labelled_examples_are_trls(loss_type, name):
    """Wrong implementations: undesirable examples with the desirable ones' sign or weight; a baseline of
    matched completions.
    """
    side, good = random_side(CHOSEN, 0.5), torch.tensor([True, False, False, True])
    logp, mask = sequences([side])
    leaf, zeros = logp.clone().requires_grad_(), torch.zeros_like(logp)
    kl = torch.tensor([0.7, 0.2, -0.1, 0.4], dtype=torch.float64)
    metrics: dict[str, list[float]] = defaultdict(list)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        beta=0.1,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        _metrics={"train": metrics},
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda model, batch: kl,
    )
    ref = torch.where(side.mask, side.ref, 0).sum(1)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": good,
    }
    inputs |= {"ref_logps": ref, "ref_KL_logps": torch.zeros(4, dtype=torch.float64)}
    outputs = SimpleNamespace(log_probs=leaf, entropy=zeros, mean_logits=zeros)
    loss = KTOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, False)
    grad = in_our_order(torch.autograd.grad(loss, leaf)[0], [side])
    row = PREFERENCES[name].with_params(desirable_weight=1.5, undesirable_weight=0.5)
    row = row.with_params(baseline=kl.mean().item()) if row.mismatched else row
    torch.testing.assert_close(ours(row, [side], good.tolist()), (loss.detach(), grad), rtol=1e-9, atol=1e-12)
    tokens, logp = packed([side], good.tolist(), 4)
    measured = row.merge([row.measure(tokens.with_(logp, None)).tolist()])
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert measured[key] == pytest.approx(metrics[key][0], rel=1e-9), key


def averaged(sides: list[Side]) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs to differentiate by, and their means over tokens: what TRL's losses without a reference are
    given.
    """
    leaves = [side.logp.clone().requires_grad_() for side in sides]
    return leaves, [
        torch.where(side.mask, x, 0).sum(1) / side.n for side, x in zip(sides, leaves, strict=True)
    ]


def packed_gradient(loss: Tensor, leaves: list[Tensor], sides: list[Side]) -> Tensor:
    grads = torch.autograd.grad(loss, leaves)
    return torch.cat(
        [g[i][side.mask[i]] for i in range(len(sides[0].logp)) for g, side in zip(grads, sides, strict=True)]
    )


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing", "row"),
    [
        ("simpo", 0.0, PREFERENCES["simpo"]),
        ("sigmoid", 0.0, replace(PREFERENCES["cpo"], nll=0.0)),
        ("sigmoid", 0.1, replace(PREFERENCES["cdpo"], reference=False)),
        ("hinge", 0.0, replace(PREFERENCES["hinge"], reference=False)),
    ],
)
def test_losses_without_a_reference_are_trls_cpo(loss_type, label_smoothing, row):
    """Wrong implementations: gamma inside beta; sums for SimPO's averages; robust DPO's smoothing for the
    conservative one.
    """
    sides = [random_side(CHOSEN, 0.5), random_side(REJECTED, 0.5)]
    leaves, means = averaged(sides)
    logps = means if row.average else [m * side.n for m, side in zip(means, sides, strict=True)]
    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type=loss_type,
        beta=row.params["beta"],
        simpo_gamma=1.0,
        label_smoothing=label_smoothing,
        accelerator=ACCELERATOR,
    )
    losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, *logps)
    loss = losses.mean()
    torch.testing.assert_close(
        ours(row, sides), (loss.detach(), packed_gradient(loss, leaves, sides)), rtol=1e-9, atol=1e-12
    )
    tokens, logp = packed(sides, (True, False), 4)
    measured = row.merge([row.measure(tokens.with_(logp, None)).tolist()])
    assert measured["rewards/chosen"] == pytest.approx(chosen.mean().item())
    assert measured["rewards/accuracies"] == pytest.approx((chosen > rejected).double().mean().item())


def test_orpo_is_trls():
    """Wrong implementations: log-probs for log odds; lambda on the NLL; the sign of the odds term.  TRL's
    odds are in float32.
    """
    sides = [random_side((4, 4, 4, 4), 0.5), random_side(REJECTED, 0.5)]
    leaves, means = averaged(sides)
    losses, *_ = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.1, accelerator=ACCELERATOR), *means)
    loss = -torch.where(sides[0].mask, leaves[0], 0).sum() / sides[0].mask.sum() - losses.mean()
    torch.testing.assert_close(
        ours(PREFERENCES["orpo"], sides),
        (loss.detach(), packed_gradient(loss, leaves, sides)),
        rtol=1e-5,
        atol=1e-6,
    )
