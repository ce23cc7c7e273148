"""linear: torch's own or, in float32 on CPU, the compiled one, whose bits are each row's own, as all of exact
mode's are.
"""

from __future__ import annotations

import pytest
import torch
from support import within_budget
from torch.library import opcheck
from torch.nn.functional import linear as torch_linear

from fastrl import ops
from fastrl.kernels._backend import extension
from fastrl.kernels._head import add_weight_grad, compiled, input_grad, project, weight_grad
from fastrl.kernels.linear import forward_op, linear_layer

needs_c = pytest.mark.skipif(
    extension() is None,
    reason="fastrl._C is not built: pip install -e . (or python setup.py build_ext --inplace)",
)
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    (1, 1, 1),
    (3, 7, 5),
    (16, 6, 128),
    (17, 13, 129),
    (33, 97, 300),
    (200, 31, 64),
    (5, 12, 1000),
    (301, 45, 130),
]
ROWS = 400  # of which the weight is packed, from 256 on; of fewer, x
SUBSETS = (
    [0],
    [399],
    [0, 1, 2],
    [7, 3, 150],
    list(range(64)),
    list(range(61, 400)),
    torch.arange(399, -1, -1).tolist(),
)


def inputs(T, N, K, dtype=torch.float32):
    return torch.randn(T, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)


# --- the definition ---------------------------------------------------------------------------------
def test_golden_values():
    """Wrong: the weight not transposed; the bias left out."""
    x, weight = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.5, -1.0]])
    want = torch.tensor([[2.0, 13.0, -3.5], [1.0, -2.0, -1.0]])
    assert torch.equal(ops.linear(x, weight, torch.tensor([1.0, 2.0, -2.0])), want)
    with ops.exact():
        assert torch.equal(ops.linear(x, weight, torch.tensor([1.0, 2.0, -2.0])), want)


def test_by_default_it_is_torchs_own():
    """Wrong: a kernel of ours that nobody asked for; an op in between, which costs time."""
    for T, dtype in ((7, torch.float32), (17, torch.bfloat16), (17, torch.float64)):
        x, weight, bias = inputs(T, 13, 29, dtype)
        assert torch.equal(ops.linear(x, weight, bias), torch_linear(x, weight, bias))
    x, weight, bias = inputs(17, 13, 29)
    assert type(linear_layer(x, weight.requires_grad_(), bias).grad_fn).__name__ == "AddmmBackward0", (
        "a small one with a gradient"
    )


@needs_c
def test_float32_on_cpu_is_the_compiled_product():
    """Wrong: other dtypes, sizes or an asked-for backend passed by; a head whose bits depend on who asks."""
    with torch.no_grad():
        for T in (8, 64, 300):
            x, weight, bias = inputs(T, 13, 29)
            ours, head = ops.linear(x, weight, bias), project(x, weight, bias, torch.float32)
            with ops.exact():
                assert torch.equal(ours, ops.linear(x, weight, bias)) and torch.equal(ours, head)
            within_budget(
                ours, torch_linear(x, weight, bias), torch_linear(x.double(), weight.double(), bias.double())
            )
        for T, dtype in ((7, torch.float32), (64, torch.bfloat16), (64, torch.float64)):
            assert not compiled(*inputs(T, 13, 29, dtype)[:2])
        x, weight, bias = inputs(64, 13, 29)
        with ops.use_backend("reference"):
            assert torch.equal(ops.linear(x, weight, bias), torch_linear(x, weight, bias))
    assert compiled(x, weight) and not compiled(x, weight.requires_grad_())


@needs_c
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_layer_that_learns_is_compiled_too(isa, threads, monkeypatch, bias):
    """Wrong: a gradient lost, or of what does not ask for one; a second derivative that the compiled products
    cut off.
    """
    monkeypatch.setattr("fastrl.kernels.linear.ENOUGH", 0)
    threads(2)
    x, weight, b = (t.requires_grad_() for t in inputs(300, 37, 29))
    wrt, up = (x, weight, *((b,) if bias else ())), torch.randn(300, 37)
    double = [t.detach().double().requires_grad_() for t in wrt]
    ours = ops.linear(*wrt)
    assert type(ours.grad_fn).__name__ == "_CompiledBackward"
    truth = torch.autograd.grad(torch_linear(*double), double, up.double())
    theirs = torch.autograd.grad(torch_linear(*wrt), wrt, up)
    for mine, its, right in zip(torch.autograd.grad(ours, wrt, up), theirs, truth, strict=True):
        within_budget(mine, its, right)
    (only,) = torch.autograd.grad(ops.linear(x.detach(), weight), weight, up)
    within_budget(only, theirs[1], truth[1])

    def second(linear, args, up):
        dx = torch.autograd.grad(linear(*args), args[0], up, create_graph=True)[0]
        return torch.autograd.grad(dx.square().sum(), args[1])[0]

    within_budget(
        second(ops.linear, wrt, up), second(torch_linear, wrt, up), second(torch_linear, double, up.double())
    )


