"""The widths of a model that its kernels are compiled for."""

from __future__ import annotations

from fastrl.kernels._verdicts.case import Widths
from fastrl.model.config import ModelConfig
from fastrl.model.language import LanguageConfig


def kernel_widths(config: LanguageConfig, page: int) -> Widths:
    """The widths of a model whose cache has pages of `page` tokens."""
    if not isinstance(config, ModelConfig):  # transformers runs its layers
        return Widths(D=config.hidden_size, V=config.vocab_size)
    return Widths(
        D=config.hidden_size,
        F=config.intermediate_size,
        H=config.num_attention_heads,
        K=config.num_key_value_heads,
        E=config.head_dim,
        page=page,
        V=config.vocab_size,
    )
