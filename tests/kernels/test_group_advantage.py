"""group_advantage against worked values, a plain loop over groups, and exact facts on bandits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from advantage_loops import groups_loop, ragged

from fastrl import ops
from fastrl.kernels import _group_advantage
from fastrl.kernels.group_advantage import BASELINES, SCALES, SHAPES, forward_op, group_advantage, reference

F64 = torch.float64
FOUR = torch.tensor([0.2, 1.0, 0.5, 0.5], dtype=F64)
ONE_OF_EIGHT = torch.tensor([1.0] + [0.0] * 7, dtype=F64)


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds for both."""
    if ops.implementations()["group_advantage"][request.param] != "ready":
        pytest.skip("fastrl._C is not built")
    with ops.use_backend(request.param, "group_advantage"):
        yield


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scale": "none"}, (-0.35, 0.45, -0.05, -0.05)),
        ({"eps": 0}, (-1.0553, 1.3568, -0.1508, -0.1508)),
        ({"eps": 0, "unbiased": False}, (-1.2185, 1.5667, -0.1741, -0.1741)),
        ({"baseline": "leave_one_out", "scale": "none"}, (-0.4667, 0.6, -0.0667, -0.0667)),
        ({"baseline": "max", "scale": "none"}, (-0.8, 0, -0.5, -0.5)),
        ({"baseline": "max", "scale": "range"}, (-1, 0, -0.625, -0.625)),
        ({"baseline": "none", "scale": "none"}, (0.2, 1, 0.5, 0.5)),
        ({"shape": "rank"}, (-1, 1, 0, 0)),
        ({"shape": "softmax", "tau": 0.25}, (-0.8757, 2.0501, -0.5872, -0.5872)),
    ],
)
def test_worked_values(options: dict[str, Any], expected: tuple[float, ...]) -> None:
    torch.testing.assert_close(
        group_advantage(FOUR, 4, **options), torch.tensor(expected, dtype=F64), atol=5.1e-5, rtol=0
    )


def test_eps_is_added_to_the_standard_deviation() -> None:
    """Catches sqrt(var + eps), and another default than 1e-4."""
    torch.testing.assert_close(group_advantage(FOUR, 4), (FOUR - FOUR.mean()) / (FOUR.std() + 1e-4))


def test_one_success_of_eight_and_groups_of_two() -> None:
    for unbiased, (best, rest), pair in (
        (False, (2.6458, -0.3780), 1.0),
        (True, (2.4749, -0.3536), math.sqrt(0.5)),
    ):
        a = group_advantage(ONE_OF_EIGHT, 8, eps=0, unbiased=unbiased)
        torch.testing.assert_close(a, torch.tensor([best] + [rest] * 7, dtype=F64), atol=5.1e-5, rtol=0)
        a = group_advantage(torch.tensor([3.0, -7.0]), 2, eps=0, unbiased=unbiased)
        torch.testing.assert_close(a, torch.tensor([pair, -pair]))


def test_rank_is_leave_one_out_on_binary_rewards() -> None:
    """Catches ranks without averaged ties."""
    reward = torch.tensor(list(product([0.0, 1.0], repeat=4)), dtype=F64).flatten()
    torch.testing.assert_close(
        group_advantage(reward, 4, shape="rank"),
        group_advantage(reward, 4, baseline="leave_one_out", scale="none"),
    )


@pytest.mark.parametrize("p", [0.05, 0.9])
def test_expected_gradient_on_a_bandit(p: float) -> None:
    """Success probability p = sigmoid(theta): the mean over samples of A d log p has a known expectation for
    each estimator.
    """
    K, true = 8, p * (1 - p)
    patterns = torch.tensor(list(product([0.0, 1.0], repeat=K)), dtype=F64)  # every outcome of one group
    c = patterns.sum(1)
    weight = p**c * (1 - p) ** (K - c)
    expected = {
        ("mean", "none", "linear"): (K - 1) / K * true,
        ("leave_one_out", "none", "linear"): true,
        ("max", "none", "linear"): true * (1 - (1 - p) ** (K - 1)),
        ("mean", "std", "linear"): {0.05: 0.1099, 0.9: 0.1960}[p],
        ("mean", "none", "softmax"): {0.05: 0.0562, 0.9: 0.0573}[p],
    }
    for (baseline, scale, shape), answer in expected.items():
        a = group_advantage(
            patterns.flatten(), K, baseline=baseline, scale=scale, shape=shape, eps=0, tau=1.0
        ).view(-1, K)
        got = (weight * (a * (patterns - p)).mean(1)).sum()
        assert float(got) == pytest.approx(answer, abs=6e-5), (baseline, scale, shape)


