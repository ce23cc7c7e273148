"""Where a training step's data comes from: demonstrations, or rollouts and their rewards.

A source is a pure function of the step number: prompts come from a seeded permutation, and sampling noise is
keyed by the sequence's number, so a resumed run sees what an uninterrupted one would, and R processes see
what one would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastrl.algorithms import Algorithm
from fastrl.algorithms.advantage import COMBINE
from fastrl.batch.types import Batch
from fastrl.config import GroupRelative
from fastrl.config import OnPolicy as OnPolicyConfig
from fastrl.data.rows import Sample
from fastrl.methods.grpo.draw import Draw, measure
from fastrl.methods.grpo.partial import Carry
from fastrl.methods.grpo.refill import block, further, keep, spread
from fastrl.parallel.device import memory_limited_by
from fastrl.parallel.world import World
from fastrl.rewards.functions import Scored, soft_overlong
from fastrl.sampler import Sampler, SamplingParams, Tail
from fastrl.sampler.episodes import dialogue
from fastrl.train.weighting import correct, reweigh, weigh

if TYPE_CHECKING:
    from fastrl.tasks import Conversation


def order(n: int, seed: int, first: int, count: int) -> list[int]:
    """Items [first, first + count) of an endless sequence of seeded permutations of range(n)."""
    items: list[int] = []
    while len(items) < count:
        epoch, start = divmod(first + len(items), n)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        items += torch.randperm(n, generator=generator)[start : start + count - len(items)].tolist()
    return items


@dataclass(frozen=True, slots=True)
class Step:
    """One training step's data: a batch per optimizer step, what is known of it already, and answers worth
    keeping.
    """

    batches: list[Batch]
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


class Source(Protocol):
    """What the trainer asks for data."""

    def collect(self, step: int, version: int) -> Step:
        """The data of `step` (counted from 0); `version` is how many optimizer steps the weights have
        seen.
        """

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep of it: data that is neither used nor a function of the step's
        number.
        """

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""


@runtime_checkable
class Evaluable(Source, Protocol):
    """A source that keeps some of its data back to evaluate on."""

    def evaluate(self, learner: Any) -> tuple[dict[str, float], dict[str, Any], list[dict[str, Any]]]:
        """Metrics of what was held out, under eval/; a table for the report; a few samples."""


class Demonstrations:
    """Supervised batches: `count` sequences a step, whose masked-in tokens count the same all over the step.

    items(indices) -> demonstrations out of `size`: a pure function of the indices.  `weighted` says whether
    their weights count.
    """

    def __init__(
        self,
        items: Callable[[Sequence[int]], list[Sample]],
        size: int,
        *,
        count: int,
        algorithm: Algorithm,
        seed: int,
        device: torch.device,
        world: World,
        weighted: bool = False,
    ) -> None:
        self.items, self.size, self.count, self.seed, self.weighted = items, size, count, seed, weighted
        self.algorithm, self.device, self.world = algorithm, device, world

    def collect(self, step: int, version: int) -> Step:
        chosen = order(self.size, self.seed, step * self.count, self.count)
        mine = self.world.share(self.count)
        rows = self.items([chosen[i] for i in mine])
        tokens = torch.tensor([t for row in rows for t in row.tokens], dtype=torch.int64, device=self.device)
        mask = torch.tensor([m for row in rows for m in row.mask], dtype=torch.bool, device=self.device)
        lengths = torch.tensor([0, *(len(row.tokens) for row in rows)], device=self.device)
        zeros = torch.zeros(tokens.shape, device=self.device)
        cu = lengths.cumsum(0).to(torch.int32)
        number, share = (
            torch.repeat_interleave(torch.tensor(x, device=self.device), cu.diff().long()) if rows else zeros
            for x in (list(mine), [row.weight for row in rows])
        )
        batch = Batch(
            tokens=tokens,
            cu_seqlens=cu,
            mask=mask & (share > 0),
            advantage=torch.ones_like(zeros),
            old_logp=zeros,
            weight=zeros,
            number=number,
        )
        batch = weigh(batch, self.algorithm, self.world, max_length=1)
        return Step([reweigh(batch, share, self.world) if self.weighted else batch])

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing: its data is a function of the step's number."""


