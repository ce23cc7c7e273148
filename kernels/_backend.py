"""Which implementation of an op runs: the automatic choice, and how to overrule it.

An op file registers its implementations (`_registry`) under the op's public name, each as named parts:

    register("token_logp", "reference", forward=_forward, backward=_backward)

and its torch.library body asks `pick("token_logp", logits, "forward")` for the one to call.  A public
function calls what `route` returns: that registered op, or the picked implementation itself where the
difference cannot be observed.  An op that several libraries can run (attention) gives each of them a name,
and the order in which they are tried, with `ladder`.

A kernel whose note is COMPILED_ONLY is chosen once it has passed its check on the very device (`_verdicts`),
in exact mode too.  FASTRL_BACKEND states a preference, with the usual choice where it cannot be met;
`use_backend` is strict.

In exact mode (`exact`) every op between tokens and log-probs runs an implementation that is registered as
batch-invariant: the bits of a row depend on that row alone, not on the number of rows, its place among them,
padding, chunks or threads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastrl.kernels._registry import (
    BACKENDS,
    COMPILED_ONLY,
    EXACT_ONLY,
    NOT_BY_DEFAULT,
    Implementation,
    _ladders,
    _table,
    devices,
    exact_blocks,
    extension,
    ladder,
    order,
    register,
    register_triton,
    unbuilt,
)
from fastrl.kernels._verdicts.first_use import verdict_of
from fastrl.kernels._verdicts.machine import machine, pretended
from fastrl.kernels._verdicts.table import TABLE

__all__ = [
    "BACKENDS",
    "COMPILED_ONLY",
    "EXACT_ONLY",
    "NOT_BY_DEFAULT",
    "Implementation",
    "_ladders",
    "_table",
    "devices",
    "extension",
    "ladder",
    "order",
    "register",
    "register_triton",
    "unbuilt",
]

INTERPRETED = (
    "triton",
    "cpu",
)  # under TRITON_INTERPRET=1, slowly: for tests, and only when asked for by name
ASKED_BY = "FASTRL_BACKEND"
AUTO = "auto"
PLAIN = (Tensor, torch.nn.Parameter)  # types without a __torch_dispatch__ of their own

Asked = tuple[str, frozenset[str]]  # a backend's name and the ops it was asked for; no ops means all

_asked: list[Asked] = []  # for the whole process: autograd runs a CUDA backward in threads of its own


def pick(op: str, x: Tensor, part: str) -> Callable[..., Any]:
    """The function that runs `part` of `op` for tensors like `x`.

    Raises RuntimeError when a backend that was asked for by name cannot run it: nothing falls back silently.
    """
    wanted = requested(op)
    table = _table[op]
    strict = is_exact() and any(i.exact for i in table.values())
    if wanted is not None:
        reason = _obstacle(table.get(wanted), wanted, x, part, x.device.type, by_name=True)
        if not reason and strict and x.device.type not in table[wanted].exact:
            reason = "it is not batch-invariant, which exact mode asks for"
        if reason:
            have = ", ".join(b for b in order(op) if b in table and not table[b].missing)
            raise RuntimeError(
                f"{op}: backend {wanted!r} was asked for, but {reason}; available here: {have}"
            )
        return table[wanted].parts[part]
    return batch_invariant(op, x, part) if strict else inexact(op, x, part)


def inexact(op: str, x: Tensor, part: str) -> Callable[..., Any]:
    """The function that runs `part` of `op` by default, exact mode aside: the first that fits."""
    table, liked, kind = _table[op], preferred(), x.device.type
    for name in _in_turn(op, liked):
        impl = table.get(name)
        if impl is None or impl.note == EXACT_ONLY:
            continue
        if impl.default is not None and x.dtype not in impl.default:
            continue
        if _obstacle(impl, name, x, part, kind, by_name=name == liked):
            continue
        run = impl.parts[part] if impl.note != COMPILED_ONLY else _proven(op, name, impl, x, part, liked)
        if run is not None:
            return run
    raise RuntimeError(f"{op}: no implementation for {x.dtype} on {x.device.type}")


def _in_turn(op: str, liked: str | None) -> tuple[str, ...]:
    """The names in the order in which they are tried: the preferred backend first."""
    return order(op) if liked is None else (liked, *order(op))


def _proven(
    op: str, name: str, impl: Implementation, x: Tensor, part: str, liked: str | None
) -> Callable[..., Any] | None:
    """The function, if the implementation has passed its check on the device of `x`, or needs none.

    One that is preferred by name also runs where it was not checked; never where it failed.
    """
    if impl.note != COMPILED_ONLY:
        return impl.parts[part]
    key = op, name, x.dtype, x.device.index
    parts = TABLE.runs.get(key) or verdict_of(key, x)
    if parts is not None:
        return parts[part]
    return impl.parts[part] if name == liked and not TABLE.failed(key) else None


def route(
    registered: Callable[..., Any], op: str, part: str, x: Tensor, *others: Tensor | None
) -> Callable[..., Any]:
    """What runs `part` of `op` on `x` and `others`, which are all of its tensors.

    Returns `registered`, the torch.library op, or the picked function itself: a call of a `custom_op` takes
    20 us on the host, more than the arithmetic of a decode step's norm.
    """
    return pick(op, x, part) if direct(x, *others) else registered


def direct(*tensors: Tensor | None, differentiable: bool = False) -> bool:
    """Whether an op on these tensors can bypass torch.library.

    It cannot while torch.compile traces, under a mode (FakeTensorMode, FlopCounterMode), a functorch
    transform, autocast or a profiler, which shows ops by name; nor for a tensor subclass, a gradient to be
    taken (unless the caller is `differentiable` itself), or a view that the dispatcher would have to negate.
    """
    if torch.compiler.is_compiling():
        return False

    c = torch._C
    if c._len_torch_dispatch_stack() or c._len_torch_function_stack() or c._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0 or torch.autograd._profiler_enabled():
        return False
    if c._get_tracing_state() is not None or c._is_any_autocast_enabled():
        return False

    grad = not differentiable and torch.is_grad_enabled()
    for x in tensors:
        if x is not None and (type(x) not in PLAIN or (grad and x.requires_grad) or x.is_neg()):
            return False
    return True


def transformed() -> bool:
    """Whether torch.compile traces, or a functorch transform is active."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def batch_invariant(op: str, x: Tensor, part: str) -> Callable[..., Any]:
    """The function that runs `part` of `op` by default in exact mode."""
    table, where, liked = _table[op], x.device.type, preferred()
    names = [
        n for n in dict.fromkeys((*_in_turn(op, liked), *table)) if n in table and where in table[n].exact
    ]
    reasons = {}
    for name in names:
        impl = table[name]
        reason = _obstacle(impl, name, x, part, where, by_name=name == liked)
        run = None if reason else _proven(op, name, impl, x, part, liked)
        if run is not None:
            return run
        reasons[name] = reason or TABLE.reason((op, name, x.dtype, x.device.index))
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "none is written"
    raise RuntimeError(
        f"{op}: exact mode has no batch-invariant implementation for {x.dtype} on {where} ({why})"
    )


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Run batch-invariant arithmetic inside the `with` block, in every thread of the process.

    It is slower, and gives a token the same bits whatever it is batched with: log-probs recorded while
    sampling equal the trainer's own bit for bit.  Gradients are correct but need not have that property.  An
    op without such an implementation for a dtype and device raises RuntimeError when called: float64 has
    none, and float16 none on CPU.
    """
    exact_blocks.append(None)
    try:
        yield
    finally:
        exact_blocks.pop()


def is_exact() -> bool:
    """Whether exact mode is on."""
    return bool(exact_blocks)


def requested(op: str) -> str | None:
    """The backend asked for by the innermost `use_backend` that covers `op`, else None."""
    for name, ops in reversed(_asked):
        if not ops or op in ops:
            return name
    return None


def preferred() -> str | None:
    """The backend that FASTRL_BACKEND prefers: each op takes it where it can run, else its usual one.

    None for "auto", or nothing.  Raises ValueError for an unknown name.
    """
    # os.environ.get raises and catches a KeyError inside, which takes three times as long
    if ASKED_BY not in os.environ:
        return None
    name = os.environ[ASKED_BY]
    if not name or name == AUTO:
        return None
    if name not in BACKENDS:
        raise ValueError(f"{ASKED_BY}: expected one of {', '.join((AUTO, *BACKENDS))}; got {name!r}")
    return name


def asked() -> tuple[object, ...]:
    """All requests in force, and the state of the verdicts: while this value is unchanged, the same tensors
    get the same implementations.
    """
    return is_exact(), tuple(_asked), os.environ.get(ASKED_BY), TABLE.generation


def overruled() -> bool:
    """Whether a backend is asked for or preferred by name, for any op."""
    return bool(_asked) or preferred() is not None


@contextlib.contextmanager
def use_backend(name: str, *ops: str) -> Iterator[None]:
    """Run `ops` (all of them when none is named) on one backend inside the `with` block, in every thread of
    the process.

    The name may also be an implementation of the named ops, as in use_backend("varlen_attn", "attention").
    Raises ValueError for an unknown backend or op.  An op that the backend cannot run raises RuntimeError
    when called.
    """
    for op in ops:
        if op not in _table:
            raise ValueError(f"use_backend: expected one of {', '.join(sorted(_table))}; got {op!r}")
    _known(name, "use_backend", ops)
    entry = (name, frozenset(ops))
    _asked.append(entry)
    try:
        yield
    finally:
        del _asked[next(i for i in reversed(range(len(_asked))) if _asked[i] is entry)]


def backend(device: str | torch.device | None = None) -> dict[str, str]:
    """Which implementation each op uses on `device`: "cpu", "cuda", "cuda:N" or a torch.device; default: CUDA
    where there is a GPU.

    On CUDA, kernels that have passed their check on that device ("cuda" is the current one), in every dtype
    that was checked.  Raises ValueError or TypeError for anything else.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, index = _place(device)
    return {op: requested(op) or _by_default(op, kind, index) for op in sorted(_table)}


