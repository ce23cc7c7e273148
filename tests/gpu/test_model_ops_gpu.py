"""The decoder's own ops on a GPU: the Triton kernels against float64, every rung of attention's ladder,
launches that do not wait.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support import no_waiting, tiny_config, use, within_budget

from fastrl import ops
from fastrl.kernels import rms_norm, rope, swiglu
from fastrl.kernels._backend import order
from fastrl.kernels.rope import rope_tables
from fastrl.model.decoder import Decoder

pytestmark = pytest.mark.gpu
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
RUNGS = [name for name in order("attention") if name not in ("cpu", "reference")]


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def wide(x):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in x]


# --- the elementwise ops: the arguments of a run, and what it computes ----------------------------------
def norm_case(T, D, dtype):
    return [normal(T, D, dtype=dtype) for _ in range(4)] + [1 + 0.3 * normal(D).to(dtype)]


def norm_run(x, residual, up, up_h, weight):
    y, h, r = rms_norm.add_op(x, residual, weight, 1e-6)
    alone, r_alone = rms_norm.forward_op(x, weight, 1e-6)
    return (
        y,
        h,
        *rms_norm.add_backward_op(up, up_h, h, weight, r),
        alone,
        *rms_norm.backward_op(up, x, weight, r_alone),
    )


def swiglu_case(T, F, dtype):
    return [3 * normal(T, 2 * F, dtype=dtype), normal(T, F, dtype=dtype)]


def swiglu_run(x, up):
    return swiglu.forward_op(x), swiglu.backward_op(up, x)


def rope_case(T, H, K, E, dtype, norm):
    fused, ups = (normal(T, H + 2 * K, E, dtype=dtype).split((H, K, K), 1) for _ in range(2))
    weights = [
        1 + 0.2 * normal(E).to(dtype) if norm else torch.empty(0, device="cuda", dtype=dtype)
        for _ in range(2)
    ]
    tables = rope_tables(E, 1e4, None, 4096, torch.float32, "cuda")
    return [*ups[:2], *fused[:2], torch.randint(4096, (T,), device="cuda"), *tables, *weights, 1e-6]


def rope_run(dq, dk, *args):
    return *rope.forward_op(*args), *rope.backward_op(dq, dk, *args)


CASES = {
    "rms_norm": (norm_run, lambda dtype: norm_case(512, 896, dtype)),
    "rms_norm wide": (norm_run, lambda dtype: norm_case(64, 16384, dtype)),
    "rms_norm odd": (norm_run, lambda dtype: norm_case(333, 513, dtype)),
    "swiglu": (swiglu_run, lambda dtype: swiglu_case(512, 4864, dtype)),
    "swiglu odd": (swiglu_run, lambda dtype: swiglu_case(77, 1001, dtype)),
    "rope": (rope_run, lambda dtype: rope_case(512, 14, 2, 64, dtype, False)),
    "rope norm": (rope_run, lambda dtype: rope_case(512, 32, 8, 128, dtype, True)),
    "rope odd": (rope_run, lambda dtype: rope_case(77, 5, 5, 80, dtype, True)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, dtype):
    """Wrong: a tail that is read past, a rounding that ptxas or fused multiply-adds move, a row whose warps
    do not agree on its sum.
    """
    run, make = CASES[name]
    args, op = make(dtype), name.split()[0]
    with use("reference", op):
        its, exact = run(*args), run(*wide(args))
    with use("triton", op):
        ours = run(*args)
    for mine, like, right in zip(ours, its, exact, strict=True):
        within_budget(mine, like, right)


@pytest.mark.parametrize("name", CASES)
def test_two_runs_give_the_same_bits_and_wait_for_nothing(name):
    """Wrong: sums in the order in which programs finish; a launch that asks the device how many tokens there
    are.
    """
    run, make = CASES[name]
    args = make(torch.bfloat16)
    with use("triton", name.split()[0]):
        first = run(*args)
        with no_waiting():
            again = [run(*args) for _ in range(20)]
    assert all(torch.equal(a, b) for other in again for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rope"])
def test_70000_rows(name):
    """Wrong: rows on a grid axis that ends at 65,535."""
    run, args = {
        "rms_norm": (norm_run, norm_case(70000, 64, torch.float32)),
        "swiglu": (swiglu_run, swiglu_case(70000, 24, torch.float32)),
        "rope": (rope_run, rope_case(70000, 2, 1, 16, torch.float32, True)),
    }[name]
    with use("reference", name):
        exact = run(*wide(args))
    with use("triton", name):
        for mine, right in zip(run(*args), exact, strict=True):
            assert (mine - right).abs().max() <= 1e-5 * max(1.0, right.abs().max().item())


@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_more_than_2_31_elements(name):
    """Wrong: offsets in int32.  Only the last rows are compared: they lie beyond 2^31 elements."""
    T, D = 150_000, 14336 + 512
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip(f"needs 24 GiB of free GPU memory, there are {free / 2**30:.1f}")
    assert T * D > 2**31
    x = torch.empty(T, D, dtype=torch.bfloat16, device="cuda").normal_()
    tail = slice(T - 8, T)
    with use("triton", name):
        if name == "rms_norm":
            w = torch.ones(D, device="cuda", dtype=torch.bfloat16)
            assert torch.equal(ops.rms_norm(x, w)[tail], ops.rms_norm(x[tail].clone(), w))
        else:
            assert torch.equal(ops.swiglu(x)[tail], ops.swiglu(x[tail].clone()))


def test_keys_and_values_go_to_their_slots():
    """Wrong: queries stored too, keys stored before they are turned, a slot of another token; a wait on the
    way.
    """
    _, _, q, k, *rest = rope_case(64, 14, 2, 64, torch.bfloat16, False)
    v, slots = normal(64, 2, 64, dtype=torch.bfloat16), torch.randperm(4096, device="cuda")[:64]
    k_cache, v_cache = (torch.zeros(4096, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    with use("triton", "rope"), torch.no_grad():
        rope.store_op(q, k, v, *rest, k_cache, v_cache, slots)
        with no_waiting():
            yq, yk = rope.store_op(q, k, v, *rest, k_cache, v_cache, slots)
        assert all(torch.equal(a, b) for a, b in zip((yq, yk), rope.forward_op(q, k, *rest), strict=True))
    assert torch.equal(k_cache[slots], yk) and torch.equal(v_cache[slots], v)
    assert k_cache.any(-1).any(-1).sum() == v_cache.any(-1).any(-1).sum() == 64


def test_under_compile():
    """Wrong: an op that torch.compile looks into, or compiles again for each number of rows."""
    w = torch.rand(256, device="cuda")

    def block(x):
        y, h = ops.rms_norm(x, w, residual=x)
        return ops.swiglu(torch.cat((y, h), -1)).sum()

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    with use("triton", "rms_norm"), use("triton", "swiglu"):
        for T in (16, 24, 40):
            leaves = [torch.ones(T, 256, device="cuda", requires_grad=True) for _ in range(2)]
            for f, leaf in zip((compiled, block), leaves, strict=True):
                f(leaf).backward()
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


# --- attention --------------------------------------------------------------------------------------
def packed(lengths, H, K, E, dtype):
    """q, k and v as views of one projection, the ends, and the gradient that arrives."""
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    T = sum(lengths)
    return normal(T, H + 2 * K, E, dtype=dtype), (H, K, K), cu, normal(T, H, E, dtype=dtype)


def torchs_own(fused, heads, cu, up):
    """y and the gradient of the projection by PyTorch's own attention, a sequence at a time."""
    leaf = fused.detach().requires_grad_()
    sequences = []
    for a, b in pairwise(cu.tolist()):
        q, k, v = (x.transpose(0, 1)[None] for x in leaf[a:b].split(heads, 1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        sequences.append(y[0].transpose(0, 1))
    y = torch.cat(sequences)
    return y, torch.autograd.grad(y, leaf, up)[0]


def attend(name, fused, heads, cu, up, longest=None):
    """y and the gradient of the projection, on one rung; a skip where it has an obstacle on this GPU."""
    leaf = fused.detach().requires_grad_()
    with use(name, "attention"):
        try:
            y = ops.attention(*leaf.split(heads, 1), cu, max_seqlen=longest)
        except RuntimeError as error:
            if "was asked for, but" not in str(error):
                raise
            pytest.skip(str(error))
        return y, torch.autograd.grad(y, leaf, up)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H, K, E", [(4, 4, 64), (14, 2, 64), (32, 8, 128), (6, 1, 80)])
@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_is_the_reference(name, H, K, E, dtype):
    """No further from float64 than PyTorch's own attention in the same dtype.

    Wrong: lse handed over in another layout or base, shared heads interleaved, sequences that see each other;
    a padded row of lse.
    """
    case = packed([3, 0, 250, 1, 129, 64, 513], H, K, E, dtype)
    ours, its = attend(name, *case), torchs_own(*case)
    exact = attend("reference", case[0].double(), *case[1:3], case[3].double())
    for mine, like, right in zip(ours, its, exact, strict=True):
        within_budget(mine, like, right)


@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_gives_the_same_bits_twice(name):
    """Wrong: a backward that adds its blocks in the order in which they finish."""
    case = packed([1024, 17, 2000, 512], 14, 2, 64, torch.bfloat16)
    first = attend(name, *case)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, attend(name, *case), strict=True))


