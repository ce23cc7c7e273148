"""Ops under what surrounds their call: autocast, torch.func, forward-mode differentiation.

**Autocast.**  The products (`linear`, the head's losses, `attention`) take its dtype, as torch's own do:
their arguments are cast before the op, and mixed dtypes are no error there.  Everything inside a registered
op runs with autocast off (`ignore_autocast`): an op's arithmetic is chosen by the dtypes of its arguments.

**torch.func.**  A registered backward is not one that it can differentiate, so `with_gradient` also gives an
op the form of autograd.Function that it can.  Forward mode is refused there: the tangent would be lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import forward_ad

KINDS = ("cpu", "cuda")  # devices whose autocast lowers arguments
LIBRARY = torch.library.Library("fastrl", "FRAGMENT")


# --- autocast ---------------------------------------------------------------------------------------
def lowered(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in the dtype of autocast where it is on for their device, as torch's products take them.

    Float64 stays what it is, as in torch.
    """
    first = tensors[0]
    if not isinstance(first, Tensor) or not _autocast(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(x.to(dtype) if _castable(x) else x for x in tensors)


def widened(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in the widest of their dtypes where autocast is on, as torch's sums take them."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not _autocast(first.device.type):
        return tensors
    dtype = first.dtype
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype) if _castable(x) else dtype
    return tuple(x.to(dtype) if _castable(x) else x for x in tensors)


def _autocast(kind: str) -> bool:
    return kind in KINDS and torch.is_autocast_enabled(kind)


def _castable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def no_autocast(kind: str) -> contextlib.AbstractContextManager[object]:
    """Autocast is off inside the `with` block, for tensors of this kind of device."""
    return torch.autocast(kind, enabled=False) if _autocast(kind) else contextlib.nullcontext()


def ignore_autocast(*names: str) -> None:
    """Have the registered ops run with autocast off: it would lower the products inside of them.

    A kernel of the dispatcher's autocast keys, so that a call without autocast costs nothing.
    """
    for name in names:
        op = getattr(torch.ops.fastrl, name).default
        for kind in KINDS:
            LIBRARY.impl(name, _outside(op, kind), f"Autocast{kind.upper()}")


def _outside(op: Callable[..., Any], kind: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with no_autocast(kind):
            return op(*arguments, **named)

    return call


# --- torch.func, and second derivatives -------------------------------------------------------------
def with_gradient(
    op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """Register the backward of an op; returns what a public function calls, for torch.func too."""
    name = op._qualname if isinstance(op, torch.library.CustomOpDef) else op._schema.name
    torch.library.register_autograd(name, backward, setup_context=setup_context)

    def forward(*inputs: Any) -> Any:
        return op(*inputs)

    parts = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    function: Any = type(name.partition("::")[2], (torch.autograd.Function,), parts)

    def call(*inputs: Any) -> Any:
        return function.apply(*inputs) if functional() else op(*inputs)

    return call


def without_gradient(op: Any) -> Callable[..., Any]:
    """What a backward calls for its own op, which has no derivative: torch.func, which always asks for one,
    is told so when it is taken.
    """
    name = op._qualname.partition("::")[2]

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"{name}: second derivatives are not provided")

    parts = {
        "forward": staticmethod(lambda *inputs: op(*inputs)),
        "setup_context": staticmethod(lambda ctx, inputs, output: None),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    function: Any = type(name, (torch.autograd.Function,), parts)

    def call(*inputs: Any) -> Any:
        return function.apply(*inputs) if functional() else op(*inputs)

    return call


def functional() -> bool:
    """Whether torch.func transforms the call, or a forward-mode derivative may be taken of it.

    Not while torch.compile traces, which knows registered ops.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def final(op: str, grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients that were computed in the forward: to differentiate them again raises RuntimeError.

    They would silently be taken for constants.  Without `inputs`, which only `kept` has, already a backward
    under create_graph=True is refused.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return list(grads)
    if not inputs:
        raise RuntimeError(_refusal(op))
    return [_Constant.apply(op, g, *inputs) for g in grads]


def kept(*inputs: Tensor) -> tuple[Tensor, ...]:
    """What a backward needs for `final`: nothing, but under torch.func, which always asks for a graph."""
    return inputs if functional() else ()


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(op: str, grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_refusal(ctx.op))


def needed(x: Tensor | None) -> bool:
    """Whether a gradient of `x` is to be taken."""
    return x is not None and torch.is_grad_enabled() and x.requires_grad


def gradient_of(f: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """f(*inputs), a scalar, and its derivatives by each of them, inside of an op.

    Hooks on saved tensors, and with them torch.utils.checkpoint, do not see the tensors that f saves: they
    are used up before this returns.
    """
    if torch.compiler.is_compiling() or functional():
        value, pull = torch.func.vjp(f, *inputs)  # type: ignore[misc]
        return value, pull(torch.ones_like(value))

    with torch.enable_grad(), _no_hooks():
        leaves = [x.detach().requires_grad_() for x in inputs]
        value = f(*leaves)
        if not value.requires_grad:
            return value, tuple(torch.zeros_like(x) for x in inputs)
        grads = torch.autograd.grad(value, leaves, torch.ones_like(value), materialize_grads=True)
    return value.detach(), grads


def _no_hooks() -> contextlib.AbstractContextManager[object]:
    autograd: Any = torch._C._autograd
    if not autograd._saved_tensors_hooks_is_enabled():  # under torch.func there are none
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(x: Tensor) -> Tensor:
    return x


def checkpointed() -> bool:
    """Whether torch.utils.checkpoint (use_reentrant=False) runs this call, and will run it again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__


def _refusal(op: str) -> str:
    return (
        f"{op}: its gradient is computed with the loss and has no derivative of its own; "
        "expected a backward without create_graph=True"
    )
