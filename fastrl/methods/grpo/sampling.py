"""One round of sampling: completions of some prompts, group by group, and their rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastrl.batch.types import Rollouts
from fastrl.config import OnPolicy
from fastrl.errors import UserError
from fastrl.methods.grpo.groups import SampledGroups
from fastrl.methods.grpo.partial import PartialRollouts
from fastrl.methods.grpo.prompts import PromptItem, Prompts
from fastrl.parallel.device import memory_limited_by
from fastrl.parallel.world import World
from fastrl.rewards.functions import Scored, soft_overlong
from fastrl.sampler import Sampler, SamplingParams, Tail
from fastrl.sampler.episodes import Dialogue
from fastrl.sampler.prompts import for_template
from fastrl.train.source import State, order


class GroupSampler:
    """Samples `config.group` completions of every prompt and scores them.

    Prompts come from a seeded permutation, and a sequence's noise is keyed by its number, so which prompts
    and which noise a round uses follows from its step, its number in the step and `count` alone.  Groups that
    are still unfinished wait for the next step where `config.tail` is carry.
    """

    def __init__(self, config: OnPolicy, sampler: Sampler, prompts: Prompts, world: World) -> None:
        self.config, self.sampler, self.prompts, self.world = config, sampler, prompts, world
        self.pending = PartialRollouts(config.group) if config.tail == "carry" else None
        self.tail = None if config.tail == "finish" else Tail(share=config.tail_share, action=config.tail)
        self.params = sampling_params(config, prompts)

    def sample_round(self, step: int, index: int, count: int, version: int, before: int = 0) -> SampledGroups:
        """Refill round `index` of a step (0 is the first sampling): completions of this process's share of
        `count` prompts, after `before` groups of earlier rounds of the same step.
        """
        config, prompts = self.config, self.prompts
        first = prompt_block(step, index, config.refill) * config.prompts
        share = self.world.share(count)

        chosen = order(prompts.size, config.seed, first, count)
        numbers = [chosen[place] for place in share]
        items = [prompts.item(number) for number in numbers]
        places = [before + place for place in share]

        dialogue = self._dialogue(items)
        rollouts = self._generate(items, (first + share.start) * config.group, version, dialogue)
        if self.pending is not None:
            numbers, rollouts = self.pending.take_finished(rollouts, numbers)
            items, places = [prompts.item(number) for number in numbers], list(range(len(numbers)))
            count = len(numbers)

        if dialogue is not None:
            rollouts = replace(rollouts, messages=dialogue.messages(rollouts))
        repeated = [item for item in items for _ in range(config.group)]
        scored = self._score(repeated, rollouts, dialogue)
        return SampledGroups(repeated, rollouts, scored, places, count, numbers)

    def state(self) -> State:
        """The groups that wait for the next step."""
        return {} if self.pending is None else self.pending.state()

    def load_state(self, state: State) -> None:
        """Restore what `state` returned.  Raises UserError where groups wait and --tail would drop them."""
        if self.pending is not None:
            self.pending.load_state(state, self.sampler.tokenizer, self.sampler.model.device)
        elif state:
            waiting = "carry, because unfinished groups wait in the checkpoint"
            raise UserError(f"--tail: expected {waiting}, got {self.config.tail}")

    def _dialogue(self, items: Sequence[PromptItem]) -> Dialogue | None:
        """What answers the policy's turns, in a task of several."""
        if self.prompts.game is None:
            return None
        examples = [columns["example"] for _, columns in items for _ in range(self.config.group)]
        return Dialogue(self.prompts.game, self.sampler.tokenizer, examples)

    def _generate(
        self, items: Sequence[PromptItem], first: int, version: int, dialogue: Dialogue | None
    ) -> Rollouts:
        in_flight = self.config.sampling.max_tokens_in_flight
        columns = [c for _, c in items]
        prompts = for_template([p for p, _ in items], columns, self.sampler.tokenizer)
        with memory_limited_by("--sampling.max-tokens-in-flight", in_flight):
            return self.sampler.generate(
                prompts,
                self.params,
                sequence_offset=first,
                weight_version=version,
                environment=dialogue,
                tail=self.tail,
                carried=None if self.pending is None else self.pending.unfinished(),
            )

    def _score(self, repeated: Sequence[PromptItem], rollouts: Rollouts, dialogue: Dialogue | None) -> Scored:
        config = self.config
        prompts: list[Any] = [prompt for prompt, _ in repeated]
        columns: list[Mapping[str, Any]] = [c for _, c in repeated]
        scored = self.prompts.score(prompts, rollouts.said, rollouts.completions(), columns)

        if dialogue is not None and not config.reward:
            scored = replace(scored, reward=dialogue.rewards)
        if config.overlong_buffer:
            lengths = rollouts.lengths.tolist()
            penalty = soft_overlong(lengths, config.max_new_tokens, config.overlong_buffer)
            scored = scored.plus("overlong", penalty)
        return scored


def prompt_block(step: int, index: int, refill: int) -> int:
    """The block of prompts, and of prompts x group sequence numbers, that round `index` of a step uses.

    A run with R rounds of refill has 1 + R blocks per step; a round uses the front of its own block, so that
    no two samples of a run have the same number.
    """
    return step * (1 + refill) + index


def sampling_params(config: OnPolicy, prompts: Prompts) -> SamplingParams:
    """How a run's options have completions drawn."""
    sampling = config.sampling
    return SamplingParams(
        n=config.group,
        max_new_tokens=config.max_new_tokens,
        # The longest conversation; a single completion is bounded by max_new_tokens alone.
        max_length=(config.max_tokens or 0) if prompts.game else 0,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=config.seed,
        stop=prompts.stop,
    )
