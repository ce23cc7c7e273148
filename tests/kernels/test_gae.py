"""gae against a plain loop over time in float64, worked values, and the rule that observation tokens are
transparent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from advantage_loops import gae_loop as loop
from support import within_budget
from torch import Tensor

from fastrl import ops
from fastrl.kernels.gae import forward_op, gae, reference

F64 = torch.float64
VALUE = torch.tensor([0.5, 0.6, 0.7], dtype=F64)
ONE = torch.tensor([0, 3], dtype=torch.int32)


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds for both."""
    if ops.implementations()["gae"][request.param] != "ready":
        pytest.skip("fastrl._C is not built")
    with ops.use_backend(request.param, "gae"):
        yield


@pytest.mark.parametrize(
    ("reward", "gamma", "lam", "expected"),
    [
        ((0, 0, 1), 1.0, 0.95, (0.465750, 0.385, 0.3)),
        ((0, 0, 1), 1.0, 1.0, (0.5, 0.4, 0.3)),
        ((0, 0, 1), 1.0, 0.0, (0.1, 0.1, 0.3)),
        ((-0.01, -0.02, 1), 0.99, 0.95, (0.418018575, 0.35515, 0.3)),
    ],
)
def test_worked_values(reward: Any, gamma: float, lam: float, expected: Any) -> None:
    advantage, returns = gae(torch.tensor(reward, dtype=F64), VALUE, ONE, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantage, torch.tensor(expected, dtype=F64), atol=1e-12, rtol=0)
    torch.testing.assert_close(returns, advantage + VALUE)


def random_case(dtype: torch.dtype = F64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    reward, value = torch.randn(2, 90, generator=g, dtype=F64).to(dtype)
    return (
        reward,
        value,
        torch.tensor([0, 1, 30, 30, 67, 90], dtype=torch.int32),
        torch.rand(90, generator=g) > 0.3,
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_loop(masked: bool, seed: int) -> None:
    """Catches a carry that leaks over a sequence's end, and one that is cut (or discounted) at an observation
    token.
    """
    reward, value, cu, mask = random_case(seed=seed)
    mask = mask if masked else torch.ones_like(mask)
    advantage, returns = gae(reward, value, cu, gamma=0.97, lam=0.9, mask=mask if masked else None)
    expected = loop(reward, value, cu.tolist(), mask, 0.97, 0.9)
    torch.testing.assert_close(advantage, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(returns, torch.where(mask, expected + value, 0), atol=1e-12, rtol=0)


def test_inserting_observations_changes_nothing() -> None:
    reward, value, _, _ = random_case()
    reward, value = reward[:8], value[:8]
    plain, _ = gae(reward, value, torch.tensor([0, 3, 8]), gamma=0.9, lam=0.8)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    wide_reward, wide_value = torch.full((2, 13), math.nan, dtype=F64)
    wide_reward[mask], wide_value[mask] = reward, value
    wide, returns = gae(wide_reward, wide_value, torch.tensor([0, 5, 13]), gamma=0.9, lam=0.8, mask=mask)
    torch.testing.assert_close(wide[mask], plain)
    assert not wide[~mask].any() and not returns[~mask].any()


def test_a_nan_stays_in_its_sequence_and_before_its_token() -> None:
    """Catches 0 * NaN at a sequence's end, by which one bad reward spoils all sequences before it."""
    reward, value, cu, _ = random_case()
    clean, _ = gae(reward, value, cu, gamma=1.0, lam=1.0)
    reward[50] = math.nan
    spoiled, _ = gae(reward, value, cu, gamma=1.0, lam=1.0)
    bad = spoiled.isnan()
    assert bad[30:51].all() and int(bad.sum()) == 21 and torch.equal(spoiled[~bad], clean[~bad])


def test_no_discount_gives_return_minus_value_and_no_trace_gives_delta() -> None:
    reward, value, _, _ = random_case()
    cu = torch.tensor([0, 90])
    advantage, returns = gae(reward, value, cu, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, reward.flip(0).cumsum(0).flip(0))
    advantage, _ = gae(reward, value, cu, gamma=0.9, lam=0.0)
    torch.testing.assert_close(
        advantage, reward + 0.9 * torch.cat([value[1:], torch.zeros(1, dtype=F64)]) - value
    )


def test_error_against_float64_is_the_loops_own() -> None:
    reward, value, cu, mask = random_case(torch.float32)
    truth = loop(reward.double(), value.double(), cu.tolist(), mask, 0.99, 0.95)
    theirs = loop(reward, value, cu.tolist(), mask, 0.99, 0.95)
    ours, _ = gae(reward, value, cu, gamma=0.99, lam=0.95, mask=mask)
    assert ours.dtype == torch.float32
    within_budget(ours, theirs, truth)


def test_empty_strided_and_half_inputs() -> None:
    reward, value, cu, mask = random_case()
    expected, _ = gae(reward, value, cu, gamma=0.9, lam=0.9, mask=mask)
    strided = torch.stack([reward, value], dim=1)
    assert torch.equal(
        gae(strided[:, 0], strided[:, 1], cu.long(), gamma=0.9, lam=0.9, mask=mask).advantage, expected
    )
    empty = reward[:0]
    for ends in ([0], [0, 0, 0]):
        assert gae(empty, empty, torch.tensor(ends), gamma=0.9, lam=0.9).advantage.shape == (0,)
    half, _ = gae(reward.bfloat16(), value.bfloat16(), cu, gamma=0.9, lam=0.9)
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half, gae(reward.bfloat16().float(), value.bfloat16().float(), cu, gamma=0.9, lam=0.9).advantage
    )


def test_opcheck_and_compile() -> None:
    reward, value, cu, mask = random_case(torch.float32)
    torch.library.opcheck(forward_op, (reward, value, cu, mask, 0.9, 0.8))
    torch.library.opcheck(forward_op, (reward, value, cu, mask[:0], 0.9, 0.8))
    run = torch.compile(lambda r, v: gae(r, v, cu, gamma=0.9, lam=0.8), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(reward, value)[0], gae(reward, value, cu, gamma=0.9, lam=0.8).advantage)


def test_the_definition_reads_no_values() -> None:
    """Meta tensors have none: catches .item() and boolean indexing, which make the host wait for a GPU."""
    assert reference(*(x.to("meta") for x in random_case()), 0.9, 0.8)[0].shape == (90,)


def test_result_takes_no_gradient() -> None:
    reward, value, cu, _ = random_case()
    assert not gae(
        reward.requires_grad_(), value.requires_grad_(), cu, gamma=1.0, lam=1.0
    ).advantage.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 1.5}, r"gamma: expected a discount in \[0, 1\], got 1.5"),
        ({"lam": -0.1}, r"lam: expected a discount in \[0, 1\], got -0.1"),
        ({"value": VALUE[:2]}, r"value: expected shape \(T=3\), got \(2,\)"),
        (
            {"cu_seqlens": torch.tensor([0, 2])},
            r"cu_seqlens: expected non-decreasing ends from 0 to T=3, got \[0, 2\]",
        ),
        ({"mask": torch.ones(3)}, r"mask: expected dtype bool, got float32"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        gae(**{"reward": VALUE, "value": VALUE, "cu_seqlens": ONE, "gamma": 1.0, "lam": 1.0, **changes})
