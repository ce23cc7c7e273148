"""attention's C++ kernels on every instruction set this processor has.  Without fastrl._C: skipped,
visibly.
"""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from support import within_budget

from fastrl import ops
from fastrl.kernels._backend import backend, extension, pick
from fastrl.kernels._native import attention as native
from fastrl.kernels.attention import prefix_op, reference, reference_backward

C = extension()
needs_c = pytest.mark.skipif(
    C is None, reason="fastrl._C is not built: pip install -e . (or python setup.py build_ext --inplace)"
)
SCALE = 0.3


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def case(lengths, H, K, E, dtype=torch.float32):
    """q, k and v as views of one projection, an upstream gradient, the ends."""
    cu = ends(lengths)
    fused = torch.randn(int(cu[-1]), H + 2 * K, E).to(dtype)
    return *fused.split((H, K, K), 1), torch.randn(int(cu[-1]), H, E).to(dtype), cu


def ours(q, k, v, dy, cu, scale=SCALE):
    """y, lse and the three gradients."""
    y, lse = native.forward(q, k, v, cu, scale, 0)
    return y, lse, *native.backward(dy, q, k, v, y, lse, cu, scale, 0)


def theirs(q, k, v, dy, cu, scale=SCALE):
    y, lse = reference(q, k, v, cu, scale, 0)
    return y, lse, *reference_backward(dy, q, k, v, y, lse, cu, scale, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "lengths, H, K, E",
    [
        ([1, 0, 2, 13, 64, 65, 0], 4, 2, 32),  # around a tile of keys
        ([97, 130], 2, 2, 64),  # around a tile of rows
        ([40, 9], 7, 1, 80),  # a token's heads in two tiles
        ([33, 20], 6, 3, 129),
        ([70], 3, 3, 7),
        ([5], 100, 1, 16),  # more heads than a tile has rows
        ([18, 3], 2, 1, 256),
        ([7], 1, 1, 1),
        ([600], 4, 1, 8),  # several shares of the gradients of keys and values
    ],
)
def test_as_near_to_float64_as_the_reference(isa, lengths, H, K, E, dtype):
    """Wrong: a tail of the width, of a tile or of a block of rows dropped; a diagonal one off; scores beyond
    the diagonal added to the gradients; shares of dk left out; query head h with key head h % K.
    """
    args = case(lengths, H, K, E, dtype)
    exact = theirs(*(x.double() if x.is_floating_point() else x for x in args))
    for mine, like, right in zip(ours(*args), theirs(*args), exact, strict=True):
        assert mine.dtype == like.dtype and mine.is_contiguous()
        within_budget(mine, like, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_a_sequence_are_its_own(isa, threads, dtype):
    """Wrong: tiles that begin where the batch does, gradients added up by whichever thread is ready, sums
    whose order depends on how many sequences are copied at once.
    """
    lengths = [300, 1, 64, 0, 513, 37]
    args = case(lengths, 6, 2, 40, dtype)
    alone = []
    for a, n in zip(args[-1].tolist(), lengths, strict=False):
        alone.append(ours(*(x[a : a + n] for x in args[:-1]), ends([n])))
    for n in (1, 2, 3):
        threads(n)
        for mine, right in zip(ours(*args), zip(*alone, strict=True), strict=True):
            assert torch.equal(mine, torch.cat(right)), n
    threads(2)
    again = torch.arange(6).flip(0)
    rows = torch.cat([torch.arange(args[-1][i], args[-1][i + 1]) for i in again])
    turned = ours(*(x[rows] for x in args[:-1]), ends([lengths[i] for i in again]))
    for mine, right in zip(turned, ours(*args), strict=True):
        assert torch.equal(mine, right[rows])


def test_a_row_does_not_depend_on_the_rows_beside_it(isa):
    """The last tokens over their past have the bits of the whole sequence.  Wrong: a tile of rows whose place
    shows in their sums; a past that is counted from the first query.
    """
    lengths, new = [200, 70, 9, 130], [1, 70, 3, 77]
    q, k, v, _, cu = case(lengths, 6, 2, 32)
    whole = native.forward(q, k, v, cu, SCALE, 0)[0]
    last = torch.cat([torch.arange(b - n, b) for b, n in zip(cu[1:].tolist(), new, strict=True)])
    y = native.prefix(q[last], k, v, ends(new), cu, SCALE, 0)
    assert torch.equal(y, whole[last])
    with ops.use_backend("cpu", "attention"):
        assert torch.equal(prefix_op(q[last], k, v, ends(new), cu, SCALE, 0), y)


def test_any_scale(isa):
    """Wrong: the largest score taken before a negative scale turns it into the least."""
    args = case([70, 5], 4, 2, 16)
    exact = [x.double() if x.is_floating_point() else x for x in args]
    for scale in (-2.0, 0.0, 30.0):
        results = ours(*args, scale), theirs(*args, scale), theirs(*exact, scale)
        for mine, like, right in zip(*results, strict=True):
            within_budget(mine, like, right, factor=3)


def test_rows_of_scores_as_far_as_float_goes(isa):
    """Wrong: exp of a score without its row's maximum, or with the maximum of its own tile only."""
    q, k, v, dy, cu = case([200], 2, 1, 16)
    for at in (3, 150):
        far = k.clone()
        far[at] = 300 * q[180, 0]
        exact = theirs(*(x.double() for x in (q, far, v, dy)), cu, 1.0)
        for mine, right in zip(ours(q, far, v, dy, cu, 1.0), exact, strict=True):
            assert mine.isfinite().all()
            torch.testing.assert_close(mine.double(), right, atol=3e-2, rtol=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_shows_where_the_reference_shows_it(isa, which, bad):
    """In every row that sees it, and in none where the reference, which reads a little ahead, is finite.
    Wrong: a maximum that swallows NaN; a row of another tile or sequence that catches it.
    """
    args = list(case([20, 150, 30], 2, 1, 16))
    args[which] = args[which].clone()
    args[which][80, 0, 3] = bad
    mine, right = (results[0].isfinite().flatten(1).all(1) for results in (ours(*args), theirs(*args)))
    seen = torch.arange(200) == 80 if which == 0 else (torch.arange(200) >= 80) & (torch.arange(200) < 170)
    assert not (mine & seen & ~right).any() and not (right & ~mine).any()
    assert mine[:60].all() and mine[170:].all()


def at_the_end_of_a_page(x):
    """A copy of `x` behind which no byte may be read."""
    size, page = x.numel() * x.element_size(), mmap.PAGESIZE
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + room), page, 0) == 0
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=room - size).view(x.shape)
    copy.copy_(x)
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("E", [5, 32, 75])
def test_nothing_is_read_past_the_end(isa, E, dtype):
    """Wrong: whole vectors loaded from the last row, or four rows where one is left.  The process would
    end.
    """
    args = [x.contiguous() for x in case([64, 67], 2, 2, E, dtype)]
    right = ours(*args)
    own = [at_the_end_of_a_page(x) for x in args]
    for mine, other in zip(ours(*own), right, strict=True):
        assert torch.equal(mine, other)


