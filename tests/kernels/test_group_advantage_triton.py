"""group_advantage's Triton kernels under the interpreter, through the op, against a loop over groups in
float64.
"""

from __future__ import annotations

import math
import os
from itertools import product

import pytest
import torch
from advantage_loops import groups_loop, ragged

from fastrl import ops
from fastrl.kernels import _backend
from fastrl.kernels.group_advantage import BASELINES, SCALES, SHAPES, forward_op, group_advantage, reference

kernels = pytest.importorskip(
    "fastrl.kernels._triton.group_advantage", reason="triton is not installed", exc_type=ImportError
)
pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs TRITON_INTERPRET=1, set where there is no GPU",
    ),
    pytest.mark.filterwarnings(
        "ignore:invalid value encountered:RuntimeWarning"
    ),  # NumPy, where a group's divisor is 0 or infinite
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]
NO_IDS = torch.empty(0, dtype=torch.int64)
ROWS = [*product(BASELINES, SCALES, ("linear",)), ("mean", "std", "rank"), ("mean", "std", "softmax")]
FEW = [
    ("leave_one_out", "std", "linear"),
    ("max", "range", "linear"),
    ("mean", "std", "rank"),
    ("mean", "std", "softmax"),
]


@pytest.fixture(autouse=True)
def triton():
    with ops.use_backend("triton", "group_advantage"):
        yield


def rewards(S, dtype=torch.float32):
    """Gaussian, a quarter of them tied, a tenth not scored."""
    reward = torch.randn(S)
    reward[torch.rand(S) < 0.25] = 0.5
    reward[torch.rand(S) < 0.1] = math.nan
    return reward.to(dtype)


def judge(reward, group, baseline, scale, shape):
    got = group_advantage(reward, group, baseline=baseline, scale=scale, shape=shape)
    ids = group if isinstance(group, torch.Tensor) else torch.arange(len(reward)) // group
    torch.testing.assert_close(
        got.double(), groups_loop(reward, ids, baseline, scale, shape), atol=1e-6, rtol=1e-6
    )
    assert got.dtype == torch.float32 and not got[reward.isnan()].any()


# --- values -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("baseline, scale, shape", ROWS)
def test_every_row_of_the_tables(baseline, scale, shape):
    """Wrong: a place in a table that the kernel knows as another; a rank without averaged ties; a NaN that
    counts.
    """
    judge(rewards(40 * 8), 8, baseline, scale, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size, groups", [(1, 5), (2, 300), (3, 200), (16, 70), (100, 3), (1024, 1)])
def test_tiles(size, groups, dtype):
    """Wrong: a row of a tile beyond the last group, or columns beyond a group's end, taken for members."""
    reward = rewards(size * groups, dtype)
    for row in FEW[:3] if size > 16 else FEW:
        judge(reward, size, *row)


@pytest.mark.parametrize("baseline, scale, shape", [*FEW, ("mean", "batch_std", "linear")])
def test_ids_in_any_order(baseline, scale, shape):
    """Wrong: samples returned in sorted order; a group cut where a program's samples end; one program's group
    of many in two chunks.
    """
    reward, ids = (x.float() if x.is_floating_point() else x for x in ragged(150))
    # about 70 samples: a group over four programs
    ids[10:145] = torch.where(torch.rand(135) < 0.5, 2**40, ids[10:145])
    judge(reward, ids, baseline, scale, shape)
    if shape == "linear":
        judge(reward[:45], ids[:45].int(), baseline, scale, shape)


@pytest.mark.parametrize("row", FEW)
def test_groups_larger_than_a_tile(row, monkeypatch):
    """Wrong: a walk that starts in the middle of its group, or that ends with the program's own samples."""
    monkeypatch.setattr(kernels, "MAX_TILE", 64)
    judge(rewards(3 * 150), 150, *row)


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1e6])
@pytest.mark.parametrize("scale", ["std", "batch_std"])
def test_digits_of_an_offset(scale, offset):
    """Rewards of 1000 +- 1e-3.  Wrong: moments in fp32, or of one pass, or parts of a batch merged without
    their own means.
    """
    reward = offset + 1e-3 * torch.randn(2000)
    options = ("mean", scale, "linear", 1e-4, True, 0.5)
    exact = reference(reward.double(), NO_IDS, 8, *options)
    assert (forward_op(reward, NO_IDS, 8, *options) - exact).abs().max() <= 2**-23 * exact.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [1, 3, torch.tensor([4, 0, 4, 0, 4, 9])], ids=str)
