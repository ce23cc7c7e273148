"""The critic: the reward still to be expected, from hidden states.  A head on the policy's, or a model of its
own.

Row t of packed hidden states has seen the tokens up to t: its value is that of the state after token t and
before token t + 1.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from fastrl.errors import UserError
from fastrl.model import weights
from fastrl.model.adapter import load_model
from fastrl.model.config import Settings, is_scoring, scoring_body
from fastrl.model.decoder import Decoder
from fastrl.model.folder import existing_folder
from fastrl.model.language import LanguageModel


class ValueHead(nn.Module):
    """weight (D,) and bias: value = hidden . weight + bias, in the reward's unit.  Zeros at first: a fresh
    critic expects nothing.

    fp32 whatever the hidden states are (float64 for those of a float64 model).
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        wide = torch.promote_types(dtype, torch.float32)
        self.weight = nn.Parameter(torch.zeros(width, dtype=wide, device=device))
        self.bias = nn.Parameter(torch.zeros((), dtype=wide, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N,)."""
        # summed row by row: a value does not depend on which rows are with it
        return (hidden.to(self.weight.dtype) * self.weight).sum(-1) + self.bias


class Critic(nn.Module):
    """A model without its language-model head, and a value head."""

    def __init__(self, body: LanguageModel, head: ValueHead) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Values after each token, (T,)."""
        values: Tensor = self.head(self.body(tokens, cu_seqlens))
        return values

    @classmethod
    def like(cls, model: LanguageModel) -> Self:
        """A critic that starts from a copy of the policy's weights."""
        return cls._around(copy.deepcopy(model))

    @classmethod
    def load(cls, name: str, policy: LanguageModel, *, trust: bool = False) -> Self:
        """A critic that starts from a folder: a causal language model, or a reward model of one label, with
        its head.

        Raises:  UserError for no folder, another architecture, more than one label, or a vocabulary or
                 context smaller than the policy's.
        """
        folder = str(existing_folder(name, "--critic-model", "a model's folder"))
        config = weights.read_config(Path(folder))
        if is_scoring(config):
            critic = cls._scoring(folder, config, policy)
        else:
            critic = cls._around(load_model(folder, policy.dtype, policy.device, trust=trust))
        critic.body.gradient_checkpointing = policy.gradient_checkpointing

        for name in ("vocab_size", "max_position_embeddings"):
            size, needed = getattr(critic.body.config, name), getattr(policy.config, name)
            if size < needed:
                raise UserError(
                    f"--critic-model: expected a {name} of at least the policy's {needed}, "
                    f"got {size} in {folder}"
                )
        return critic

    @classmethod
    def _around(cls, model: LanguageModel) -> Self:
        """A zero value head on this model.  An untied language-model head is dropped, or frozen where
        transformers needs it: no loss trains it.
        """
        if isinstance(model, Decoder):
            model.drop_head()
        elif not model.config.tie_word_embeddings:
            model.head_weight.requires_grad_(False)
        return cls(model, ValueHead(model.config.hidden_size, model.dtype, model.device))

    @classmethod
    def _scoring(cls, folder: str, config: Settings, policy: LanguageModel) -> Self:
        shape = scoring_body(config, f"--critic-model: {folder}")
        body = Decoder.empty(shape, policy.dtype, policy.device)
        critic = cls(body, ValueHead(shape.hidden_size, policy.dtype, policy.device))

        score = torch.empty(1, shape.hidden_size, dtype=critic.head.weight.dtype, device=policy.device)
        parameters = dict(body.named_parameters()) | {"score": score}
        layout = body.layout() | {"score": {"score.weight": 1}}
        weights.read(Path(folder), parameters, layout, tied=False)
        with torch.no_grad():
            critic.head.weight.copy_(score[0])
        return critic
