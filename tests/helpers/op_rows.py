"""One small call of every public op, with its differentiable inputs apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastrl import ops
from fastrl.kernels.rope import rope_tables

T, D, V, H, K, E = 9, 8, 11, 4, 2, 6
CU = torch.tensor([0, 4, T], dtype=torch.int32)
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class OpRow:
    """`call(*leaves)` gives a tuple of outputs.

    shapes      of the leaves; T is their first size
    gradients   whether the outputs are differentiable in all leaves
    product     whether autocast lowers the inputs, as it does those of torch's own products
    """

    call: Callable[..., Outputs]
    shapes: tuple[tuple[int, ...], ...]
    gradients: bool = True
    product: bool = False

    def leaves(self, rows: int = T, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Values of one seed, without requires_grad."""
        torch.manual_seed(3)
        shapes = [(rows if s[0] == T else s[0], *s[1:]) for s in self.shapes]
        return [torch.randn(s).to(dtype) for s in shapes]


def _ends(rows: int) -> Tensor:
    return CU if rows == T else torch.tensor([0, rows], dtype=torch.int32)


def _ids(rows: int, n: int) -> Tensor:
    return torch.arange(rows) * 7 % n


def _token_logp(logits: Tensor) -> Outputs:
    return tuple(ops.token_logp(logits, _ids(len(logits), V), entropy=True)[:2])


def _selective(logits: Tensor) -> Outputs:
    return (ops.selective_log_softmax(logits, _ids(len(logits), V)),)


def _linear_logp(hidden: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    target = _ids(len(hidden), V)
    return tuple(ops.linear_logp(hidden, weight, target, bias=bias, entropy=True, temperature=0.7)[:2])


def _loss(logp: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
    return (entropy * 0.3 - logp * (1 + rows)).sum()


def _linear_loss(level: str, hidden: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    target = _ids(len(hidden), V)
    return (ops.linear_loss(hidden, weight, target, _loss, bias=bias, entropy=True, level=level)[0],)


def _cross_entropy(options: dict[str, object], hidden: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    target = _ids(len(hidden), V)
    if len(target):
        target[2] = -100
    return (ops.linear_cross_entropy(hidden, weight, target, bias=bias, **options),)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    return (ops.linear(x, weight, bias),)


def _policy(options: dict[str, object], logp: Tensor, entropy: Tensor) -> Outputs:
    n = len(logp)
    fixed = torch.linspace(-2, 1, n)
    loss, _ = ops.policy_loss(
        logp,
        logp.detach() * 0.9,
        fixed.sin(),
        token_weight=torch.full((n,), 0.1),
        entropy=entropy,
        entropy_coef=0.01,
        kl="k3",
        kl_coef=0.1,
        ref_logp=fixed,
        cu_seqlens=_ends(n),
        **options,
    )
    return (loss,)


def _rms_norm(x: Tensor, weight: Tensor) -> Outputs:
    return (ops.rms_norm(x, weight),)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Outputs:
    return ops.rms_norm(x, weight, residual=residual)


def _swiglu(x: Tensor) -> Outputs:
    return (ops.swiglu(x),)


def _rope(q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor) -> Outputs:
    cos, sin = rope_tables(E, 1e4, None, 32, torch.float32, "cpu")
    return ops.rope(q, k, _ids(len(q), 32), cos, sin, q_norm=q_norm, k_norm=k_norm)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return (ops.attention(q, k, v, _ends(len(q))),)


def _prefix(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return (ops.attention(q, k, v, _ends(len(q)), cu_seqlens_k=_ends(len(q))),)


def _decode(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    table = torch.tensor([[0, 1]], dtype=torch.int32)
    lengths = torch.arange(1, len(q) + 1, dtype=torch.int32).clamp(max=8)
    return (ops.decode_attention(q, k, v, table, lengths, rows=torch.zeros(len(q), dtype=torch.int64)),)


def _gae(reward: Tensor, value: Tensor) -> Outputs:
    return tuple(ops.gae(reward, value, _ends(len(reward)), gamma=0.99, lam=0.95))


def _group_advantage(reward: Tensor) -> Outputs:
    return (ops.group_advantage(reward, _ids(len(reward), 3)),)


def _sample(options: dict[str, object], logits: Tensor) -> Outputs:
    n = torch.arange(len(logits))
    drawn = ops.sample(logits, seed=5, sequence=n, position=n, temperature=0.8, **options)
    return (drawn.token.double(), drawn.logp, drawn.behaviour_logp, drawn.entropy)


def _perturb_init(embeds: Tensor) -> Outputs:
    ends = _ends(len(embeds))
    return (ops.perturb_init(embeds, radius=0.5, norm="l2", scope="sequence", seed=3, cu_seqlens=ends),)


def _perturb_step(norm: str, delta: Tensor, grad: Tensor) -> Outputs:
    start = delta.detach().float().clone()
    return (ops.perturb_step(start, grad, step_size=0.3, radius=0.5, norm=norm),)


HEAD = ((T, D), (V, D), (V,))
ROWS = {
    "token_logp": OpRow(_token_logp, ((T, V),)),
    "selective_log_softmax": OpRow(_selective, ((T, V),)),
    "linear": OpRow(_linear, HEAD, product=True),
    "linear_logp": OpRow(_linear_logp, HEAD, product=True),
    "linear_loss": OpRow(partial(_linear_loss, "token"), HEAD, product=True),
    "linear_loss sequence": OpRow(partial(_linear_loss, "sequence"), HEAD, product=True),
    "linear_cross_entropy": OpRow(partial(_cross_entropy, {}), HEAD, product=True),
    "linear_cross_entropy none": OpRow(partial(_cross_entropy, {"reduction": "none"}), HEAD, product=True),
    "linear_cross_entropy all": OpRow(
        partial(
            _cross_entropy, {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.01, "logits_bytes": 200}
        ),
        HEAD,
        product=True,
    ),
    "policy_loss": OpRow(partial(_policy, {"surrogate": "clip"}), ((T,), (T,))),
    "policy_loss sequence": OpRow(partial(_policy, {"surrogate": "sapo", "ratio": "sequence"}), ((T,), (T,))),
    "rms_norm": OpRow(_rms_norm, ((T, D), (D,))),
    "rms_norm residual": OpRow(_add_rms_norm, ((T, D), (T, D), (D,))),
    "swiglu": OpRow(_swiglu, ((T, 2 * D),)),
    "rope": OpRow(_rope, ((T, H, E), (T, K, E), (E,), (E,))),
    "attention": OpRow(_attention, ((T, H, E), (T, K, E), (T, K, E)), product=True),
    "attention prefix": OpRow(_prefix, ((T, H, E), (T, K, E), (T, K, E)), gradients=False, product=True),
    "decode_attention": OpRow(_decode, ((T, H, E), (2, 4, K, E), (2, 4, K, E)), gradients=False),
    "gae": OpRow(_gae, ((T,), (T,)), gradients=False),
    "group_advantage": OpRow(_group_advantage, ((T,),), gradients=False),
    "sample": OpRow(partial(_sample, {}), ((T, V),), gradients=False),
    "sample filtered": OpRow(partial(_sample, {"top_p": 0.8, "top_k": 5}), ((T, V),), gradients=False),
    "perturb_init": OpRow(_perturb_init, ((T, D),), gradients=False),
    "perturb_step": OpRow(partial(_perturb_step, "l2"), ((T, D), (T, D)), gradients=False),
    "perturb_step l1": OpRow(partial(_perturb_step, "l1"), ((T, D), (T, D)), gradients=False),
}
