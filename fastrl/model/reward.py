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
from fastrl.data.comparisons import SEPARATOR, Group, Statement, encode_statements
from fastrl.data.packing import pack
from fastrl.errors import UserError
from fastrl.files import JsonObject, shorten
from fastrl.kernels._rows import take_rows
from fastrl.model import weights
from fastrl.model.adapter import Source, load_model
from fastrl.model.carried import OF_MODEL, read_carried, write_carried
from fastrl.model.config import CAUSAL, SCORING, ModelConfig, Settings, is_scoring, scoring_body
from fastrl.model.decoder import Decoder
from fastrl.model.folder import model_folder
from fastrl.model.language import Tokenizer
from fastrl.model.tokenizer import align_ends

HEAD_SEED = 30_000_001  # the head's own stream of random numbers: the decoder's begins at `seed`
AS_SAVED = ""  # of RewardModel.load: the separator that the folder names
Text = str | list[dict[str, Any]]
Sequences = Sequence[list[int] | Text | tuple[Text, Text] | tuple[Text, Text, JsonObject]]
"""What a reward model scores: token ids, text, chat messages, or (prompt, completion), the latter also with
the columns that a chat template is given.
"""

# how the probabilities of a completion's steps become one number
TRAJECTORY: dict[str, Callable[[Tensor], float]] = {
    "min": lambda p: float(p.min()),
    "product": lambda p: float(p.log().sum().exp()),
    "last": lambda p: float(p[-1]),
}


class RewardModel(nn.Module):
    """A decoder without its language-model head, and `head` (1, D): reward = hidden state . head, no bias.

    steps      the separator between a completion's steps where the model judges each of them; None where it
               judges whole sequences
    tokenizer  what `score` reads text with; may be set later
    """

    supports_cache = False

    def __init__(
        self, body: Decoder, *, tied: bool, steps: str | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        super().__init__()
        self.body, self.tied, self.steps, self.tokenizer = body, tied, steps, tokenizer
        head = torch.empty(1, body.config.hidden_size, dtype=body.dtype, device=body.device)
        self.head = nn.Parameter(head)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, at: Tensor | None = None) -> Tensor:
        """Rewards, (N,): at rows `at` (N,) of the packed tokens (T,), or at every sequence's last token.

        float32 whatever the model is kept in (float64 for a float64 model): a margin of rewards is a small
        difference of large sums.
        """
        at = cu_seqlens[1:].long() - 1 if at is None else at
        wide = torch.promote_types(self.dtype, torch.float32)
        hidden = take_rows(self.body(tokens, cu_seqlens), at)
        return (hidden.to(wide) * self.head.to(wide)).sum(-1)

    @torch.no_grad()
    def score(
        self,
        sequences: Sequences,
        *,
        tokenizer: Tokenizer | None = None,
        max_tokens: int = 16384,
        trajectory: str = "min",
    ) -> list[float]:
        """The reward of every sequence: a list of token ids, a text, a list of chat messages, or a pair
        (prompt, completion) of those.  A third item, {"tools": ..., "chat_template_kwargs": ...}, is given to
        the chat template.

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
        summary = TRAJECTORY[trajectory]
        return [summary(r.double().sigmoid()) for r in rewards]

    @torch.no_grad()
    def step_scores(
        self, sequences: Sequences, *, tokenizer: Tokenizer | None = None, max_tokens: int = 16384
    ) -> list[Tensor]:
        """Every sequence's rewards, (steps,) on the host, logits; one of them where the model judges whole
        sequences.
        """
        groups = self.groups(sequences, tokenizer)
        scores: list[Tensor] = [torch.empty(0)] * len(groups)
        lengths = [group.length for group in groups]
        for members in plan(lengths, max(max_tokens, *lengths, 1)):
            packed = pack([groups[i] for i in members], self.device)
            rewards = self(packed.tokens, packed.cu_seqlens, packed.at).cpu()
            steps = [len(groups[i].target) for i in members]
            for i, reward in zip(members, rewards.split(steps), strict=True):
                scores[i] = reward
        return scores

    def groups(self, sequences: Sequences, tokenizer: Tokenizer | None = None) -> list[Group]:
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

        parsed = [_parse(i, sequence, self.steps) for i, sequence in enumerate(sequences)]
        statements = [item for item in parsed if isinstance(item, Statement)]
        encoded: list[Group] = []
        if tokenizer is not None:
            encoded = encode_statements(statements, tokenizer, separator=self.steps or SEPARATOR)
        elif statements:
            raise UserError(
                f"{statements[0].where}: expected a list of token ids, "
                "because the reward model has no tokenizer; got text"
            )

        context, rest = self.config.max_position_embeddings, iter(encoded)
        groups = [item if isinstance(item, Group) else _fitted(next(rest), context) for item in parsed]
        for group in groups:
            self._check(group)
        return groups

    def _check(self, group: Group) -> None:
        context, V = self.config.max_position_embeddings, self.config.vocab_size
        if group.length > context:
            raise UserError(
                f"{group.where}: {group.length} tokens, but the reward model's context has {context}"
            )
        low, high = min(group.tokens[0]), max(group.tokens[0])
        if not 0 <= low <= high < V:
            raise UserError(f"{group.where}: expected token ids in [0, {V}), got {low} to {high}")

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
        source: Source,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        steps: str | None = AS_SAVED,
    ) -> Self:
        """A reward model's folder as it is; a causal language model (or a config.json: random weights) with a
        fresh head.

        The head is drawn from normal(0, 1/sqrt(D + 1)), by `seed` or torch's global generator.  `steps` and
        `tokenizer` are the model's attributes; AS_SAVED takes the separator from the folder, and none for a
        fresh head.
        Raises:  UserError for another architecture, more than one label, and whatever `load_model` refuses.
        Source:  the head's scale: Stiennon et al. 2020 (arXiv 2009.01325).
        """
        path = None if isinstance(source, Mapping) else model_folder(source)
        folder = path if path is not None and path.is_dir() else None
        config = weights.read_config(folder) if folder else {}
        if folder and is_scoring(config):
            model = cls._trained(folder, config, dtype, device)
        else:
            model = cls._fresh(source, dtype, device, seed)

        model.tokenizer = tokenizer
        if tokenizer is not None:
            align_ends(model, tokenizer)
        if steps != AS_SAVED:
            model.steps = steps
        return model

    @classmethod
    def _fresh(
        cls,
        source: Source,
        dtype: torch.dtype,
        device: torch.device | str,
        seed: int | None,
    ) -> Self:
        body = load_model(source, dtype=dtype, device=device, seed=seed)
        if not isinstance(body, Decoder):
            raise UserError(
                "--model: expected a Llama, Qwen2 or Qwen3 to put a reward head on, "
                f"got {body.config.architecture}"
            )
        tied = body.config.tie_word_embeddings
        body.drop_head()
        model = cls(body, tied=tied)

        head_seed = int(torch.randint(2**62, ())) if seed is None else seed + HEAD_SEED
        generator = torch.Generator().manual_seed(head_seed)
        scale = (body.config.hidden_size + 1) ** -0.5
        with torch.no_grad():
            model.head.copy_(torch.randn(model.head.shape, generator=generator) * scale)
        return model

    @classmethod
    def _trained(cls, folder: Path, config: Settings, dtype: torch.dtype, device: torch.device | str) -> Self:
        body = Decoder.empty(scoring_body(config, str(folder)), dtype, device)
        tied = bool(config.get("tie_word_embeddings", False))
        model = cls(body, tied=tied, steps=config.get("step_separator"))
        model.read(folder)
        body.carried = read_carried(folder, OF_MODEL)
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
        dtype = dtype or self.dtype
        settings = self.config.to_dict() | {
            "tie_word_embeddings": self.tied,
            "architectures": [self.config.architecture.removesuffix(CAUSAL) + SCORING],
            "num_labels": 1,
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "pad_token_id": self._padding(),
        }
        if self.steps is not None:
            settings["step_separator"] = self.steps
        weights.write_config(Path(folder), settings, (), dtype)
        weights.write(Path(folder), dict(self.named_parameters()), self.layout(), dtype, max_shard_bytes)
        write_carried(Path(folder), self.body.carried)

    def end_with(self, tokens: tuple[int, ...]) -> None:
        """Make these the end-of-sequence tokens of what is saved."""
        self.body.end_with(tokens)

    def layout(self) -> weights.Layout:
        """Each parameter's tensors in a Hugging Face file."""
        body = {f"body.{name}": parts for name, parts in self.body.layout().items()}
        return body | {"head": {"score.weight": 1}}

    def _padding(self) -> int | None:
        """A token to pad with that ends no sequence, if one is known."""
        ends = {*self.config.eos_token_id, getattr(self.tokenizer, "eos_token_id", None)}
        candidates = (getattr(self.tokenizer, "pad_token_id", None), self.config.extra.get("pad_token_id"))
        return next((token for token in candidates if token is not None and token not in ends), None)