class OnPolicy:
    """Batches of rollouts: sample `group` completions of every prompt, score them, turn rewards into
    advantages.

    prompt(i) -> (prompt, columns) of item i of `size`;  score(prompts, completions, token lists, columns) ->
    Scored.  reference(batch) -> (T,) log-probs under the reference model, or None when the algorithm wants no
    KL.  trainer(batch) -> (T,) log-probs under the weights as they are; asked for once a step by a correction
    over several updates.  game, the task, answers the policy's turns if it is one of several; its rewards
    count unless config names reward functions.
    """

    def __init__(
        self,
        config: OnPolicyConfig,
        sampler: Sampler,
        algorithm: Algorithm,
        *,
        prompt: Callable[[int], tuple[Any, Mapping[str, Any]]],
        size: int,
        score: Callable[..., Scored],
        reference: Callable[[Batch], Tensor] | None,
        stop: Sequence[str],
        world: World,
        trainer: Callable[[Batch], Tensor] | None = None,
        game: Conversation | None = None,
    ) -> None:
        if algorithm.correction is not None and trainer is None and config.minibatches * config.epochs > 1:
            raise ValueError(
                "trainer: expected a function of the batch, got None; "
                "a correction over several updates needs it"
            )
        self.config, self.sampler, self.algorithm, self.world = config, sampler, algorithm, world
        self.prompt, self.size, self.score, self.reference, self.trainer = (
            prompt,
            size,
            score,
            reference,
            trainer,
        )
        self.game, self.carry, self.members = game, Carry(config.group), config.group
        self.tail = None if config.tail == "finish" else Tail(share=config.tail_share, action=config.tail)
        s = config.sampling
        self.params = SamplingParams(
            n=config.group,
            max_new_tokens=config.max_new_tokens,
            max_length=(config.max_tokens or 0) if game else 0,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            seed=config.seed,
            stop=tuple(stop),
        )

    def collect(self, step: int, version: int) -> Step:
        draw, kept = self._fill(step, version)
        whole, told = self._complete(draw, step, version)
        G = self.members
        # this process's groups of the batch
        mine = {place: i for i, place in enumerate(draw.places) if place in kept}
        own = [i * G + g for i in mine.values() for g in range(G)]
        batch = self._batch(whole, own, self._advantage(whole, own))
        metrics = measure(draw, self.config.group, version, self.world) | told
        if self.config.refill:
            metrics |= {"refill/groups": float(draw.prompts), "refill/kept": float(len(kept))}
        return Step(
            list(self._split(batch, [kept.index(place) for place in mine])),
            metrics,
            draw.samples(self.config.group),
        )

    def _complete(self, draw: Draw, step: int, version: int) -> tuple[Draw, dict[str, float]]:
        """The draw with whatever else is in its groups, `members` sequences each, and what is to be told of
        that.
        """
        return draw, {}

    def _fill(self, step: int, version: int) -> tuple[Draw, list[int]]:
        """All that was drawn for the step, and the places of the groups that make its batch."""
        prompts, refill = self.config.prompts, self.config.refill
        draw = self._draw(step, 0, prompts, version)
        if not refill:
            return draw, list(range(draw.prompts))
        draws, useful = [draw], self._useful(draw)
        while sum(useful) < prompts and len(draws) <= refill:
            count = further(sum(useful), len(useful), prompts)
            draw = self._draw(step, len(draws), count, version, before=len(useful))
            draws.append(draw)
            useful += self._useful(draw)
        return Draw.join(draws), keep(useful, prompts)

    def _draw(self, step: int, turn: int, count: int, version: int, before: int = 0) -> Draw:
        """Round `turn` of a step: completions of `count` prompts (this process's share of them) and their
        rewards.
        """
        config, G = self.config, self.config.group
        number = block(step, turn, config.refill) * config.prompts
        chosen = order(self.size, config.seed, number, count)
        mine = self.world.share(count)
        items = [(chosen[i], *self.prompt(chosen[i])) for i in mine]
        talk = (
            dialogue(self.game, self.sampler.tokenizer, [c["example"] for _, _, c in items for _ in range(G)])
            if self.game
            else None
        )
        with memory_limited_by("--sampling.max-tokens-in-flight", config.sampling.max_tokens_in_flight):
            rollouts = self.sampler.generate(
                [p for _, p, _ in items],
                self.params,
                sequence_offset=(number + mine.start) * G,
                weight_version=version,
                environment=talk,
                tail=self.tail,
                carried=self.carry.unfinished(),
            )
        places = [before + i for i in mine]
        if config.tail == "carry":
            done, rollouts = self.carry.sort(rollouts, [item for item, _, _ in items])
            items, places, count = [(i, *self.prompt(i)) for i in done], list(range(len(done))), len(done)
        repeated = [(p, columns) for _, p, columns in items for _ in range(G)]
        scored = self.score(
            [p for p, _ in repeated], rollouts.text, rollouts.completions(), [c for _, c in repeated]
        )
        if talk is not None and not config.reward:
            scored = replace(scored, reward=talk.rewards)
        if config.overlong_buffer:
            scored = scored.plus(
                "overlong",
                soft_overlong(rollouts.lengths.tolist(), config.max_new_tokens, config.overlong_buffer),
            )
        return Draw(repeated, rollouts, scored, places, count, [i for i, _, _ in items])

    def state(self) -> dict[str, Tensor]:
        return self.carry.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.carry.load_state(state, self.sampler.tokenizer, self.sampler.model.device)

    def _useful(self, draw: Draw) -> list[bool]:
        """Which groups of the round, of all processes, have rewards that differ."""
        return self.world.gather(spread(draw.reward, self.config.group).tolist())

    def _advantage(self, draw: Draw, own: list[int]) -> Tensor:
        """Advantages of the samples `own` of this process; what depends on the whole batch sees those of all
        processes.
        """
        config, G, advantage = (
            self.config,
            len(draw.rollouts) // max(len(draw.places), 1),
            self.algorithm.advantage,
        )
        assert advantage is not None and isinstance(config, GroupRelative)
        apart = config.multi_objective_aggregation != "sum_then_normalize"
        # summed once, as the log has it
        named = (draw.scored.each if apart else {}) or {"reward": (1.0, draw.scored.reward)}
        length = draw.rollouts.lengths.tolist()
        rows = [(draw.places[i // G], length[i], *(values[i] for _, values in named.values())) for i in own]
        if advantage.whole_batch or apart:
            rows = sorted(self.world.gather(rows), key=lambda row: row[0])
        if not own:  # its share is empty, and so is what it knows of the rewards
            return torch.zeros(0, device=draw.rollouts.tokens.device)
        table = torch.tensor(rows, dtype=torch.float32, device=draw.rollouts.tokens.device).view(
            len(rows), 2 + len(named)
        )
        weight = table.new_tensor([w for w, _ in named.values()])
        combine = COMBINE[config.multi_objective_aggregation]
        everybody = combine(table[:, 2:].T.contiguous(), weight, advantage, G, table[:, 1])
        places = {draw.places[i // G] for i in own}
        return everybody[[row[0] in places for row in rows]] if len(rows) != len(own) else everybody

    def _batch(self, draw: Draw, own: list[int], advantage: Tensor) -> Batch:
        """The samples `own`, in that order, with their advantages (len(own),)."""
        rollouts = draw.rollouts
        mask = rollouts.completion_mask
        if self.config.overlong_filter:
            whole = torch.tensor(
                [reason != "length" for reason in rollouts.finish_reason], device=mask.device
            )
            mask = mask & torch.repeat_interleave(whole, rollouts.cu_seqlens.diff().long())
        zeros = torch.zeros_like(rollouts.logp)
        batch = Batch(
            tokens=rollouts.tokens,
            cu_seqlens=rollouts.cu_seqlens,
            mask=mask,
            advantage=zeros,
            old_logp=rollouts.logp,
            weight=zeros,
        )
        # as many of them may be others, or in another order
        batch = batch if own == list(range(len(rollouts))) else batch.select(own)
        batch = replace(batch, advantage=torch.repeat_interleave(advantage, batch.cu_seqlens.diff().long()))
        if self.algorithm.correction is not None and self.config.minibatches * self.config.epochs > 1:
            assert self.trainer is not None
            batch = correct(batch, self.algorithm.correction, self.trainer(batch))
        return batch if self.reference is None else replace(batch, ref_logp=self.reference(batch))

    def _split(self, batch: Batch, places: Sequence[int]) -> Iterator[Batch]:
        """Epochs of minibatches of whole groups, each weighed as one optimizer step, without the samples that
        cannot move it.

        Minibatch k holds every M-th of the step's prompts, of which this process has those at `places`: the
        same ones for any number of processes, and about as many in each.  (The prompts come shuffled.)
        """
        config, M, G = self.config, self.config.minibatches, len(batch) // max(len(places), 1)
        for _ in range(config.epochs):
            for k in range(M):
                groups = [i for i, place in enumerate(places) if place % M == k]
                part = batch.select([g * G + i for g in groups for i in range(G)]) if M > 1 else batch
                yield self._live(self._weigh(part))

    def _weigh(self, part: Batch) -> Batch:
        return weigh(part, self.algorithm, self.world, max_length=self.config.max_new_tokens)

    def _live(self, batch: Batch) -> Batch:
        """Without KL and entropy terms a sample with zero advantage has zero gradient: leave it out, its
        denominators stay.
        """
        if self.algorithm.kl_coef or self.algorithm.entropy_coef:
            return batch
        moves = (batch.advantage[batch.cu_seqlens[:-1].long()] != 0) & (batch.live_ends.diff() > 0)
        return batch if bool(moves.all()) else batch.select(moves.nonzero().squeeze(1).tolist())
