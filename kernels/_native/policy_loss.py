"""policy_loss on CPU: csrc/cpu/policy_loss.cpp, which takes addresses, all of fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import extension
from fastrl.kernels._policy_arguments import Columns, Options
from fastrl.kernels._policy_metrics import METRICS
from fastrl.kernels.surrogates import KLS, SURROGATES

KL_IDS = {name: i for i, name in enumerate(("", *KLS), -1)}  # enum Kl of csrc/cpu/policy_loss_rows.h


def forward(c: Columns, o: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), metrics (M,), d loss / d logp (T,) and d loss / d entropy (T,), empty without entropy."""
    c = Columns(*(x.contiguous() for x in c))
    sequence_ends = c.cu_seqlens.long() if o.ratio == "sequence" else c.cu_seqlens[:0]

    loss = c.logp.new_empty(())
    metrics = c.logp.new_empty(len(METRICS))
    dlogp = torch.empty_like(c.logp)
    dentropy = torch.empty_like(c.entropy)

    extension().policy_loss_cpu(
        *(x.data_ptr() for x in c[:-1]),
        sequence_ends.data_ptr(),
        sequence_ends.shape[0] - 1,
        loss.data_ptr(),
        metrics.data_ptr(),
        dlogp.data_ptr(),
        dentropy.data_ptr(),
        SURROGATES[o.surrogate].cpu_id,
        o.three_params,
        KL_IDS[o.kl],
        o.kl_coef,
        o.entropy_coef,
        c.logp.shape[0],
        torch.get_num_threads(),
    )
    return loss, metrics, dlogp, dentropy
