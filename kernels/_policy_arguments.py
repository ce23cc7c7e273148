"""The arguments of policy_loss, checked and in one form: flat vectors of one dtype, empty where absent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels._check import FLOATS, INTS, compute_dtype, dims, one_of, same_device
from fastrl.kernels.surrogates import KLS, SURROGATES, Surrogate, name_of

RATIOS = ("token", "sequence")
PARAMS = 3  # parameters that a surrogate inside a kernel can have


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments that are not tensors."""

    surrogate: str  # empty for one that is not in the table
    params: tuple[float, ...]
    ratio: str
    kl: str  # empty for none
    kl_coef: float
    entropy_coef: float

    @property
    def three_params(self) -> tuple[float, ...]:
        """The parameters as the kernels take them: padded with 0."""
        return (*self.params, *(0.0,) * (PARAMS - len(self.params)))


class Columns(NamedTuple):
    """The (T,) vectors, and the (S+1,) ends where the ratio needs them; empty where absent."""

    logp: Tensor
    entropy: Tensor
    old_logp: Tensor
    advantage: Tensor
    weight: Tensor
    ref_logp: Tensor
    correction: Tensor
    mask: Tensor
    cu_seqlens: Tensor


def policy_arguments(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    *,
    surrogate: str | Surrogate,
    token_weight: Tensor,
    ratio: str = "token",
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    kl: str | None = None,
    kl_coef: float = 0.0,
    ref_logp: Tensor | None = None,
    correction: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Surrogate, Columns, Options]:
    """Check the arguments of `policy_loss`, and bring them into one form.

    Raises:  ValueError or TypeError naming the argument.
    """
    if isinstance(surrogate, str):
        one_of("surrogate", surrogate, SURROGATES)
    row = SURROGATES[surrogate] if isinstance(surrogate, str) else surrogate
    one_of("ratio", ratio, RATIOS)
    if kl is not None:
        one_of("kl", kl, KLS)
    _check(
        logp,
        mask,
        cu_seqlens,
        entropy=entropy,
        old_logp=old_logp,
        advantage=advantage,
        token_weight=token_weight,
        ref_logp=ref_logp,
        correction=correction,
    )
    _needs("kl_coef", kl_coef, kl=kl, ref_logp=ref_logp)
    _needs("entropy_coef", entropy_coef, entropy=entropy)

    dtype = compute_dtype(logp)
    none = logp.new_empty(0, dtype=dtype)
    columns = Columns(
        logp=_flat(logp, dtype, none),
        entropy=_flat(entropy, dtype, none),
        old_logp=_constant(old_logp, dtype, none),
        advantage=_constant(advantage, dtype, none),
        weight=_constant(token_weight, dtype, none),
        ref_logp=_constant(ref_logp, dtype, none),
        correction=_constant(correction, dtype, none),
        mask=_flat(mask, torch.bool, none),
        cu_seqlens=_sequence_ends(cu_seqlens, logp) if ratio == "sequence" else none,
    )

    name = (surrogate if isinstance(surrogate, str) else name_of(row)) or ""
    options = Options(
        surrogate=name,
        params=tuple(row.params[p] for p in SURROGATES[name].params) if name else (),
        ratio=ratio,
        kl=kl if kl and kl_coef else "",
        kl_coef=float(kl_coef),
        entropy_coef=float(entropy_coef),
    )
    return row, columns, options


def _flat(x: Tensor | None, dtype: torch.dtype, none: Tensor) -> Tensor:
    if x is None:
        return none
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.ndim == 1 else x.reshape(-1)


def _constant(x: Tensor | None, dtype: torch.dtype, none: Tensor) -> Tensor:
    return _flat(x.detach() if x is not None and x.requires_grad else x, dtype, none)


def _check(logp: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, **floats: Tensor | None) -> None:
    """Check shapes, dtypes and devices; correct arguments pass quickly, because small calls are frequent."""
    padded = isinstance(logp, Tensor) and logp.ndim == 2
    dims("logp", logp, "B L" if padded else "T", FLOATS)
    sizes = dict(zip("BL" if padded else "T", logp.shape, strict=True))
    for name, x in {**floats, "mask": mask}.items():
        if x is None:
            continue
        dtypes = (torch.bool,) if name == "mask" else FLOATS
        ok = isinstance(x, Tensor) and x.shape == logp.shape and x.dtype in dtypes
        if not ok:
            dims(name, x, " ".join(sizes), dtypes, **sizes)

    if any(x is not None and x.device != logp.device for x in (mask, cu_seqlens, *floats.values())):
        same_device(logp=logp, mask=mask, cu_seqlens=cu_seqlens, **floats)
    if padded and cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None with logp (B, L), whose rows are the sequences")


def _sequence_ends(cu_seqlens: Tensor | None, logp: Tensor) -> Tensor:
    """`cu_seqlens`, or the ends of the rows of (B, L)."""
    if logp.ndim == 2:
        return torch.arange(0, logp.numel() + 1, max(logp.shape[1], 1), device=logp.device)
    if cu_seqlens is None:
        raise ValueError(
            'cu_seqlens: expected (S+1,) ends of the sequences, got None; ratio="sequence" needs them'
        )
    dims("cu_seqlens", cu_seqlens, "S+1", INTS)
    return cu_seqlens


def _needs(coef: str, value: float, **others: object) -> None:
    for name, x in others.items():
        if value and x is None:
            raise ValueError(f"{name}: expected a value, got None; {coef}={value:g} needs it")
