"""A reward model: the decoder with a scalar head, read at the last token of a sequence or at the end of every
step.

Saved as a Hugging Face folder of ...ForSequenceClassification with one label, which transformers loads with
equal scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastrl.batch.pack import plan
from fastrl.data.comparisons import SEPARATOR, Group, Statement, encode_statements, pack
from fastrl.errors import UserError
from fastrl.files import shorten
from fastrl.model import weights
from fastrl.model.adapter import load_model
from fastrl.model.config import architecture
from fastrl.model.decoder import Decoder, ModelConfig

CAUSAL, SCORING = "ForCausalLM", "ForSequenceClassification"
HEAD_SEED = 30_000_001  # the head's own stream of random numbers: the decoder's begins at `seed`
TRAJECTORY: dict[
    str, Callable[[Tensor], float]
] = {  # how probabilities of a completion's steps become one number
    "min": lambda p: float(p.min()),
    "product": lambda p: float(p.log().sum().exp()),
    "last": lambda p: float(p[-1]),
}


class RewardModel(nn.Module):
    """A decoder without its language-model head, and `head` (1, D): reward = hidden state . head, no bias.

    steps      the separator between a completion's steps where the model judges each of them; None where it
               judges the whole
    tokenizer  what `score` reads text with; may be set later
    """

    supports_cache = False

    def __init__(self, body: Decoder, *, tied: bool, steps: str | None = None, tokenizer: Any = None) -> None:
        super().__init__()
        self.body, self.tied, self.steps, self.tokenizer = body, tied, steps, tokenizer
        self.head = nn.Parameter(
            torch.empty(1, body.config.hidden_size, dtype=body.dtype, device=body.device)
        )

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, at: Tensor | None = None) -> Tensor:
        """Rewards, (N,): at rows `at` (N,) of the packed tokens (T,), or at every sequence's last token.

        float32 whatever the model is kept in (float64 for a float64 model): a margin of rewards is a small
        difference of large sums.
        """
        at = cu_seqlens[1:].long() - 1 if at is None else at
        wide = torch.promote_types(self.dtype, torch.float32)
        return (self.body(tokens, cu_seqlens)[at].to(wide) * self.head.to(wide)).sum(-1)

    @torch.no_grad()
    def score(
        self,
        sequences: Sequence[Any],
        *,
        tokenizer: Any = None,
        max_tokens: int = 16384,
        trajectory: str = "min",
    ) -> list[float]:
        """The reward of every sequence: a list of token ids, a text, a list of chat messages, or a pair
        (prompt, completion) of those.

        Text is tokenised as in training, its end-of-sequence token included; token lists are taken as they
        are.  A model that judges steps gives its probabilities that they are right, as one number by
        `trajectory`, a row of TRAJECTORY.
        Memory:  `max_tokens` tokens of one forward pass.
        Raises:  UserError for a sequence that is empty, longer than the model's context, or text without a
                 tokenizer.
        """
        rewards = self.step_scores(sequences, tokenizer=tokenizer, max_tokens=max_tokens)
        if self.steps is None:
            return [float(r[0]) for r in rewards]
        if trajectory not in TRAJECTORY:
            raise UserError(f"trajectory: expected one of {', '.join(TRAJECTORY)}; got {trajectory!r}")
        return [TRAJECTORY[trajectory](r.double().sigmoid()) for r in rewards]

    @torch.no_grad()
    def step_scores(
        self, sequences: Sequence[Any], *, tokenizer: Any = None, max_tokens: int = 16384
    ) -> list[Tensor]:
        """Every sequence's rewards, (steps,) on the host, logits; one of them where the model judges whole
        sequences.
        """
        groups = self.groups(sequences, tokenizer)
        out: list[Tensor] = [torch.empty(0)] * len(groups)
        lengths = [g.length for g in groups]
        for some in plan(lengths, max(max_tokens, *lengths, 1)):
            packed = pack([groups[i] for i in some], self.device)
            rewards = self(packed.tokens, packed.cu_seqlens, packed.at).cpu()
            for i, own in zip(some, rewards.split([len(groups[i].target) for i in some]), strict=True):
                out[i] = own
        return out

    def groups(self, sequences: Sequence[Any], tokenizer: Any = None) -> list[Group]:
        """The tokens of every sequence to score, a group each.  Raises UserError as `score` does.

        Text that fills the context, as a completion cut off there does, has no room for its end-of-sequence
        token: it is read without.
        """
        tokenizer = tokenizer or self.tokenizer
        if isinstance(sequences, str):
            raise UserError(
                "sequences: expected a list of sequences, "
                f"got the text {shorten(sequences, 60)} alone; put it into a list"
            )
        made: list[Group | Statement] = [_read(i, s, self.steps) for i, s in enumerate(sequences)]
        texts = [m for m in made if isinstance(m, Statement)]
        if texts and tokenizer is None:
            raise UserError(
                f"{texts[0].where}: expected a list of token ids, "
                "because the reward model has no tokenizer; got text"
            )
        encoded = iter(encode_statements(texts, tokenizer, separator=self.steps or SEPARATOR))
        context, V = self.config.max_position_embeddings, self.config.vocab_size
        groups = [m if isinstance(m, Group) else _endless(next(encoded), context) for m in made]
        for g in groups:
            if g.length > context:
                raise UserError(f"{g.where}: {g.length} tokens, but the reward model's context has {context}")
            if not 0 <= min(g.tokens[0]) <= max(g.tokens[0]) < V:
                raise UserError(
                    f"{g.where}: expected token ids in [0, {V}), got {min(g.tokens[0])} to {max(g.tokens[0])}"
                )
        return groups

    # --- what trainers ask of any model ---
    @property
    def config(self) -> ModelConfig:
        """The decoder's configuration."""
        return self.body.config

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.body.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' and the computation's dtype; rewards are float32 at least."""
        return self.body.dtype

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the backward computes the layers again."""
        return self.body.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.body.gradient_checkpointing = on

    # --- making, loading, saving ---
    @classmethod
    def load(
        cls,
        source: str | Path | Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> Self:
        """A reward model's folder as it is; a causal language model (or a config.json: random weights) with a
        fresh head.

        The head is drawn from normal(0, 1/sqrt(D + 1)), by `seed` or torch's global generator.
        Raises:  UserError for another architecture, more than one label, and whatever `load_model` refuses.
        Source:  the head's scale: Stiennon et al. 2020 (arXiv 2009.01325).
        """
        folder = Path(source) if not isinstance(source, Mapping) and Path(source).is_dir() else None
        config = weights.read_config(folder) if folder else {}
        if folder and architecture(config).endswith(SCORING):
            return cls._trained(folder, config, dtype, device)
        body = load_model(source, dtype=dtype, device=device, seed=seed)
        if not isinstance(body, Decoder):
            raise UserError(
                "--model: expected a Llama, Qwen2 or Qwen3 to put a reward head on, "
                f"got {body.config.architecture}"
            )
        tied = body.config.tie_word_embeddings
        model = cls(_headless(body), tied=tied)
        fresh = int(torch.randint(2**62, ())) if seed is None else seed + HEAD_SEED
        generator = torch.Generator().manual_seed(fresh)
        with torch.no_grad():
            model.head.copy_(
                torch.randn(model.head.shape, generator=generator) * (body.config.hidden_size + 1) ** -0.5
            )
        return model

    @classmethod
    def _trained(
        cls, folder: Path, config: dict[str, Any], dtype: torch.dtype, device: torch.device | str
    ) -> Self:
        # transformers' own default is two
        labels = config.get("num_labels") or len(config.get("id2label") or (0, 1))
        if labels != 1:
            raise UserError(
                f"{folder}: expected a model of one label, whose score is the reward; "
                f"config.json has {labels}"
            )
        causal = architecture(config).removesuffix(SCORING) + CAUSAL
        typed = ModelConfig.from_dict(config | {"architectures": [causal], "tie_word_embeddings": True})
        body = Decoder._empty(typed, dtype, device)
        model = cls(
            body, tied=bool(config.get("tie_word_embeddings", False)), steps=config.get("step_separator")
        )
        model.read(folder)
        return model

    def read(self, folder: str | Path) -> None:
        """Fill the weights from the folder of a reward model of this shape.  Raises UserError as
        `weights.read` does.
        """
        weights.read(Path(folder), dict(self.named_parameters()), self.layout(), tied=False)

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, *, max_shard_bytes: int = 5 << 30
    ) -> None:
        """Write config.json and *.safetensors under Hugging Face's names, in `dtype` or the model's own.

        transformers reads a padded batch at the last token that is not pad_token_id: one that is the
        end-of-sequence token too is left out, so that it refuses to guess.
        """
        dtype, c = dtype or self.dtype, self.config
        own = c.to_dict() | {
            "tie_word_embeddings": self.tied,
            "architectures": [c.architecture.removesuffix(CAUSAL) + SCORING],
        }
        own |= {
            "num_labels": 1,
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "pad_token_id": self._padding(),
        }
        own |= {} if self.steps is None else {"step_separator": self.steps}
        weights.write_config(Path(folder), own, (), dtype)
        weights.write(Path(folder), dict(self.named_parameters()), self.layout(), dtype, max_shard_bytes)

    def layout(self) -> weights.Layout:
        """Each parameter's tensors in a Hugging Face file."""
        return {f"body.{name}": parts for name, parts in self.body.layout().items()} | {
            "head": {"score.weight": 1}
        }

    def _padding(self) -> int | None:
        """A token that no sequence ends in, to pad with."""
        ends = {*self.config.eos_token_id, getattr(self.tokenizer, "eos_token_id", None)}
        known = (getattr(self.tokenizer, "pad_token_id", None), self.config.extra.get("pad_token_id"))
        return next((p for p in known if p is not None and p not in ends), None)


