"""group_advantage's C++ kernel against a loop over groups in float64, on every instruction set this processor
has.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from advantage_loops import groups_loop, ragged

from fastrl import ops
from fastrl.kernels._backend import extension
from fastrl.kernels.group_advantage import BASELINES, SCALES, group_advantage, reference

C = extension()
pytestmark = pytest.mark.skipif(
    C is None, reason="fastrl._C is not built: pip install -e . (or python setup.py build_ext --inplace)"
)
ROWS = [*product(BASELINES, SCALES, ("linear",)), ("mean", "std", "rank"), ("mean", "std", "softmax")]


@pytest.fixture(autouse=True)
def cpu():
    with ops.use_backend("cpu", "group_advantage"):
        yield


def rewards(S, dtype=torch.float32):
    """Gaussian, a quarter of them tied, a tenth not scored."""
    reward = torch.randn(S)
    reward[torch.rand(S) < 0.25] = 0.5
    reward[torch.rand(S) < 0.1] = math.nan
    return reward.to(dtype)


# --- values -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 16, 17, 64])
def test_fixed_sizes(isa, size, dtype):
    """Wrong: a tail read as members (2, 3, 17), a vector stored over the next group, or past the end of the
    last one.
    """
    reward = rewards(37 * size, dtype)
    ids = torch.arange(37).repeat_interleave(size)
    for baseline, scale, shape in ROWS:
        got = group_advantage(reward, size, baseline=baseline, scale=scale, shape=shape)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        want = groups_loop(reward, ids, baseline, scale, shape)
        torch.testing.assert_close(
            got.double(), want, atol=tolerance, rtol=tolerance, msg=f"{baseline} {scale} {shape}"
        )


def test_nothing_is_written_past_the_end(isa):
    """Wrong: whole vectors stored for the last group of a chunk, which is some other tensor's memory."""
    for size in (1, 2, 3, 5, 8, 16, 19):
        out = torch.full((2 * size + 32,), 7.0)
        reward = torch.randn(2 * size)
        C.group_advantage_cpu(
            reward.data_ptr(), False, 0, size, 0, 0, 0, 1e-4, True, 0.5, out.data_ptr(), 2 * size, 1
        )
        assert (out[2 * size :] == 7).all() and torch.equal(out[: 2 * size], group_advantage(reward, size))


@pytest.mark.parametrize("baseline, scale, shape", ROWS)
def test_ragged_groups_by_ids(isa, baseline, scale, shape):
    """Wrong: samples returned in the order of their groups; ids taken for group numbers (they are far apart
    in the second call).
    """
    reward, ids = ragged()
    want = groups_loop(reward, ids, baseline, scale, shape)
    for far in (1, 2**40):
        torch.testing.assert_close(
            group_advantage(reward, ids * far, baseline=baseline, scale=scale, shape=shape),
            want,
            atol=1e-12,
            rtol=1e-12,
        )


def test_ids_further_apart_than_int64_holds(isa):
    """Wrong: a distance of ids that overflows, so that memory beyond the counts is written, by a caller of
    the module itself.
    """
    reward, out = torch.tensor([1.0, 2.0, 5.0, 4.0]), torch.empty(4)
    for low, high in ((-(2**63), 2**63 - 1), (-(2**62) - 5, 2**62 + 5), (-(2**63), 2**63 - 2)):
        ids = torch.tensor([low, high, low, high])
        mean, plain, linear = 0, 3, 0
        C.group_advantage_cpu(
            reward.data_ptr(),
            False,
            ids.data_ptr(),
            0,
            mean,
            plain,
            linear,
            0.0,
            True,
            1.0,
            out.data_ptr(),
            4,
            1,
        )
        assert out.tolist() == [-2.0, -1.0, 2.0, 1.0]


