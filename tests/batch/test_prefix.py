"""Common beginnings forwarded once: the same loss, gradient and log-probs as every sequence whole."""

from __future__ import annotations

import pytest
import torch
from runs import METHODS, decoder, drift, gradient, learner, logp, make_batch, relative

from fastrl.batch import prefix
from fastrl.batch.types import Batch
from fastrl.model.decoder import Layer

NONE = 0  # for prefix.MAX_TOKENS_PER_SPARED: nothing is shared


def batch_of(*sequences: tuple[str, str]) -> Batch:
    """Sequences of tokens a = 3, b = 4, ... beside their masks of . and x,
    each with an advantage of its own.
    """
    text, mask = "".join(t for t, _ in sequences), "".join(m for _, m in sequences)
    assert len(text) == len(mask)
    T, lengths = len(text), torch.tensor([0, *(len(t) for t, _ in sequences)])
    noise = torch.Generator().manual_seed(0)
    advantage = torch.randn(len(sequences), generator=noise).repeat_interleave(lengths[1:])
    old = -torch.rand(T, generator=noise) - 2
    return Batch(
        tokens=torch.tensor([ord(c) - ord("a") + 3 for c in text], dtype=torch.int64),
        cu_seqlens=lengths.cumsum(0).to(torch.int32),
        mask=torch.tensor([c == "x" for c in mask], dtype=torch.bool),
        advantage=advantage,
        old_logp=old,
        weight=torch.full((T,), 1 / max(T, 1)),
        ref_logp=old - 0.1,
    )


BATCHES = {
    "two prompts": [
        ("abcde", "...xx"),
        ("abcfgh", "...xxx"),
        ("abci", "...x"),
        ("dbce", "...x"),
        ("dbcff", "...xx"),
    ],
    "one token more": [("abde", "..xx"), ("abce", "..xx"), ("abce", "...x"), ("abcf", "...x")],
    "equal lengths, other tokens": [("abcd", "..xx"), ("aecd", "..xx"), ("abcd", "..xx"), ("abee", "..xx")],
    "turns": [("abcdefg", "..x..xx"), ("abcdeff", "..x..xx"), ("abcfefg", "..xx..x")],
    "no loss token": [("abc", "..."), ("abcd", "...x"), ("abce", "...x"), ("abc", "...")],
    "none, then an end": [("abcd", "...."), ("abcd", "...x"), ("abcd", "...x"), ("abc", "...")],
    "an empty sequence": [("abcd", "...x"), ("abce", "...x"), ("", ""), ("abcf", "...x"), ("abcf", "...x")],
    "the first like the last": [("abcd", "...x"), ("defd", "...x"), ("defe", "...x"), ("abcd", "...x")],
}


@pytest.mark.parametrize("method", ["rloo", "gspo+kl"])
@pytest.mark.parametrize("name", BATCHES)
def test_loss_and_gradient_are_those_of_whole_sequences(name, method, monkeypatch):
    """In float64.  Wrong implementations: the gradient of one copy alone; prompts compared by length, or by
    their first tokens; a prompt that follows another sequence's; positions that count on; the prediction of
    the first completion token lost; what comes between two turns shared, or a token after the prompt; a
    leader without a completion, whose last token is dropped.
    """
    model = decoder(dtype=torch.float64)
    batch = batch_of(*BATCHES[name])
    monkeypatch.setattr(prefix, "MAX_TOKENS_PER_SPARED", 1 << 20)
    assert prefix.shared(batch) is not None
    got, g = gradient(learner(model, METHODS[method]), batch)
    shared = logp(model, batch)
    monkeypatch.setattr(prefix, "MAX_TOKENS_PER_SPARED", NONE)
    expected, h = gradient(learner(model, METHODS[method]), batch)
    assert relative(g, h) < 1e-12
    assert got == pytest.approx(expected, rel=1e-11, abs=1e-13)
    torch.testing.assert_close(shared, logp(model, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "gspo+kl"])
def test_a_step_of_rollouts_agrees_and_forwards_each_prompt_once(name, monkeypatch):
    """Wrong implementation: sharing that is computed and not used; or used where the temperature or the
    reference is another's.
    """
    model = decoder()
    batch = make_batch(name, model)
    model.double()
    drift(model, 1e-3 if "gspo" in name else 0.03)
    seen, real = [], Layer.forward
    monkeypatch.setattr(
        Layer, "forward", lambda self, x, *rest: seen.append(x.shape[0]) or real(self, x, *rest)
    )
    found, tokens = [], []
    for least in (prefix.MAX_TOKENS_PER_SPARED, NONE):
        monkeypatch.setattr(prefix, "MAX_TOKENS_PER_SPARED", least)
        seen.clear()
        found.append(gradient(learner(model, METHODS[name]), batch))
        tokens.append(seen[0])
    assert relative(found[0][1], found[1][1]) < 1e-12
    prompts = {tuple(t) for t in _prompts(batch)}
    completions = int(batch.mask.sum()) - len(batch)  # the last token of each predicts nothing
    assert tokens == [sum(map(len, prompts)) + completions, batch.tokens.numel()]


def _prompts(batch: Batch) -> list[list[int]]:
    parts = zip(*(x.split(batch.cu_seqlens.diff().tolist()) for x in (batch.tokens, batch.mask)), strict=True)
    return [tokens[~mask].tolist() for tokens, mask in parts]


def test_copies_are_added_in_a_fixed_order():
    """Wrong implementation: one index_add over all copies, which on CUDA adds in any order."""
    index, rank = torch.tensor([2, 0, 2, 1, 2, 0]), torch.tensor([0, 0, 1, 0, 2, 1])
    copies = prefix.Copies.of(index, rank)
    assert all(copies.index[part].unique().numel() == part.numel() for part in copies.parts)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(copies.take, x)


def test_next_to_nothing_in_common_is_not_worth_a_copy():
    """Wrong implementation: sequences that share their first token alone are copied for it, layer after
    layer.
    """
    long = "." + "x" * 39
    assert prefix.shared(batch_of(("a" * 40, long), ("a" * 40, long))) is None
    assert prefix.shared(batch_of(("abcd", "...x"), ("abcd", "...x"))) is not None
    assert prefix.shared(batch_of(("abcd", "...x"), ("eeee", "...x"))) is None
    assert prefix.shared(batch_of(("abcd", "...x"))) is None
    assert prefix.shared(batch_of()) is None
