"""Attention of packed sequences by the dense kernels of PyTorch: `sdpa_cpu` and `sdpa` of the ladder.

They run on padded batches of sequences of like length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.kernels._attention.flash import deterministic
from fastrl.kernels._attention.prefix import dense
from fastrl.kernels._check import compute_dtype
from fastrl.kernels._rows import put_rows

PADDED_TOKENS = 1 << 16  # of one padded batch
ALONE = 128  # tokens from which, on CPU, a sequence is a batch of its own: a call costs less than padding
HALVES = (torch.float32, torch.bfloat16, torch.float16)
Dense = Callable[..., tuple[Tensor, ...]]


# --- padded batches ---------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Padded:
    """A batch of n sequences padded to L tokens."""

    index: Tensor  # (n, L): the packed token at each place; padding repeats the sequence's own last one
    padding: Tensor  # (n, L)
    places: Tensor  # the places that are not padding
    tokens: Tensor  # the packed token of each of `places`
    span: (
        slice | None
    )  # where the sequences lie, if they are neighbours of one length: then nothing is copied

    @classmethod
    def alone(cls, start: int, length: int, device: torch.device) -> Padded:
        """One sequence."""
        tokens = torch.arange(start, start + length, device=device)
        return cls(
            index=tokens[None],
            padding=torch.zeros_like(tokens, dtype=torch.bool)[None],
            places=tokens - start,
            tokens=tokens,
            span=slice(start, start + length),
        )

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Packed (T, H, ...) as (n, H, L, ...)."""
        rows = x.index_select(0, self.index.flatten()) if self.span is None else x[self.span]
        return rows.to(dtype).unflatten(0, self.index.shape).transpose(1, 2)

    def put(self, out: Tensor, x: Tensor) -> None:
        """Write (n, H, L, ...) back to packed `out` (T, H, ...)."""
        if self.span is not None:
            out[self.span].unflatten(0, self.index.shape).copy_(x.transpose(1, 2))
            return
        rows = x.transpose(1, 2).flatten(0, 1).index_select(0, self.places)
        put_rows(out, self.tokens, rows.to(out.dtype))

    def take_lse(self, lse: Tensor) -> Tensor:
        """Packed (T, H) as (n, H, L), infinite at the padding, so that its probabilities are 0."""
        return self.take(lse, lse.dtype).masked_fill(self.padding[:, None], torch.inf)


def padded(cu_seqlens: Tensor, at_once: Callable[[int], int]) -> Iterator[Padded]:
    """The packed sequences as padded batches, each of lengths within a power of two.

    A batch has at most at_once(L) sequences of up to L tokens; 0 means that each is a batch of its own.  At
    most half of a batch is padding, which repeats the last token of its sequence: nothing of another
    sequence, not even a NaN, can leak in.  cu_seqlens is read on the host, which waits for the device on
    CUDA.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    power, total = lengths.double().log2().ceil(), int(lengths.sum())  # -inf for an empty sequence
    for p in power[lengths > 0].unique().tolist():
        inside = (power == p).nonzero().squeeze(1)
        at = torch.arange(int(lengths[inside].max()), device=starts.device)
        count = at_once(at.numel())
        if count == 0:
            yield from (Padded.alone(int(starts[i]), int(lengths[i]), starts.device) for i in inside)
            continue
        for some in inside.split(count):
            last = lengths[some, None] - 1
            index = starts[some, None] + torch.minimum(at, last)
            places = (at <= last).flatten().nonzero().squeeze(1)
            contiguous = some.numel() == lengths.numel() and index.numel() == total
            yield Padded(
                index=index,
                padding=at > last,
                places=places,
                tokens=index.flatten()[places],
                span=slice(0, total) if contiguous else None,
            )


# --- dense attention --------------------------------------------------------------------------------
# forward(q (n, H, L, E), k and v (n, K, L, E), scale) -> y, lse (n, H, L);  backward(dy, q, k, v, y, lse,
# scale) -> dq, dk, dv
_CPU = "_scaled_dot_product_flash_attention_for_cpu"
_CUDA = (
    "_scaled_dot_product_efficient_attention"  # unlike flash attention, for float32, any width and any GPU
)
LSE_MULTIPLE = 32  # to which _CUDA pads lse


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Flash attention for CPU."""
    y, lse = getattr(torch.ops.aten, _CPU)(q, k, v, 0.0, True, scale=scale)
    return y, lse


def cpu_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Its gradients."""
    return getattr(torch.ops.aten, _CPU + "_backward")(dy, q, k, v, y, lse, 0.0, True, scale=scale)


def cuda_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Memory-efficient attention, which needs a key head for every query head."""
    G, L = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(G, 1) for x in (k, v))
    y, lse, *_ = getattr(torch.ops.aten, _CUDA)(q, k, v, None, True, 0.0, True, scale=scale)
    return y, lse[..., :L]


def cuda_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Its gradients; those of query heads that share a key head are added in float32."""
    (n, K, L, E), G = k.shape, q.shape[1] // k.shape[1]
    wide = (x.repeat_interleave(G, 1) for x in (k, v))
    lse = torch.nn.functional.pad(lse, (0, -L % LSE_MULTIPLE), value=torch.inf)
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    with deterministic():
        dq, dk, dv, _ = getattr(torch.ops.aten, _CUDA + "_backward")(
            dy,
            q,
            *wide,
            None,
            y,
            lse,
            no_dropout,
            no_dropout,
            0.0,
            (True, True, True, False),
            True,
            scale=scale,
        )
    if G == 1:
        return dq, dk, dv
    shared = [x.view(n, K, G, L, E).sum(2, dtype=torch.float32).to(x.dtype) for x in (dk, dv)]
    return dq, *shared


def _at_once(x: Tensor) -> Callable[[int], int]:
    """Sequences of a padded batch, by their length."""
    return lambda L: 0 if x.is_cpu and L >= ALONE else max(1, PADDED_TOKENS // L)


# --- packed attention from it -----------------------------------------------------------------------
def _packed(dense_forward: Dense, dense_backward: Dense) -> dict[str, Callable[..., Any]]:
    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, max_seqlen: int
    ) -> tuple[Tensor, Tensor]:
        y, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=compute_dtype(q))
        for batch in padded(cu_seqlens, _at_once(q)):
            inputs = [batch.take(x, x.dtype) for x in (q, k, v)]
            for out, x in zip((y, lse), dense_forward(*inputs, scale), strict=True):
                batch.put(out, x)
        return y, lse

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        for batch in padded(cu_seqlens, _at_once(q)):
            inputs = [batch.take(x, x.dtype) for x in (dy, q, k, v, y)]
            results = dense_backward(*inputs, batch.take_lse(lse), scale)
            for out, x in zip(grads, results, strict=True):
                batch.put(out, x)
        return grads

    return {"forward": forward, "backward": backward, "prefix": dense}


def _missing(name: str) -> str:
    return "" if hasattr(torch.ops.aten, name + "_backward") else f"this torch has no {name}"


PADDED: dict[str, dict[str, Any]] = {
    "sdpa_cpu": {
        "devices": ("cpu",),
        "dtypes": HALVES,
        "missing": _missing(_CPU),
        **_packed(cpu_forward, cpu_backward),
    },
    "sdpa": {
        "devices": ("cuda",),
        "dtypes": HALVES,
        "missing": _missing(_CUDA) if torch.version.cuda else "this torch was built without CUDA",
        **_packed(cuda_forward, cuda_backward),
    },
}
