"""group_advantage and gae on a GPU, every implementation asked for by name: values, the same bits twice, no
wait, torch.compile.
"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from support import no_waiting, use, within_budget

from fastrl import ops
from fastrl.kernels import gae as gae_file
from fastrl.kernels import group_advantage as group_file

pytestmark = pytest.mark.gpu
ROWS = [(b, s, "linear") for b in group_file.BASELINES for s in group_file.SCALES] + [
    ("mean", "std", "rank"),
    ("mean", "std", "softmax"),
]


@pytest.fixture(params=["reference", "triton"])
def implementation(request):
    with use(request.param, "group_advantage"), use(request.param, "gae"):
        yield request.param


def rewards(S, dtype=torch.float32):
    """Gaussian around 1000, a quarter of them tied, a tenth not scored."""
    reward = 1000 + torch.randn(S, device="cuda")
    reward[torch.rand(S, device="cuda") < 0.25] = 1000.5
    reward[torch.rand(S, device="cuda") < 0.1] = torch.nan
    return reward.to(dtype)


def packed(lengths, dtype=torch.float32):
    T = sum(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    reward, value = (torch.randn(T, device="cuda").to(dtype) for _ in range(2))
    return reward, value, cu, torch.rand(T, device="cuda") > 0.3


# --- group_advantage --------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 2, 7, 16, 64, 1000, 5000])
def test_group_advantage(implementation, size, dtype):
    """Against float64, every row of the tables, and the same bits twice."""
    reward, none = rewards(30_000 // size * size, dtype), torch.empty(0, dtype=torch.int64, device="cuda")
    for row in ROWS:
        options = (size, *row, 1e-4, True, 0.5)
        exact = group_file.reference(reward.double(), none, *options)
        ours = [group_file.forward_op(reward, none, *options) for _ in range(2)]
        assert torch.equal(*ours)
        torch.testing.assert_close(ours[0].double(), exact, atol=1e-6, rtol=1e-6, msg=f"{row}")


@pytest.mark.parametrize("groups", [3, 5000, 40_000])
def test_group_advantage_by_ids(implementation, groups):
    """Groups in any order, some of them larger than a program's samples; 40,000 ids for 30,000 samples are
    groups of one and two.
    """
    reward, ids = rewards(30_000), torch.randint(groups, (30_000,), device="cuda") * 1000
    for row in ROWS:
        options = (0, *row, 1e-4, True, 0.5)
        exact = group_file.reference(reward.double(), ids, *options)
        ours = [group_file.forward_op(reward, ids, *options) for _ in range(2)]
        assert torch.equal(*ours)
        torch.testing.assert_close(ours[0].double(), exact, atol=1e-6, rtol=1e-6, msg=f"{row}")


# --- gae --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("masked", [False, True])
def test_gae(implementation, masked, gamma, lam, dtype):
    """Against the float64 definition, no further than its own fp32 run, over one token to many blocks; the
    same bits twice.
    """
    reward, value, cu, mask = packed([1, 0, 129, 2048, 2049, 20_000, 5], dtype)
    mask = mask if masked else mask[:0]
    exact = gae_file.reference(reward.double(), value.double(), cu, mask, gamma, lam)
    plain = gae_file.reference(reward, value, cu, mask, gamma, lam)
    ours, again = (gae_file.forward_op(reward, value, cu, mask, gamma, lam) for _ in range(2))
    for mine, twice, its, right in zip(ours, again, plain, exact, strict=True):
        assert torch.equal(mine, twice)
        within_budget(mine, its, right)


def test_a_nan_stays_in_its_sequence(implementation):
    """Wrong: a block's carry that passes a sequence's end."""
    reward, value, cu, _ = packed([3000, 5000, 3000])
    reward[7000] = torch.nan
    bad = ops.gae(reward, value, cu, gamma=1.0, lam=1.0).advantage.isnan()
    assert bad[3000:7001].all() and int(bad.sum()) == 4001


def test_70000_sequences_and_groups(implementation):
    """Wrong: a grid axis that ends at 65,535."""
    reward, value, cu, _ = packed([3] * 70_000)
    found = ops.gae(reward, value, cu, gamma=1.0, lam=1.0).returns.view(-1, 3)
    torch.testing.assert_close(found, reward.view(-1, 3).flip(1).cumsum(1).flip(1))
    exact = ops.group_advantage(reward.double(), 3) if implementation == "reference" else None
    ours = ops.group_advantage(reward, 3)
    if exact is not None:
        torch.testing.assert_close(ours.double(), exact, atol=1e-6, rtol=1e-6)
    assert torch.equal(ours[-300:], ops.group_advantage(reward[-300:], 3))


# --- both -------------------------------------------------------------------------------------------
def test_nothing_waits_for_the_device(implementation):
    reward, value, cu, mask = packed([300, 724])
    ids = torch.randint(50, (1024,), device="cuda")

    def step():
        ops.gae(reward, value, cu, gamma=0.99, lam=0.95, mask=mask)
        for scale in ("std", "batch_std"):
            ops.group_advantage(reward, 16, scale=scale)
            ops.group_advantage(reward, ids, scale=scale)

    step()  # compiles
    with no_waiting():
        step()


def test_under_compile(implementation):
    """Wrong: an op that torch.compile looks into, or compiles again for each number of samples."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def both(reward, value, cu):
        return ops.group_advantage(reward * 1.0, 16), ops.gae(
            reward * 1.0, value, cu, gamma=0.99, lam=0.95
        ).advantage

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend=counter, dynamic=True)
    for length in (160, 320, 480):
        reward, value, cu, _ = packed([length, length])
        for mine, right in zip(compiled(reward, value, cu), both(reward, value, cu), strict=True):
            assert torch.equal(mine, right)
    assert counter.frame_count == 1
