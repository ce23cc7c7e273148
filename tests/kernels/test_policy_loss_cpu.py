"""policy_loss's C++ kernel on every instruction set this processor has, against float64; each test names what
it catches.
"""

from __future__ import annotations

import math
from itertools import product

import policy
import pytest
import torch
from policy import ALL_KLS, SWITCHES, case, fused, judge, numbers, variant

from fastrl import ops
from fastrl.algorithms import ALGORITHMS
from fastrl.kernels._backend import extension
from fastrl.kernels.policy_loss import KLS, RATIOS, SURROGATES, policy_loss
from fastrl.kernels.surrogates import Surrogate

C = extension()
needs_c = pytest.mark.skipif(
    C is None, reason="fastrl._C is not built: pip install -e . (or python setup.py build_ext --inplace)"
)


# --- values -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", SURROGATES)
def test_every_row_with_every_kl_and_every_input(isa, name, ratio):
    """Wrong: rows numbered in another order than the tables; a correction on the KL term; a tail of 301
    tokens dropped or read past.
    """
    given = case(301)
    for kl, switches in product(ALL_KLS, SWITCHES):
        judge("cpu", variant(given, name, ratio, kl, switches))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_fused_and_unfused(isa, name):
    policy.algorithm("cpu", name)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 127, 128, 129, 256, 4095, 4096, 4097, 12301])
def test_sizes_around_a_block_and_a_chunk(isa, T):
    """Wrong: a last block that counts the tokens beyond the end, whose ratio is 1; a chunk's sums that
    overwrite another's.
    """
    outcome = judge("cpu", variant(case(T), "clip", "sequence", "k3"))
    judge("cpu", variant(case(T), "sapo", "token", None, ()))
    assert outcome[1]["tokens"] == int(outcome[1]["tokens"]) <= T


def test_parameters_of_the_rows(isa):
    """Wrong: parameters in another order than the row's, or those of the table instead of the caller's."""
    given = case(500)
    for row in (
        SURROGATES["clip"].with_params(low=0.1, high=0.3, cap=1.5),
        SURROGATES["cispo"].with_params(low=0.8, high=1.1),
        SURROGATES["sapo"].with_params(pos=0.7, neg=2.0),
        SURROGATES["dro"].with_params(beta=0.5),
        SURROGATES["luffy_off"].with_params(gamma=0.3),
    ):
        for ratio in RATIOS:
            judge("cpu", variant(given, row, ratio, "k2"))


def test_long_and_many_sequences(isa):
    """Wrong: an fp32 running mean; sequences shorter than a vector; ends at the wrong token."""
    given = variant(case(20000, spread=0.05), "clip", "sequence", None)
    for cu in (
        torch.tensor([0, 20000]),
        torch.arange(0, 20001, 5),
        torch.cat([torch.zeros(7), torch.tensor([1, 3, 11, 20000])]).int(),
    ):
        judge("cpu", given | {"cu_seqlens": cu})


@pytest.mark.parametrize("check", policy.CHECKS, ids=lambda f: f.__name__)
def test_checks_that_every_implementation_passes(isa, check):
    """Wrong: loss * mask; a maximum that drops NaN; a clamp without its gradient; exp(d) - 1 - d; a stride of
    1 assumed; 0 / 0.
    """
    check("cpu")


