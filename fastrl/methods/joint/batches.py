"""Batches of rollouts whose rewards are a reward model's, with the comparisons that the verifier makes of
them: `fastrl joint`'s data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastrl.algorithms.joint import JointAlgorithm
from fastrl.algorithms.reward import Judged
from fastrl.config import AlgorithmChoice, HeldOut, Joint, Reward
from fastrl.data.comparisons import Group
from fastrl.errors import UserError
from fastrl.methods.grpo.draw import Draw
from fastrl.methods.grpo.rollouts import OnPolicy, Step
from fastrl.methods.joint.learner import JointBatch, JointLearner, as_groups, as_tensors, compared, under
from fastrl.methods.reward.batches import Comparisons, check_group, comparisons
from fastrl.methods.reward.learner import RewardBatch
from fastrl.report.stats import correlation
from fastrl.rewards.functions import Scored, said_to
from fastrl.sampler import Sampler
from fastrl.tasks import Task

BUFFER = "comparisons."  # before the names of a checkpoint's tensors


class JointSource(OnPolicy):
    """`OnPolicy` whose rewards are the learner's reward model's; what `score` says, the oracle, is for the
    reward model to learn.

    offline  comparisons that are not the policy's own, some at every update of the reward model; or None
    buffer   this run's comparisons since the last update, of all processes
    """

    config: Joint

    def __init__(
        self,
        learner: JointLearner,
        config: Joint,
        sampler: Sampler,
        algorithm: JointAlgorithm,
        *,
        score: Callable[..., Scored],
        offline: Comparisons | None = None,
        **options: Any,
    ) -> None:
        if options.get("game") is not None:
            raise UserError(
                "--task: expected a task of one turn, whose completions a reward model can read; "
                f"got {config.task}"
            )
        super().__init__(config, sampler, algorithm.policy, score=self._judge, **options)
        if config.demonstrations and getattr(self.prompt(0)[1].get("example"), "demo", None) is None:
            raise UserError(
                "--demonstrations: expected a --task with demonstrations to compare with; "
                "leave it out, or give --offline-share"
            )
        self.learner, self.oracle, self.offline = learner, score, offline
        self.reward_loss = algorithm.reward_loss
        self.buffer: list[Group] = []
        self._read: list[Group] = []  # the step's completions, as the reward model read them

    def collect(self, step: int, version: int) -> Step:
        """The policy's batches; the last one brings the comparisons, in the steps after which the reward
        model is updated.
        """
        done = super().collect(step, version)
        batches = [JointBatch(batch) for batch in done.batches]
        if (step + 1) % self.config.reward_every == 0:
            batches[-1] = replace(batches[-1], comparisons=self._due(step))
        return replace(done, batches=batches)  # type: ignore[arg-type]

    def state(self) -> dict[str, Tensor]:
        """The groups that were carried over, and the comparisons that wait for the reward model's next
        update.
        """
        return super().state() | {f"{BUFFER}{name}": x for name, x in as_tensors(self.buffer).items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        held = under(BUFFER, state)
        self.buffer = as_groups(held) if held else []
        super().load_state({name: x for name, x in state.items() if not name.startswith(BUFFER)})

    def _judge(
        self,
        prompts: Sequence[Any],
        texts: list[str] | None,
        tokens: list[list[int]],
        columns: Sequence[Mapping[str, Any]],
    ) -> Scored:
        """The reward model's rewards as numbers, the oracle's beside them.  The run's first completions
        become the calibration set.
        """
        verdict, learner = self.oracle(prompts, texts, tokens, columns), self.learner
        self._read = learner.reward.model.groups(
            [(p, said_to(p, text)) for p, text in zip(prompts, texts or [], strict=True)]
        )
        if not learner.calibration:
            learner.calibration = self.world.gather(self._read)[: self.config.calibration]
            learner.calibrate()
        proxy = learner.rewards(self._read)
        parts = {"joint/proxy": proxy, "joint/oracle": verdict.reward}
        extra = {"oracle": verdict.reward, "proxy": proxy}
        return replace(
            verdict, reward=proxy, parts=verdict.parts | parts, extra=verdict.extra | extra, each={}
        )

    def _complete(self, draw: Draw, step: int, version: int) -> tuple[Draw, dict[str, float]]:
        """The draw as it is; its comparisons go to the buffer, and the reward model is judged by them before
        it learns from them.
        """
        G, shape = self.config.group, self.learner.reward.model.config
        oracle, proxy = (draw.scored.extra.get(name, []) for name in ("oracle", "proxy"))
        own = [(self._read[i : i + G], oracle[i : i + G]) for i in range(0, len(oracle), G)]
        shown = self._demonstrated(draw) if self.config.demonstrations else [([], [])] * len(own)
        ranked = [
            _ranked(f"prompt {n}", [*mine[0], *more[0]], [*mine[1], *more[1]])
            for n, mine, more in zip(draw.numbers, own, shown, strict=True)
        ]
        fresh = [g for g in ranked if self._compares(g.target)]
        for g in fresh:
            check_group(g, shape.vocab_size, self.config.micro_tokens)
        flat = sum(not self._compares([y for y in said if not math.isnan(y)]) for _, said in own)
        won, pairs, groups, tied = self.world.sum(*_won(proxy, oracle, G), float(len(own)), float(flat))
        both = [
            (x, y) for x, y in self.world.gather(list(zip(proxy, oracle, strict=True))) if not math.isnan(y)
        ]
        self.buffer += self.world.gather(fresh)
        return draw, {
            "joint/accuracy": won / pairs if pairs else math.nan,
            "joint/pairs": pairs,
            "joint/tied": tied / max(groups, 1),
            "joint/correlation": correlation(*zip(*both, strict=True)) if both else math.nan,
            "joint/shift": self.learner.scale.mean,
            "joint/scale": self.learner.scale.deviation,
        }

    def _compares(self, target: Sequence[float]) -> bool:
        """Whether one of them is better than another: ties are not compared."""
        return bool(target) and self.reward_loss.units(target) > 0

    def _demonstrated(self, draw: Draw) -> list[tuple[list[Group], list[float]]]:
        """Of each group: its prompt's demonstration as the reward model reads it, with the oracle's verdict;
        empty where there is none.
        """
        items = draw.items[:: self.config.group]
        known = [
            (p, columns, columns["example"].demo)
            for p, columns in items
            if columns["example"].demo is not None
        ]
        prompts, rows, texts = (
            [p for p, _, _ in known],
            [c for _, c, _ in known],
            [text for _, _, text in known],
        )
        reads = self.sampler.tokenizer
        # ended, as completions are
        tokens = [[*reads(text, add_special_tokens=False)["input_ids"], reads.eos_token_id] for text in texts]
        verdicts = self.oracle(prompts, texts, tokens, rows).reward
        read = self.learner.reward.model.groups(
            [(p, said_to(p, text)) for p, text in zip(prompts, texts, strict=True)]
        )
        each = iter([([g], [y]) for g, y in zip(read, verdicts, strict=True)])
        return [next(each) if columns["example"].demo is not None else ([], []) for _, columns in items]

    def _due(self, step: int) -> RewardBatch:
        """This process's share of the waiting comparisons, and the offline ones of this update."""
        waiting, self.buffer = self.buffer, []
        groups, total = [waiting[i] for i in self.world.share(len(waiting))], float(len(waiting))
        if self.offline is None:
            return RewardBatch(groups, total)
        more: Any = self.offline.collect(step // self.config.reward_every, 0).batches[0]
        return RewardBatch([*groups, *more.groups], total + more.total)


def _ranked(where: str, read: Sequence[Group], oracle: Sequence[float]) -> Group:
    """A prompt's completions, those that the oracle has judged, as one group that its verdicts rank."""
    known = [(g.tokens[0], y) for g, y in zip(read, oracle, strict=True) if not math.isnan(y)]
    return compared(where, [tokens for tokens, _ in known], [y for _, y in known])


def _won(proxy: Sequence[float], oracle: Sequence[float], group: int) -> tuple[float, float]:
    """Pairs of a group, one better than the other by the oracle: how many the reward model has the same way
    round, and all of them.
    """
    score, target = (torch.tensor(x, dtype=torch.float64) for x in (proxy, oracle))
    sizes = [group] * (len(proxy) // group)
    judged = Judged(score=score, target=target, sizes=sizes, margin=torch.zeros(len(sizes)), total=1.0)
    beats = judged.beats()
    return float((judged.gaps()[beats] > 0).sum()), float(beats.sum())


def offline_comparisons(
    config: Joint, task: Task | None, tokenizer: Any, learner: JointLearner, device: torch.device
) -> Comparisons | None:
    """The comparisons that make up `offline_share` of an update's groups, ties among the policy's own
    counted; None at a share of 0.
    """
    own = config.prompts * config.reward_every
    count = round(own * config.offline_share / (1 - config.offline_share))
    if config.offline_share == 0:
        return None
    if count == 0:
        raise UserError(
            f"--offline-share: expected a share that is a group or more of {own} of the policy's, "
            f"got {config.offline_share}"
        )
    if config.offline is None and not hasattr(task, "mistakes"):
        raise UserError(
            "--offline-share: expected a --task with wrong answers to compare with its "
            "demonstrations; give --offline FILE"
        )
    wanted = Reward(
        model=config.model,
        task=config.task,
        dataset=config.offline,
        algorithm=AlgorithmChoice(config.reward_loss, {"center": config.center}),
        prompts=count,
        max_tokens=config.max_tokens,
        micro_tokens=config.micro_tokens,
        seed=config.seed,
        holdout=0.0,
        eval=HeldOut(prompts=0),
    )
    return comparisons(wanted, task, tokenizer, None, learner.reward, learner.algorithm.reward_loss, device)[
        0
    ]
