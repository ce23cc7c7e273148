"""Accuracy of a model on a task's held-out split: greedy and sampled, with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch

from fastrl.batch.types import Rollouts
from fastrl.errors import UserError
from fastrl.files import call_user
from fastrl.parallel.world import World
from fastrl.report.stats import Estimate, share_interval, wilson
from fastrl.rewards.functions import Reward, score
from fastrl.run.log import replace_text
from fastrl.sampler import Sampler, SamplingParams
from fastrl.sampler.episodes import dialogue
from fastrl.sampler.prompts import for_template
from fastrl.search import SEARCHES, Candidates, pass_at_k
from fastrl.tasks import Example, Prompt, Score, Task

EVAL_SEED = 20_000_003  # keeps the noise of evaluations apart from the training's

Answer = tuple[str, Score]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of P held-out prompts: one greedy answer each, and n answers drawn at temperature 1.

    greedy   (P,) answers with their scores, in the order of the prompts
    sampled  (P, n) answers with their scores; empty if none were asked for
    logp     (P, n) mean log-probability of each sampled answer's tokens, nats
    tokens   (P, n) each sampled answer's drawn tokens, its end-of-sequence token included
    said     (P, n) sampled answers as a reward function sees them; empty where those are the texts
    """

    examples: list[Example]
    greedy: list[Answer]
    sampled: list[list[Answer]]
    logp: list[list[float]] = field(default_factory=list)
    tokens: list[list[list[int]]] = field(default_factory=list)
    said: list[list[Prompt]] = field(default_factory=list)

    def per_prompt(self) -> list[float]:
        """Share of each prompt's sampled answers that are correct."""
        return [sum(s.correct for _, s in answers) / len(answers) for answers in self.sampled]

    def accuracy(self) -> tuple[Estimate, Estimate]:
        """Greedy and sampled accuracy with 95% intervals.

        The sampled answers of one prompt are not independent, so that interval is over prompts.
        """
        n = len(self.greedy)
        correct = sum(s.correct for _, s in self.greedy)
        greedy = Estimate(correct / n, *wilson(correct, n))
        if not self.sampled:
            return greedy, Estimate(math.nan, math.nan, math.nan)
        return greedy, share_interval(self.per_prompt())

    def well_formed(self) -> float:
        """Share of all answers that have the form of an answer."""
        scores = [s for _, s in self.greedy]
        for answers in self.sampled:
            scores += [s for _, s in answers]
        return sum(s.well_formed for s in scores) / len(scores)

    def metrics(self) -> dict[str, float]:
        """The numbers under their names in metrics.jsonl, without those that were not measured."""
        metrics = {"eval/well_formed": self.well_formed()}
        for name, estimate in zip(("greedy", "sampled"), self.accuracy(), strict=True):
            if math.isnan(estimate.mean):
                continue
            key = f"eval/accuracy_{name}"
            metrics |= {key: estimate.mean, f"{key}_lo": estimate.lo, f"{key}_hi": estimate.hi}
        return metrics


class _Drawn(NamedTuple):
    """A completion before it is scored."""

    text: str
    said: Prompt
    logp: float
    tokens: list[int]


class _Answered(NamedTuple):
    """One prompt's part of an Evaluation."""

    example: Example
    greedy: Answer
    sampled: list[Answer]
    logp: list[float]
    tokens: list[list[int]]
    said: list[Prompt]


def evaluate(
    sampler: Sampler,
    task: Task,
    *,
    split: str,
    prompts: int,
    samples: int,
    max_new_tokens: int,
    seed: int = 0,
    weight_version: int = 0,
    world: World | None = None,
) -> Evaluation:
    """Evaluate the sampler's model on the first `prompts` examples of `split`, or on all if it has fewer."""
    world = world or World()
    size = task.size(split)
    if size == 0 or prompts < 1:
        expected = f"at least one of {task.name}'s split {split!r}"
        raise UserError(f"prompts: expected {expected}, got {prompts} of {size}")
    local = world.share(min(prompts, size))
    examples = [task.example(split, i) for i in local]
    asked = for_template([e.prompt for e in examples], [e.fields for e in examples], sampler.tokenizer)

    def generate(n: int, temperature: float, first: int) -> list[_Drawn]:
        params = SamplingParams(
            n=n,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=EVAL_SEED + seed,
            stop=tuple(task.stop),
        )
        talk = dialogue(task, sampler.tokenizer, [e for e in examples for _ in range(n)])
        rollouts = sampler.generate(
            asked,
            params,
            sequence_offset=first,
            weight_version=weight_version,
            environment=talk,
        )
        if talk is not None:
            rollouts = replace(rollouts, messages=talk.messages(rollouts))
        texts, said = rollouts.text or [], rollouts.said or []
        columns = zip(texts, said, mean_logp(rollouts), rollouts.completions(), strict=True)
        return [_Drawn(*column) for column in columns]

    def scored(example: Example, text: str) -> Answer:
        return text, call_user(f"--task: {task.name}'s verifier", task.verify, example, text)

    greedy = generate(1, 0.0, 0)
    drawn = generate(samples, 1.0, local.start * samples) if samples else []
    answered = []
    for i, (example, best) in enumerate(zip(examples, greedy, strict=True)):
        some = drawn[i * samples : (i + 1) * samples]
        best_answer = scored(example, best.text)
        answers = [scored(example, d.text) for d in some]
        logp = [d.logp for d in some]
        tokens = [d.tokens for d in some]
        said = [d.said for d in some]
        answered.append(_Answered(example, best_answer, answers, logp, tokens, said))
    return _collect(world.gather(answered), bool(samples))


