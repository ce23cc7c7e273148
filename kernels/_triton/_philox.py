"""Philox4x32-10 (see _philox.py) inside a Triton kernel: the four 32-bit words of a counter, bit for bit
those of `philox`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """The four uint32 words of each counter under each key; counters and keys are integers in [0, 2^32) of
    any type, and broadcast.
    """
    # tl.cast takes Python integers, too; tl.to_tensor came with Triton 3.7
    a, b = tl.cast(c0, tl.uint32), tl.cast(c1, tl.uint32)
    c, d = tl.cast(c2, tl.uint32), tl.cast(c3, tl.uint32)
    j, k = tl.cast(k0, tl.uint32), tl.cast(k1, tl.uint32)
    for _ in tl.static_range(10):
        x, y = a, c
        a = tl.umulhi(y, 0xCD9E8D57) ^ b ^ j
        b = tl.mul(y, 0xCD9E8D57, sanitize_overflow=False)
        c = tl.umulhi(x, 0xD2511F53) ^ d ^ k
        d = tl.mul(x, 0xD2511F53, sanitize_overflow=False)
        j = tl.add(j, 0x9E3779B9, sanitize_overflow=False)
        k = tl.add(k, 0xBB67AE85, sanitize_overflow=False)
    return a, b, c, d
