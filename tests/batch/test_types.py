"""What flows between the stages keeps tokens and what is said of them together."""

from __future__ import annotations

import torch

from fastrl.batch.types import Batch, Tokens


def batch(**changes: object) -> Batch:
    """Three sequences of 2, 3 and 1 tokens, whose vectors all tell which token they belong to."""
    n = torch.arange(6)
    fields = {name: n.float() + 10 * i for i, name in enumerate(("advantage", "old_logp", "weight"))}
    return Batch(
        **{
            "tokens": n,
            "cu_seqlens": torch.tensor([0, 2, 5, 6], dtype=torch.int32),
            "mask": n % 2 == 1,
            **fields,
        }
        | changes
    )


def test_a_selection_keeps_every_vector_with_its_token():
    """Wrong implementations: a vector left whole; the sequences in the batch's order instead of the order
    asked for.
    """
    part = batch(ref_logp=torch.arange(6.0) + 50).select([2, 0])
    assert (
        part.tokens.tolist() == [5, 0, 1]
        and part.cu_seqlens.tolist() == [0, 1, 3]
        and part.cu_seqlens.dtype == torch.int32
    )
    assert part.mask.tolist() == [True, False, True] and len(part) == 2
    assert [part.advantage.tolist(), part.old_logp.tolist(), part.weight.tolist()] == [
        [5, 0, 1],
        [15, 10, 11],
        [25, 20, 21],
    ]
    assert part.ref_logp is not None and part.ref_logp.tolist() == [55, 50, 51] and part.correction is None


def test_a_selection_of_nothing():
    part = batch().select([])
    assert (len(part), part.tokens.numel(), part.tokens.dtype, part.cu_seqlens.tolist()) == (
        0,
        0,
        torch.int64,
        [0],
    )


def test_sequence_ends_survive_only_where_every_live_token_does():
    """Wrong implementation: a chunk that cuts a sequence in two keeps the ends, and GSPO averages over the
    wrong tokens.
    """
    x = torch.arange(5.0)
    tokens = Tokens(old_logp=x, advantage=x, weight=x, cu_seqlens=torch.tensor([0, 1, 3]), live=3)
    live = torch.tensor([0, 2, 4])
    assert tokens[live].old_logp.tolist() == [0, 2, 4] and tokens[live].cu_seqlens is not None
    assert tokens[live[:2]].cu_seqlens is None and tokens[live].ref_logp is None
    assert tokens[live].with_(x[:3] + 7, None).logp.tolist() == [7, 8, 9]
