"""Rotary position embedding of queries and keys, after their per-head norm when the model has one.

    n   = round(x / sqrt(mean_e x_e^2 + eps)) w           of each head, only with q_norm / k_norm (Qwen3)
    y_1 = n_1 cos - n_2 sin,   y_2 = n_2 cos + n_1 sin    n = (n_1, n_2), the two halves of a head

cos and sin are rows `positions` of tables (N, E/2).  The rotation runs in fp32 and rounds once; its backward
turns back by the same angle, so without a norm only the angles are kept.

While sampling, the turned keys and their values are also written to their slots of a paged cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.kernels._backend import pick, register, register_triton, route, unbuilt
from fastrl.kernels._check import FLOATS, INTS, compute_dtype, dims, same_device
from fastrl.kernels._contexts import ignore_autocast, widened, with_gradient, without_gradient
from fastrl.kernels._launch import FLOAT_CODES
from fastrl.kernels._native import rope as native
from fastrl.kernels._rows import put_rows
from fastrl.kernels.rms_norm import reference as norm
from fastrl.kernels.rms_norm import reference_backward as norm_backward


class Store(NamedTuple):
    """Where to store keys and values: v (T, K, E), and distinct `slots` (T,) int64 of caches (N, K, E)."""

    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slots: Tensor


# --- reference --------------------------------------------------------------------------------------
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, sign: float = 1.0) -> Tensor:
    """`x` (T, H, E) turned by the angles (T, 1, E/2), or back by them with sign -1."""
    x = x.to(cos.dtype)
    a, b = x.chunk(2, -1)
    out = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    first, second = out.chunk(2, -1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=second).addcmul_(a, sin, value=sign)
    return out.to(dtype)


def _norm_backward(dn: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    _, r = norm(rows, weight, eps)
    dx, dw = norm_backward(dn.reshape(rows.shape), rows, weight, r)
    return dx.view(x.shape), dw


def reference(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The definition: q (T, H, E) and k (T, K, E), turned; an empty norm weight means none."""
    c, s = _angles(positions, cos, sin, compute_dtype(q))
    heads = ((q, q_norm), (k, k_norm))
    turned = [_rotate(norm(x, w, eps)[0] if w.numel() else x, c, s, x.dtype) for x, w in heads]
    return turned[0], turned[1]


def reference_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k and of the two norm weights (empty without one).

    q and k are read only with a norm.
    """
    c, s = _angles(positions, cos, sin, compute_dtype(dq))
    gq, wq = _turn_back(dq, q, q_norm, c, s, eps)
    gk, wk = _turn_back(dk, k, k_norm, c, s, eps)
    return gq.to(dq.dtype), gk.to(dk.dtype), wq, wk


def _turn_back(
    dy: Tensor, x: Tensor, weight: Tensor, c: Tensor, s: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients of heads `x` and of their norm's weight."""
    if weight.numel():
        return _norm_backward(_rotate(dy, c, s, c.dtype, -1.0), x, weight, eps)
    return _rotate(dy, c, s, dy.dtype, -1.0), weight.new_empty(0)


def _angles(positions: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    c = cos.index_select(0, positions)[:, None].to(dtype)
    s = sin.index_select(0, positions)[:, None].to(dtype)
    return c, s


def reference_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same, with the turned keys and the values written to the caches."""
    q, k = reference(q, k, positions, cos, sin, q_norm, k_norm, eps)
    put_rows(k_cache, slots, k)
    put_rows(v_cache, slots, v)
    return q, k


register("rope", "reference", forward=reference, backward=reference_backward, store=reference_store)


# --- kernels ----------------------------------------------------------------------------------------
register(
    "rope",
    "cpu",
    dtypes=tuple(FLOAT_CODES),
    missing=unbuilt("rope_forward_cpu"),
    exact=("cpu",),
    forward=native.forward,
    backward=native.backward,
    store=native.store,
)
register_triton("rope", "rope", "forward", "backward", "store", exact=True)


# --- registration and autograd ----------------------------------------------------------------------
@torch.library.custom_op("fastrl::rope", mutates_args=())
def forward_op(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """q and k, normalised where a norm weight is not empty, and turned."""
    return pick("rope", q, "forward")(q, k, positions, cos, sin, q_norm, k_norm, eps)


@torch.library.custom_op("fastrl::rope_store", mutates_args=("k_cache", "v_cache"))
def store_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """q and k, turned; k and v are written to the caches.  No gradient."""
    return pick("rope", q, "store")(
        q, k, v, positions, cos, sin, q_norm, k_norm, eps, k_cache, v_cache, slots
    )


@torch.library.custom_op("fastrl::rope_backward", mutates_args=())
def backward_op(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, q_norm and k_norm."""
    return pick("rope", dq, "backward")(dq, dk, q, k, positions, cos, sin, q_norm, k_norm, eps)


@forward_op.register_fake
def _(q, k, positions, cos, sin, q_norm, k_norm, eps):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape)


@store_op.register_fake
def _(q, k, v, positions, cos, sin, q_norm, k_norm, eps, k_cache, v_cache, slots):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape)


