"""What the tests share: the fair numerical budget, tiny model configurations, the data beside the checkout,
implementations by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl import ops
from fastrl.kernels._backend import COMPILED_ONLY, EXACT_ONLY
from fastrl.kernels._budget import ULP, allowed_error, largest_error

__all__ = ["DATA", "ULP", "data_file", "no_waiting", "paged", "tiny_config", "use", "within_budget"]

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def within_budget(ours: Tensor, theirs: Tensor, truth: Tensor, *, factor: float = 1.5) -> None:
    """Ours may not be further from the float64 truth than PyTorch's own result in the same dtype, times
    `factor` plus one ulp.
    """
    ours, theirs, truth = ours.detach(), theirs.detach(), truth.detach().double()
    if not truth.numel():
        return
    error, budget = (largest_error(x, truth) for x in (ours, theirs))
    allowed = allowed_error(theirs, truth, ours.dtype, factor=factor)
    assert error <= allowed, (
        f"error {error:.3e} against float64, allowed {allowed:.3e} (PyTorch itself: {budget:.3e})"
    )


def data_file(*parts: str) -> Path:
    """A file of the data that lies beside the checkout; the test is skipped, visibly, where it does not."""
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not beside this checkout (expected in ../shared/data)")
    return path


def tiny_config(family: str = "qwen2", **changes: Any) -> dict[str, Any]:
    """The config.json of a decoder small enough for a test, as a Hugging Face dict."""
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[
        family
    ]
    config = {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    return config | changes


def paged(k: Tensor, v: Tensor, lengths: list[int], page: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed keys and values (T, K, E) spread over shuffled pages: caches, table, lengths.

    Unused table entries are out of range, unused slots hold large numbers.
    """
    pages = [-(-n // page) for n in lengths]
    free = torch.randperm(sum(pages) + 3).tolist()
    table = torch.full((len(lengths), max(pages) + 1), -7, dtype=torch.int32)
    caches = [torch.full((len(free), page, x.shape[1], x.shape[2]), 1e4, dtype=x.dtype) for x in (k, v)]
    start = 0
    for i, n in enumerate(lengths):
        for p in range(pages[i]):
            table[i, p] = free.pop()
            rows = slice(start + p * page, start + min(n, (p + 1) * page))
            for cache, x in zip(caches, (k, v), strict=True):
                cache[table[i, p], : rows.stop - rows.start] = x[rows]
        start += n
    return *caches, table, torch.tensor(lengths, dtype=torch.int32)


# --- implementations --------------------------------------------------------------------------------
def use(name: str, op: str) -> contextlib.AbstractContextManager[None]:
    """One implementation of an op, or a visible skip that says why it is not there."""
    state = ops.implementations()[op].get(name, "not written")
    if state not in ("ready", COMPILED_ONLY, EXACT_ONLY):
        pytest.skip(f"{op}: {name}: {state}")
    return ops.use_backend(name, op)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Any wait for the CUDA device is an error."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
