"""Second opinions on preference losses through the head: Liger's chunked losses and ours on the same hidden
states, loss and gradient.

Liger's NLL is a mean over the tokens of all chosen completions, ours over pairs of each completion's mean:
these have one length here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl import ops
from fastrl.algorithms.preference import PREFERENCES, Preference
from fastrl.batch.types import Tokens
from fastrl.config.dpo import TRL_NAMES

try:
    from liger_kernel import chunked_loss
except ImportError as error:
    pytest.skip(f"no Liger (the peers extra): {error}", allow_module_level=True)

N, L, D, V = 4, 9, 16, 61
CHOSEN, REJECTED = (6, 6, 6, 6), (2, 9, 1, 5)
DPO = (
    "sigmoid",
    "hinge",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)
SINGLE = {"rtol": 2e-5, "atol": 2e-6}


class Batch:
    """N chosen completions, then N rejected ones, of up to L tokens: hidden states, a head, and those of a
    reference model.
    """

    def __init__(self) -> None:
        self.mask = torch.arange(L) < torch.tensor([*CHOSEN, *REJECTED])[:, None]
        self.hidden, self.ref = (torch.randn(2 * N, L, D) / 2 for _ in range(2))
        self.weight, self.ref_weight, self.bias = (
            torch.randn(V, D) / 2,
            torch.randn(V, D) / 2,
            torch.randn(V) / 2,
        )
        self.token = torch.randint(V, (2 * N, L))

    @property
    def target(self) -> Tensor:
        """As Liger has it: -100 where nothing counts."""
        return torch.where(self.mask, self.token, -100)

    def loss(
        self, row: Preference, hidden: Tensor, weight: Tensor, bias: Tensor, good: list[bool] | None = None
    ) -> Tensor:
        """The row's, of pairs that lie next to each other, or of all sequences as labelled examples."""
        order = [side + i for i in range(N) for side in (0, N)] if good is None else list(range(2 * N))
        label = [i < N for i in order] if good is None else good
        keep, length = self.mask[order], self.mask[order].sum(1)
        target = self.token[order][keep]
        frozen = ops.linear_logp(self.ref[order][keep], self.ref_weight, target).logp
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)]).to(torch.int32)
        live = int(length.sum())
        tokens = Tokens(
            old_logp=torch.zeros(live),
            advantage=torch.tensor([1.0 if g else -1.0 for g in label]).repeat_interleave(length),
            weight=torch.full((live,), row.unit / len(order)),
            ref_logp=frozen,
            cu_seqlens=ends,
            live=live,
        )

        def share(logp: Tensor, entropy: Tensor | None, rows: Tensor) -> Tensor:
            return row.loss(tokens.with_(logp, None))

        budget = 5 * V * 4  # of logits: several chunks
        return ops.linear_loss(
            hidden[order][keep], weight, target, share, bias=bias, level="sequence", logits_bytes=budget
        )[0]


def compare(batch: Batch, ours: Any, theirs: Any) -> None:
    found = []
    for loss in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
        value = loss(*leaves)
        found.append((value.detach(), torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(*found, **SINGLE)


@pytest.mark.parametrize("loss_type", DPO)
def test_losses_with_a_reference_are_ligers(loss_type):
    """Wrong implementations: pairs taken from neighbouring rows of one side; the reference differentiated; a
    rule of another name.
    """
    batch, row = Batch(), PREFERENCES[TRL_NAMES.get(loss_type, loss_type)]
    smoothing = row.params.get("label_smoothing", 0.0)
    liger = chunked_loss.LigerFusedLinearDPOLoss(
        beta=row.params["beta"],
        compiled=False,
        use_ref_model=True,
        loss_type=loss_type,
        label_smoothing=smoothing,
    )
    compare(
        batch,
        lambda h, w, b: batch.loss(row, h, w, b),
        lambda h, w, b: liger(w, h, batch.target, bias=b, ref_input=batch.ref, ref_weight=batch.ref_weight)[
            0
        ],
    )


FREE: dict[str, tuple[Any, dict[str, Any], Preference]] = {  # Liger's class, its settings, our row
    "cpo": ("LigerFusedLinearCPOLoss", {"beta": 0.1, "alpha": 1.0}, PREFERENCES["cpo"]),
    "cpo, smoothed": (
        "LigerFusedLinearCPOLoss",
        {"beta": 0.1, "label_smoothing": 0.1, "compute_nll_loss": False, "alpha": 0.0},
        replace(PREFERENCES["cdpo"], reference=False),
    ),
    "simpo": (
        "LigerFusedLinearSimPOLoss",
        {"beta": 2.0, "gamma": 1.0, "compute_nll_loss": False},
        PREFERENCES["simpo"],
    ),
    "simpo and nll": (
        "LigerFusedLinearSimPOLoss",
        {"beta": 2.0, "gamma": 1.0, "alpha": 0.5},
        replace(PREFERENCES["simpo"], nll=0.5),
    ),
    "orpo": ("LigerFusedLinearORPOLoss", {"beta": 0.1}, PREFERENCES["orpo"]),
}


@pytest.mark.parametrize("case", FREE)
def test_losses_without_a_reference_are_ligers(case):
    """Wrong implementations: sums for averages; gamma inside beta; the NLL of both sides,
    or weighed by beta.
    """
    name, settings, row = FREE[case]
    batch, liger = Batch(), getattr(chunked_loss, name)(compiled=False, **settings)
    compare(
        batch, lambda h, w, b: batch.loss(row, h, w, b), lambda h, w, b: liger(w, h, batch.target, bias=b)[0]
    )


def test_kto_is_ligers():
    """Wrong implementations: the baseline inside beta's sign; labels of neighbours; a mean over the good ones
    alone.
    """
    batch, row, good = (
        Batch(),
        PREFERENCES["kto"].with_params(baseline=0.3),
        [i % 3 == 0 for i in range(2 * N)],
    )
    liger = chunked_loss.LigerFusedLinearKTOLoss(beta=0.1, compiled=False, use_ref_model=True)
    compare(
        batch,
        lambda h, w, b: batch.loss(row, h, w, b, good),
        lambda h, w, b: liger(
            h,
            w,
            batch.target,
            bias=b,
            preference_labels=torch.tensor(good),
            ref_input=batch.ref,
            ref_weight=batch.ref_weight,
            kl=torch.tensor(0.3),
        )[0],
    )
