"""How many kernels a decode step launches with the Triton kernels: the nodes of its CUDA graph.

There is no CUDA here.  PyTorch's operations are counted by a dispatch mode, Triton's launches where the
interpreter would run them.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from support import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastrl import ops
from fastrl.kernels import _head, decoder_layer
from fastrl.model.decoder import Decoder
from fastrl.sampler.cache import PagedCache
from fastrl.sampler.state import State
from fastrl.sampler.step import DecodeStep

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU"
)

# what launches no kernel: views, allocations, and reads of a dtype
VIEWS = (
    *("view", "expand", "slice", "select", "t", "transpose", "permute", "unsqueeze", "squeeze", "detach"),
    *("alias", "as_strided", "split", "split_with_sizes", "chunk", "unbind", "reshape", "unflatten"),
    *("_unsafe_view", "_reshape_alias", "empty", "empty_like", "new_empty", "empty_strided", "promote_types"),
)
# the reference's look at its arguments, on CPU only
LOOKS = ("aminmax", "_local_scalar_dense")
STEP = ("rms_norm", "sample", "advance")
QWEN25_05B = {  # its layers and heads, at a fraction of its width
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "hidden_size": 112,
    "intermediate_size": 608,
    "head_dim": 8,
    "max_position_embeddings": 1024,
}


class Nodes(TorchDispatchMode):
    """Kernels of PyTorch by the name of their operation, and of Triton by their function's."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name not in VIEWS and name not in LOOKS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def nodes(monkeypatch):
    """What a step launches is written down, and not run; a bf16 head is one product into fp32, as on CUDA."""
    counted, run = Nodes(), interpreter.InterpretedFunction.run

    def launch(kernel: Any, *args: Any, **options: Any) -> None:
        counted.seen.append(kernel.fn.__name__)
        if kernel.fn.__module__.endswith(".newest"):  # its positions are looked at by rope's checks
            with _disable_current_modes():
                run(kernel, *args, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", launch)
    monkeypatch.setattr(_head, "_widened_product", lambda x, weight, dtype, out: torch.mm(x, weight.T))
    for name, module in list(sys.modules.items()):  # as without the mode
        if name.startswith("fastrl.kernels") and hasattr(module, "direct"):
            monkeypatch.setattr(module, "direct", lambda *tensors, differentiable=False: True)
    return counted


def launched(nodes: Nodes, b: int, backends: tuple[str, ...], **changes: Any) -> Counter[str]:
    """What a step of b rows launches with the Triton kernels of these ops."""
    model = Decoder.from_config(tiny_config("qwen2", **QWEN25_05B | changes), dtype=torch.bfloat16, seed=0)
    state = State(PagedCache(model, 8, 64), b, b, 900, torch.device("cpu"))
    step = DecodeStep(model, state)
    model.tables()  # once, not a step's
    nodes.seen.clear()
    with torch.no_grad(), ops.use_backend("triton", *backends), nodes:
        step(b, (0, 1.0, 0.0))
    return Counter(nodes.seen)


FUSED = (*STEP, "decoder_layer", *decoder_layer.OPS)


@pytest.mark.parametrize("b", [1, 16, 64, 256])
def test_a_step_of_24_layers_is_128_nodes(nodes, b):
    """Issue: at most 150.  Wrong: a cast, a copy or an index that is computed anew in each layer, or in each
    step where once a call is enough; the splits of attention added up in a launch of their own.
    """
    got = launched(nodes, b, FUSED)
    assert got == {
        "newest_kernel": 1,
        "forward_kernel": 2,  # the last norm, advance
        "embedding": 1,
        "enter_kernel": 1,
        "heads_kernel": 24,
        "split_kernel": 24,
        "residual_kernel": 48,
        "gated_kernel": 24,
        "mm": 1,  # the head
        "draw_kernel": 1,
        "combine_kernel": 1,  # of the draw
    }
    assert got.total() == 128


def test_a_layer_is_five_nodes_with_them_and_ten_without(nodes):
    """Wrong: the count of one layer, or of what surrounds the layers, hidden in that of the other."""
    unfused = (*STEP, *(op for op in decoder_layer.OPS if op != "linear"))
    for backends, each, around in ((FUSED, 5, 8), (unfused, 10, 7)):
        two, five = (launched(nodes, 8, backends, num_hidden_layers=L).total() for L in (2, 5))
        assert (five - two) / 3 == each and two - 2 * each == around