def test_no_spread_is_exactly_zero(group, shape):
    """Wrong: std < eps for no spread (three times 0.1 has another mean in fp32); A = R for one sample; NaN
    for no scored one.
    """
    for baseline, scale in (("mean", "std"), ("max", "range"), ("none", "none")):
        options = {"baseline": baseline, "scale": scale, "shape": shape}
        assert not group_advantage(torch.full((6,), 0.1), group, **options).any()
        assert not group_advantage(torch.full((6,), math.nan), group, **options).any()


def test_infinite_rewards_are_what_the_definition_says():
    """Wrong: infinity taken for a NaN reward, which is silently 0."""
    reward = torch.tensor([math.inf, 1.0, 2.0, 3.0, -math.inf, 0.0, 0.0, 0.0])
    for row in ROWS:
        want = reference(reward, NO_IDS, 4, *row, 1e-4, True, 0.5)
        torch.testing.assert_close(
            forward_op(reward, NO_IDS, 4, *row, 1e-4, True, 0.5), want, equal_nan=True, msg=str(row)
        )


# --- the op around it -------------------------------------------------------------------------------
def test_no_samples_strided_and_the_same_bits_twice():
    assert group_advantage(torch.empty(0), 4).shape == group_advantage(torch.empty(0), NO_IDS).shape == (0,)
    reward, ids = rewards(48), torch.randint(0, 5, (48,))
    for group in (4, ids):
        want = group_advantage(reward, group, scale="batch_std")
        assert torch.equal(
            group_advantage(torch.stack([reward, reward], 1)[:, 0], group, scale="batch_std"), want
        )


def test_launches(monkeypatch):
    """Wrong: a program for every group (4096 x 16 is 128), groups on a grid axis that ends at 65,535, a
    variant for each group size.
    """

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **options: launches.append((self.name, *grid, options.get("BLOCK")))

    launches = []
    for name in ("tile", "walk", "parts"):
        monkeypatch.setattr(kernels, f"{name}_kernel", Recorder(name))
    group_advantage(torch.zeros(4096 * 16), 16)
    group_advantage(torch.zeros(4096 * 16).bfloat16(), 16)
    group_advantage(torch.zeros(300_000), 1)
    group_advantage(torch.zeros(4096 * 9), 9, scale="batch_std")
    group_advantage(torch.zeros(4096 * 9), 9, scale="batch_std", shape="rank")
    group_advantage(torch.zeros(4096), torch.zeros(4096, dtype=torch.int64))
    group_advantage(torch.zeros(4096), 2048)
    nine = ("tile", 128, 16)
    assert launches == [
        ("tile", 128, 16),
        ("tile", 64, 16),
        ("tile", 1172, 2),
        ("parts", 36, 1024),
        nine,
        nine,
        ("walk", 128, None),
        ("walk", 128, None),
    ]


def test_opcheck_and_compile():
    reward, ids = torch.rand(6), torch.tensor([1, 0, 1, 0, 0, 7])
    options = ("mean", "std", "linear", 1e-4, True, 0.5)
    torch.library.opcheck(forward_op, (reward, ids, 0, *options))
    torch.library.opcheck(forward_op, (reward, ids[:0], 3, *options))
    run = torch.compile(lambda r: group_advantage(r, 3), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(reward), group_advantage(reward, 3))


def test_compiled_only_and_not_for_float64():
    assert ops.implementations()["group_advantage"]["triton"] == _backend.COMPILED_ONLY
    with pytest.raises(RuntimeError, match=r"does not take torch\.float64"):
        group_advantage(torch.rand(4).double(), 2)
