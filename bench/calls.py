"""Calls of every op that has a Triton implementation: all that their launches can be compiled for.

A block is a function and the values each of its arguments takes; its calls are all combinations that
`possible` lets through.  Values are chosen for what a launch is specialised by: dtypes, which optional inputs
are there, sizes and strides that are multiples of 16 and sizes that are not, tiles of every size.  Contents
do not matter: nothing runs but torch's own ops between two launches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastrl import ops
from fastrl.kernels._backend import exact, pick

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
NARROWED = ((FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16), (FP32, FP16))  # of logits, of gradients
EITHER = (False, True)
WIDE, ODD = 8192, 8191  # vocabularies that stand for 151936 and 50257
VOCABULARIES = ((WIDE, WIDE), (ODD, ODD), (ODD, WIDE), (200, 200))  # columns, and from one row to the next

T = TypeVar("T")
Given = dict[str, Any]
Axes = dict[str, tuple[Any, ...]]
Blocks = Iterator["Block"]


def anything(given: Given) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    function: Callable[..., Any]
    axes: Axes  # argument -> its values
    possible: Callable[[Given], bool] = anything
    wide: bool = False  # sizes, strides and addresses allow 16-byte accesses
    grads: tuple[str, ...] = ()  # arguments whose gradient is taken

    def calls(self) -> Iterator[Given]:
        """The arguments of each call."""
        for values in itertools.product(*self.axes.values()):
            given = dict(zip(self.axes, values, strict=True))
            if self.possible(given):
                yield given

    def run(self, given: Given) -> None:
        """One call, and its backward."""
        leaves = {n: _parameter(given[n]) for n in self.grads if given.get(n) is not None}
        found = self.function(**given | leaves)
        outputs = [x for x in _tensors(found) if x.requires_grad]
        if outputs:
            torch.autograd.backward([x.sum() for x in outputs])


def _parameter(x: Tensor) -> Tensor:
    """It requires grad and is not a leaf, as the results of a model, and has the strides of `x`."""
    leaf = x.detach().requires_grad_()
    return leaf.view_as(leaf)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict | tuple | list):
        for part in x.values() if isinstance(x, dict) else x:
            yield from _tensors(part)


def once_in_fp16(cases: Sequence[T]) -> Iterator[tuple[torch.dtype, T]]:
    """Every case in fp32 and bf16, and the first in fp16, whose code is that of bf16 but for conversions."""
    yield from itertools.product((FP32, BF16), cases)
    yield FP16, cases[0]


def zeros(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def ints(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def flags(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def apart(T: int, V: int, stride: int, dtype: torch.dtype) -> Tensor:
    """(T, V) whose rows are `stride` elements apart."""
    return torch.zeros(T, stride, dtype=dtype)[:, :V]


# --- the vocabulary ---------------------------------------------------------------------------------
def token_logp() -> Blocks:
    for dtype, (V, stride) in once_in_fp16(VOCABULARIES):
        yield Block(
            function=ops.token_logp,
            axes={
                "logits": (apart(3, V, stride, dtype),),
                "target": (ints(3),),
                "temperature": (1.0, torch.ones(3)),
                "entropy": EITHER,
                "inplace_backward": EITHER,
            },
            grads=("logits",),
            wide=V == WIDE,  # a gradient of its own has no padded rows
        )
    padded = (zeros(2, 5, ODD)[:, :-1], zeros(2, 5, WIDE, dtype=BF16)[:, :-1], zeros(2, 4, WIDE + 1)[..., 1:])
    axes = {"logits": padded, "target": (ints(2, 4),), "entropy": (True,)}
    yield Block(function=ops.token_logp, axes=axes, grads=("logits",))
    for (dtype, to), (V, stride) in itertools.product(NARROWED, VOCABULARIES):
        if dtype != to and stride not in (WIDE, ODD):
            continue
        x = apart(3, V, stride, dtype)
        over = x if dtype == to else x.view(to)[:, :V]
        axes = {"out": (over,), "logits": (x,), "entropy": EITHER}
        for function in (_fused_into, _backward_into):
            yield Block(function=function, axes=axes, wide=stride == WIDE)


def _fused_into(out: Tensor, logits: Tensor, entropy: bool) -> None:
    one = torch.ones(3)
    pick("token_logp", logits, "fused_into")(out, logits, ints(3), one, one, one if entropy else one[:0])


def _backward_into(out: Tensor, logits: Tensor, entropy: bool) -> None:
    one = torch.ones(3)
    h = one if entropy else one[:0]
    pick("token_logp", logits, "backward_into")(out, one, h, logits, ints(3), one, h, one, one)


def linear_cross_entropy() -> Blocks:
    for dtype, V in once_in_fp16((WIDE, ODD, 200)):
        yield Block(
            function=ops.linear_cross_entropy,
            axes={
                "hidden": (zeros(2, 16, dtype=dtype),),
                "weight": (zeros(V, 16, dtype=dtype),),
                "target": (ints(2),),
                "bias": (None, zeros(V, dtype=dtype)),
                "mask": (None, flags(2)),
                "reduction": ("mean", "none"),
                "label_smoothing": (0.0, 0.1),
                "softcap": (None, 30.0),
                "z_loss": (0.0, 1e-4),
                "logits_dtype": (FP32, dtype),
            },
            grads=("hidden", "weight"),
            wide=V == WIDE,
            possible=_simple,
        )
    for dtype in (FP32, BF16):  # on CUDA the rows of odd vocabularies are padded
        over = apart(2, ODD, WIDE, dtype)
        axes = {
            "out": (over, over.view(BF16)[:, :ODD]),
            "logits": (over,),
            "smoothing": (0.0, 0.1),
            "cap": (0.0, 30.0),
        }
        yield Block(function=_cross_entropy_into, axes=axes)


def _simple(given: Given) -> bool:
    """Bias and mask do not reach the kernels: one call with each is enough."""
    extra = given["bias"] is not None, given["mask"] is not None, given["reduction"] != "mean"
    return not any(extra) or (given["softcap"] is None and not given["label_smoothing"] and all(extra))


def _cross_entropy_into(out: Tensor, logits: Tensor, smoothing: float, cap: float) -> None:
    part = pick("linear_cross_entropy", logits, "fused_into")
    part(out, logits, ints(2), torch.ones(2), smoothing, cap, 0.0)


def linear_logp() -> Blocks:
    for dtype, D, V in itertools.product(DTYPES, (64, 1600), (4096, ODD)):
        yield Block(
            function=ops.linear_logp,
            axes={
                "hidden": (zeros(2, D, dtype=dtype),),
                "weight": (zeros(V, D, dtype=dtype),),
                "target": (ints(2),),
                "bias": (None, zeros(V, dtype=dtype)),
                "temperature": (1.0, torch.ones(2)),
                "entropy": EITHER,
                "logits_dtype": (FP32, dtype),
            },
            possible=lambda given: isinstance(given["temperature"], float) or given["bias"] is None,
            grads=("hidden", "weight") if D == 64 else (),
            wide=V == 4096,
        )


def linear_loss() -> Blocks:
    for dtype, V in once_in_fp16((WIDE, ODD)):
        yield Block(
            function=ops.linear_loss,
            axes={
                "hidden": (zeros(2, 16, dtype=dtype),),
                "weight": (zeros(V, 16, dtype=dtype),),
                "target": (ints(2),),
                "loss": (_loss,),
                "mask": (None, flags(2)),
                "bias": (None, zeros(V, dtype=dtype)),
                "temperature": (1.0, torch.ones(2)),
                "entropy": EITHER,
                "logits_dtype": (FP32, dtype),
                "level": ("token", "sequence"),
            },
            possible=lambda given: (given["mask"] is None) == (given["bias"] is None),
            grads=("hidden", "weight"),
            wide=V == WIDE,
        )


def _loss(logp: Tensor, entropy: Tensor | None, rows: Tensor) -> Tensor:
    return -logp.sum() if entropy is None else (entropy - logp).sum()


def linear() -> Blocks:
    for dtype, (K, N) in itertools.product(DTYPES, ((64, 128), (40, 70), (37, 5))):
        axes = {
            "x": (zeros(5, K, dtype=dtype), zeros(5, K + 16, dtype=dtype)[:, :K]),
            "weight": (zeros(N, K, dtype=dtype),),
            "bias": (None, zeros(N, dtype=dtype)),
        }
        yield Block(function=ops.linear, axes=axes, grads=("x",), wide=K == 64)
        yield Block(function=_product, axes=axes, wide=K == 64)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Into float32, as the logits of exact mode."""
    out = zeros(x.shape[0], weight.shape[0])
    pick("linear", x, "into")(out, x, weight, weight.new_empty(0) if bias is None else bias)


def sample() -> Blocks:
    for dtype, V in once_in_fp16((151936, 50257, WIDE, 200)):
        yield Block(
            function=ops.sample,
            axes={
                "logits": (zeros(2, V, dtype=dtype),),
                "seed": (0, ints(2)),
                "sequence": (ints(2),),
                "position": (ints(2),),
                "temperature": (1.0, torch.ones(2)),
                "top_k": (0, 1, 16, 50),
                "top_p": (1.0, 0.9),
                "min_p": (0.0, 0.1),
            },
            possible=lambda given: isinstance(given["seed"], int) == isinstance(given["temperature"], float),
            wide=V in (151936, WIDE),
        )


def sample_exactly() -> Blocks:
    axes = {"logits": (zeros(2, WIDE), zeros(2, ODD)), "top_k": (0, 5)}
    yield Block(function=_sample_exactly, axes=axes)


def _sample_exactly(logits: Tensor, top_k: int) -> None:
    with exact():
        ops.sample(logits, seed=0, sequence=ints(2), position=ints(2), top_k=top_k)
