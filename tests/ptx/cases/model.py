"""The model's own ops: rms_norm, swiglu, rope, decode_attention, and a layer of them in one call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastrl.kernels import _layer as layers
from fastrl.kernels import decode_attention as decoding
from fastrl.kernels import decoder_layer as layer
from fastrl.kernels import rms_norm as norms
from fastrl.kernels import rope as turning
from fastrl.kernels import swiglu as gates
from fastrl.kernels._layer import LayerWeights
from ptx.cases.case import BF16, F16, F32, Build, Case, case, doubled, kernel

EPS = 1e-6


def rms_norm(dtype: torch.dtype, T: int, D: int, *, both: bool = True) -> Case:
    """Both directions, with a residual and, if `both`, without; 16-bit references round where the op does."""
    x, residual, up, up_h = (torch.randn(T, D).to(dtype) for _ in range(4))
    weight = (1 + 0.3 * torch.randn(D)).to(dtype)
    wide = doubled if dtype == F32 else lambda *tensors: list(tensors)
    y, h, r = norms.reference_add(*wide(x, residual, weight), EPS)
    alone, r_alone = norms.reference(*wide(x, weight), EPS)
    dx, dw = norms.reference_add_backward(*doubled(up, up_h, h, weight, r))
    dx_alone, dw_alone = norms.reference_backward(*doubled(up, x, weight, r_alone))

    def run() -> list[torch.Tensor]:
        forward, add, backward, add_backward = (
            kernel("rms_norm", n, x) for n in ("forward", "add", "backward", "add_backward")
        )
        a = add(x, residual, weight, EPS)
        found = [*a[:2], *add_backward(up, up_h, a[1], weight, a[2])]
        if not both:
            return found
        b = forward(x, weight, EPS)
        return [*found, b[0], *backward(up, x, weight, b[1])]

    low = {F32: 1e-6, BF16: 2.0**-7, F16: 2.0**-10}[dtype]
    want = (y, h, dx, dw, *((alone, dx_alone, dw_alone) if both else ()))
    return case(run, want, (low,) * len(want))


def swiglu(dtype: torch.dtype, T: int, F: int) -> Case:
    x, up = (3 * torch.randn(T, 2 * F)).to(dtype), torch.randn(T, F).to(dtype)
    want = gates.reference(x.double()), gates.reference_backward(*doubled(up, x))
    low = {F32: 1e-6, BF16: 2.0**-8, F16: 2.0**-11}[dtype]
    forward = partial(kernel, "swiglu", "forward", x)
    backward = partial(kernel, "swiglu", "backward", x)
    return case(lambda: [forward()(x), backward()(up, x)], want, (low, low))


def rope(dtype: torch.dtype, T: int, H: int, K: int, E: int, *, normed: bool = False) -> Case:
    """Forward, the form that also writes the caches, and backward."""
    fused, up = (torch.randn(T, H + 2 * K, E).to(dtype) for _ in range(2))
    q, k, v = fused.split((H, K, K), 1)
    up_q, up_k, _ = up.split((H, K, K), 1)
    weights = [(1 + 0.2 * torch.randn(E if normed else 0)).to(dtype) for _ in range(2)]
    cos, sin = turning.rope_tables(E, 1e4, None, 64, F32, "cpu")
    at, slots = torch.randint(64, (T,)), torch.randperm(20)[:T]
    head = (q, k, at, cos, sin, *weights)
    wide = doubled(*head) if dtype == F32 else head
    turned = turning.reference(*wide, EPS)
    gradients = turning.reference_backward(*doubled(up_q, up_k, *head), EPS)
    caches = torch.zeros(2, 20, K, E, dtype=torch.float64)
    caches[0, slots], caches[1, slots] = turned[1].double(), v.double()

    def run() -> list[torch.Tensor]:
        forward, store, backward = (kernel("rope", n, q) for n in ("forward", "store", "backward"))
        ours = torch.zeros(2, 20, K, E, dtype=dtype)
        a = forward(*head, EPS)
        b = store(q, k, v, *head[2:], EPS, ours[0], ours[1], slots)
        return [*a, *b, ours, *backward(up_q, up_k, *head, EPS)]

    low = {F32: 1e-6, BF16: 2.0**-7, F16: 2.0**-10}[dtype]
    return case(run, (*turned, *turned, caches, *gradients), (low,) * 9)


def decode_attention(
    dtype: torch.dtype, lengths: list[int], H: int, K: int, E: int, page: int, *, rows: bool = False
) -> Case:
    """Slots past a length hold NaN, and entries of the table past the pages are far out of range."""
    B, N = len(lengths), max(1, -(-max(lengths) // page))
    q = torch.randn(B, H, E).to(dtype)
    k, v = (torch.randn(B * N, page, K, E).to(dtype) for _ in range(2))
    table = torch.randperm(B * N).view(B, N).int()
    ends = torch.tensor(lengths, dtype=torch.int32)
    slot = torch.arange(N * page).view(1, N, page).expand(B, N, page)
    beyond = torch.zeros(B * N, page, dtype=torch.bool)
    beyond[table.flatten().long()] = (slot >= ends[:, None, None]).flatten(0, 1)
    k[beyond], v[beyond] = torch.nan, torch.nan
    table[torch.arange(N) * page >= ends[:, None]] = 2**31 - 1
    of = torch.randperm(B) if rows else None
    shuffled = torch.empty_like(table)
    if of is not None:
        shuffled[of] = table
    given = (shuffled if rows else table, ends, of, E**-0.5)
    want = decoding.reference(*doubled(q, k, v), *given)
    low = {F32: 2e-6, BF16: 2.0**-7, F16: 2.0**-9}[dtype]
    return case(lambda: [kernel("decode_attention", "forward", q)(q, k, v, *given)], (want,), (low,))


def decoder_layer(
    dtype: torch.dtype, lengths: list[int], sizes: tuple[int, ...], *, normed: bool = False
) -> Case:
    """A layer of sizes D, F, H, K, E over pages of 64, its second row on page 0, as one that has ended."""
    (D, F, H, K, E), B = sizes, len(lengths)
    N = -(-max(lengths) // 64)
    table, ends = torch.arange(1, B * N + 1).view(B, N).int(), torch.tensor(lengths, dtype=torch.int32)
    table[1:2] = 0
    position = ends.long() - 1
    slots = table.gather(1, (position // 64)[:, None])[:, 0].long() * 64 + position % 64
    k, v = (torch.randn(B * N + 1, 64, K, E).to(dtype) for _ in range(2))
    shapes = (
        (D,),
        ((H + 2 * K) * E, D),
        ((H + 2 * K) * E,),
        (E,),
        (E,),
        (D, H * E),
        (D,),
        (2 * F, D),
        (D, F),
    )
    given = [(torch.randn(shape) * shape[-1] ** (0.5 - 0.5 * len(shape))).to(dtype) for shape in shapes]
    absent = {2} if normed else {3, 4}
    weights = LayerWeights(*(None if i in absent else w for i, w in enumerate(given)))
    x, stream = (torch.randn(B, D).to(dtype) for _ in range(2))
    angle = torch.randn(max(lengths), E // 2)
    rest = (position, angle.cos(), angle.sin())

    def call(run: Callable[..., Tensor], wide: bool) -> list[Tensor]:
        to = torch.float64 if wide else dtype
        cast = LayerWeights(*(w if w is None else w.to(to) for w in weights))
        caches = [c.clone().to(to) for c in (k, v)]
        args = (x.to(to), stream.to(to), cast, *rest, *caches, slots, table, ends, EPS)
        return [run(*args), *(c[1:] for c in caches)]

    want = call(layers.summed(layer.reference), True)
    low = {F32: 4e-6, BF16: 2.0**-5, F16: 2.0**-8}[dtype]
    return case(lambda: call(kernel("decoder_layer", "summed", x), False), want, (low,) * 3)


CASES: dict[str, Build] = {
    "decoder_layer bf16": partial(decoder_layer, BF16, [270, 1, 9], (32, 512, 2, 1, 16)),
    "rms_norm fp32": partial(rms_norm, F32, 5, 513),
    "rms_norm bf16": partial(rms_norm, BF16, 2, 896),
    "rms_norm fp16 narrow": partial(rms_norm, F16, 33, 16),
    "rms_norm fp32 walked": partial(rms_norm, F32, 1, 8200, both=False),
    "swiglu fp32": partial(swiglu, F32, 3, 501),
    "swiglu bf16": partial(swiglu, BF16, 2, 1024),
    "rope bf16": partial(rope, BF16, 3, 14, 2, 64),
    "rope fp32 normed": partial(rope, F32, 3, 3, 3, 80, normed=True),
    "rope bf16 normed": partial(rope, BF16, 2, 4, 2, 128, normed=True),
    "decode bf16": partial(decode_attention, BF16, [0, 1, 17, 65], 4, 2, 64, 64),
    "decode bf16 splits": partial(decode_attention, BF16, [300, 5], 14, 2, 64, 64, rows=True),
    "decode fp16 short pages": partial(decode_attention, F16, [20, 50], 2, 2, 80, 16),
    "decode fp32": partial(decode_attention, F32, [33, 70], 2, 2, 32, 64),
}
LONG: dict[str, Build] = {
    "decoder_layer bf16 normed": partial(
        decoder_layer, BF16, [5, 1, *range(2, 17)], (72, 48, 4, 2, 32), normed=True
    ),
    "decoder_layer fp16 of 40 rows": partial(decoder_layer, F16, [3] * 40, (64, 48, 2, 1, 24)),
    "decoder_layer bf16 of 70 rows": partial(decoder_layer, BF16, [3] * 70, (64, 80, 2, 1, 16)),
    "decoder_layer fp32": partial(decoder_layer, F32, [40, 1], (40, 512, 2, 2, 16)),
    "rms_norm bf16 of many rows": partial(rms_norm, BF16, 70, 96),
    "swiglu fp16": partial(swiglu, F16, 2, 40),
    "rope fp32 narrow": partial(rope, F32, 7, 2, 1, 16, normed=True),
    "decode bf16 long pages": partial(decode_attention, BF16, [600], 2, 1, 64, 256),
    "decode fp16 many heads": partial(decode_attention, F16, [70, 130], 8, 8, 80, 16),
    "decode bf16 wide heads": partial(decode_attention, BF16, [130, 257], 16, 8, 128, 64),
    "decode fp32 of one token": partial(decode_attention, F32, [1], 1, 1, 16, 1),
}