@needs_c
def test_other_strides_and_no_rows():
    """Wrong: contiguous q, k, v or dy assumed; an upstream gradient of stride 0; a width of stride 2."""
    args = case([9, 30], 4, 2, 24)
    right = ours(*(x.contiguous() for x in args))
    q, k, v, dy, cu = args
    wide = torch.zeros(39, 5, 60)
    wide[:, :4, 1:49:2] = dy
    views = (q.transpose(0, 1).contiguous().transpose(0, 1), k, v, wide[:, :4, 1:49:2], cu.long())
    for form in (args, views):
        assert all(torch.equal(a, b) for a, b in zip(ours(*form), right, strict=True))
    same = dy[:1].expand(39, 4, 24)
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours(q, k, v, same, cu), ours(q, k, v, same.clone(), cu), strict=True)
    )
    for lengths in ([], [0], [0, 0]):
        shapes = [x.shape for x in ours(*case(lengths, 4, 2, 8))]
        assert shapes == [(0, 4, 8), (0, 4), (0, 4, 8), (0, 2, 8), (0, 2, 8)]


@needs_c
def test_offsets_beyond_2_to_the_31():
    """Wrong: 32-bit offsets of a token.  The pages between are never touched."""
    q, k, v, dy, cu = (x.contiguous() for x in case([3], 1, 1, 8, torch.bfloat16))
    slab = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    far = []
    for i, x in enumerate((q, k, v, dy)):
        there = slab[8 * i :].as_strided((3, 1, 8), (2**30, 8, 1))
        there.copy_(x)
        far.append(there)
    for mine, right in zip(ours(*far, cu), ours(q, k, v, dy, cu), strict=True):
        assert torch.equal(mine, right)


@needs_c
def test_chosen_by_default_on_cpu():
    """Wrong: a kernel that is built and never runs; one that is asked for heads wider than its tiles."""
    assert backend("cpu")["attention"] == "cpu"
    assert pick("attention", torch.zeros(1, 1, 256), "backward") is native.backward
    assert pick("attention", torch.zeros(1, 1, 257), "backward") is not native.backward
    assert pick("attention", torch.zeros(1, 1, 64).double(), "forward") is reference
    with (
        pytest.raises(RuntimeError, match="it takes heads of a width up to 256, got E=264"),
        ops.use_backend("cpu", "attention"),
    ):
        pick("attention", torch.zeros(1, 1, 264), "forward")


@needs_c
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"code": 2}, r"code: expected 0 \(fp32\) or 1 \(bf16\), got 2"),
        ({"H": 3}, "H: expected a multiple of K=2, got 3"),
        ({"E": 257}, "E: expected 1 to 256, got 257"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"q": 0}, "y, q, k, v, ends: expected addresses, got 0"),
        ({"T": -1}, "T, T_k, S, H: expected at least 0, got -1"),
        ({"T": 2}, "ends: expected non-decreasing ends, 0 to 2, got 0 before 3"),
        ({"T_k": 4}, "ends_k: expected non-decreasing ends, 0 to 4, got 0 before 5"),
        ({"ends_k": "ends_q", "ends": "ends_k"}, "ends_k: expected at least 5 keys of sequence 0, got 3"),
    ],
)
def test_bad_arguments_are_value_errors(changes, message):
    at = {"ends_q": torch.tensor([0, 3]), "ends_k": torch.tensor([0, 5])}
    given = {"y": 8, "lse": 0, "q": 8, "q_token": 8, "q_head": 2, "k": 8, "k_token": 4, "k_head": 2}
    given |= {"v": 8, "v_token": 4, "v_head": 2, "code": 0, "ends": "ends_q", "ends_k": "ends_k"}
    given |= {"scale": 1.0, "S": 1, "T": 5, "T_k": 5, "H": 4, "K": 2, "E": 2, "threads": 1} | changes
    values = [at[x].data_ptr() if isinstance(x, str) else x for x in given.values()]
    with pytest.raises(ValueError, match=message):
        C.attention_forward_cpu(*values)