# --- groups -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("baseline", "scale", "shape"), list(product(BASELINES, SCALES, SHAPES)))
def test_equals_a_loop_over_ragged_groups(baseline: str, scale: str, shape: str) -> None:
    """Catches NaN counted as 0 or as a member, statistics over the batch instead of the group, and samples
    returned in sorted order.
    """
    reward, ids = ragged()
    expected = groups_loop(reward, ids, baseline, scale, shape)
    got = group_advantage(reward, ids, baseline=baseline, scale=scale, shape=shape)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    assert not got[:8].any() and not got[reward.isnan()].any()  # exactly 0
    order = torch.randperm(60)
    shuffled = group_advantage(reward[order], ids[order].int(), baseline=baseline, scale=scale, shape=shape)
    torch.testing.assert_close(shuffled, got[order], atol=1e-12, rtol=1e-12)


def test_a_missing_reward_is_no_tie_with_a_reward_of_0() -> None:
    """It is kept as 0, behind the others: here behind the best, which is 0."""
    got = group_advantage(torch.tensor([0.0, torch.nan, -1.0]), 3, shape="rank")
    assert got.tolist() == [1, 0, -1]


def test_a_size_means_contiguous_groups() -> None:
    reward = torch.rand(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        group_advantage(reward, 3),
        group_advantage(reward, torch.tensor([5, 5, 5, 2, 2, 2, 9, 9, 9, 0, 0, 0])),
    )
    assert torch.equal(group_advantage(reward, 3)[:3], group_advantage(reward[:3], 3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_no_spread_is_exactly_zero(baseline: str, scale: str, shape: str) -> None:
    """Three times 0.1 has a mean that is not 0.1 in fp32: catches std < eps as the test for no spread, and A
    = R for one sample.
    """
    for size in (1, 3):
        assert not group_advantage(
            torch.full((6,), 0.1), size, baseline=baseline, scale=scale, shape=shape
        ).any()


def test_large_offsets_keep_their_digits() -> None:
    """Rewards of 1000 +- 1e-3: catches E[R^2] - E[R]^2, which is pure rounding here, and moments in fp32."""
    reward = 1000 + 1e-3 * torch.tensor([-1.0, 1.0, 0.5, -0.5, 0.25])
    r = reward.double()
    torch.testing.assert_close(
        group_advantage(reward, 5, eps=0).double(), (r - r.mean()) / r.std(), atol=1e-6, rtol=1e-6
    )


# --- the form of the op -----------------------------------------------------------------------------
def test_empty_strided_and_half_inputs() -> None:
    assert group_advantage(torch.empty(0), 4).shape == (0,)
    assert group_advantage(torch.empty(0), torch.empty(0, dtype=torch.int64)).shape == (0,)
    both = torch.rand(8, 2)
    assert torch.equal(group_advantage(both[:, 0], 4), group_advantage(both[:, 0].clone(), 4))
    half = group_advantage(both[:, 0].bfloat16(), 4)
    assert half.dtype == torch.float32
    assert torch.equal(half, group_advantage(both[:, 0].bfloat16().float(), 4))
    assert not group_advantage(torch.rand(4, requires_grad=True), 4).requires_grad


def test_opcheck_and_compile() -> None:
    reward, ids = torch.rand(6), torch.tensor([1, 0, 1, 0, 0, 7])
    options = ("mean", "std", "linear", 1e-4, True, 0.5)
    torch.library.opcheck(forward_op, (reward, ids, 0, *options))
    torch.library.opcheck(forward_op, (reward, ids[:0], 3, *options))
    run = torch.compile(lambda r: group_advantage(r, 3), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(reward), group_advantage(reward, 3))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_definition_reads_no_values(shape: str) -> None:
    """Meta tensors have none: catches unique(), bincount() and boolean indexing, which make the host wait for
    a GPU.
    """
    reward, ids = torch.rand(6, device="meta"), torch.zeros(6, dtype=torch.int64, device="meta")
    for group, size in ((ids, 0), (ids[:0], 3)):
        assert reference(reward, group, size, "leave_one_out", "batch_std", shape, 1e-4, True, 0.5).shape == (
            6,
        )


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (3, {}, r"group: expected a size that divides the 4 rewards, got 3; pass ids for unequal groups"),
        (0, {}, r"group: expected a size that divides the 4 rewards, got 0"),
        (2.0, {}, r"group: expected ids \(S=4\) or an int, got float"),
        (torch.tensor([0, 1]), {}, r"group: expected shape \(S=4\), got \(2,\)"),
        (torch.tensor([0, 1, -1, 0]), {}, r"group: expected ids of 0 or more, got -1"),
        (
            4,
            {"baseline": "median"},
            r"baseline: expected one of 'mean', 'leave_one_out', 'max', 'none'; got 'median'",
        ),
        (4, {"scale": "mad"}, r"scale: expected one of"),
        (4, {"shape": "cubic"}, r"shape: expected one of"),
        (4, {"tau": 0.0}, r"tau: expected a positive temperature, got 0.0"),
    ],
)
def test_errors_name_the_argument(group: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        group_advantage(FOUR, group, **options)


def test_the_tables_are_in_the_order_of_the_kernels():
    """Wrong: a row added to the op's tables in the middle, so that the kernel computes another."""
    assert tuple(BASELINES) == _group_advantage.BASELINES
    assert tuple(SCALES) == _group_advantage.SCALES
    assert tuple(SHAPES) == _group_advantage.SHAPES