def _place(device: str | torch.device) -> tuple[str, int | None]:
    """The kind of a device, and the index that its tensors have."""
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device: expected cpu, cuda, cuda:N or a torch.device, got {type(device).__name__}")
    hint = f'; ops.backend()["{device}"] is the implementation of an op' if device in _table else ""
    unknown = f"device: expected cpu, cuda or cuda:N, got {str(device)!r}{hint}"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(unknown) from None

    if place.type == "cpu" and not place.index:
        return "cpu", None
    if place.type != "cuda":
        raise ValueError(unknown)
    if place.index is None:
        return "cuda", _index("cuda")
    present = torch.cuda.device_count()
    if place.index >= max(present, 1):  # without any, "cuda:0" is what a GPU would run
        raise ValueError(f"device: expected one of the {present} CUDA devices here, got {str(device)!r}")
    return "cuda", place.index


def _by_default(op: str, kind: str, index: int | None) -> str:
    """The first implementation of `op` that may be chosen on devices of this kind."""
    table, liked = _table[op], preferred()
    for name in _in_turn(op, liked):
        impl = table.get(name)
        if impl is None or impl.missing or impl.note == EXACT_ONLY or impl.default == ():
            continue
        if not _runs_on(impl, name, kind, by_name=name == liked):
            continue
        if impl.note != COMPILED_ONLY or name == liked or TABLE.has_passed(op, name, index):
            return name
    raise RuntimeError(f"{op}: no implementation on {kind}")


