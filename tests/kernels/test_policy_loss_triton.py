"""policy_loss's Triton kernels under the interpreter, against float64; each test names what it catches.  It
shows values, not races.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import cycle

import policy
import pytest
import torch
from policy import ALL_KLS, SWITCHES, case, fused, judge, numbers, variant
from torch.library import opcheck

from fastrl import ops
from fastrl.algorithms import ALGORITHMS
from fastrl.kernels import _backend
from fastrl.kernels.policy_loss import RATIOS, SURROGATES, forward_op, policy_loss
from fastrl.kernels.surrogates import Surrogate

kernels = pytest.importorskip(
    "fastrl.kernels._triton.policy_loss", reason="triton is not installed", exc_type=ImportError
)
triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU"
)


# --- values -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", SURROGATES)
def test_every_row_with_every_kl(name, ratio):
    """Wrong: the function of another row, a derivative that is not that of the value, a correction on the KL
    term.  Each KL has other inputs.
    """
    given = case(301)
    for i, (kl, switches) in enumerate(zip(ALL_KLS, cycle(SWITCHES), strict=False)):
        judge("triton", variant(given, name, ratio, kl, switches if ratio == "token" else SWITCHES[i - 3]))


@pytest.mark.parametrize("kl", [None, "k3"])
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "+".join(s) or "none")
def test_every_input_there_or_not(switches, kl):
    """Wrong: an input that is read where it is not given."""
    for ratio in RATIOS:
        judge("triton", variant(case(150), "clip", ratio, kl, switches))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_fused_and_unfused(name):
    policy.algorithm("triton", name)


@pytest.mark.parametrize("T", [1, 3, 511, 512, 513, 1024, 1500])
def test_sizes_around_a_block(T):
    """Wrong: a last block that counts tokens beyond the end, whose ratio is 1; a whole block that is taken
    twice; sums never added.
    """
    judge("triton", variant(case(T), "clip", "sequence", "k3"))
    judge("triton", variant(case(T), "sapo", "token", None, ()))


def test_programs_that_take_several_blocks(monkeypatch):
    """Wrong: a stride other than the number of programs; the rest taken by none or by two; sums in the wrong
    row of the second stage.
    """
    given = variant(case(2900), "clip", "sequence", "k3")
    for programs in (1, 2, 5):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        judge("triton", given)
    monkeypatch.setattr(kernels, "ADDED", 4)
    judge("triton", given)


def test_parameters_of_the_rows():
    """Wrong: parameters in another order than the row's, or those of the table instead of the caller's."""
    for row in (
        SURROGATES["clip"].with_params(low=0.1, high=0.3, cap=1.5),
        SURROGATES["cispo"].with_params(low=0.8, high=1.1),
        SURROGATES["sapo"].with_params(pos=0.7, neg=2.0),
        SURROGATES["dro"].with_params(beta=0.5),
        SURROGATES["luffy_off"].with_params(gamma=0.3),
    ):
        judge("triton", variant(case(300), row, "token", "k2"))


def test_long_and_many_sequences():
    """Wrong: blocks that two sequences share, written by both; a sequence of several blocks; ends at the
    wrong token.
    """
    given = variant(case(3000, spread=0.05), "clip", "sequence", None)
    for cu in (
        torch.tensor([0, 3000]),
        torch.arange(0, 3001, 60),
        torch.tensor([0, 0, 1, 513, 1024, 1025, 3000, 3000]).int(),
    ):
        judge("triton", given | {"cu_seqlens": cu})


@pytest.mark.parametrize("check", policy.CHECKS, ids=lambda f: f.__name__)
def test_checks_that_every_implementation_passes(check):
    """Wrong: loss * mask; a maximum that drops NaN; a clamp without its gradient; exp(d) - 1 - d; a stride of
    1 assumed; 0 / 0.
    """
    check("triton")


def test_two_runs_give_the_same_bits():
    given = variant(case(1300), "clip", "sequence", "k3")
    assert torch.equal(numbers(fused("triton", given)), numbers(fused("triton", given)))


def test_the_cpu_kernel_says_the_same():
    """Both are held to float64; this holds them to each other, on a case with every input."""
    if _backend.extension() is None:
        pytest.skip("fastrl._C is not built")
    given = variant(case(1300), "clip", "sequence", "k3")
    torch.testing.assert_close(
        numbers(fused("triton", given)), numbers(fused("cpu", given)), rtol=2e-6, atol=1e-8
    )


# --- the op around them -----------------------------------------------------------------------------
def test_a_row_with_a_function_of_its_own(monkeypatch):
    """Wrong: a table of names that a user cannot add to."""
    ratio = Surrogate(
        lambda d, logp, a: (d.exp() * a, d.exp() * a), triton=kernels.surrogates.ratio, cpu_id=2
    )
    monkeypatch.setitem(SURROGATES, "mine", ratio)
    given = variant(case(100), "mine", "token", "k3")
    assert torch.equal(
        numbers(fused("triton", given)), numbers(fused("triton", given | {"surrogate": "ratio"}))
    )


def test_a_surrogate_that_is_not_in_the_table_runs_its_pytorch_columns():
    clip = SURROGATES["clip"]
    mine = Surrogate(lambda d, logp, a, **p: (clip.torch(d, logp, a, **p)[0], None), params=clip.params)
    with ops.use_backend("triton", "policy_loss"):
        ours = policy.run(policy_loss, variant(case(100), mine, "sequence", "k3"))
    theirs = fused("reference", variant(case(100), "clip", "sequence", "k3"))
    assert ours[2][0].shape == theirs[2][0].shape and ours[0].isfinite()


def test_the_launch_has_few_programs_and_no_length(monkeypatch):
    """Wrong: a grid axis that ends at 65,535, partial sums that grow with T,
    T as a constant to compile for.
    """

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **options: constants.append(
                {n for n in options if n not in ("num_warps", "enable_fp_fusion")}
            )

    grids, constants = [], []
    for name in ("token_kernel", "combine_kernel", "mean_kernel"):
        monkeypatch.setattr(kernels, name, Recorder())
    T = 2_000_000
    x = torch.zeros(T)
    with ops.use_backend("triton", "policy_loss"):
        policy_loss(
            x, x, x, surrogate="clip", token_weight=x, ratio="sequence", cu_seqlens=torch.arange(0, T + 1, 20)
        )
    assert grids == [(100_000,), (kernels.PROGRAMS,), (1,)]
    assert not any("T" in c for c in constants)


@pytest.mark.parametrize("ratio", RATIOS)
def test_opcheck(ratio):
    c = case(20)
    names = (
        "logp",
        "entropy",
        "old_logp",
        "advantage",
        "token_weight",
        "ref_logp",
        "correction",
        "mask",
        "cu_seqlens",
    )
    with ops.use_backend("triton", "policy_loss"):
        opcheck(forward_op, (*(c[n] for n in names), "clip", [0.2, 0.2, 9.0], ratio, "k3", 0.1, 0.1))


def test_under_compile_and_vjp():
    given = variant(case(30), "clip", "token", "k3")
    with ops.use_backend("triton", "policy_loss"):
        want = policy.run(policy_loss, given)
        logp = given.pop("logp")
        compiled = torch.compile(lambda p: policy_loss(p, **given)[0], fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(logp), want[0])
        value, pull = torch.func.vjp(lambda p: policy_loss(p, **given)[0], logp)
        assert torch.equal(value, want[0]) and torch.equal(pull(torch.ones(()))[0], want[2][0])


def test_the_table_is_there_without_triton():
    """Wrong: an import of triton in the module of the tables."""
    code = (
        "import sys; sys.modules['triton'] = None; from fastrl import ops; "
        "print(ops.SURROGATES['clip'].triton, ops.implementations()['policy_loss']['triton'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "clip triton is not installed", done.stderr