@needs_c
@pytest.mark.parametrize(
    "T, N, K", [(8, 1, 1), (9, 7, 5), (130, 33, 97), (257, 128, 64), (300, 600, 31), (129, 100, 520)]
)
def test_gradients_of_every_size(isa, threads, T, N, K):
    """Wrong: tails of rows (6), lanes (2 vectors), blocks (128) or chunks (512) left out or added twice; sums
    begun anew in a block.
    """
    x, weight, _ = inputs(T, N, K)
    dy = torch.randn(T, N + 3)[:, :N]
    for count in (1, 3):
        threads(count)
        within_budget(input_grad(dy, weight), dy @ weight, dy.double() @ weight.double())
        buffer = torch.full((T, K + 2), torch.nan)
        assert torch.equal(input_grad(dy, weight, buffer[:, :K]), input_grad(dy, weight))
        assert buffer[:, K:].isnan().all()
        turned = torch.empty(K, T).T  # not rows: torch's own product
        within_budget(input_grad(dy, weight, turned), dy @ weight, dy.double() @ weight.double())
        within_budget(weight_grad(dy, x), dy.T @ x, dy.double().T @ x.double())
        total = torch.randn(N, K + 2)
        want = total[:, :K].double() + dy.double().T @ x.double()
        theirs = torch.addmm(total[:, :K], dy.T, x)
        add_weight_grad(total[:, :K], dy, x)
        within_budget(total[:, :K], theirs, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, N, K", SHAPES)
def test_exact_is_as_near_to_float64_as_torch(isa, T, N, K, dtype):
    """Wrong: tails of rows (6), lanes (16) or columns (128) left out or added twice; bf16 sums; one chain
    over all of K.
    """
    for bias in (True, False):
        x, weight, b = inputs(T, N, K, dtype)
        arguments = (x, weight, b if bias else None)
        with ops.exact():
            ours = ops.linear(*arguments)
        assert ours.dtype == dtype
        within_budget(
            ours, torch_linear(*arguments), torch_linear(*(a if a is None else a.double() for a in arguments))
        )


@needs_c
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_torchs(dtype):
    """Wrong: dW transposed; the bias's gradient summed over the outputs; a gradient for what does not ask for
    one.
    """
    x, weight, bias = (t.requires_grad_() for t in inputs(9, 5, 7, dtype))
    up = torch.randn(9, 5).to(dtype)
    with ops.exact():
        ours = torch.autograd.grad(ops.linear(x, weight, bias), (x, weight, bias), up)
    theirs = torch.autograd.grad(torch_linear(x, weight, bias), (x, weight, bias), up)
    truth = torch.autograd.grad(
        torch_linear(x.double(), weight.double(), bias.double()), (x, weight, bias), up.double()
    )
    for mine, its, right in zip(ours, theirs, truth, strict=True):
        within_budget(mine, its, right)
    with ops.exact():
        assert torch.autograd.grad(ops.linear(x.detach(), weight), weight, up)[0].shape == weight.shape


def test_gradcheck_of_the_registered_op():
    """Wrong: a backward that reads the output, or forgets the bias."""
    arguments = tuple(
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (5, 3), (5,))
    )
    with ops.use_backend("reference", "linear"):
        assert torch.autograd.gradcheck(ops.linear, arguments)


