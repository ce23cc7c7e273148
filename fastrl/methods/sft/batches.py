"""Supervised batches: demonstrations of a dataset or a task, weighed over the whole optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.algorithms import Algorithm
from fastrl.batch.types import Batch
from fastrl.config import Sft
from fastrl.data.dataset import read_items
from fastrl.data.encode import Sample
from fastrl.data.encoders import Limits, SampleEncoder
from fastrl.data.messages import template_columns
from fastrl.data.rows import Row
from fastrl.errors import UserError
from fastrl.files import key_values
from fastrl.methods.sft.objective import noise_key
from fastrl.model.language import Tokenizer
from fastrl.parallel.world import World
from fastrl.tasks import Task
from fastrl.tasks.task import TRAIN
from fastrl.train.source import State, Step, order
from fastrl.train.weighting import reweigh, weigh

Items = Callable[[Sequence[int]], list[Sample]]  # indices -> demonstrations: a pure function


class Demonstrations:
    """`count` demonstrations a step, out of `size`; their loss tokens count the same all over the step.

    weighted  whether the demonstrations' own weights count
    """

    def __init__(
        self,
        items: Items,
        size: int,
        *,
        count: int,
        algorithm: Algorithm,
        seed: int,
        device: torch.device,
        world: World,
        weighted: bool = False,
    ) -> None:
        self.items, self.size, self.count, self.seed = items, size, count, seed
        self.algorithm, self.weighted = algorithm, weighted
        self.device, self.world = device, world

    def collect(self, step: int, version: int) -> Step[Batch]:
        """The demonstrations of `step`, one batch."""
        chosen = order(self.size, self.seed, step * self.count, self.count)
        places = self.world.share(self.count)
        rows = self.items([chosen[place] for place in places])
        keys = [noise_key(self.seed, step, place) for place in places]

        batch, share = self._pack(rows, keys)
        batch = weigh(batch, self.algorithm, self.world, max_length=1)
        batch = reweigh(batch, share, self.world) if self.weighted else batch
        return Step([batch.to(self.device)])

    def state(self) -> State:
        """Nothing: the data is a function of the step's number."""
        return {}

    def load_state(self, state: State) -> None:
        """Nothing to restore."""

    def _pack(self, rows: Sequence[Sample], keys: Sequence[int]) -> tuple[Batch, Tensor]:
        """The batch of `rows`, not yet weighed, and each token's weight among demonstrations (T,); on the
        host.
        """
        tokens = torch.tensor([t for row in rows for t in row.tokens], dtype=torch.int64)
        mask = torch.tensor([m for row in rows for m in row.mask], dtype=torch.bool)
        lengths = torch.tensor([0, *(len(row.tokens) for row in rows)])
        cu_seqlens = lengths.cumsum(0).to(torch.int32)
        zeros = torch.zeros(tokens.shape)

        def per_token(values: Sequence[float]) -> Tensor:
            each = torch.tensor(values)
            return torch.repeat_interleave(each, cu_seqlens.diff().long()) if rows else zeros

        share = per_token([row.weight for row in rows])
        batch = Batch(
            tokens=tokens,
            cu_seqlens=cu_seqlens,
            mask=mask & (share > 0),
            advantage=torch.ones_like(zeros),
            old_logp=zeros,
            weight=zeros,
            number=per_token(keys),
        )
        return batch, share


@dataclass(frozen=True, slots=True)
class DemonstrationEncoder:
    """Turns rows into samples of a run, and refuses what its model cannot take."""

    config: Sft
    tokenizer: Tokenizer
    context: int
    vocab_size: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return min(self.config.max_tokens or self.context, self.context)

    @property
    def encoder(self) -> SampleEncoder:
        """What is made of rows, whoever does it."""
        config = self.config
        limits = Limits(self.longest, config.micro_tokens, self.vocab_size)
        return SampleEncoder(limits, config.turns, config.sample_weights)

    def __call__(self, rows: Sequence[Row]) -> list[Sample]:
        """The samples of rows.  Raises UserError, naming the row, for one that cannot be trained on."""
        return self.encoder.encode(rows, self.tokenizer)


def demonstrations(
    encode: DemonstrationEncoder, task: Task | None, world: World | None = None
) -> tuple[Items, int]:
    """What there is to imitate, and how much; every line of a dataset is checked before training.

    Raises:  UserError where there is nothing to imitate.
    """
    config = encode.config
    if config.dataset is not None:
        columns = key_values(config.columns, "--columns")
        known = read_items(config.dataset, encode.encoder, encode.tokenizer, columns=columns, world=world)
        return known, len(known)

    if task is None:
        raise UserError(
            "--dataset or --task: expected one of them, to have demonstrations to train on; got neither"
        )
    if task.example(TRAIN, 0).demo is None:
        raise UserError(f"--task: {task.name} has no demonstrations; give a --dataset")
    return _demonstrations_of(task, encode), task.size(TRAIN)


def _demonstrations_of(task: Task, encode: DemonstrationEncoder) -> Items:
    def items(indices: Sequence[int]) -> list[Sample]:
        rows = []
        for i in indices:
            example = task.example(TRAIN, i)
            extras = template_columns(example.fields)
            fields = {**extras, "prompt": example.prompt, "completion": example.demo}
            rows.append(Row(f"{task.name} {TRAIN}[{i}]", "prompt-completion", fields))
        return encode(rows)

    return items
