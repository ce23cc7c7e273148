"""Implementations of other projects that several benchmarks time: from logits, and from hidden states."""

from __future__ import annotations

from torch import Tensor

from fastrl.bench.common import BOTH, Case, Function, Unavailable, only, peer


def trl_from_logits(case: Case) -> Function:
    """Log-prob and entropy of TRL: its Triton kernel on CUDA, its PyTorch functions elsewhere."""
    try:
        both = peer("trl.trainer.utils", "selective_log_softmax_and_entropy")
    except Unavailable:  # older releases have two functions
        logp = peer("trl.trainer.utils", "selective_log_softmax")
        entropy = peer("trl.trainer.utils", "entropy_from_logits")
        return lambda logits, target: (logp(logits, target), entropy(logits))
    return lambda logits, target: both(logits, target)


def trl_chunked(case: Case) -> Function:
    """(hidden, weight, target) -> log-prob, entropy, by TRL's autograd function over chunks of the
    vocabulary.

    The chunk size is that of its trainers.
    """
    function = peer("trl.trainer.utils", "_ChunkedLogProbFunction")
    size = peer("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")

    def call(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logp, entropy, *_ = function.apply(hidden, weight, None, target, 1.0, size, None, 1.0, ("entropy",))
        return logp, entropy

    return call


def quack_from_logits(case: Case) -> Function:
    """QuACK's one-read cross-entropy: the log-prob alone."""
    only(case.device == "cuda", "QuACK's kernels are for Hopper and newer")
    fused = peer("quack.cross_entropy", "cross_entropy")
    return lambda logits, target: -fused(logits, target, reduction="none")


def flash_attn_from_logits(case: Case) -> Function:
    """flash-attn's Triton cross-entropy: the log-prob alone."""
    only(case.device == "cuda", "flash-attn's kernel is Triton: CUDA only")
    fused = peer("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    return lambda logits, target: -fused(logits, target)[0]


def quack_linear(case: Case) -> Function:
    """QuACK's chunked linear cross-entropy, mean."""
    only(case.device == "cuda", "QuACK's kernels are for Hopper and newer")
    fused = peer("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda hidden, weight, target: fused(hidden, weight, target)


def cut_cross_entropy(case: Case) -> Function:
    """Apple's: its Triton kernel on CUDA, the torch.compile form it falls back to elsewhere."""
    fused = peer("cut_cross_entropy", "linear_cross_entropy")
    form = {} if case.device == "cuda" else {"impl": "torch_compile"}
    return lambda hidden, weight, target: fused(hidden, weight, target, **form)


def liger_from_logits(case: Case) -> Function:
    """Liger's Triton log-prob of all rows but the last, which it skips; without entropy or backward."""
    only(case.device == "cuda", "Liger's kernel is Triton: CUDA only")
    only(case.mode != BOTH, "Liger's fused_selective_log_softmax has no backward")
    logp = peer("liger_kernel.ops.grpo_loss", "fused_selective_log_softmax")
    return lambda logits, target: logp(logits[None], target[None, :-1], 1.0)[0]