# --- whose bits they are ----------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, K", [(130, 70), (61, 513)])
def test_a_row_has_the_same_bits_in_every_company(isa, threads, N, K, dtype):
    """Wrong: tiles, splits or a turned product that sum by the number of rows; a narrow panel's other order;
    threads that split K.
    """
    x, weight, bias = inputs(ROWS, N, K, dtype)
    strided = torch.zeros(ROWS, K + 3, dtype=dtype)
    strided[:, 3:] = x
    with ops.exact():
        want = ops.linear(x, weight, bias)
        for count in (1, 2, 3):
            threads(count)
            for rows in SUBSETS:
                assert torch.equal(ops.linear(x[rows], weight, bias), want[rows])
            assert torch.equal(ops.linear(strided[:, 3:], weight, bias), want)
            assert torch.equal(ops.linear(x.T.contiguous().T, weight.T.contiguous().T, bias), want)
            assert torch.equal(ops.linear(x, weight[5:50], bias[5:50]), want[:, 5:50]), (
                "nor of the outputs beside it"
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_exact_too_whatever_the_chunk(isa, dtype):
    """Wrong: the head's product left to the library, or rounded to bf16 on its way to float32 logits."""
    x, weight, bias = inputs(ROWS, 61, 96, dtype)
    with ops.exact():
        want = project(x, weight, bias, torch.float32)
        for rows in SUBSETS:
            buffer = torch.empty(len(rows), 80)[:, :61]
            assert torch.equal(project(x[rows], weight, bias, torch.float32), want[rows])
            assert torch.equal(project(x[rows], weight, bias, torch.float32, buffer), want[rows])
    truth = torch_linear(x.double(), weight.double(), bias.double())
    within_budget(want, torch_linear(x.float(), weight.float(), bias.float()), truth)


@needs_c
def test_nan_and_infinity_stay_in_their_own_row():
    """Wrong: a row that reads its neighbour's lane; 0 times what lies beyond the last row."""
    x, weight, bias = inputs(20, 9, 40)
    with ops.exact():
        want = ops.linear(x, weight, bias)
        x[3, 5], x[17, 0] = torch.nan, torch.inf
        got = ops.linear(x, weight, bias)
    clean = [t for t in range(20) if t not in (3, 17)]
    assert torch.equal(got[clean], want[clean]) and got[3].isnan().all() and got[17].isinf().all()


@needs_c
def test_empty():
    """Wrong: uninitialised outputs where there is nothing to sum."""
    with ops.exact():
        for T, N, K in ((0, 3, 4), (3, 0, 4)):
            assert ops.linear(torch.empty(T, K), torch.empty(N, K)).shape == (T, N)
        assert torch.equal(
            ops.linear(torch.empty(3, 0), torch.empty(2, 0), torch.tensor([1.0, 2.0])),
            torch.tensor([[1.0, 2.0]] * 3),
        )


# --- the rest ---------------------------------------------------------------------------------------
@needs_c
def test_opcheck():
    with ops.exact():
        opcheck(forward_op, tuple(t.requires_grad_() for t in inputs(5, 3, 4)))
        opcheck(forward_op, (*inputs(5, 3, 4)[:2], torch.empty(0)))


def test_errors_name_the_argument():
    x, weight, bias = inputs(2, 3, 4)
    with pytest.raises(ValueError, match=r"weight: expected shape \(N, K=4\), got \(3, 5\)"):
        ops.linear(x, torch.ones(3, 5), bias)
    with pytest.raises(TypeError, match=r"weight: expected dtype float32, got bfloat16"):
        ops.linear(x, weight.bfloat16())
    with pytest.raises(ValueError, match=r"bias: expected shape \(N=3\), got \(4,\)"):
        ops.linear(x, weight, torch.ones(4))


def test_exact_mode_refuses_what_it_has_no_kernel_for():
    """Wrong: a library product in exact mode, without a word."""
    for dtype in (torch.float64, torch.float16):
        with (
            ops.exact(),
            pytest.raises(
                RuntimeError,
                match=rf"linear: exact mode has no batch-invariant implementation for {dtype} on cpu",
            ),
        ):
            ops.linear(*inputs(2, 3, 4, dtype))
    with (
        ops.exact(),
        ops.use_backend("reference"),
        pytest.raises(RuntimeError, match="'reference' was asked for, but it is not batch-inv"),
    ):
        ops.linear(*inputs(2, 3, 4))


@needs_c
def test_the_kernel_checks_its_arguments():
    """Wrong: an address of 0 that ends the process."""
    C = extension()
    for change, message in (
        ((8, 1, 0, 8, 1, 8, 1, 2, 0, 1, 1, 1, 1), "code: expected 0"),
        ((8, 1, 1, 8, 1, 8, 1, 0, 0, 1, 1, 1, 1), "out: expected 0"),
        ((0, 1, 0, 8, 1, 8, 1, 0, 0, 1, 1, 1, 1), "y, x, w: expected addresses"),
        ((8, 1, 0, 8, 1, 8, 1, 0, 0, 1, 1, 1, 0), "threads: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            C.linear_forward_cpu(*change)
    for change, message in (
        ((0, 1, 8, 1, 8, 1, 1, 1, 1, 1), "y, x, w: expected addresses"),
        ((8, 1, 8, 1, 8, 1, -1, 1, 1, 1), "M, N, K: expected at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            C.linear_input_grad_cpu(*change)
    for change, message in (
        ((0, 1, 8, 1, 8, 1, 1, 1, 1, False, 1), "y, a, b: expected addresses"),
        ((8, 1, 8, 1, 8, 1, 1, -1, 1, True, 1), "T, M, N: expected at least 0"),
        ((8, 1, 8, 1, 8, 1, 1, 1, 1, True, 0), "threads: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            C.linear_weight_grad_cpu(*change)
