"""Flash attention of packed sequences on CUDA, by the libraries that are installed: the top of the ladder.

    flash_attn_4   flash-attn-4 (CuTe DSL), where its backward can be deterministic: not on Hopper
    flash_attn_2   flash-attn
    varlen_attn    the flash attention inside torch, as called by torch.nn.attention.varlen

All three take the ends of queries and of keys separately, and align the causal mask with the last of both.

Each is called by its forward and its backward, because the op around them has its own autograd.  They keep
the same: y, and the natural logarithm lse, (H, T) for them and (T, H) here.  The backward is deterministic in
all three.  None is given pages: paged calls of varlen_attn are wrong in several builds (pytorch issue
194167), and decoding has a kernel of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastrl.kernels._launch import on_device, unit_rows

DTYPES = (torch.bfloat16, torch.float16)
WIDEST = 256  # of a head
OLDEST = {"flash-attn": (2, 7), "flash-attn-4": (4, 0)}  # earlier ones have other names of arguments
Call = Callable[..., tuple[Tensor, ...]]


@contextlib.contextmanager
def deterministic(*, warn_only: bool = False) -> Iterator[None]:
    """Ask torch's kernels for their deterministic form; the setting, of the whole process, is put back.

    warn_only  an operation that has none warns instead of failing
    """
    settings: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False  # or every torch.empty would write NaN
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


# --- libraries --------------------------------------------------------------------------------------
# forward(q, k, v, ends, longest, scale, keys) -> y, lse (H, T), where `keys` are the ends of the keys if they
# differ; backward(dy, q, k, v, y, lse (H, T), ends, longest, scale) -> dq, dk, dv
def flash4(interface: Any) -> tuple[Call, Call]:
    """flash_attn.cute.interface."""

    def options(ends: Tensor, longest: int, scale: float, keys: Tensor | None = None) -> dict[str, Any]:
        return {
            "cu_seqlens_q": ends,
            "cu_seqlens_k": ends if keys is None else keys,
            "max_seqlen_q": longest,
            "max_seqlen_k": longest,
            "softmax_scale": scale,
            "causal": True,
        }

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return interface._flash_attn_fwd(q, k, v, **options(*rest), return_lse=True)[:2]

    def backward(
        dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        return interface._flash_attn_bwd(q, k, v, y, dy, lse, **options(*rest), deterministic=True)[:3]

    return forward, backward


def flash2(interface: Any) -> tuple[Call, Call]:
    """flash_attn.flash_attn_interface."""

    def forward(
        q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float, keys: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return interface.flash_attn_varlen_func(
            q,
            k,
            v,
            ends,
            ends if keys is None else keys,
            longest,
            longest,
            softmax_scale=scale,
            causal=True,
            return_attn_probs=True,
        )[:2]

    def backward(
        dy: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        y: Tensor,
        lse: Tensor,
        ends: Tensor,
        longest: int,
        scale: float,
    ) -> tuple[Tensor, ...]:
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        interface._flash_attn_varlen_backward(
            dy,
            q,
            k,
            v,
            y,
            lse,
            *grads,
            ends,
            ends,
            longest,
            longest,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=True,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=True,
        )
        return grads

    return forward, backward


def varlen(aten: Any) -> tuple[Call, Call]:
    """The two ops of torch.ops.aten that torch.nn.attention.varlen calls.

    In torch 2.10 and 2.11 only the ops take shared heads.
    """

    def forward(
        q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float, keys: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        of_keys = ends if keys is None else keys
        return aten._flash_attention_forward(
            q, k, v, ends, of_keys, longest, longest, 0.0, True, False, scale=scale
        )[:2]

    def backward(
        dy: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        y: Tensor,
        lse: Tensor,
        ends: Tensor,
        longest: int,
        scale: float,
    ) -> tuple[Tensor, ...]:
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # for a dropout of 0
        unused = torch.empty(0, device=q.device)
        with deterministic():
            return aten._flash_attention_backward(
                dy, q, k, v, y, lse, ends, ends, longest, longest, 0.0, True, seed, unused, scale=scale
            )

    return forward, backward


# --- rungs ------------------------------------------------------------------------------------------
def parts(library: tuple[Call, Call]) -> dict[str, Callable[..., Any]]:
    """The op's forward, backward and prefix from a library's forward and backward."""
    call, call_backward = library

    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, max_seqlen: int
    ) -> tuple[Tensor, Tensor]:
        T, H, _ = q.shape
        if T == 0:
            return torch.empty_like(q), q.new_empty(T, H, dtype=torch.float32)
        tensors = [unit_rows(x) for x in (q, k, v)]
        ends = cu_seqlens.int().contiguous()
        with on_device(q):
            y, lse = call(*tensors, ends, max_seqlen or T, scale)
        return y, lse.t().contiguous()

    def backward(
        dy: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        y: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor,
        scale: float,
        max_seqlen: int,
    ) -> tuple[Tensor, ...]:
        T = q.shape[0]
        if T == 0:
            return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        tensors = (dy.contiguous(), *(unit_rows(x) for x in (q, k, v)), y, lse.t().contiguous())
        ends = cu_seqlens.int().contiguous()
        with on_device(q):
            grads = call_backward(*tensors, ends, max_seqlen or T, scale)
            return tuple(x.contiguous() for x in grads)

    def prefix(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        cu_seqlens_k: Tensor,
        scale: float,
        max_seqlen: int,
    ) -> Tensor:
        if q.shape[0] == 0:
            return torch.empty_like(q)
        tensors = [unit_rows(x) for x in (q, k, v)]
        ends, keys = (x.int().contiguous() for x in (cu_seqlens, cu_seqlens_k))
        with on_device(q):
            return call(*tensors, ends, max_seqlen or k.shape[0], scale, keys)[0]

    return {"forward": forward, "backward": backward, "prefix": prefix}


def installed(package: str, module: str) -> tuple[Any, str]:
    """The module of an installed package, or why there is none."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None, f"{package} is not installed"
    if not torch.version.cuda:
        return None, "this torch was built without CUDA"
    oldest = OLDEST[package]
    if tuple(int(n) for n in version.split(".")[:2]) < oldest:
        return None, f"{package} {version} is older than {'.'.join(map(str, oldest))}"
    try:
        return importlib.import_module(module), ""
    except ImportError as error:
        return None, f"{package} {version} cannot be imported: {error}"


