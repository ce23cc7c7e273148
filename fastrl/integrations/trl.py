"""TRL's trainers on our ops: patch() swaps TRL's functions from logits or hidden states to log-probs.

    from fastrl.integrations.trl import patched

    with patched():
        GRPOTrainer(...).train()

In TRL's loaded modules, every name that is bound to one of these functions is swapped, if the installed
version has it:

    selective_log_softmax                from logits                                 by ops.token_logp
    entropy_from_logits                  from logits                                 by ops.token_logp
    selective_log_softmax_and_entropy    from logits                                 by ops.token_logp
    _ChunkedLogProbFunction              from hidden states and the head's weight    by ops.linear_logp

TRL looks the functions up when it calls them, so that trainers made before patch() also run on our ops, and
unpatch() restores them.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrl import ops

__all__ = ["patch", "patched", "unpatch"]

_HOME = "trl.trainer.utils"  # the module of TRL that defines or collects these functions
_swapped: list[tuple[object, object]] = []  # (TRL's, ours), while patched


class AutogradFunction(Protocol):
    """TRL's `torch.autograd.Function`, or our stand-in."""

    def apply(self, *arguments: object) -> tuple[Tensor | None, ...]: ...


# --- from logits ------------------------------------------------------------------------------------
def _selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> Tensor:
    if index.shape == logits.shape[:-1]:
        return _stats(logits, index, temperature, row_mask, entropy=False)[0]
    return _masked(ops.selective_log_softmax(logits, index, temperature), row_mask)  # K tokens of each row


def _entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    any_token = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return _stats(logits, any_token, 1.0, None, entropy=True)[1]


def _selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    logp, entropy = _stats(logits, index, temperature, row_mask, entropy=True)
    return logp, entropy if entropy_requires_grad else entropy.detach()


def _stats(
    logits: Tensor,
    index: Tensor,
    temperature: float,
    row_mask: Tensor | None,
    *,
    entropy: bool,
) -> list[Tensor]:
    """Log-prob and, if asked for, entropy, shaped like index, in the dtype that TRL's function returns."""
    # 2-d and 3-d logits go in as they are: the views that TRL passes need no copy
    rows = logits if logits.ndim in (2, 3) else logits.reshape(-1, logits.shape[-1])
    stats = ops.token_logp(
        rows,
        index.reshape(rows.shape[:-1]),
        temperature=temperature,
        entropy=entropy,
    )

    # where TRL would use its fused loss kernel, its results are float32
    is_fused = getattr(importlib.import_module(_HOME), "_supports_trl_loss_kernel", None)
    dtype = logits.dtype
    if is_fused is not None and is_fused(logits, index, row_mask):
        dtype = torch.float32
    columns = [x for x in (stats.logp, stats.entropy) if x is not None]
    return [_masked(x.view(index.shape).to(dtype), row_mask) for x in columns]


def _masked(x: Tensor, row_mask: Tensor | None) -> Tensor:
    return x if row_mask is None else x.masked_fill(row_mask == 0, 0)


# --- from hidden states -----------------------------------------------------------------------------
_TAIL = ("temperature", "chunk_size", "final_logit_softcapping", "logit_scale")
_SIGNATURES = (  # the positional arguments of TRL's autograd function
    # TRL 1.15 and later: five results, None where not in `outputs`
    ("hidden", "weight", "bias", "targets", *_TAIL, "outputs"),
    ("last_hidden", "weight", "bias", "targets", *_TAIL),  # 1.13 and 1.14: log-prob and entropy
    ("last_hidden", "weight", "targets", *_TAIL),  # 1.5 to 1.12
)
_DEFAULTS = {
    "bias": None,
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "outputs": ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
}
_ONLY_TRL = ("log_sum_sq_probs", "is_top1")  # metrics without gradient that we leave to TRL's function


def _linear(trl: AutogradFunction, names: tuple[str, ...]) -> type:
    """A stand-in for TRL's autograd function with the arguments `names`."""

    def apply(*arguments: Any) -> tuple[Tensor | None, ...]:
        given = _DEFAULTS | dict(zip(names, arguments, strict=False))
        hidden, weight = arguments[:2]
        bias = given["bias"]
        outputs = given["outputs"]
        temperature = given["temperature"]
        logit_scale = given["logit_scale"]
        softcap = given["final_logit_softcapping"]
        logp, entropy = _linear_logp(
            hidden, weight, bias, given["targets"], temperature, softcap, logit_scale, "entropy" in outputs
        )
        if "outputs" not in names:
            return logp, entropy

        mean = None
        if "mean_logits" in outputs:
            mean = _mean_logits(hidden, weight, bias, logit_scale / temperature)
        rest = tuple(x for x in _ONLY_TRL if x in outputs)
        if not rest:
            return logp, entropy, None, mean, None
        with torch.no_grad():
            theirs = trl.apply(*(given[name] for name in names[:-1]), rest)
        return logp, entropy, theirs[2], mean, theirs[4]

    return type("ChunkedLogProbFunction", (), {"apply": staticmethod(apply), "__doc__": _linear.__doc__})


