"""Exact mode on a GPU: its products, and the claim that rollouts equal the trainer bit for bit."""

from __future__ import annotations

import pytest
import torch
from decoders import model_of, rollouts_of, scores
from support import within_budget
from torch.nn.functional import linear as torch_linear

from fastrl import ops
from fastrl.kernels._head import project

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUBSETS = ([0], [999], [7, 3, 150], list(range(64)), list(range(61, 1000)))


def normal(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, K", [(4864, 896), (300, 130), (61, 77)])
def test_linear_is_near_to_float64_and_a_row_has_its_own_bits(N, K, dtype):
    """Wrong: TF32; tiles by the number of rows; wide loads of odd strides."""
    x, weight, bias = normal(1000, K, dtype=dtype), normal(N, K, dtype=dtype), normal(N, dtype=dtype)
    with ops.exact():
        want = ops.linear(x, weight, bias)
        logits = project(x, weight, None, torch.float32)
        for rows in SUBSETS:
            assert torch.equal(ops.linear(x[rows], weight, bias), want[rows])
            assert torch.equal(project(x[rows], weight, None, torch.float32), logits[rows])
    within_budget(
        want, torch_linear(x, weight, bias), torch_linear(x.double(), weight.double(), bias.double())
    )
    within_budget(logits, torch_linear(x.float(), weight.float()), torch_linear(x.double(), weight.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_sampled_log_probs_are_the_trainers_bit_for_bit(family, dtype):
    """Wrong: any op between tokens and log-prob whose bits depend on the rows beside it."""
    with ops.exact():
        model = model_of(family, dtype, "cuda")
        rollouts = rollouts_of(model)
        live = rollouts.completion_mask
        assert live.sum() > 1000
        for micro_tokens in (int(rollouts.cu_seqlens.diff().max()), 300, 1 << 20):
            alone, beside_a_loss, entropy = scores(model, rollouts, micro_tokens)
            assert torch.equal(alone, rollouts.logp)
            assert torch.equal(beside_a_loss[live], rollouts.logp[live])
            assert torch.equal(entropy[live], rollouts.entropy[live])
