"""The compiled kernels (csrc/): raw addresses, sizes, strides in elements.  Call them through fastrl.ops.

An address of 0 means absent; `code` is 0 for fp32 and 1 for bf16; the last argument is a thread count (cpu) or a stream (cuda).
The *_cuda functions exist only where the module was built with nvcc.
"""

def token_logp_forward_cpu(
    logits: int,
    code: int,
    L: int,
    batch: int,
    row: int,
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
    out_batch: int,
    out_row: int,
    logits: int,
    code: int,
    L: int,
    batch: int,
    row: int,
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
def token_logp_fused_cpu(
    logits: int,
    code: int,
    L: int,
    batch: int,
    row: int,
    target: int,
    temperature: int,
    dlogp: int,
    dentropy: int,
    logp: int,
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
    L: int,
    batch: int,
    row: int,
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
    out_code: int,
    out_batch: int,
    out_row: int,
    logits: int,
    code: int,
    L: int,
    batch: int,
    row: int,
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
def token_logp_fused_cuda(
    out: int,
    out_code: int,
    out_batch: int,
    out_row: int,
    logits: int,
    code: int,
    L: int,
    batch: int,
    row: int,
    target: int,
    temperature: int,
    dlogp: int,
    dentropy: int,
    logp: int,
    entropy: int,
    m: int,
    log_s: int,
    T: int,
    V: int,
    stream: int,
    /,
) -> None: ...
def token_logp_fused_limit(code: int, /) -> int:
    """The largest vocabulary of which a cluster of CTAs keeps a row on chip."""

def perturb_step_cpu(
    delta: int,
    delta_stride: int,
    grad: int,
    code: int,
    grad_stride: int,
    mask: int,
    ends: int,
    S: int,
    T: int,
    D: int,
    step_size: float,
    radius: float,
    norm: int,
    embeds: int,
    embeds_code: int,
    embeds_stride: int,
    out: int,
    out_code: int,
    out_stride: int,
    threads: int,
    /,
) -> None: ...
def perturb_init_cpu(
    delta: int, mask: int, ends: int, S: int, T: int, D: int, radius: float, norm: int, seed: int, threads: int, /
) -> None: ...
def sample_forward_cpu(
    logits: int,
    code: int,
    stride: int,
    seed: int,
    sequence: int,
    position: int,
    temperature: int,
    token: int,
    logp: int,
    behaviour_logp: int,
    entropy: int,
    B: int,
    V: int,
    top_k: int,
    top_p: float,
    min_p: float,
    threads: int,
    /,
) -> None: ...
def cpu_isa() -> str:
    """The instruction set the CPU kernels use: the best there is, or FASTRL_CPU_ISA."""

def cpu_isas() -> list[str]:
    """Those this processor has, slowest first, out of baseline, avx2, avx512."""

def threads_from() -> str:
    """File of the OpenMP runtime shared with torch; empty where the kernels run on one thread."""