def _fitted(group: Group, context: int) -> Group:
    """The encoded sequence, without its end-of-sequence token where that alone exceeds the context."""
    (tokens,), (at,) = group.tokens, group.at
    if len(tokens) != context + 1:
        return group
    return replace(group, tokens=[tokens[:-1]], at=[[*at[:-1], context - 1]])


def _parse(i: int, sequence: Any, steps: str | None) -> Group | Statement:
    """Sequence i of a call: tokens as a group, text as a statement that is still to be tokenised."""
    where = f"sequences[{i}]"
    if steps is None and isinstance(sequence, list) and all(isinstance(t, int) for t in sequence):
        if not sequence:
            raise UserError(f"{where}: expected at least one token, got none")
        return Group(where, [sequence], [[len(sequence) - 1]], [0.0])

    prompt, completion, columns = None, sequence, None
    if isinstance(sequence, tuple) and len(sequence) in (2, 3):
        prompt, completion, columns = (*sequence, None)[:3]
    if steps is None:
        return Statement(where, "compared", prompt, [completion], [0.0], columns=columns)

    last = completion[-1] if isinstance(completion, list) and completion else completion
    text = last.get("content") if isinstance(last, dict) else last
    if prompt is None or not isinstance(text, str):
        raise UserError(
            f"{where}: expected a pair (prompt, completion) with the steps to judge; "
            f"got {shorten(sequence, 80)}"
        )
    parts = text.split(steps)
    return Statement(where, "steps", prompt, parts, [0.0] * len(parts), columns=columns)
