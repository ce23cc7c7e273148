"""The public ops.  Re-exports only: each op's formula, reference, kernels and registration live in
fastrl/kernels/<op>.py.
"""

from fastrl.kernels._backend import backend, exact, implementations, use_backend
from fastrl.kernels.attention import attention
from fastrl.kernels.decode_attention import decode_attention
from fastrl.kernels.decoder_layer import layer_for as _layer_for  # noqa: F401  registers it among the others
from fastrl.kernels.gae import gae
from fastrl.kernels.group_advantage import group_advantage
from fastrl.kernels.linear import linear
from fastrl.kernels.linear_cross_entropy import linear_cross_entropy
from fastrl.kernels.linear_logp import linear_logp
from fastrl.kernels.linear_loss import linear_loss
from fastrl.kernels.perturb import perturb_init, perturb_step
from fastrl.kernels.policy_loss import SURROGATES, Surrogate, policy_loss
from fastrl.kernels.rms_norm import rms_norm
from fastrl.kernels.rope import rope
from fastrl.kernels.sample import sample
from fastrl.kernels.swiglu import swiglu
from fastrl.kernels.token_logp import TokenStats, selective_log_softmax, token_logp

__all__ = [
    "SURROGATES",
    "Surrogate",
    "TokenStats",
    "attention",
    "backend",
    "decode_attention",
    "exact",
    "gae",
    "group_advantage",
    "implementations",
    "linear",
    "linear_cross_entropy",
    "linear_logp",
    "linear_loss",
    "perturb_init",
    "perturb_step",
    "policy_loss",
    "rms_norm",
    "rope",
    "sample",
    "selective_log_softmax",
    "swiglu",
    "token_logp",
    "use_backend",
]
