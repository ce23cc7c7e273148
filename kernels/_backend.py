"""Which implementation of an op runs: the registry, the automatic choice, and how to overrule it.

An op file registers its implementations under the op's public name, each as named parts ("forward",
"backward"):

    register("token_logp", "reference", forward=_forward, backward=_backward)

and its torch.library body asks `pick("token_logp", logits, "forward")` for the one to call.  A public
function calls what `route` returns: that registered op, or the picked implementation itself where the
difference cannot be observed.  An op that several libraries can run (attention) gives each of them a name,
and the order in which they are tried, with `ladder`.

In exact mode (`exact`) every op between tokens and log-probs runs an implementation that is registered as
batch-invariant: the bits of a row depend on that row alone, not on the number of rows, its place among them,
padding, chunks or threads.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("cuda", "triton", "cpu", "reference")  # the automatic choice takes the first that fits
DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",), "reference": ("cpu", "cuda")}
INTERPRETED = (
    "triton",
    "cpu",
)  # under TRITON_INTERPRET=1, slowly: for tests, and only when asked for by name
ASKED_BY = "FASTRL_BACKEND"
PLAIN = (Tensor, torch.nn.Parameter)  # types without a __torch_dispatch__ of their own

# builds, but has never run on the hardware it is for: chosen only when asked for
COMPILED_ONLY = "compiled only"
# batch-invariant, but not the fastest: chosen in exact mode, and when asked for
EXACT_ONLY = "exact mode only"
NOT_BY_DEFAULT = (COMPILED_ONLY, EXACT_ONLY)

Asked = tuple[str, frozenset[str]]  # a backend's name and the ops it was asked for; no ops means all


@dataclass(frozen=True, slots=True)
class Implementation:
    parts: dict[str, Callable[..., Any]]
    dtypes: tuple[torch.dtype, ...] | None  # None: every dtype
    note: str  # shown by `backend()`; COMPILED_ONLY keeps it from being chosen by default
    missing: str  # why it cannot be used in this process; empty when it can
    devices: tuple[str, ...]
    obstacle: Callable[[Tensor], str] | None  # why it cannot take a tensor of its devices and dtypes, or ""
    exact: tuple[str, ...] = ()  # the devices on which its forward is batch-invariant
    default: tuple[torch.dtype, ...] | None = None  # dtypes for which it may be chosen by default; None: all


_table: dict[str, dict[str, Implementation]] = {}
_ladders: dict[str, tuple[str, ...]] = {}  # ops with implementation names of their own; others use BACKENDS
_asked: list[Asked] = []  # for the whole process: autograd runs a CUDA backward in threads of its own
_exact: list[None] = []  # for the whole process too: one entry for every open `exact` block


def register(
    op: str,
    backend: str,
    *,
    dtypes: tuple[torch.dtype, ...] | None = None,
    note: str = "",
    missing: str = "",
    devices: tuple[str, ...] | None = None,
    obstacle: Callable[[Tensor], str] | None = None,
    exact: tuple[str, ...] = (),
    default: tuple[torch.dtype, ...] | None = None,
    **parts: Callable[..., Any],
) -> None:
    """Add an implementation of `op`; called once, by the op's own file, when it is imported.

    `devices` is needed for a name that is not in BACKENDS.
    """
    _table.setdefault(op, {})[backend] = Implementation(
        parts=parts,
        dtypes=dtypes,
        note=note,
        missing=missing,
        devices=DEVICES[backend] if devices is None else devices,
        obstacle=obstacle,
        exact=exact,
        default=default,
    )


def ladder(op: str, *names: str) -> None:
    """Set the order in which the implementations of `op` are tried; their names may be their own."""
    _ladders[op] = names


def order(op: str) -> tuple[str, ...]:
    """The names an implementation of `op` may have, in the order in which the automatic choice tries them."""
    return _ladders.get(op, BACKENDS)


def register_triton(op: str, module: str, *parts: str, exact: bool = False) -> None:
    """Add the Triton implementation of `op`: the functions `parts` of fastrl.kernels._triton.`module`.

    It takes the module's DTYPES.  `exact` says that it is batch-invariant.  Where triton is not installed (it
    has no wheels outside Linux) the implementation is listed as missing.
    """
    try:
        implementation = importlib.import_module(f"fastrl.kernels._triton.{module}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("triton"):
            raise
        register(op, "triton", missing="triton is not installed")
        return
    register(
        op,
        "triton",
        dtypes=implementation.DTYPES,
        note=COMPILED_ONLY,
        exact=("cuda", "cpu") if exact else (),
        **{part: getattr(implementation, part) for part in parts},
    )


def pick(op: str, x: Tensor, part: str) -> Callable[..., Any]:
    """The function that runs `part` of `op` for tensors like `x`.

    Raises RuntimeError when a backend that was asked for by name cannot run it: nothing falls back silently.
    """
    wanted = requested(op)
    table = _table[op]
    strict = is_exact() and any(i.exact for i in table.values())
    if wanted is not None:
        reason = _obstacle(table.get(wanted), wanted, x, part, by_name=True)
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
    table = _table[op]
    for name in order(op):
        impl = table.get(name)
        if impl is None or impl.note in NOT_BY_DEFAULT:
            continue
        if impl.default is not None and x.dtype not in impl.default:
            continue
        if not _obstacle(impl, name, x, part):
            return impl.parts[part]
    raise RuntimeError(f"{op}: no implementation for {x.dtype} on {x.device.type}")


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
    transform or a profiler, which shows ops by name; nor for a tensor subclass, a gradient to be taken
    (unless the caller is `differentiable` itself), or a view that the dispatcher would have to negate.
    """
    if torch.compiler.is_compiling():
        return False

    c = torch._C
    if c._len_torch_dispatch_stack() or c._len_torch_function_stack() or c._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0 or torch.autograd._profiler_enabled():
        return False
    if c._get_tracing_state() is not None:
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
    table, where = _table[op], x.device.type
    names = [n for n in dict.fromkeys((*order(op), *table)) if n in table and where in table[n].exact]
    reasons = {n: _obstacle(table[n], n, x, part) for n in names}
    for name, reason in reasons.items():
        if not reason:
            return table[name].parts[part]
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
    _exact.append(None)
    try:
        yield
    finally:
        _exact.pop()


