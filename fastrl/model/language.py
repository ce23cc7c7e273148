"""What fastrl asks of a model, as Protocols: `Decoder` and `Adapter` have them, and nothing else is assumed.

`Tokenizer` is exported here too, so that model and tokenizer come from one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn

from fastrl.data.tokenizer import Tokenizer

__all__ = [
    "Attend",
    "CachedModel",
    "LanguageConfig",
    "LanguageModel",
    "LayeredConfig",
    "Tokenizer",
    "has_cache",
]

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q (T, H, E), k (T, K, E), v (T, K, E)) -> (T, H, E).

With a method slab(layer) -> (k_cache, v_cache, slots), it finds each token's key and value there when it is
called: rope writes them in its own launch.  With a method paged(layer) -> Paged, it is the attention of one
new token per row over pages, which a layer may run in one call with everything else.
"""


class LanguageConfig(Protocol):
    """What samplers and trainers ask of any model's configuration; names are Hugging Face's."""

    @property
    def architecture(self) -> str:
        """The class in config.json."""

    @property
    def vocab_size(self) -> int:
        """V, rows of the head."""

    @property
    def hidden_size(self) -> int:
        """D, the width of the hidden states."""

    @property
    def max_position_embeddings(self) -> int:
        """The context: tokens of the longest sequence."""

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the head is the embedding."""

    @property
    def eos_token_id(self) -> tuple[int, ...]:
        """The end-of-sequence tokens."""


class LanguageModel(Protocol):
    """A causal language model on packed tokens: hidden states, and a head beside them.

    Logits are `model(tokens, cu_seqlens) @ head_weight.T + head_bias`.
    """

    gradient_checkpointing: bool

    @property
    def config(self) -> LanguageConfig:
        """The model's shape and its end-of-sequence tokens."""

    @property
    def supports_cache(self) -> bool:
        """Whether the model takes an `attend` with a key/value cache; if so it is a `CachedModel`."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' and the computation's dtype."""

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""

    @property
    def head_bias(self) -> Tensor | None:
        """(V,), or None."""

    @property
    def embed(self) -> Callable[[Tensor], Tensor]:
        """Tokens (T,) to their input embeddings (T, D)."""

    def __call__(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        attend: Attend | None = None,
        embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (T, D) of packed tokens (T,), as `Decoder.forward`."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Every parameter once."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, with its name."""

    def end_with(self, tokens: tuple[int, ...]) -> None:
        """Make these the end-of-sequence tokens, of sampling and of what is saved."""

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, *, max_shard_bytes: int = 5 << 30
    ) -> None:
        """Write a Hugging Face folder."""


class LayeredConfig(LanguageConfig, Protocol):
    """A configuration that also says how many keys and values a token has."""

    @property
    def num_hidden_layers(self) -> int:
        """L, layers."""

    @property
    def num_key_value_heads(self) -> int:
        """K, key/value heads."""

    @property
    def head_dim(self) -> int:
        """E, the width of a head."""


class CachedModel(LanguageModel, Protocol):
    """A language model that runs over a key/value cache."""

    @property
    def config(self) -> LayeredConfig:
        """The model's shape and its end-of-sequence tokens."""

    def __call__(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        attend: Attend | None = None,
        embeds: Tensor | None = None,
        max_seqlen: int | None = None,
        only_store: bool = False,
    ) -> Tensor:
        """Hidden states (T, D) of packed tokens (T,), as `Decoder.forward`."""


def has_cache(model: LanguageModel) -> TypeGuard[CachedModel]:
    """Whether the model runs over a key/value cache."""
    return model.supports_cache
