"""The compiled kernels (csrc/): raw addresses, sizes, strides in elements.  Call them through fastrl.ops.

An address of 0 means absent; `code` is 0 for fp32 and 1 for bf16; the last argument is a thread count (cpu) or a stream (cuda).
The *_cuda functions exist only where the module was built with nvcc.
"""

def token_logp_forward_cpu(
    logits: int,
    code: int,
    stride: int,
    target: int,
    temperature: int,
    logp: int,
    entropy: int,
    m: int,
    log_s: int,
    T: int,
    V: int,
    threads: int,
    /,
) -> None: ...
def token_logp_backward_cpu(
    out: int,
    out_stride: int,
    logits: int,
    code: int,
    stride: int,
    target: int,
    temperature: int,
    dlogp: int,
    dentropy: int,
    entropy: int,
    m: int,
    log_s: int,
    T: int,
    V: int,
    threads: int,
    /,
) -> None: ...
def token_logp_forward_cuda(
    logits: int,
    code: int,
    stride: int,
    target: int,
    temperature: int,
    logp: int,
    entropy: int,
    m: int,
    log_s: int,
    T: int,
    V: int,
    stream: int,
    /,
) -> None: ...
def token_logp_backward_cuda(
    out: int,
    out_stride: int,
    logits: int,
    code: int,
    stride: int,
    target: int,
    temperature: int,
    dlogp: int,
    dentropy: int,
    entropy: int,
    m: int,
    log_s: int,
    T: int,
    V: int,
    stream: int,
    /,
) -> None: ...
def policy_loss_cpu(
    logp: int,
    entropy: int,
    old_logp: int,
    advantage: int,
    weight: int,
    ref_logp: int,
    correction: int,
    mask: int,
    ends: int,
    S: int,
    loss: int,
    metrics: int,
    dlogp: int,
    dentropy: int,
    surrogate: int,
    params: tuple[float, ...],
    kl: int,
    kl_coef: float,
    entropy_coef: float,
    T: int,
    threads: int,
    /,
) -> None: ...
def cpu_isa() -> str:
    """The instruction set the CPU kernels use: the best there is, or FASTRL_CPU_ISA."""

def cpu_isas() -> list[str]:
    """Those this processor has, slowest first, out of baseline, avx2, avx512."""

def threads_from() -> str:
    """File of the OpenMP runtime shared with torch; empty where the kernels run on one thread."""