def test_large_groups_are_ranked_by_sorting(isa):
    """Wrong: ties that are not averaged, or NaN ranked, where comparing each with each would take too
    long.
    """
    reward = rewards(3 * 2000)
    want = reference(
        reward.double(), torch.empty(0, dtype=torch.int64), 2000, "mean", "std", "rank", 0.0, True, 0.5
    )
    torch.testing.assert_close(group_advantage(reward, 2000, shape="rank").double(), want, atol=1e-6, rtol=0)
    assert not group_advantage(torch.full((2000,), 0.1), 2000, shape="rank").any()


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1e6])
def test_digits_of_an_offset(isa, offset):
    """Rewards of 1000 +- 1e-3.  Wrong: moments in fp32, or of one pass; the error is that of one rounding."""
    reward = offset + 1e-3 * torch.randn(64 * 16)
    for scale in ("std", "batch_std", "range", "none"):
        exact = reference(
            reward.double(), torch.empty(0, dtype=torch.int64), 16, "mean", scale, "linear", 1e-4, True, 0.5
        )
        assert (group_advantage(reward, 16, scale=scale) - exact).abs().max() <= 2**-24 * exact.abs().max()


def test_softmax_over_its_whole_range(isa):
    """Wrong: exp of what was rounded to fp32 first, and exp of a large negative number that wraps around."""
    reward = torch.tensor([0.0, -1e-3, -0.7, -30.0, -700.0, -800.0, -1e30, 3.0]).repeat(4)
    exact = reference(
        reward.double(), torch.empty(0, dtype=torch.int64), 8, "mean", "std", "softmax", 1e-4, True, 1.0
    )
    got = group_advantage(reward.double(), 8, shape="softmax", tau=1.0)
    torch.testing.assert_close(got, exact, atol=1e-15, rtol=4e-16)
    rounded = group_advantage(reward, 8, shape="softmax", tau=1.0)
    assert (rounded - exact).abs().max() <= 2**-24 * exact.abs().max()


def test_infinite_rewards_are_what_the_definition_says(isa):
    """Wrong: infinity taken for a NaN reward, which is silently 0."""
    reward = torch.tensor([math.inf, 1.0, 2.0, 3.0, -math.inf, 0.0, 0.0, 0.0])
    for baseline, scale, shape in ROWS:
        options = (4, baseline, scale, shape, 1e-4, True, 0.5)
        want = reference(reward, torch.empty(0, dtype=torch.int64), *options)
        got = group_advantage(reward, 4, baseline=baseline, scale=scale, shape=shape)
        torch.testing.assert_close(got, want, equal_nan=True, msg=f"{baseline} {scale} {shape}")


# --- layout, threads, choice ------------------------------------------------------------------------
@pytest.mark.parametrize("scale", ["std", "batch_std"])
def test_the_same_bits_for_every_thread_count(isa, scale):
    """Wrong: a batch's moments summed in shares of the threads; a group whose bits depend on a neighbour that
    has a NaN.
    """
    reward, before, found = rewards(3 * 20_011, torch.float64), torch.get_num_threads(), []
    ids = torch.randint(0, 5000, (3 * 20_011,))
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append((group_advantage(reward, 3, scale=scale), group_advantage(reward, ids, scale=scale)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert scale == "batch_std" or torch.equal(found[0][0][3000:3300], group_advantage(reward[3000:3300], 3))


def test_strided_no_samples_and_chosen_by_default():
    """Wrong: a stride of 1 assumed; a kernel that is built and never runs."""
    reward = rewards(64)
    assert torch.equal(group_advantage(torch.stack([reward, reward], 1)[:, 0], 4), group_advantage(reward, 4))
    assert group_advantage(reward[:0], torch.empty(0, dtype=torch.int64)).shape == (0,)
    assert ops.implementations()["group_advantage"]["cpu"] == "ready"
    assert ops.backend("cpu")["group_advantage"] == "cpu"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"S": -1}, "S: expected at least 0, got -1"),
        ({"size": 3}, "size: expected a divisor of S, or group ids, got 3"),
        ({"size": 0}, "size: expected a divisor of S, or group ids, got 0"),
        ({"baseline": 4}, "baseline: expected 0 to 3, got 4"),
        ({"scale": -1}, "scale: expected 0 to 3, got -1"),
        ({"shape": 3}, "shape: expected 0 to 2, got 3"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"out": 0}, "reward, out: expected addresses, got 0"),
    ],
)
def test_bad_arguments_are_value_errors(changes, message):
    given = {
        "reward": 8,
        "is_double": False,
        "group": 0,
        "size": 2,
        "baseline": 0,
        "scale": 0,
        "shape": 0,
        "eps": 0.0,
    }
    with pytest.raises(ValueError, match=message):
        C.group_advantage_cpu(
            *(given | {"unbiased": True, "tau": 0.5, "out": 8, "S": 4, "threads": 1} | changes).values()
        )