def _headless(body: Decoder) -> Decoder:
    """The decoder without its language-model head, which would be trained by nothing."""
    if not body.config.tie_word_embeddings:
        del body.head
        body.config = replace(body.config, tie_word_embeddings=True)
    return body


def _endless(group: Group, context: int) -> Group:
    """The encoded sequence, without its last token where that alone exceeds the context."""
    (tokens,), (at,) = group.tokens, group.at
    return (
        group
        if len(tokens) != context + 1
        else replace(group, tokens=[tokens[:-1]], at=[[*at[:-1], context - 1]])
    )


def _read(i: int, sequence: Any, steps: str | None) -> Group | Statement:
    """A sequence to score; text is left to the tokenizer."""
    where = f"sequences[{i}]"
    if steps is None and isinstance(sequence, list) and all(isinstance(t, int) for t in sequence):
        if not sequence:
            raise UserError(f"{where}: expected at least one token, got none")
        return Group(where, [sequence], [[len(sequence) - 1]], [0.0])
    prompt, completion = sequence if isinstance(sequence, tuple) and len(sequence) == 2 else (None, sequence)
    if steps is None:
        return Statement(where, "compared", prompt, [completion], [0.0])
    last = completion[-1] if isinstance(completion, list) and completion else completion
    text = last.get("content") if isinstance(last, dict) else last
    if prompt is None or not isinstance(text, str):
        raise UserError(
            f"{where}: expected a pair (prompt, completion), whose steps the model judges; "
            f"got {shorten(sequence, 80)}"
        )
    parts = text.split(steps)
    return Statement(where, "steps", prompt, parts, [0.0] * len(parts))
