"""The decoder that the training and rollout benchmarks run: ours, and the same weights in transformers."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn

from fastrl.bench.common import Case, peer
from fastrl.model import Decoder


def ours(case: Case, dtype: torch.dtype | None = None) -> Decoder:
    """A Qwen2-like decoder of the case's L layers, width D, F, H heads of which K for keys, vocabulary V; always the same weights."""
    L, D, F, H, K, V = case.sizes("L D F H K V")
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": V, "hidden_size": D, "intermediate_size": F,
        "num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": K, "head_dim": D // H, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
    }  # fmt: skip
    return Decoder.from_config(config, dtype=dtype or getattr(torch, case.dtype), device=case.device, seed=0)


def theirs(case: Case) -> Any:
    """The same weights as a transformers model.  Raises Unavailable without transformers."""
    auto = peer("transformers", "AutoModelForCausalLM")
    peer("transformers.utils.logging", "disable_progress_bar")()
    with tempfile.TemporaryDirectory() as folder:
        ours(case).save_pretrained(folder)
        model = auto.from_pretrained(folder, dtype=getattr(torch, case.dtype))
    model = model.to(case.device)
    assert isinstance(model, nn.Module)
    return model


def parameters(case: Case) -> tuple[int, int]:
    """Parameters of the layers, and of the embedding (which is the head)."""
    L, D, F, H, K, V = case.sizes("L D F H K V")
    per_layer = 2 * D * D + 2 * D * K * (D // H) + 3 * D * F
    return L * per_layer, V * D