def _index(kind: str) -> int | None:
    """The index of the current device of this kind, as tensors have it."""
    if kind != "cuda":
        return None
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def implementations() -> dict[str, dict[str, str]]:
    """Every implementation of every op, with "ready", or why it is not chosen by default.

    A kernel that has passed its check on the current CUDA device is ready.
    """
    states = {}
    for op, table in sorted(_table.items()):
        states[op] = {name: _state(op, name, impl) for name, impl in table.items()}
    return states


def _state(op: str, name: str, impl: Implementation) -> str:
    if impl.note != COMPILED_ONLY or impl.missing:
        return impl.missing or impl.note or "ready"
    kind = machine().stands_in or "cuda"
    return "ready" if TABLE.has_passed(op, name, _index(kind)) else COMPILED_ONLY


def _known(name: str, where: str, ops: tuple[str, ...] = ()) -> str:
    # implementations that are not on the ladder: chosen when asked for, or in exact mode
    aside = (n for op in ops for n in _table[op] if n not in order(op))
    names = list(dict.fromkeys((*BACKENDS, *aside, *(n for op in ops for n in order(op)))))
    if name not in names:
        raise ValueError(f"{where}: expected one of {', '.join(names)}; got {name!r}")
    return name


def _obstacle(impl: Implementation | None, name: str, x: Tensor, part: str, kind: str, by_name: bool) -> str:
    if impl is None:
        return "it has no such implementation"
    if impl.missing:
        return impl.missing
    if kind not in impl.devices and not _runs_on(impl, name, kind, by_name):
        return f"it does not run on {kind} tensors"
    if impl.dtypes is not None and x.dtype not in impl.dtypes:
        return f"it does not take {x.dtype}"
    if part not in impl.parts:
        return f"it has no {part}"
    return impl.obstacle(x) if impl.obstacle is not None else ""


def _runs_on(impl: Implementation, name: str, kind: str, by_name: bool) -> bool:
    """Whether it takes tensors of this kind of device: its own, or the CPU's in the GPU's place."""
    if kind in impl.devices:
        return True
    if by_name and (name, kind) == INTERPRETED and os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return len(pretended) > 1 and impl.note == COMPILED_ONLY and machine().stands_in == kind
