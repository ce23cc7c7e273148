"""rope against complex rotation in float64, and its tables against transformers' own frequencies."""

from __future__ import annotations

import pytest
import torch
from support import within_budget
from torch.library import opcheck
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from fastrl import ops
from fastrl.kernels.rope import backward_op, forward_op, rope_tables

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
T, H, K, E, N = 9, 4, 2, 8, 40


def inputs(dtype=torch.float32):
    q, k = torch.randn(T, H, E, dtype=dtype), torch.randn(T, K, E, dtype=dtype)
    return (
        q,
        k,
        torch.randint(N, (T,)),
        *rope_tables(E, 100.0, None, N, dtype if dtype == torch.float64 else torch.float32, "cpu"),
    )


def turned(x, positions, theta=100.0):
    """Each pair (x_e, x_{e + E/2}) as a complex number, times e^(i position theta^(-2e/E)), in float64."""
    a, b = x.double().chunk(2, -1)
    angle = positions.double()[:, None] * theta ** (
        -torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1]
    )
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((z.real, z.imag), -1)


def normed(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def test_golden_values():
    """Wrong implementations: interleaved pairs (GPT-J), or the opposite sense of rotation."""
    q = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]], dtype=torch.float64)
    y, _ = ops.rope(q, q, torch.tensor([1]), *rope_tables(4, 100.0, None, 2, torch.float64, "cpu"))
    expected = [0.5403023059, -0.1996668333, 0.8414709848, 1.9900083306]  # angles 1 and 0.1
    torch.testing.assert_close(y.flatten(), torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


def test_against_complex_rotation():
    q, k, positions, cos, sin = inputs(torch.float64)
    yq, yk = ops.rope(q, k, positions, cos, sin)
    torch.testing.assert_close(yq, turned(q, positions))
    torch.testing.assert_close(yk, turned(k, positions))


def test_scores_depend_on_distance_only():
    q, k, _, cos, sin = inputs(torch.float64)
    near, far = (ops.rope(q[:2], k[:2], torch.tensor([a, a + 5]), cos, sin) for a in (0, 30))
    scores = [(yq[1, 0] * yk[0, 0]).sum() for yq, yk in (near, far)]
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_value_and_gradients_within_the_budget_of_pytorch(norm, dtype):
    q, k, positions, cos, sin = inputs()
    weights = [1 + 0.2 * torch.randn(E) for _ in range(2)]
    ups = torch.randn(T, H, E), torch.randn(T, K, E)
    results = []
    for cast, ours in ((dtype, True), (dtype, False), (torch.float64, False)):
        leaves = [t.to(dtype).to(cast).requires_grad_() for t in (q, k, *weights)]
        if ours:
            extra = {"q_norm": leaves[2], "k_norm": leaves[3]} if norm else {}
            y = ops.rope(leaves[0], leaves[1], positions, cos, sin, **extra)
        else:
            x = [normed(leaf, w) if norm else leaf for leaf, w in zip(leaves[:2], leaves[2:], strict=True)]
            c, s = (torch.cat((t, t), -1).to(cast)[positions][None] for t in (cos, sin))
            y = [
                t[0].transpose(0, 1)
                for t in apply_rotary_pos_emb(*(t.transpose(0, 1)[None] for t in x), c, s)
            ]
        total = sum((a * b.to(cast)).sum() for a, b in zip(y, ups, strict=True))
        results.append((*y, *torch.autograd.grad(total, leaves if norm else leaves[:2])))
    for ours, theirs, exact in zip(*results, strict=True):
        within_budget(ours, theirs, exact)


@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck(norm):
    """Wrong implementations: a backward that turns forward again; a norm whose backward ignores the other
    elements of the head.
    """
    q, k, positions, cos, sin = inputs(torch.float64)
    leaves = [
        t.requires_grad_()
        for t in (
            q[:3],
            k[:3],
            torch.rand(E, dtype=torch.float64) + 0.5,
            torch.rand(E, dtype=torch.float64) + 0.5,
        )
    ]

    def fn(q, k, a, b):
        return ops.rope(q, k, positions[:3], cos, sin, **({"q_norm": a, "k_norm": b} if norm else {}))

    assert torch.autograd.gradcheck(fn, leaves)


def test_one_norm_without_the_other():
    q, k, positions, cos, sin = inputs(torch.float64)
    w = torch.rand(E, dtype=torch.float64)
    yq, yk = ops.rope(q, k, positions, cos, sin, k_norm=w)
    torch.testing.assert_close(yq, turned(q, positions))
    torch.testing.assert_close(yk, turned(normed(k, w), positions))


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3], ids=["default", "linear", "llama3"])
def test_tables_are_those_of_transformers(scaling):
    """Wrong implementation: Llama 3's blend taken over wavelengths instead of turns, or its two limits
    swapped.
    """
    settings = {**(scaling or {"rope_type": "default"}), "rope_theta": 1000.0}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        rope_parameters=settings,
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(1), torch.arange(256)[None])
    ours = rope_tables(32, 1000.0, scaling, 256, torch.float32, "cpu")
    # one ulp of a frequency, 256 positions on
    torch.testing.assert_close(ours[0], cos[0, :, :16], atol=2e-5, rtol=0)
    torch.testing.assert_close(ours[1], sin[0, :, :16], atol=2e-5, rtol=0)