def _linear_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob and entropy in float32, as TRL returns them.

    Products are in the dtype that TRL's would have; logits stay in float32.
    """
    advice = "train this model with TRL unpatched"
    if softcap is not None:
        raise NotImplementedError(f"final_logit_softcapping: expected None, got {softcap}; {advice}")
    if not logit_scale > 0:
        raise NotImplementedError(f"logit_scale: expected a positive number, got {logit_scale}; {advice}")
    if hasattr(weight, "ds_id"):  # gathered now, but empty again when the backward needs it
        got = "one sharded by DeepSpeed ZeRO-3"
        raise NotImplementedError(f"weight: expected a whole head, got {got}; {advice}")

    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        stats = ops.linear_logp(
            hidden.to(dtype),
            weight.to(dtype),
            targets,
            bias=bias,
            temperature=temperature / logit_scale,
            entropy=entropy,
        )
    return stats.logp.float(), None if stats.entropy is None else stats.entropy.float()


@torch.no_grad()
def _mean_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Mean logit over the vocabulary; it is linear, so one vector product replaces all logits."""
    mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
    if bias is not None:
        mean = mean + bias.mean(dtype=torch.float32)
    return mean * scale


# --- the swap ---------------------------------------------------------------------------------------
_LOGITS: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
    "selective_log_softmax": _selective_log_softmax,
    "entropy_from_logits": _entropy_from_logits,
    "selective_log_softmax_and_entropy": _selective_log_softmax_and_entropy,
}
_LINEAR = "_ChunkedLogProbFunction"


def patch() -> None:
    """Make TRL's trainers compute log-probs and entropies with our ops, until unpatch(); idempotent.

    Raises:  ImportError when TRL is not installed, or its functions are not the ones this module knows.
    """
    if _swapped:
        return
    pairs = _pairs(_home())
    _replace(pairs)
    _swapped.extend(pairs)


def unpatch() -> None:
    """Restore TRL's own functions, also in modules that were loaded since patch(); idempotent."""
    _replace([(ours, trl) for trl, ours in _swapped])
    _swapped.clear()


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """patch() inside the `with` block; afterwards, also after an exception, TRL is as it was before."""
    outermost = not _swapped
    patch()
    try:
        yield
    finally:
        if outermost:
            unpatch()


def _home() -> ModuleType:
    try:
        return importlib.import_module(_HOME)
    except ModuleNotFoundError as error:
        if error.name == "trl":
            raise ImportError('TRL is not installed: pip install "fastrl-kernels[peers]"') from error
        raise


def _pairs(home: ModuleType) -> list[tuple[object, object]]:
    """(TRL's, ours) for every function that this version of TRL has."""
    theirs = {name: getattr(home, name, None) for name in (*_LOGITS, _LINEAR)}
    if theirs["selective_log_softmax"] is None:
        raise ImportError(
            f"{_HOME}: expected {', '.join(theirs)}; this version of TRL has no selective_log_softmax"
        )
    pairs: list[tuple[object, object]] = []
    for name, ours in _LOGITS.items():
        if theirs[name] is not None:
            pairs.append((theirs[name], ours))

    linear = theirs[_LINEAR]
    if linear is None:
        return pairs
    arguments = tuple(inspect.signature(linear.forward).parameters)[1:]  # without ctx
    if arguments not in _SIGNATURES:
        known = " or ".join(f"({', '.join(s)})" for s in _SIGNATURES)
        raise ImportError(
            f"{_HOME}.{_LINEAR}: expected the arguments {known}; "
            f"this version of TRL has ({', '.join(arguments)})"
        )
    return [*pairs, (linear, _linear(linear, arguments))]


def _replace(pairs: list[tuple[object, object]]) -> None:
    """Rebind every name in TRL's loaded modules from the first of a pair to the second."""
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.split(".")[0] != "trl":
            continue
        for name, value in list(vars(module).items()):
            for old, new in pairs:
                if old is value:
                    setattr(module, name, new)
