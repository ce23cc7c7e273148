"""token_logp on CPU and CUDA: csrc/cpu/token_logp.cpp and csrc/cuda/token_logp*.cu.

The compiled functions take addresses, sizes and strides.  Each is called for the device of its logits.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastrl.kernels._backend import extension
from fastrl.kernels._launch import FLOAT_CODES, address, row_layout, unit_rows

Stats = tuple[Tensor, Tensor, Tensor, Tensor]


def context(x: Tensor) -> int:
    """The thread count of torch on CPU; the current stream of the tensor's device on CUDA."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else torch.get_num_threads()


def _call(name: str, logits: Tensor, *arguments: int) -> None:
    function = getattr(extension(), f"token_logp_{name}_{logits.device.type}")
    function(*arguments, logits.shape[-1], context(logits))


def _new_stats(logits: Tensor, T: int, entropy: bool) -> Stats:
    device = logits.device
    logp, m, log_s = (torch.empty(T, dtype=torch.float32, device=device) for _ in range(3))
    h = torch.empty(T if entropy else 0, dtype=torch.float32, device=device)
    return logp, h, m, log_s


def _rows(logits: Tensor) -> tuple[int, ...]:
    """Address, dtype and layout of the rows of logits."""
    return (logits.data_ptr(), FLOAT_CODES[logits.dtype], *row_layout(logits))


def _gradient_rows(out: Tensor) -> tuple[int, ...]:
    """Address and strides of a gradient; on CUDA its dtype too, which may be narrower."""
    _, batch, row = row_layout(out)
    if out.is_cuda:
        return (out.data_ptr(), FLOAT_CODES[out.dtype], batch, row)
    return (out.data_ptr(), batch, row)


def forward(logits: Tensor, target: Tensor, temperature: Tensor, entropy: bool) -> Stats:
    """logp, entropy (empty unless asked for), m and log s, each (T,)."""
    logits = unit_rows(logits)
    target = target.long().contiguous()
    T = target.shape[0]
    stats = _new_stats(logits, T, entropy)

    vectors = [address(x) for x in (target, temperature, *stats)]
    _call("forward", logits, *_rows(logits), *vectors, T)
    return stats


def backward(dlogp: Tensor, dentropy: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
    """The gradient of the logits, in their dtype; `rest` is that of `backward_into`."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return backward_into(out, dlogp, dentropy, logits, *rest)


def backward_into(out: Tensor, dlogp: Tensor, dentropy: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
    """`backward`, written to `out`; `rest` is target, temperature, entropy, m and log s."""
    if out.stride(-1) != 1:  # in place over logits whose rows are not contiguous
        return out.copy_(backward(dlogp, dentropy, logits, *rest))
    logits = unit_rows(logits)
    target, temperature, entropy, m, log_s = rest
    target = target.long().contiguous()
    dlogp, dentropy = dlogp.float().contiguous(), dentropy.float().contiguous()

    vectors = [address(x) for x in (target, temperature, dlogp, dentropy, entropy, m, log_s)]
    _call("backward", logits, *_gradient_rows(out), *_rows(logits), *vectors, target.shape[0])
    return out


def fused_into(
    out: Tensor, logits: Tensor, target: Tensor, temperature: Tensor, dlogp: Tensor, dentropy: Tensor
) -> Stats:
    """The statistics of `forward`, and the gradient of the logits in `out`, from one read of the logits."""
    if not _fits_fused(logits):
        stats = forward(logits, target, temperature, dentropy.numel() > 0)
        backward_into(out, dlogp, dentropy, logits, target, temperature, *stats[1:])
        return stats
    target = target.long().contiguous()
    dlogp, dentropy = dlogp.float().contiguous(), dentropy.float().contiguous()
    T = target.shape[0]
    stats = _new_stats(logits, T, dentropy.numel() > 0)

    gradient = _gradient_rows(out) if logits.is_cuda else ()  # on CPU it is written over the logits
    vectors = [address(x) for x in (target, temperature, dlogp, dentropy, *stats)]
    _call("fused", logits, *gradient, *_rows(logits), *vectors, T)
    return stats


def _fits_fused(logits: Tensor) -> bool:
    """Whether one kernel does both directions; on CUDA a row must fit in a cluster of multiprocessors."""
    if logits.stride(-1) != 1:
        return False
    if logits.is_cuda:
        return logits.shape[-1] <= _fused_limit(logits.dtype, logits.device.index)
    return True


@functools.cache
def _fused_limit(dtype: torch.dtype, device: int) -> int:
    return int(extension().token_logp_fused_limit(FLOAT_CODES[dtype], device))
