"""The C++ kernels of perturb on every instruction set that is here; what each check catches is said in
tests/helpers/perturbations.py.
"""

from __future__ import annotations

import perturbations as p
import pytest
import torch

from fastrl.kernels._backend import extension
from fastrl.kernels.perturb import perturb_init, perturb_step

C = extension()
BACKEND = "cpu"
needs_c = pytest.mark.skipif(
    C is None, reason="fastrl._C is not built: pip install -e . (or python setup.py build_ext --inplace)"
)
balls = pytest.mark.parametrize(("norm", "scope"), p.BALLS)


@pytest.mark.parametrize(
    ("D", "dtype"),
    [
        (1, torch.float32),
        (37, torch.bfloat16),
        (64, torch.float16),
        (5000, torch.bfloat16),
        (1000, torch.float64),
    ],
    ids=str,
)
@balls
def test_values(isa, norm, scope, D, dtype):
    """Wrong: a tail of a row that is dropped or read past, 0 * NaN of masked tokens, an embedding added
    before the projection.
    """
    p.check_values(BACKEND, norm, scope, D, dtype)


@pytest.mark.parametrize(("norm", "scope"), list(p.GOLDEN))
def test_golden(isa, norm, scope):
    p.check_golden(BACKEND, norm, scope)


@balls
def test_magnitudes(isa, norm, scope):
    """Wrong: squares in fp32 alone, by which a large gradient counts as not finite, or a step that is less
    than fp32 can hold.
    """
    p.check_magnitudes(BACKEND, norm, scope)


@balls
def test_nothing_to_do(isa, norm, scope):
    p.check_nothing(BACKEND, norm, scope)


@balls
def test_layouts(isa, norm, scope):
    """Wrong: a row stride taken to be D, a copy that is updated instead of the argument."""
    p.check_layouts(BACKEND, norm, scope)


@pytest.mark.parametrize("scope", p.SCOPES)
def test_l1_close_magnitudes(isa, scope):
    p.check_close_magnitudes(BACKEND, scope)


@pytest.mark.parametrize("radius", [1e-3, 0.5, 3.0, 1e4])
@pytest.mark.parametrize("scope", p.SCOPES)
def test_l1_spread_magnitudes(isa, scope, radius):
    p.check_spread_magnitudes(BACKEND, scope, radius)


@balls
def test_start(isa, norm, scope):
    p.check_start(BACKEND, norm, scope)


@needs_c
@pytest.mark.parametrize("T", [3, 90000])
@pytest.mark.parametrize("norm", p.NORMS)
def test_many_tokens(norm, T):
    """Wrong: a 16-bit token number; sums that drift over 90,000 tokens."""
    p.judge(
        BACKEND,
        0.01 * torch.randn(T, 3),
        torch.randn(T, 3),
        step_size=0.3,
        radius=0.5,
        norm=norm,
        scope="batch",
    )


@balls
def test_the_same_bits_for_every_thread_count(isa, norm, scope, threads):
    """Wrong: sums in the order in which threads finish; both ways of sharing out balls are taken (3 and 40 of
    them).
    """
    x, g, mask = 0.1 * torch.randn(400, 500), torch.randn(400, 500), torch.rand(400) > 0.2
    for cu in (torch.tensor([0, 100, 120, 400]), torch.arange(0, 401, 10)):
        how = p.given(norm, scope, mask=mask) | ({"cu_seqlens": cu} if scope == "sequence" else {})
        results = []
        for n in (1, 2, 3):
            threads(n)
            results.append(p.step(BACKEND, x, g, **how))
        assert all(torch.equal(results[0], r) for r in results[1:])


@needs_c
def test_rows_that_are_far_apart():
    """Wrong: a 32-bit offset.  The pages between the rows are never touched."""
    far = torch.empty(2**30 + 64, dtype=torch.float32).as_strided((3, 7), (2**29, 1))
    x, g = 0.1 * torch.randn(3, 7), torch.randn(3, 7)
    far.copy_(x)
    perturb_step(far, g, step_size=0.1, radius=0.2, scope="batch")
    assert torch.equal(far, p.step(BACKEND, x, g, step_size=0.1, radius=0.2, norm="l2", scope="batch"))


@needs_c
def test_chosen_by_default_on_cpu():
    """Wrong: a kernel that is built and never runs."""
    x, g = torch.randn(4, 9), torch.randn(4, 9)
    assert torch.equal(
        perturb_step(x.clone(), g, step_size=0.1, radius=1.0),
        p.step(BACKEND, x, g, step_size=0.1, radius=1.0),
    )
    how = {"radius": 1.0, "norm": "l2", "scope": "token", "seed": 3}
    assert torch.equal(perturb_init(x, **how), p.start(BACKEND, x, **how))


@needs_c
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"T": -1}, "T: expected at least 0, got -1"),
        ({"D": 0}, "D: expected at least 1, got 0"),
        ({"code": 2}, r"code: expected 0 \(fp32\) or 1 \(bf16\), got 2"),
        ({"norm": 3}, r"norm: expected 0 \(l2\), 1 \(linf\) or 2 \(l1\), got 3"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"delta": 0}, "delta: expected an address, got 0"),
        ({"out": 8}, "embeds: expected an address, because out has one, got 0"),
    ],
)
def test_bad_arguments_are_value_errors(changes, message):
    given = {
        "delta": 8,
        "delta_stride": 4,
        "grad": 8,
        "code": 0,
        "grad_stride": 4,
        "mask": 0,
        "ends": 0,
        "S": 0,
        "T": 1,
        "D": 4,
        "step_size": 0.1,
        "radius": 1.0,
        "norm": 0,
        "embeds": 0,
        "embeds_code": 0,
        "embeds_stride": 0,
        "out": 0,
        "out_code": 0,
        "out_stride": 0,
        "threads": 1,
    }
    with pytest.raises(ValueError, match=message):
        C.perturb_step_cpu(*(given | changes).values())
