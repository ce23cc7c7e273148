"""Rollouts whose rewards are a judge's, with the comparisons that the verifier makes of them: `fastrl
joint`'s data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from fastrl.algorithms.reward import Judged, RewardLoss
from fastrl.config import Joint
from fastrl.data.comparisons import Group, check_group
from fastrl.data.messages import as_read, template_columns
from fastrl.methods.grpo.groups import SampledGroups
from fastrl.methods.grpo.rollouts import RolloutSource
from fastrl.methods.joint.groups import as_groups, as_tensors, compared, under
from fastrl.methods.joint.judge import Judge
from fastrl.methods.joint.learner import JointBatch
from fastrl.methods.reward.batches import Comparisons
from fastrl.methods.reward.objective import RewardBatch
from fastrl.model.language import Tokenizer
from fastrl.parallel.world import World
from fastrl.report.stats import correlation
from fastrl.rewards.functions import Prompt, Scored, as_message
from fastrl.train.source import Metrics, State, Step

BUFFER = "comparisons."  # before the names of a checkpoint's tensors
Score = Callable[
    [Sequence[Any], Sequence[Prompt] | None, list[list[int]], Sequence[Mapping[str, Any]]], Scored
]  # (prompts, completions, token lists, columns) -> their rewards


@dataclass(frozen=True, slots=True)
class Oracle:
    """What labels completions for the judge to learn from: the run's own rewards, which the policy never
    sees.

    demonstrations  whether each group is compared with its prompt's demonstration, too
    """

    config: Joint
    loss: RewardLoss
    judge: Judge
    score: Score
    tokenizer: Tokenizer
    world: World
    demonstrations: bool

    def judged(
        self,
        prompts: Sequence[Any],
        said: Sequence[Prompt] | None,
        tokens: list[list[int]],
        columns: Sequence[Mapping[str, Any]],
    ) -> Scored:
        """The judge's rewards as numbers, the oracle's beside them."""
        verdict = self.score(prompts, said, tokens, columns)
        proxy = self.judge.rewards(self._read(prompts, said or [], columns))

        parts = {"joint/proxy": proxy, "joint/oracle": verdict.reward}
        extra = {"oracle": verdict.reward, "proxy": proxy}
        return replace(
            verdict, reward=proxy, parts=verdict.parts | parts, extra=verdict.extra | extra, each={}
        )

    def comparisons(self, groups: SampledGroups) -> tuple[list[Group], Metrics]:
        """This process's groups that compare something, and how the judge, before it learns from them, does
        on them.
        """
        size, extra = self.config.group, groups.scored.extra
        oracle, proxy = extra.get("oracle", []), extra.get("proxy", [])
        prompts, columns = [p for p, _ in groups.items], [c for _, c in groups.items]
        read = self._read(prompts, groups.rollouts.said or [], columns)

        known = [(read[i : i + size], oracle[i : i + size]) for i in range(0, len(oracle), size)]
        more = self._demonstrated(groups) if self.demonstrations else [([], [])] * len(known)
        ranked = []
        for number, own, shown in zip(groups.numbers, known, more, strict=True):
            sequences, verdicts = [*own[0], *shown[0]], [*own[1], *shown[1]]
            ranked.append(_ranked(f"prompt {number}", sequences, verdicts))

        useful = [g for g in ranked if self._compares(g.target)]
        for g in useful:
            check_group(g, self.judge.model.config.vocab_size, self.config.micro_tokens)

        tied = sum(not self._compares([y for y in verdicts if not math.isnan(y)]) for _, verdicts in known)
        return useful, self._metrics(proxy, oracle, len(known), tied)

    def _metrics(self, proxy: Sequence[float], oracle: Sequence[float], groups: int, tied: int) -> Metrics:
        """How the judge's rewards go with the oracle's, over all processes."""
        won, pairs = _won(proxy, oracle, self.config.group)
        won, pairs, every, flat = self.world.sum(won, pairs, float(groups), float(tied))
        gathered = self.world.gather(list(zip(proxy, oracle, strict=True)))
        both = [(x, y) for x, y in gathered if not math.isnan(y)]
        agreement = correlation(*zip(*both, strict=True)) if both else math.nan
        scale = self.judge.scale
        return {
            "joint/accuracy": won / pairs if pairs else math.nan,
            "joint/pairs": pairs,
            "joint/tied": flat / max(every, 1),
            "joint/correlation": agreement,
            "joint/shift": scale.mean,
            "joint/scale": scale.deviation,
        }

    def _read(
        self, prompts: Sequence[Any], said: Sequence[Prompt], columns: Sequence[Mapping[str, Any]]
    ) -> list[Group]:
        """Completions as the reward model reads them."""
        rows = zip(prompts, said, columns, strict=True)
        return self.judge.model.groups(
            [(p, as_read(p, as_message(p, text)), template_columns(row)) for p, text, row in rows]
        )

    def _compares(self, target: Sequence[float]) -> bool:
        """Whether one of them is better than another: ties are not compared."""
        return bool(target) and self.loss.units(target) > 0

    def _demonstrated(self, groups: SampledGroups) -> list[tuple[list[Group], list[float]]]:
        """Of each group: its prompt's demonstration as the reward model reads it, with the oracle's verdict;
        empty where there is none.
        """
        items = groups.items[:: self.config.group]
        known = [(prompt, columns) for prompt, columns in items if columns["example"].demo is not None]
        prompts, columns = [p for p, _ in known], [c for _, c in known]
        texts = [c["example"].demo for c in columns]

        verdicts = self.score(prompts, texts, [self._ended(text) for text in texts], columns).reward
        read = self._read(prompts, texts, columns)
        each = iter([([g], [y]) for g, y in zip(read, verdicts, strict=True)])
        return [next(each) if c["example"].demo is not None else ([], []) for _, c in items]

    def _ended(self, text: str) -> list[int]:
        """Tokens of a demonstration, ended as completions are."""
        eos = self.tokenizer.eos_token_id
        assert eos is not None
        return [*self.tokenizer.encode(text, add_special_tokens=False), eos]


@final
class ComparisonBuffer:
    """The comparisons that wait for the reward model's next update.

    offline  comparisons that are not the policy's own, some at every update of the reward model; or None
    buffer   this run's comparisons since the last update, of all processes
    """

    def __init__(self, config: Joint, oracle: Oracle, offline: Comparisons | None, world: World) -> None:
        self.config, self.oracle, self.offline, self.world = config, oracle, offline, world
        self.buffer: list[Group] = []

    def extend(self, groups: SampledGroups, step: int, version: int) -> tuple[SampledGroups, Metrics]:
        """The groups as they are; their comparisons go to the buffer."""
        useful, metrics = self.oracle.comparisons(groups)
        self.buffer += self.world.gather(useful)
        return groups, metrics

    def due(self, step: int) -> RewardBatch | None:
        """This process's share of the waiting comparisons, and the offline ones of this update; None where
        none is due after this step.
        """
        every = self.config.reward_every
        if (step + 1) % every != 0:
            return None

        waiting, self.buffer = self.buffer, []
        groups, total = [waiting[i] for i in self.world.share(len(waiting))], float(len(waiting))
        if self.offline is None:
            return RewardBatch(groups, total)
        (more,) = self.offline.collect(step // every, 0).batches
        return RewardBatch([*groups, *more.groups], total + more.total)


@final
class JointRollouts:
    """A policy's rollouts with the comparisons made of them."""

    def __init__(self, rollouts: RolloutSource, comparisons: ComparisonBuffer) -> None:
        self.rollouts, self.comparisons = rollouts, comparisons

    def collect(self, step: int, version: int) -> Step[JointBatch]:
        """The policy's batches; the last one brings the comparisons, in the steps after which the reward
        model is updated.
        """
        sampled = self.rollouts.collect(step, version)
        batches = [JointBatch(batch) for batch in sampled.batches]
        batches[-1] = replace(batches[-1], comparisons=self.comparisons.due(step))
        return Step(batches, sampled.metrics, sampled.samples)

    def state(self) -> State:
        """The groups that wait for the next step, and the comparisons that wait for the reward model's
        update.
        """
        waiting = as_tensors(self.comparisons.buffer)
        return self.rollouts.state() | {f"{BUFFER}{name}": x for name, x in waiting.items()}

    def load_state(self, state: State) -> None:
        """Restore what `state` returned."""
        waiting = under(BUFFER, state)
        self.comparisons.buffer = as_groups(waiting) if waiting else []
        own = {name: x for name, x in state.items() if not name.startswith(BUFFER)}
        self.rollouts.load_state(own)


def _ranked(where: str, read: Sequence[Group], oracle: Sequence[float]) -> Group:
    """A prompt's completions, those that the oracle has judged, as one group that its verdicts rank."""
    known = [(g.tokens[0], y) for g, y in zip(read, oracle, strict=True) if not math.isnan(y)]
    return compared(where, [tokens for tokens, _ in known], [y for _, y in known])


def _won(proxy: Sequence[float], oracle: Sequence[float], group: int) -> tuple[float, float]:
    """Pairs of a group, one better than the other by the oracle: how many the judge has the same way round,
    and all of them.
    """
    score, target = (torch.tensor(x, dtype=torch.float64) for x in (proxy, oracle))
    sizes = [group] * (len(proxy) // group)
    judged = Judged(score=score, target=target, sizes=sizes, margin=torch.zeros(len(sizes)), total=1.0)
    beats = judged.beats()
    return float((judged.gaps()[beats] > 0).sum()), float(beats.sum())
