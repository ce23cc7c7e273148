"""What linear_loss and linear_logp should cost on an H200, by arithmetic: bytes, products and instructions.

    python -m fastrl.bench.predict

Nothing here is measured.  The rates are what library kernels reach on an H200: 790 TFLOP/s in bfloat16
products of this size, 4.0 TB/s in kernels that pass over rows.  Caches, waves that are not full and launches
are left out, so that a time is a lower bound of what the same bytes take.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastrl.kernels._chunks import chunk_rows, share_of, spans

PRODUCTS = 790e12  # FLOP a second
COPY = 4.0e12  # bytes a second
H200 = 150_110_011_392  # bytes of memory
TENSOR, EXPONENTS, SCHEDULERS = (
    4096,
    16,
    4,
)  # a cycle and multiprocessor: FLOP, exponents, instructions of warps
ROWS, COLUMNS, DEPTH, LEAD, LEAST = 128, 256, 64, 2, 3  # of a tile of linear_logp_hopper.py
BF16 = 2  # bytes


@dataclass(frozen=True, slots=True)
class Loss:
    """One forward and backward of linear_loss beside its three products in bfloat16."""

    chunks: int
    row_bytes: int  # the forward reads a logit, the backward reads it and writes its gradient
    wide_bytes: int  # logits wider than bfloat16, written by the first product
    weight_bytes: int  # of the weight's gradient, but for writing it once in bfloat16
    products: float  # seconds

    @property
    def bytes(self) -> int:
        return self.row_bytes + self.wide_bytes + self.weight_bytes

    @property
    def ratio(self) -> float:
        """The time of all over that of the products."""
        return 1 + self.bytes / COPY / self.products


def linear_loss(T: int, D: int, V: int, *, itemsize: int = 4, row_reads: int = 2, memory: int = H200) -> Loss:
    """T tokens of width D and a vocabulary of V, cut as on a device with `memory` bytes.

    itemsize of a logit; row_reads: passes of the row kernels over the logits, 2, or 1 where one kernel forms
    value and gradient, which takes a derivative that is known before.
    """
    device = torch.device("cuda")
    chunks = len(spans(T, chunk_rows(V, itemsize, device, share_of(memory)), device))
    # one chunk: read and written once more, scaled by the upstream gradient.  More: float32 that the first
    # chunk writes, the others read and write, and the scaling reads
    element = 2 * BF16 if chunks == 1 else 4 + 8 * (chunks - 1) + 4
    return Loss(
        chunks,
        T * V * (row_reads * itemsize + BF16),
        T * V * (itemsize - BF16),
        V * D * element,
        6 * T * D * V / PRODUCTS,
    )


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of linear_logp, 128 tokens by 256 of the vocabulary: cycles of a multiprocessor."""

    product: float
    sums: float
    hidden: float  # of the sums, behind products

    @property
    def share(self) -> float:
        """Of the rate of a product alone."""
        return self.product / (self.product + self.sums - self.hidden)


def linear_logp(D: int, instructions: int = 836, *, overlapped: bool = True) -> Tile:
    """`instructions` of a thread for the sums of a tile, 256 threads.

    Overlapped: a group of half the threads takes its exponents while the other is up to LEAD steps behind,
    which it then multiplies at twice its usual rate.
    """
    product = 2 * ROWS * COLUMNS * D / TENSOR
    sums = max(ROWS * COLUMNS / EXPONENTS, instructions * 8 / SCHEDULERS)
    step = product / (D / DEPTH) / 2  # of one group alone
    staggered = overlapped and -(-D // DEPTH) >= LEAST
    return Tile(product, sums, min(sums, 2 * LEAD * step) if staggered else 0.0)


def main() -> None:
    print("linear_loss, 8192 tokens, V = 151936: predicted time over that of its three products")
    for D in (896, 2048, 4096):
        wide, one, narrow = (
            linear_loss(8192, D, 151_936, itemsize=size, row_reads=reads)
            for size, reads in ((4, 2), (4, 1), (2, 2))
        )
        print(
            f"  D={D:<5} {wide.chunks} chunk   fp32 logits {wide.ratio:.3f}"
            f"   if they were read once {one.ratio:.3f}   bf16 logits {narrow.ratio:.3f}"
        )
    print("linear_logp: predicted share of the rate of the product alone")
    for D in (896, 1536):
        serial, lean, now = (
            linear_logp(D, n, overlapped=o) for n, o in ((2239, False), (836, False), (836, True))
        )
        print(
            f"  D={D:<5} 2,239 instructions {serial.share:.0%}   836 {lean.share:.0%}"
            f"   overlapped {now.share:.0%}"
        )


if __name__ == "__main__":
    main()
