"""token_logp's compiled kernels, csrc/cpu and csrc/cuda: they take addresses, sizes and strides, and do the
arithmetic of the op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl.kernels._backend import COMPILED_ONLY, extension, register, unbuilt
from fastrl.kernels._launch import FLOAT_CODES, row_layout, unit_rows

Stats = tuple[Tensor, Tensor, Tensor, Tensor]


def context(x: Tensor) -> int:
    """What a compiled kernel runs under: torch's thread count on CPU, the stream of the tensor's own device
    on CUDA.
    """
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else torch.get_num_threads()


def _outputs(logits: Tensor, T: int, entropy: bool) -> Stats:
    logp, m, log_s = (torch.empty(T, dtype=torch.float32, device=logits.device) for _ in range(3))
    return logp, torch.empty(T if entropy else 0, dtype=torch.float32, device=logits.device), m, log_s


def _addresses(*tensors: Tensor) -> list[int]:
    """Where each is; 0 for an empty one, which is how an absent one looks."""
    return [x.data_ptr() if x.numel() else 0 for x in tensors]


def _out(out: Tensor, device: str) -> tuple[int, ...]:
    """The gradient's address and strides; on CUDA also its type, which may be narrower than the logits'."""
    _, batch, row = row_layout(out)
    return (out.data_ptr(), *((FLOAT_CODES[out.dtype],) if device == "cuda" else ()), batch, row)


def parts(device: str) -> dict[str, Any]:
    """The implementations over fastrl._C's functions for `device`, "cpu" or "cuda"."""

    def call(name: str, *arguments: int) -> None:
        getattr(extension(), f"token_logp_{name}_{device}")(*arguments)

    def forward(logits: Tensor, target: Tensor, temperature: Tensor, entropy: bool) -> Stats:
        logits, target = unit_rows(logits), target.long().contiguous()
        stats = _outputs(logits, target.shape[0], entropy)
        rows = (logits.data_ptr(), FLOAT_CODES[logits.dtype], *row_layout(logits))
        call(
            "forward",
            *rows,
            *_addresses(target, temperature, *stats),
            target.shape[0],
            logits.shape[-1],
            context(logits),
        )
        return stats

    def backward(dlogp: Tensor, dentropy: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        return backward_into(out, dlogp, dentropy, logits, *rest)

    def backward_into(out: Tensor, dlogp: Tensor, dentropy: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
        if out.stride(-1) != 1:  # in place over logits whose rows are not contiguous
            return out.copy_(backward(dlogp, dentropy, logits, *rest))
        logits = unit_rows(logits)
        target, temperature, entropy, m, log_s = rest
        target, dlogp, dentropy = (
            target.long().contiguous(),
            dlogp.float().contiguous(),
            dentropy.float().contiguous(),
        )
        rows = (*_out(out, device), logits.data_ptr(), FLOAT_CODES[logits.dtype], *row_layout(logits))
        vectors = _addresses(target, temperature, dlogp, dentropy, entropy, m, log_s)
        call("backward", *rows, *vectors, target.shape[0], logits.shape[-1], context(logits))
        return out

    def fused_into(
        out: Tensor, logits: Tensor, target: Tensor, temperature: Tensor, dlogp: Tensor, dentropy: Tensor
    ) -> Stats:
        limit = (
            extension().token_logp_fused_limit(FLOAT_CODES[logits.dtype])
            if device == "cuda"
            else logits.shape[-1]
        )
        # two kernels, for a row that does not fit a cluster of multiprocessors
        if logits.stride(-1) != 1 or logits.shape[-1] > limit:
            stats = forward(logits, target, temperature, dentropy.numel() > 0)
            backward_into(out, dlogp, dentropy, logits, target, temperature, *stats[1:])
            return stats
        target, dlogp, dentropy = (
            target.long().contiguous(),
            dlogp.float().contiguous(),
            dentropy.float().contiguous(),
        )
        stats = _outputs(logits, target.shape[0], dentropy.numel() > 0)
        rows = (
            *(_out(out, device) if device == "cuda" else ()),
            logits.data_ptr(),
            FLOAT_CODES[logits.dtype],
            *row_layout(logits),
        )
        vectors = _addresses(target, temperature, dlogp, dentropy, *stats)
        call("fused", *rows, *vectors, target.shape[0], logits.shape[-1], context(logits))
        return stats

    return {
        "forward": forward,
        "backward": backward,
        "backward_into": backward_into,
        "fused_into": fused_into,
    }


def register_compiled() -> None:
    """Offer what fastrl._C was built with; the CUDA kernels have not run on a GPU."""
    for device, note in (("cpu", ""), ("cuda", COMPILED_ONLY)):
        missing = unbuilt(f"token_logp_forward_{device}")
        exact = ("cpu",) if device == "cpu" else ()
        register(
            "token_logp",
            device,
            dtypes=tuple(FLOAT_CODES),
            note=note,
            missing=missing,
            exact=exact,
            **parts(device),
        )