def test_an_unknown_scaling_names_the_known_ones():
    with pytest.raises(ValueError, match=r"expected rope_type 'default', 'linear', 'llama3'; got 'yarn'"):
        rope_tables(8, 1e4, {"rope_type": "yarn", "factor": 2.0}, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"rope_type 'linear' needs 'factor'"):
        rope_tables(8, 1e4, {"type": "linear"}, 4, torch.float32, "cpu")


def test_empty_and_noncontiguous():
    q, k, positions, cos, sin = inputs()
    assert ops.rope(q[:0], k[:0], positions[:0], cos, sin)[0].shape == (0, H, E)
    qkv = torch.randn(T, (H + K) * E, requires_grad=True)
    views = qkv.view(T, H + K, E).split((H, K), 1)
    y = ops.rope(*views, positions, cos, sin, q_norm=torch.ones(E), k_norm=torch.ones(E))
    dense = ops.rope(
        *(v.contiguous() for v in views), positions, cos, sin, q_norm=torch.ones(E), k_norm=torch.ones(E)
    )
    for a, b in zip(y, dense, strict=True):
        assert torch.equal(a, b)
    grads = [torch.autograd.grad(x[0].square().sum() + x[1].sum(), qkv)[0] for x in (y, dense)]
    assert torch.equal(*grads)


def test_opcheck():
    q, k, positions, cos, sin = inputs()
    none, w = torch.empty(0), torch.rand(E)
    for norms in ((none, none), (w, w)):
        opcheck(forward_op, (q.requires_grad_(), k.requires_grad_(), positions, cos, sin, *norms, 1e-6))
        opcheck(
            backward_op,
            (
                torch.randn(T, H, E),
                torch.randn(T, K, E),
                q.detach(),
                k.detach(),
                positions,
                cos,
                sin,
                *norms,
                1e-6,
            ),
        )


def test_compiles_without_a_graph_break():
    """Wrong implementation: a check that reads the positions while compiling."""
    q, k, positions, cos, sin = inputs()
    compiled = torch.compile(ops.rope, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, positions, cos, sin)[0], ops.rope(q, k, positions, cos, sin)[0])


def test_errors_name_the_argument():
    q, k, positions, cos, sin = inputs()
    with pytest.raises(ValueError, match=rf"positions: expected values in \[0, {N}\), got 0 to {N}"):
        ops.rope(q[:2], k[:2], torch.tensor([0, N]), cos, sin)
    with pytest.raises(ValueError, match=r"k: expected shape \(T=9, K, E=8\)"):
        ops.rope(q, k[1:], positions, cos, sin)
    with pytest.raises(ValueError, match="cos: expected shape"):
        ops.rope(q, k, positions, cos[:, :2], sin)
    with pytest.raises(ValueError, match="even head width"):
        ops.rope(q[..., :7], k[..., :7], positions, cos, sin)
    with pytest.raises(ValueError, match=r"q_norm: expected shape \(E=8\)"):
        ops.rope(q, k, positions, cos, sin, q_norm=torch.ones(3))
