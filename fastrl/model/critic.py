"""The critic: what reward is still to be expected, from hidden states.  A head on the policy's, or a decoder
of its own.

Row t of packed hidden states knows the tokens up to t: its value is that of the state after token t, and
before token t + 1.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastrl.errors import UserError
from fastrl.model import weights
from fastrl.model.adapter import load_model
from fastrl.model.config import architecture
from fastrl.model.decoder import Decoder, ModelConfig

CAUSAL, SCORING = "ForCausalLM", "ForSequenceClassification"


class ValueHead(nn.Module):
    """weight (D,) and bias: value = hidden . weight + bias, in the reward's unit; zeros at first, so that no
    value is invented.

    fp32 whatever the hidden states are (float64 for those of a float64 model).
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        wide = torch.promote_types(dtype, torch.float32)
        self.weight = nn.Parameter(torch.zeros(width, dtype=wide, device=device))
        self.bias = nn.Parameter(torch.zeros((), dtype=wide, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N,)."""
        # a row's value is the same whatever rows are with it
        return (hidden.to(self.weight.dtype) * self.weight).sum(-1) + self.bias


class Critic(nn.Module):
    """A model without its language-model head, and a value head."""

    def __init__(self, body: Any, head: ValueHead) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Values after each token, (T,)."""
        values: Tensor = self.head(self.body(tokens, cu_seqlens))
        return values

    @classmethod
    def like(cls, model: Any) -> Self:
        """One that starts from a copy of the policy's weights."""
        return cls._around(copy.deepcopy(model))

    @classmethod
    def load(cls, folder: str, policy: Any) -> Self:
        """One that starts from a folder: a causal language model, or a reward model of one label, whose head
        is taken over.

        Raises:  UserError for no folder, another architecture, more than one label, or a vocabulary or
                 context smaller than the policy's.
        """
        if not Path(folder).is_dir():
            raise UserError(f"--critic-model: expected a model's folder, got {folder}")
        config = weights.read_config(Path(folder))
        scoring = architecture(config).endswith(SCORING)
        critic = (
            cls._scoring(folder, config, policy)
            if scoring
            else cls._around(load_model(folder, policy.dtype, policy.device))
        )
        critic.body.gradient_checkpointing = policy.gradient_checkpointing
        for name in ("vocab_size", "max_position_embeddings"):
            mine, needed = getattr(critic.body.config, name), getattr(policy.config, name)
            if mine < needed:
                raise UserError(
                    f"--critic-model: expected a {name} of at least the policy's {needed}, "
                    f"got {mine} in {folder}"
                )
        return critic

    @classmethod
    def _around(cls, model: Any) -> Self:
        if not model.config.tie_word_embeddings:  # a head that nothing trains and nobody reads
            if isinstance(model, Decoder):
                del model.head
                model.config = replace(model.config, tie_word_embeddings=True)
            else:
                model.head_weight.requires_grad_(False)
        return cls(model, ValueHead(model.config.hidden_size, model.dtype, model.device))

    @classmethod
    def _scoring(cls, folder: str, config: dict[str, Any], policy: Any) -> Self:
        # transformers' own default is two
        labels = config.get("num_labels") or len(config.get("id2label") or (0, 1))
        if labels != 1:
            raise UserError(
                "--critic-model: expected a model of one label, whose score is a value; "
                f"{folder} has {labels}"
            )
        causal = architecture(config).removesuffix(SCORING) + CAUSAL
        typed = ModelConfig.from_dict(config | {"architectures": [causal], "tie_word_embeddings": True})
        body = Decoder._empty(typed, policy.dtype, policy.device)
        critic = cls(body, ValueHead(typed.hidden_size, policy.dtype, policy.device))
        row = torch.empty(1, typed.hidden_size, dtype=critic.head.weight.dtype, device=policy.device)
        parameters, layout = dict(body.named_parameters()), body.layout()
        weights.read(
            Path(folder), parameters | {"score": row}, layout | {"score": {"score.weight": 1}}, tied=False
        )
        with torch.no_grad():
            critic.head.weight.copy_(row[0])
        return critic