def _collect(rows: Sequence[_Answered], sampled: bool) -> Evaluation:
    examples = [row.example for row in rows]
    greedy = [row.greedy for row in rows]
    if not sampled:
        return Evaluation(examples, greedy, [])
    return Evaluation(
        examples,
        greedy,
        sampled=[row.sampled for row in rows],
        logp=[row.logp for row in rows],
        tokens=[row.tokens for row in rows],
        said=[row.said for row in rows],
    )


def mean_logp(rollouts: Rollouts) -> list[float]:
    """(S,) mean log-probability of the tokens that the policy chose, nats; 0 for a sequence without any."""
    lengths = rollouts.cu_seqlens.diff().long().cpu()
    sequence = torch.repeat_interleave(torch.arange(len(rollouts)), lengths)
    zeros = torch.zeros(len(rollouts), dtype=torch.float64)
    total = zeros.index_add(0, sequence, rollouts.logp.double().cpu())
    count = zeros.index_add(0, sequence, rollouts.completion_mask.double().cpu())
    return (total / count.clamp_min(1)).tolist()


# --- the file -------------------------------------------------------------------------------------
def save(
    evaluation: Evaluation,
    path: Path,
    more: Mapping[str, object] | None = None,
    chosen: Sequence[int] = (),
) -> None:
    """Write the metrics, whatever `more` there is, and every answer as JSON.

    chosen  the index of each prompt's sample that a search chose
    """
    answers = []
    for i, (example, (text, verdict)) in enumerate(zip(evaluation.examples, evaluation.greedy, strict=True)):
        drawn = evaluation.sampled[i] if evaluation.sampled else []
        answer: dict[str, object] = {
            "prompt": example.prompt,
            "greedy": {"completion": text, "correct": verdict.correct, "message": verdict.message},
            "sampled": [{"completion": t, "correct": s.correct} for t, s in drawn],
        }
        if i < len(chosen):
            answer["chosen"] = chosen[i]
        answers.append(answer)

    contents = {**evaluation.metrics(), **(more or {}), "answers": answers}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(contents, indent=1))


# --- search -----------------------------------------------------------------------------------------
class SearchRow(TypedDict):
    """Accuracy of a search among n samples, and of an oracle that knows which are correct."""

    n: int
    accuracy: Estimate
    oracle: Estimate


def candidates(evaluation: Evaluation, task: Task, reward: Reward | None) -> list[Candidates]:
    """Each prompt's samples as a search sees them: with rewards if there is a reward, and with answers if the
    task has them.
    """
    samples = []
    for example, drawn in zip(evaluation.examples, evaluation.sampled, strict=True):
        samples += [(example, text) for text, _ in drawn]

    rewards: list[float] = []
    if reward is not None:
        prompts = [example.prompt for example, _ in samples]
        said = [one for drawn in evaluation.said for one in drawn] or [text for _, text in samples]
        tokens = [ids for drawn in evaluation.tokens for ids in drawn]
        columns = [{"example": example, **example.fields} for example, _ in samples]
        rewards = score([reward], prompts, said, tokens, columns).reward

    answers: list[object] = []
    read = getattr(task, "answer", None)
    if read is not None:
        answers = [call_user(f"--task: {task.name}'s answer", read, text) for _, text in samples]

    made = []
    first = 0
    for drawn, logp in zip(evaluation.sampled, evaluation.logp, strict=True):
        part = slice(first, first + len(drawn))
        first = part.stop
        correct = [s.correct for _, s in drawn]
        made.append(Candidates(right=correct, logp=logp, reward=rewards[part], answer=answers[part]))
    return made


def search_accuracy(found: Sequence[Candidates], search: str) -> list[SearchRow]:
    """Accuracy of the search among n samples, n = 1, 2, 4, ... and all, beside the oracle's."""
    total = len(found[0].right)
    choose = SEARCHES[search]
    sizes = {2**i for i in range(total.bit_length()) if 2**i <= total} | {total}
    table = []
    for n in sorted(sizes):
        accuracy = _over_prompts([choose.at_k(c, n) for c in found])
        oracle = _over_prompts([pass_at_k(total, sum(c.right), n) for c in found])
        table.append(SearchRow(n=n, accuracy=accuracy, oracle=oracle))
    return table


def _over_prompts(values: Sequence[float]) -> Estimate:
    """The mean of one probability per prompt, with its interval.

    Values that are all 0 or 1 may agree by chance, and then get Wilson's interval.
    """
    if not all(v in (0, 1) for v in values):
        return share_interval(values)
    correct = sum(values)
    n = len(values)
    return Estimate(correct / n, *wilson(int(correct), n))