@backward_op.register_fake
def _(dq, dk, q, k, positions, cos, sin, q_norm, k_norm, eps):  # type: ignore[no-untyped-def]
    return (
        dq.new_empty(dq.shape),
        dk.new_empty(dk.shape),
        q_norm.new_empty(q_norm.shape),
        k_norm.new_empty(k_norm.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, positions, cos, sin, q_norm, k_norm, ctx.eps = inputs
    kept = (q if q_norm.numel() else q.new_empty(0), k if k_norm.numel() else k.new_empty(0))
    ctx.save_for_backward(*kept, positions, cos, sin, q_norm, k_norm)


def _autograd(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    gq, gk, wq, wk = differentiate(dq, dk, *ctx.saved_tensors, ctx.eps)
    return gq, gk, None, None, None, wq, wk, None


differentiate = without_gradient(backward_op)
differentiable = with_gradient(forward_op, _autograd, _setup)
ignore_autocast("rope", "rope_store", "rope_backward")


# --- public -----------------------------------------------------------------------------------------
def rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    store: Store | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions' angles, differentiable in q, k and the norm weights.

    Shapes:  q (T, H, E), k (T, K, E) bf16|fp16|fp32|fp64;  positions (T,) int in [0, N);  cos, sin (N, E/2)
             from `rope_tables`;  q_norm, k_norm (E,): RMS norm of each head first;  store: also write the
             turned keys, and their values, to a cache (under no_grad; slots are not checked)
             ->  (q, k) like the inputs.
    Memory:  the angles are kept for the backward, and q and k where there is a norm.
    Raises:  ValueError or TypeError naming the argument; for a position outside the tables on CPU only.
    Source:  Su et al. 2021, "RoFormer"; halves as in Llama's Hugging Face weights, not interleaved pairs.
    """
    q, k = widened(q, k)
    T, _, E = dims("q", q, "T H E", FLOATS)
    dims("k", k, "T K E", (q.dtype,), T=T, E=E)
    dims("positions", positions, "T", INTS, T=T)
    if E % 2:
        raise ValueError(f"q: expected an even head width, got E={E}")
    N, _ = dims("cos", cos, "N E/2", FLOATS, **{"E/2": E // 2})
    dims("sin", sin, "N E/2", FLOATS, N=N, **{"E/2": E // 2})
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            dims(name, weight, "E", FLOATS, E=E)
    same_device(q=q, k=k, positions=positions, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm)
    # reading values on CUDA would wait for the device, and in torch.compile break the graph
    readable = T and positions.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable:
        low, high = map(int, positions.aminmax())
        if not 0 <= low <= high < N:
            raise ValueError(f"positions: expected values in [0, {N}), got {low} to {high}")

    weights = tuple(q.new_empty(0) if w is None else w for w in (q_norm, k_norm))
    turn = (positions, cos, sin, *weights)
    if store is None:
        return route(differentiable, "rope", "forward", q, k, *turn)(q, k, *turn, eps)
    _check_store(store, k)
    run = route(store_op, "rope", "store", q, k, *store, *turn)
    return run(q, k, store.v, *turn, eps, *store[1:])


def _check_store(store: Store, k: Tensor) -> None:
    """Raise ValueError or TypeError where `store` does not fit the keys."""
    T, K, E = k.shape
    dims("store.v", store.v, "T K E", (k.dtype,), T=T, K=K, E=E)
    N, _, _ = dims("store.k_cache", store.k_cache, "N K E", (k.dtype,), K=K, E=E)
    dims("store.v_cache", store.v_cache, "N K E", (k.dtype,), N=N, K=K, E=E)
    dims("store.slots", store.slots, "T", INTS, T=T)
    same_device(k=k, **store._asdict())
    for name, cache in (("k_cache", store.k_cache), ("v_cache", store.v_cache)):
        if not cache.is_contiguous():
            raise ValueError(f"store.{name}: expected a contiguous cache, got strides {cache.stride()}")


# --- tables -----------------------------------------------------------------------------------------
def _unscaled(frequency: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    return frequency


def _linear(frequency: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    return frequency / scaling["factor"]


def _llama3(frequency: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3.1)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    old = scaling["original_max_position_embeddings"]
    turns = old * frequency / (2 * math.pi)  # over the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequency / scaling["factor"] + blend * frequency


SCALINGS: dict[str, Callable[[Tensor, Mapping[str, Any]], Tensor]] = {
    "default": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
}


def rope_tables(
    head_dim: int,
    theta: float,
    scaling: Mapping[str, Any] | None,
    n: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """cos and sin (n, head_dim/2) of every position below `n`.

    The arithmetic is fp32, like Hugging Face's, and float64 for float64.  `scaling` is the rope_scaling of a
    config: None, or a mapping with rope_type (or type) and the numbers of that type.

    Raises:  ValueError for a scaling type that is not in SCALINGS, or lacks a number.
    """
    kind = "default" if scaling is None else str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind not in SCALINGS:
        raise ValueError(f"rope_scaling: expected rope_type {', '.join(map(repr, SCALINGS))}; got {kind!r}")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).to(wide) / head_dim
    try:
        frequency = SCALINGS[kind](1.0 / (theta**exponent), scaling or {})
    except KeyError as missing:
        raise ValueError(
            f"rope_scaling: rope_type {kind!r} needs {missing}, got {dict(scaling or {})}"
        ) from None
    angle = torch.arange(n, device=device).to(wide)[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)