@pytest.mark.parametrize("name", ["flash_attn_4", "flash_attn_2", "varlen_attn"])
def test_flash_does_not_wait_and_takes_any_bound(name):
    """Wrong: a longest sequence read from the device, or one that changes the result when it is only a
    bound.
    """
    case = packed([300, 17, 200], 14, 2, 64, torch.bfloat16)
    exact = attend(name, *case, longest=300)
    attend(name, *case)
    with no_waiting():
        loose = attend(name, *case)
    assert all(torch.equal(a, b) for a, b in zip(exact, loose, strict=True))


@pytest.mark.parametrize("lengths", [[], [0, 0], [1, 1]])
@pytest.mark.parametrize("name", RUNGS)
def test_empty_sequences(name, lengths):
    y, grad = attend(name, *(case := packed(lengths, 4, 2, 64, torch.bfloat16)))
    assert torch.equal(y, case[0][:, 6:].repeat_interleave(2, 1)) and grad.isfinite().all()


@pytest.mark.parametrize("name", RUNGS)
def test_the_decoder_on_a_rung_and_the_kernels(name):
    """Wrong: a kernel that is right alone and wrong on the views of a fused projection."""
    model = Decoder.from_config(
        tiny_config("qwen3", head_dim=64, hidden_size=64), seed=1, dtype=torch.bfloat16, device="cuda"
    )
    tokens, cu = (
        torch.randint(61, (90,), device="cuda"),
        torch.tensor([0, 30, 31, 90], dtype=torch.int32, device="cuda"),
    )
    exact = Decoder.from_config(tiny_config("qwen3", head_dim=64, hidden_size=64), seed=1, device="cuda")(
        tokens, cu
    )
    attend(name, *packed([4], 4, 2, 64, torch.bfloat16))  # or a skip
    with use(name, "attention"), use("triton", "rms_norm"), use("triton", "rope"), use("triton", "swiglu"):
        hidden = model(tokens, cu)
        hidden.sum().backward()
    assert (hidden - exact).abs().max() < 0.03 * exact.abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