def is_exact() -> bool:
    """Whether exact mode is on."""
    return bool(_exact)


def requested(op: str) -> str | None:
    """The backend asked for by the innermost `use_backend` that covers `op`, else by FASTRL_BACKEND, else
    None.
    """
    for name, ops in reversed(_asked):
        if not ops or op in ops:
            return name
    # os.environ.get raises and catches a KeyError inside, which takes three times as long
    if ASKED_BY not in os.environ:
        return None
    name = os.environ[ASKED_BY]
    return _known(name, ASKED_BY) if name else None


def asked() -> tuple[object, ...]:
    """All requests in force: while this value is unchanged, the same tensors get the same implementations."""
    return is_exact(), tuple(_asked), os.environ.get(ASKED_BY)


def overruled() -> bool:
    """Whether a backend is asked for by name, for any op."""
    return bool(_asked) or bool(os.environ.get(ASKED_BY))


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


def backend(device: str | None = None) -> dict[str, str]:
    """Which implementation each op uses on `device`, "cpu" or "cuda"; default: CUDA where there is a GPU."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {op: requested(op) or _by_default(op, kind) for op in sorted(_table)}


def _by_default(op: str, kind: str) -> str:
    """The first implementation of `op` that may be chosen on devices of this kind."""
    table = _table[op]
    for name in order(op):
        impl = table.get(name)
        if impl is None or kind not in impl.devices or impl.missing:
            continue
        if impl.note not in NOT_BY_DEFAULT:
            return name
    raise RuntimeError(f"{op}: no implementation on {kind}")


def implementations() -> dict[str, dict[str, str]]:
    """Every implementation of every op, with "ready", or why it is not chosen by default."""
    return {
        op: {b: i.missing or i.note or "ready" for b, i in table.items()}
        for op, table in sorted(_table.items())
    }


def devices(op: str, name: str) -> tuple[str, ...]:
    """Where an implementation of `op` runs."""
    return _table[op][name].devices


@functools.cache  # an import statement that finds its module takes 0.4 us
def extension() -> Any:
    """The compiled module fastrl._C, or None when it was not built (a source tree that was never
    installed).
    """
    try:
        from fastrl import _C  # after torch, whose OpenMP runtime it shares
    except ImportError as error:
        if "fastrl._C" in str(error) or "'_C'" in str(error):
            return None
        raise
    return _C


def unbuilt(function: str) -> str:
    """Why an implementation over `function` of fastrl._C is missing; empty when it was built."""
    return "" if hasattr(extension(), function) else "fastrl._C was built without it"


def _known(name: str, where: str, ops: tuple[str, ...] = ()) -> str:
    # implementations that are not on the ladder: chosen when asked for, or in exact mode
    aside = (n for op in ops for n in _table[op] if n not in order(op))
    names = list(dict.fromkeys((*BACKENDS, *aside, *(n for op in ops for n in order(op)))))
    if name not in names:
        raise ValueError(f"{where}: expected one of {', '.join(names)}; got {name!r}")
    return name


def _obstacle(impl: Implementation | None, name: str, x: Tensor, part: str, by_name: bool = False) -> str:
    if impl is None:
        return "it has no such implementation"
    if impl.missing:
        return impl.missing
    kind = x.device.type
    interpreted = by_name and (name, kind) == INTERPRETED and os.environ.get("TRITON_INTERPRET") == "1"
    if kind not in impl.devices and not interpreted:
        return f"it does not run on {kind} tensors"
    if impl.dtypes is not None and x.dtype not in impl.dtypes:
        return f"it does not take {x.dtype}"
    if part not in impl.parts:
        return f"it has no {part}"
    return impl.obstacle(x) if impl.obstacle is not None else ""
