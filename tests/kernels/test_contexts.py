"""Every public op in what may surround its call: a row per op (helpers/op_rows.py), a column per context.

The right value is that of the plain call; where a context is refused, the message is part of the table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import torch
from op_rows import ROWS, OpRow, T
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fastrl import ops

BACKENDS = (None, "reference")
EACH = pytest.mark.parametrize("name", ROWS)
TRAINED = pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row.gradients])


def leaves_of(row: OpRow, **options: object) -> list[Tensor]:
    return [x.requires_grad_(row.gradients) for x in row.leaves(**options)]


def total(outputs: Sequence[Tensor]) -> Tensor:
    """A scalar that weighs every element differently."""
    parts = [(o.double() * torch.linspace(0.5, 1.5, o.numel()).view(o.shape)).sum() for o in outputs]
    return torch.stack(parts).sum()


def gradients(row: OpRow, outputs: Sequence[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total(outputs), leaves)) if row.gradients else []


def plainly(row: OpRow, leaves: list[Tensor] | None = None) -> list[Tensor]:
    """Outputs and gradients of the plain call."""
    leaves = leaves_of(row) if leaves is None else leaves
    outputs = row.call(*leaves)
    return [*(o.detach() for o in outputs), *gradients(row, outputs, leaves)]


def agree(found: Sequence[Tensor], right: Sequence[Tensor], tolerance: float = 1e-6) -> None:
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(
            ours.detach().double(), theirs.double(), rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.fixture(params=BACKENDS, ids=("default", "reference"), autouse=True)
def backend(request):
    with ops.use_backend(request.param) if request.param else contextlib.nullcontext():
        yield request.param


# --- autocast ---------------------------------------------------------------------------------------
@EACH
@pytest.mark.parametrize(
    "dtype, inside", [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)]
)
def test_autocast(name, dtype, inside):
    """Wrong: a product inside of an op in autocast's dtype, written to a float32 buffer or taken for one; a
    gradient in another dtype than its input.
    """
    row = ROWS[name]
    leaves = leaves_of(row)
    with torch.autocast("cpu", dtype):
        outputs = row.call(*leaves)
        found = gradients(row, outputs, leaves) if inside else []
    found = found or gradients(row, outputs, leaves)
    low = [x.detach().to(dtype) for x in leaves] if row.product else leaves
    right = plainly(row, [x.detach().requires_grad_(row.gradients) for x in low])
    agree([*outputs, *found], right, 2e-2 if row.product else 1e-6)
    assert [g.dtype for g in found] == [torch.float32] * len(found)


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row.product])
def test_autocast_leaves_float64_alone(name):
    """As torch does: a gradient check under autocast is a check in float64."""
    row = ROWS[name]
    leaves = [x.requires_grad_(row.gradients) for x in row.leaves(dtype=torch.float64)]
    with torch.autocast("cpu", torch.bfloat16):
        found = plainly(row, leaves)
    agree(found, plainly(row, [x.detach().requires_grad_(row.gradients) for x in leaves]), 1e-12)
    assert {x.dtype for x in found} == {torch.float64}


@EACH
def test_autocast_with_mixed_dtypes(name):
    """Hidden states of autocast's dtype and float32 weights, as a trainer with bf16=True has them."""
    row = ROWS[name]
    leaves = [x.bfloat16() if i == 0 else x for i, x in enumerate(row.leaves())]
    leaves = [x.requires_grad_(row.gradients) for x in leaves]
    expected = contextlib.nullcontext()
    if name == "decode_attention":  # casting a cache for every token would be the fault
        expected = pytest.raises(TypeError, match="k_cache: expected dtype bfloat16, got float32")
    with expected, torch.autocast("cpu", torch.bfloat16):
        found = plainly(row, leaves)
        agree(found, plainly(row), 0.15)


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "label_smoothing": 0.1}, {"logits_bytes": 4096}])
def test_cross_entropy_under_autocast_is_that_of_the_rounded_inputs(rows, options):
    """Both sides of the least rows of the compiled product; float64 of what the op is given is the truth."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 16), torch.randn(50, 16)
    target = torch.randint(50, (rows,))
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.linear_cross_entropy(hidden, weight, target, **options)
    low = hidden.bfloat16().double(), weight.bfloat16().double()
    right = ops.linear_cross_entropy(*low, target, **options)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


# --- what is saved ----------------------------------------------------------------------------------
@TRAINED
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(name, reentrant):
    """Wrong: torch.func inside of an op, which refuses saved-tensor hooks; a tensor unpacked twice."""
    row = ROWS[name]
    leaves = leaves_of(row)
    outputs = checkpoint(row.call, *leaves, use_reentrant=reentrant)
    total(outputs).backward()
    agree([*outputs, *(x.grad for x in leaves)], plainly(row))


@EACH
def test_saved_tensor_hooks(name):
    row = ROWS[name]
    leaves = leaves_of(row)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().numpy().copy(), torch.from_numpy)
    for context in (hooks, torch.autograd.graph.save_on_cpu()):
        with context:
            outputs = row.call(*leaves)
        agree([*outputs, *gradients(row, outputs, leaves)], plainly(row))


def test_a_shared_gradient_inside_a_checkpoint_is_refused():
    """The forward runs twice and would add the gradient twice."""
    hidden, weight = torch.randn(T, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)

    def loss(hidden: Tensor) -> Tensor:
        target = torch.zeros(T, dtype=torch.int64)
        buffer = torch.zeros(11, 8)
        return ops.linear_loss(hidden, weight, target, lambda p, h, r: -p.sum(), weight_grad=buffer)[0]

    with pytest.raises(ValueError, match=r"weight_grad: expected a call outside of torch\.utils"):
        checkpoint(loss, hidden, use_reentrant=False)


# --- without a gradient -----------------------------------------------------------------------------
@EACH
def test_no_grad_and_inference_mode(name):
    """Inference tensors work outside of inference mode, too, where nothing is to be saved."""
    row = ROWS[name]
    right = [x.detach() for x in row.call(*row.leaves())]
    with torch.no_grad():
        found = row.call(*leaves_of(row))
    agree(found, right)
    assert not any(x.requires_grad for x in found)
    with torch.inference_mode():
        leaves = row.leaves()
        agree(row.call(*leaves), right)
    agree(row.call(*leaves), right)


@TRAINED
def test_each_input_alone_requires_grad(name):
    """Wrong: a gradient computed only together with another; the value changed by who asks."""
    row = ROWS[name]
    right = plainly(row)
    for i in range(len(row.shapes)):
        leaves = row.leaves()
        leaves[i].requires_grad_()
        outputs = row.call(*leaves)
        grad = torch.autograd.grad(total(outputs), leaves[i])
        first = len(outputs)
        agree([*outputs, *grad], [*right[:first], right[first + i]])


# --- the inputs' memory -----------------------------------------------------------------------------
def every_second(x: Tensor) -> Tensor:
    wide = torch.full([2 * n for n in x.shape], torch.nan)
    view = wide[(slice(None, None, 2),) * x.ndim]
    return view.copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))


@EACH
@pytest.mark.parametrize("form", [every_second, transposed])
def test_strided_inputs(name, form):
    row = ROWS[name]
    leaves = [form(x).requires_grad_(row.gradients) for x in row.leaves()]
    if name == "decode_attention":
        with pytest.raises(ValueError, match="k_cache: expected a contiguous cache"):
            row.call(*leaves)
        return
    agree(plainly(row, leaves), plainly(row))


@EACH
def test_expanded_inputs(name):
    """Rows that are one row in memory; upstream gradients that are one number."""
    row = ROWS[name]
    if name == "decode_attention":
        pytest.skip("its caches must be contiguous, which the test of strides holds it to")
    shapes = [x.shape for x in row.leaves()]
    leaves = [x[:1].expand(s) for x, s in zip(row.leaves(), shapes, strict=True)]
    dense = [x.clone().requires_grad_(row.gradients) for x in leaves]
    agree(plainly(row, [x.requires_grad_(row.gradients) for x in leaves]), plainly(row, dense))
    if row.gradients:
        ones = [torch.autograd.grad(sum(o.sum() for o in row.call(*dense)), dense) for _ in range(2)]
        agree(*ones)


@EACH
def test_no_rows(name):
    """An empty batch has outputs, and gradients of zero: a rank without samples takes part."""
    row = ROWS[name]
    leaves = leaves_of(row, rows=0)
    outputs = row.call(*leaves)
    undefined = name.startswith("linear_cross_entropy") and "none" not in name  # a mean over nothing
    assert all(bool(o.isnan().any()) == undefined for o in outputs)
    for grad, leaf in zip(gradients(row, outputs, leaves), leaves, strict=row.gradients):
        assert grad.shape == leaf.shape and not grad.any()


# --- transforms -------------------------------------------------------------------------------------
def scalar(row: OpRow, *leaves: Tensor) -> Tensor:
    return total(row.call(*leaves)).float()


@TRAINED
def test_func_grad_and_vjp(name):
    """Wrong: a registered backward, which torch.func cannot differentiate."""
    row = ROWS[name]
    leaves, right = row.leaves(), plainly(row)
    numbers = tuple(range(len(leaves)))
    grads = torch.func.grad(lambda *x: scalar(row, *x), argnums=numbers)(*leaves)
    outputs, pull = torch.func.vjp(row.call, *leaves)
    pulled = pull(tuple(torch.linspace(0.5, 1.5, o.numel()).view(o.shape) for o in outputs))
    agree([*outputs, *grads], right, 2e-6)
    agree(pulled, grads, 2e-6)


NO_VMAP = {
    "linear_loss": "tried to vmap over _FunctionalLinearLoss",
    "perturb_step": "Batching rule not implemented for fastrl::perturb_step",
}


@EACH
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(name):
    row = ROWS[name]
    leaves = row.leaves()
    stacked = [torch.stack([x, x / 2]) for x in leaves]
    refusal = NO_VMAP.get(name.partition(" ")[0])
    if refusal:
        with pytest.raises(RuntimeError, match=refusal):
            torch.func.vmap(row.call)(*stacked)
        return
    found = torch.func.vmap(row.call)(*stacked)
    agree([x[0] for x in found], row.call(*leaves), 2e-6)
    agree([x[1] for x in found], row.call(*(x / 2 for x in leaves)), 2e-6)


@TRAINED
def test_batched_gradients(name):
    """A Jacobian in one call: torch.autograd.functional.jacobian(vectorize=True)."""
    row = ROWS[name]
    leaves = leaves_of(row)
    outputs = row.call(*leaves)
    ones = [torch.ones_like(o) for o in outputs]
    both = torch.autograd.grad(
        outputs, leaves, [torch.stack([x, 2 * x]) for x in ones], is_grads_batched=True
    )
    right = torch.autograd.grad(row.call(*leaves), leaves, ones)
    agree([g[0] for g in both], right)
    agree([g[1] for g in both], [2 * g for g in right])


@TRAINED
def test_forward_mode_is_refused(name, backend):
    """Wrong: tangents of zero without a word."""
    row = ROWS[name]
    if name == "linear" and backend is None:
        pytest.skip("torch's own product, which has a forward mode")
    leaves = row.leaves()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(row.call, tuple(leaves), tuple(leaves))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        row.call(*(forward_ad.make_dual(x, x) for x in leaves))


@pytest.mark.parametrize("name", ["attention prefix", "decode_attention"])
def test_ops_that_must_not_be_differentiated_say_so(name):
    row = ROWS[name]
    leaves = row.leaves()
    for take in (
        lambda: row.call(*(x.requires_grad_() for x in row.leaves())),
        lambda: torch.func.grad(lambda *x: scalar(row, *x))(*leaves),
        lambda: torch.func.jvp(row.call, tuple(leaves), tuple(leaves)),
    ):
        with pytest.raises(ValueError, match="q: expected no gradient"):
            take()


SECOND = "no autograd formula was registered|has no derivative of its own|second derivatives are not provided"


@TRAINED
def test_second_derivatives_are_refused(name, backend):
    """Wrong: a gradient that the forward computed, taken for a constant: parts of the second are missing."""
    row = ROWS[name]
    if name == "linear" and backend is None:
        pytest.skip("torch's own product, which can be differentiated twice")
    leaves = leaves_of(row)

    def square(*leaves: Tensor) -> Tensor:
        return total([o.square() for o in row.call(*leaves)])

    if name == "linear":  # by our own backward, in plain torch
        first = torch.autograd.grad(square(*leaves), leaves[0], create_graph=True)[0]
        assert torch.autograd.grad(first.sum(), leaves[0])[0].any()
        return
    with pytest.raises(RuntimeError, match=SECOND):
        grads = torch.autograd.grad(square(*leaves), leaves, create_graph=True)
        torch.autograd.grad(torch.stack([g.sum() for g in grads]).sum(), leaves)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.func.grad(lambda x: torch.func.grad(square)(x, *leaves[1:]).sum())(leaves[0].detach())


OPS = [name for name in ROWS if " " not in name and name != "selective_log_softmax"]


@pytest.mark.parametrize("backend", [None], indirect=True)  # a traced op is opaque
@pytest.mark.parametrize("name", OPS)
def test_compiled_without_a_graph_break(name):
    row = ROWS[name]
    torch._dynamo.reset()
    run = torch.compile(row.call, backend="aot_eager", fullgraph=True)
    leaves = leaves_of(row)
    outputs = run(*leaves)
    agree([*outputs, *gradients(row, outputs, leaves)], plainly(row), 2e-6)


@pytest.mark.parametrize(
    "name", ["linear_cross_entropy all", "linear_loss", "attention", "rms_norm residual"]
)
@pytest.mark.parametrize("backend", [None], indirect=True)
def test_compiled_under_autocast(name):
    row = ROWS[name]
    torch._dynamo.reset()
    leaves = leaves_of(row)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = torch.compile(row.call, backend="aot_eager", fullgraph=True)(*leaves)
        right = plainly(row)
    agree([*outputs, *gradients(row, outputs, leaves)], right, 2e-2)


def test_hooks_see_what_is_kept_and_nothing_else():
    """Wrong: hooks on what a loss saves inside of the op: a checkpoint would run everything once more."""
    hidden, weight = torch.randn(T, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    target, seen = torch.zeros(T, dtype=torch.int64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x.shape) or x, lambda x: x):
        ops.linear_loss(hidden, weight, target, lambda p, h, r: p.exp().sum())
    assert seen == [hidden.shape, weight.shape]
