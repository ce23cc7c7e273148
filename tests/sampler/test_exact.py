"""Exact mode: what is recorded while sampling is what the trainer computes, bit for bit, because a row's bits
are its own.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from decoders import model_of, rollouts_of, scores
from runs import grpo, write_model
from support import tiny_config, within_budget

from fastrl import ops
from fastrl.config import Eval
from fastrl.errors import UserError
from fastrl.kernels import attention, rms_norm, rope, swiglu, token_logp
from fastrl.kernels._backend import extension, is_exact
from fastrl.model.decoder import Decoder
from fastrl.report import report
from fastrl.train.learner import Learner
from fastrl.trainer import train

needs_c = pytest.mark.skipif(
    extension() is None,
    reason="fastrl._C is not built: pip install -e . (or python setup.py build_ext --inplace)",
)
DTYPES = [torch.float32, torch.bfloat16]
T = 100
SUBSETS = (
    [0],
    [T - 1],
    [0, 1, 2],
    [7, 3, 50],
    list(range(64)),
    list(range(31, T)),
    torch.arange(T - 1, -1, -1).tolist(),
)


# --- the claim --------------------------------------------------------------------------------------
@needs_c
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_sampled_log_probs_are_the_trainers_bit_for_bit(family, dtype):
    """Wrong: any op between tokens and log-prob whose bits depend on the rows beside it; a log-prob from the
    sampling kernel's sums.
    """
    with ops.exact():
        model = model_of(family, dtype)
        rollouts = rollouts_of(model)
        live, lengths = rollouts.completion_mask, rollouts.cu_seqlens.diff()
        assert live.sum() > 1000 and "stop" in rollouts.finish_reason and lengths.unique().numel() > 5, (
            "a batch that is not ragged"
        )
        for micro_tokens in (int(lengths.max()), 300, 1 << 20):
            alone, beside_a_loss, entropy = scores(model, rollouts, micro_tokens)
            assert torch.equal(alone, rollouts.logp)
            assert torch.equal(beside_a_loss[live], rollouts.logp[live])
            assert torch.equal(entropy[live], rollouts.entropy[live])


@needs_c
def test_on_two_threads_with_filters_and_on_every_instruction_set(isa, threads):
    """Wrong: a share of the work that cuts a row; the log-prob after the filters."""
    with ops.exact():
        model = model_of("qwen2")
        threads(2)
        rollouts = rollouts_of(model, top_k=20, top_p=0.9, max_new_tokens=8)
        threads(1)
        alone, _, _ = scores(model, rollouts, 200)
    assert torch.equal(alone, rollouts.logp)
    assert not torch.equal(rollouts.behaviour_logp, rollouts.logp)


@needs_c
def test_a_gradient_in_exact_mode_is_that_of_the_default():
    """Wrong: an lse of NaN that reaches the backward; a product without one."""
    model = model_of("qwen3")
    tokens, cu = torch.randint(0, 61, (90,)), torch.tensor([0, 1, 70, 70, 90], dtype=torch.int32)
    found = []
    for mode in (contextlib.nullcontext(), ops.exact()):
        with mode:
            loss = ops.linear_loss(
                model(tokens, cu)[:-1], model.head_weight, tokens[1:], lambda p, h, rows: -p.mean()
            )[0]
            found.append(torch.autograd.grad(loss, list(model.parameters())))
    for default, exact in zip(*found, strict=True):
        assert (exact - default).norm() <= 1e-5 * default.norm()


# --- the parts --------------------------------------------------------------------------------------
def bits(run, subset):
    """Whether `run(rows)` gives, for rows in any company, the rows of run(everything)."""
    want = run(list(range(T)))
    return all(torch.equal(a, b[rows]) for rows in subset for a, b in zip(run(rows), want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_ops_give_a_row_its_bits_in_every_company(isa, dtype):
    """Wrong: vectors that cross rows, tails of another arithmetic, a mean that is split by the number of
    rows.
    """
    for width in (7, 64, 130):
        x, other, weight = (
            torch.randn(T, 2 * width).to(dtype),
            torch.randn(T, width + 3).to(dtype),
            torch.rand(width).to(dtype),
        )
        strided = other[:, 3:]
        with ops.exact():
            assert bits(lambda r, x=x: (swiglu.forward_op(x[r]),), SUBSETS)
            assert bits(lambda r, s=strided, w=weight: rms_norm.forward_op(s[r], w, 1e-6), SUBSETS)
            assert bits(
                lambda r, s=strided, x=x, w=weight, n=width: rms_norm.add_op(x[r, :n], s[r], w, 1e-6), SUBSETS
            )
            assert torch.equal(
                rms_norm.forward_op(strided, weight, 1e-6)[0],
                rms_norm.forward_op(strided.contiguous(), weight, 1e-6)[0],
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_rope_gives_a_token_its_bits_with_and_without_a_cache(isa, dtype, normed):
    """Wrong: the head's norm summed in another order in the kernel that stores."""
    fused, positions = torch.randn(T, 8, 24).to(dtype), torch.randint(0, 50, (T,))
    q, k, v = fused.split((4, 2, 2), 1)
    cos, sin = rope.rope_tables(24, 1e4, None, 50, torch.float32, torch.device("cpu"))
    weights = [torch.rand(24).to(dtype) if normed else torch.empty(0, dtype=dtype) for _ in range(2)]

    def plain(rows):
        return rope.forward_op(q[rows], k[rows], positions[rows], cos, sin, *weights, 1e-6)

    def stored(rows):
        caches = torch.zeros(2, T, 2, 24, dtype=dtype)
        slots = torch.randperm(T)[: len(rows)]
        rope.store_op(q[rows], k[rows], v[rows], positions[rows], cos, sin, *weights, 1e-6, *caches, slots)
        return caches[0, slots], caches[1, slots]

    with ops.exact():
        assert bits(plain, SUBSETS) and bits(stored, SUBSETS)
        assert torch.equal(stored(list(range(T)))[0], plain(list(range(T)))[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [61, 5000])
def test_sampled_statistics_are_those_of_token_logp(isa, V, dtype):
    """Wrong: sums in the order of the sampling kernel; another order with an entropy than without; a greedy
    row at temperature 0.
    """
    logits, temperature = 5 * torch.randn(T, V).to(dtype), torch.linspace(0.3, 2, T)
    temperature[4] = 0
    row = {"seed": 1, "sequence": torch.arange(T), "position": torch.zeros(T, dtype=torch.int64)}
    with ops.exact():
        drawn = ops.sample(logits, **row, temperature=temperature)
        tau = torch.where(temperature == 0, 1, temperature)
        for entropy in (True, False):
            assert torch.equal(
                ops.token_logp(logits, drawn.token, temperature=tau, entropy=entropy).logp, drawn.logp
            )
        assert torch.equal(
            ops.token_logp(logits, drawn.token, temperature=tau, entropy=True).entropy, drawn.entropy
        )
        assert bits(lambda r: token_logp.forward_op(logits[r], drawn.token[r], tau[r], True, False), SUBSETS)
    assert torch.equal(drawn.behaviour_logp, torch.where(temperature == 0, 0, drawn.logp))
    plain = ops.sample(logits, **row, temperature=temperature)
    assert torch.equal(plain.token, drawn.token) and (plain.logp - drawn.logp).abs().max() < 1e-5


# --- attention --------------------------------------------------------------------------------------
LENGTHS = (1, 64, 0, 65, 130, 7)


def heads(dtype, H=4, K=2, E=16):
    tokens = sum(LENGTHS)
    q, k, v = torch.randn(tokens, H + 2 * K, E).to(dtype).split((H, K, K), 1)
    return q, k, v, torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_attention_has_the_bits_of_decode_attention(isa, dtype):
    """Wrong: a token that sees the next one, or another sequence; pages of a sequence that overlap;
    max_seqlen taken for a length.
    """
    q, k, v, cu = heads(dtype)
    with ops.exact():
        y = ops.attention(q, k, v, cu)
        assert torch.equal(ops.attention(q, k, v, cu, max_seqlen=max(LENGTHS)), y)
        starts = cu.tolist()
        for s, n in enumerate(LENGTHS):
            rows = slice(starts[s], starts[s + 1])
            assert torch.equal(
                ops.attention(q[rows], k[rows], v[rows], torch.tensor([0, n], dtype=torch.int32)), y[rows]
            )
            pages = torch.zeros(2, 3, 64, 2, 16, dtype=dtype)
            for cache, x in zip(pages, (k, v), strict=True):
                cache.view(-1, 2, 16)[:n] = x[rows]
            for t in {0, n // 2, n - 1} if n else ():
                table, length = (
                    torch.tensor([[0, 1, 2]], dtype=torch.int32),
                    torch.tensor([t + 1], dtype=torch.int32),
                )
                assert torch.equal(
                    ops.decode_attention(q[rows][t : t + 1], *pages, table, length), y[rows][t : t + 1]
                )
        late, new = (
            torch.cat([torch.arange(starts[s] + n // 2, starts[s + 1]) for s, n in enumerate(LENGTHS)]),
            [n - n // 2 for n in LENGTHS],
        )
        cu_new = torch.tensor([0, *new]).cumsum(0).to(torch.int32)
        assert torch.equal(
            ops.attention(q[late], k, v, cu_new, cu_seqlens_k=cu, max_seqlen=max(LENGTHS)), y[late]
        ), "after a past"
    truth = attention.reference(*(x.double() for x in (q, k, v)), cu, 0.25, 0)[0]
    within_budget(y, attention.reference(q, k, v, cu, 0.25, 0)[0], truth)


def test_gradients_of_exact_attention_in_float64():
    """Wrong: the gradient of a forward with another scale, or at the NaN that stands for lse.  Decodes by the
    reference.
    """
    q, k, v, cu = (
        x.double().contiguous().requires_grad_() if x.is_floating_point() else x
        for x in heads(torch.float32, E=4)
    )
    up = torch.randn(q.shape, dtype=torch.float64)
    found = []
    for name in ("exact", "reference"):
        with ops.use_backend(name, "attention"):
            y = ops.attention(q, k, v, cu, scale=0.3)
            found.append((y.detach(), *torch.autograd.grad(y, (q, k, v), up)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


# --- the mode ---------------------------------------------------------------------------------------
def test_nesting_and_exceptions_restore():
    """Known wrong elsewhere: the mode stays on after an exception, or goes off after a nested exit."""
    with pytest.raises(KeyError), ops.exact():
        with ops.exact():
            pass
        assert is_exact()
        raise KeyError
    assert not is_exact()


def test_an_op_without_such_an_implementation_says_so():
    """Wrong: a decoder in float64 that quietly runs on the library."""
    model = Decoder.from_config(tiny_config(), dtype=torch.float64, seed=0)
    with (
        ops.exact(),
        pytest.raises(
            RuntimeError, match=r"exact mode has no batch-invariant implementation for torch\.float64 on cpu"
        ),
    ):
        model(torch.tensor([1, 2, 3]))


@needs_c
def test_a_run_in_exact_mode(tmp_path, monkeypatch):
    """Wrong: an option that is read and reaches neither the rollouts nor the learner; a mode that outlives
    the run.
    """
    seen = []
    forward, update = Decoder.forward, Learner.update
    monkeypatch.setattr(Decoder, "forward", lambda *a, **k: (seen.append(is_exact()), forward(*a, **k))[1])
    monkeypatch.setattr(Learner, "update", lambda *a, **k: (seen.append(is_exact()), update(*a, **k))[1])
    monkeypatch.setattr(report, "build", lambda folder: None)  # seconds of plots
    result = train(grpo(tmp_path, steps=1, exact=True, eval=Eval()))
    assert len(seen) > 2 and all(seen) and not is_exact()
    assert result.metrics["ratio/max"] == 1.0, "on-policy to the last bit"


def test_a_model_that_only_transformers_can_run_is_refused(tmp_path):
    """Wrong: a promise that somebody else's products cannot keep."""
    model = write_model(tmp_path, hidden_act="gelu")
    with pytest.raises(UserError, match="--exact: expected a model that the fast decoder takes"):
        train(grpo(tmp_path, model=model, steps=1, exact=True))
