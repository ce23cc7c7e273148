"""sample on CPU: csrc/cpu/sample.cpp, which takes addresses, sizes and row strides."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import extension
from fastrl.kernels._launch import FLOAT_CODES, unit_rows


def forward(
    logits: Tensor,
    seed: Tensor,
    sequence: Tensor,
    position: Tensor,
    temperature: Tensor,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token, logp, behaviour_logp and entropy, each (B,)."""
    B, V = logits.shape
    logits = unit_rows(logits)
    inputs = tuple(x.contiguous() for x in (seed, sequence, position, temperature))

    token = torch.empty(B, dtype=torch.int64)
    logp, behaviour_logp, entropy = (torch.empty(B, dtype=torch.float32) for _ in range(3))
    outputs = (token, logp, behaviour_logp, entropy)

    extension().sample_forward_cpu(
        logits.data_ptr(),
        FLOAT_CODES[logits.dtype],
        logits.stride(0),
        *(x.data_ptr() for x in (*inputs, *outputs)),
        B,
        V,
        top_k,
        top_p,
        min_p,
        torch.get_num_threads(),
    )
    return outputs