def test_the_same_bits_for_every_thread_count(isa, threads):
    """Wrong: sums in the order in which threads finish."""
    given = variant(case(40001), "clip", "sequence", "k3")
    given["cu_seqlens"] = torch.arange(0, 40002, 40001 // 3, dtype=torch.int32)
    given["cu_seqlens"][-1] = 40001
    results = []
    for n in (1, 2, 3):
        threads(n)
        results += [numbers(fused("cpu", given)), numbers(fused("cpu", given))]
    assert all(torch.equal(r, results[0]) for r in results)


# --- the op around it -------------------------------------------------------------------------------
@needs_c
def test_inside_torch_func_vjp_with_the_first_step_s_old_logp():
    """linear_loss's callback may take its old log-probs from logp itself: a wrapper then, whose address means
    nothing.
    """
    given = case(50)
    logp, entropy = given["logp"], given["entropy"]

    def loss(p, h):
        return policy_loss(
            p,
            p.detach(),
            given["advantage"],
            surrogate="clip",
            token_weight=given["token_weight"],
            entropy=h,
            entropy_coef=0.1,
        )[0]

    value, pull = torch.func.vjp(loss, logp, entropy)
    slopes = pull(torch.ones(()))
    leaves = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
    again = loss(*leaves)
    for got, want in zip((value, *slopes), (again, *torch.autograd.grad(again, leaves)), strict=True):
        assert torch.equal(got, want)


@needs_c
def test_chosen_by_default_and_for_what():
    """Wrong: a kernel that is built and never runs; float64, which it does not take, rounded on its way."""
    given = variant(case(), "clip", "token", None)
    assert ops.backend("cpu")["policy_loss"] == "cpu"
    assert torch.equal(numbers(policy.run(policy_loss, given)), numbers(fused("cpu", given)))
    assert policy.run(policy_loss, policy.wide(given))[0].dtype == torch.float64
    with (
        ops.use_backend("cpu", "policy_loss"),
        pytest.raises(RuntimeError, match=r"does not take torch\.float64"),
    ):
        policy_loss(**policy.wide(given))


def test_a_row_without_a_native_implementation_runs_its_pytorch_columns(monkeypatch):
    """Wrong: a number of another row, or silence where the kernel was asked for by name."""
    plain = SURROGATES["clip"]
    monkeypatch.setitem(SURROGATES, "mine", Surrogate(lambda d, logp, a: (d.exp() * a, d.exp() * a)))
    given = variant(case(), "mine", "token", "k3")
    ours, theirs = policy.run(policy_loss, given), fused("reference", given | {"surrogate": "ratio"})
    assert torch.equal(numbers(ours), numbers(theirs)) and plain.cpu_id is not None
    with (
        ops.use_backend("cpu", "policy_loss"),
        pytest.raises(RuntimeError, match="backend 'cpu' was asked for, but"),
    ):
        policy_loss(**given)


def test_every_row_of_the_tables_is_in_both_kernels():
    assert [row.cpu_id for row in SURROGATES.values()] == list(range(len(SURROGATES)))
    assert [row.triton for row in SURROGATES.values()] == list(SURROGATES)
    order = "k1 k2 k3 k3+ k1_is k3_is abs k3_cut k3+_cut"  # of csrc/cpu/policy_loss_rows.h
    assert list(KLS) == order.split()


# --- messages ---------------------------------------------------------------------------------------
@needs_c
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"T": -1}, "T: expected at least 0, got -1"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"surrogate": 8}, "surrogate: expected the cpu_id of a row of SURROGATES, got 8"),
        ({"kl": 9}, "kl: expected the place of a row of KLS, or -1, got 9"),
        ({"kl": 1}, "ref_logp: expected an address, because kl is given, got 0"),
        ({"params": (0.2, 0.2)}, "params: expected 3, filled up with 0, got 2"),
        ({"logp": 0}, "logp, old_logp, advantage, weight, dlogp: expected addresses, got 0"),
        ({"entropy": 8}, "dentropy: expected an address, because entropy has one, got 0"),
        ({"metrics": 0}, "loss, metrics: expected addresses, got 0"),
    ],
)
def test_bad_arguments_are_value_errors(changes, message):
    """Wrong: a crash, when a caller of the module itself leaves something out."""
    given = {
        "logp": 8,
        "entropy": 0,
        "old_logp": 8,
        "advantage": 8,
        "weight": 8,
        "ref_logp": 0,
        "correction": 0,
        "mask": 0,
        "ends": 0,
        "S": 0,
        "loss": 8,
        "metrics": 8,
        "dlogp": 8,
        "dentropy": 0,
        "surrogate": 3,
        "params": (0.2, 0.2, math.inf),
        "kl": -1,
        "kl_coef": 0.0,
        "entropy_coef": 0.0,
        "T": 1,
        "threads": 1,
    }
    with pytest.raises(ValueError, match=message):
        C.policy_loss_cpu(*(given | changes).values())


@needs_c
@pytest.mark.parametrize("ends", [[0, 2, 4], [0, -1, 3], [0, 3, 1]])
def test_ends_that_lead_outside_are_not_followed(ends):
    """Wrong: memory before or after the log-probs, read and written, by a caller of the module itself."""
    cu, x = torch.tensor(ends), torch.zeros(32)
    at = x.data_ptr()
    with pytest.raises(ValueError, match="cu_seqlens: expected non-decreasing ends, 0 to 3, got"):
        C.policy_loss_cpu(
            at,
            0,
            at,
            at,
            at,
            0,
            0,
            0,
            cu.data_ptr(),
            2,
            at,
            at,
            at,
            0,
            3,
            (0.2, 0.2, math.inf),
            -1,
            0.0,
            0.0,
            3,
            1,
        )