def _takes(majors: tuple[int, ...], reason: str) -> Callable[[Tensor], str]:
    """The obstacle of a kernel for GPUs of these generations: another generation, or an unsupported width."""

    def obstacle(q: Tensor) -> str:
        E, major = q.shape[-1], torch.cuda.get_device_capability(q.device)[0]
        if E % 8 or E > WIDEST:
            return f"it takes heads of a width that is a multiple of 8 up to {WIDEST}, got E={E}"
        return "" if major in majors else reason

    return obstacle


def _rungs() -> Iterator[tuple[str, dict[str, Any]]]:
    common = {"devices": ("cuda",), "dtypes": DTYPES}
    no_backward = "it has no deterministic backward on this GPU (compute capability 10 or 11 needed)"
    four, missing = installed("flash-attn-4", "flash_attn.cute.interface")
    yield (
        "flash_attn_4",
        {**common, "missing": missing, "obstacle": _takes((10, 11), no_backward), **parts(flash4(four))},
    )
    ampere = _takes(tuple(range(8, 100)), "it needs a GPU of compute capability 8 or above")
    two, missing = installed("flash-attn", "flash_attn.flash_attn_interface")
    yield "flash_attn_2", {**common, "missing": missing, "obstacle": ampere, **parts(flash2(two))}
    missing = "" if torch.version.cuda else "this torch was built without CUDA"
    yield "varlen_attn", {**common, "missing": missing, "obstacle": ampere, **parts(varlen(torch.ops.aten))}


FLASH = dict(_rungs())
