"""Accuracy of a model on a task's held-out split: greedy and sampled, with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastrl.batch.types import Rollouts
from fastrl.config import Evaluate
from fastrl.errors import UserError
from fastrl.files import call_user
from fastrl.model.adapter import load_model
from fastrl.model.tokenizer import load_tokenizer
from fastrl.parallel.device import resolve_device, set_threads
from fastrl.parallel.world import World
from fastrl.report.stats import Estimate, share_interval, wilson
from fastrl.rewards.functions import Reward, load_reward, score
from fastrl.sampler import Sampler, SamplingParams
from fastrl.sampler.episodes import dialogue
from fastrl.search import SEARCHES, Candidates, pass_at_k
from fastrl.tasks import Example, Score, Task, load_run_task

EVAL_SEED = 20_000_003  # the noise of evaluations, never the training's


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of `prompts` held-out prompts: one greedy answer each, and `samples` drawn at temperature 1.

    greedy (P,), sampled (P, n) answers with their scores, in the order of the prompts
    logp   (P, n) mean log-probability of each sampled answer's tokens, nats
    tokens (P, n) each sampled answer's tokens, its end-of-sequence token included
    """

    examples: list[Example]
    greedy: list[tuple[str, Score]]
    sampled: list[list[tuple[str, Score]]]
    logp: list[list[float]] = field(default_factory=list)
    tokens: list[list[list[int]]] = field(default_factory=list)

    def per_prompt(self) -> list[float]:
        """Share of each prompt's sampled answers that are right."""
        return [sum(s.correct for _, s in answers) / len(answers) for answers in self.sampled]

    def accuracy(self) -> tuple[Estimate, Estimate]:
        """Greedy and sampled accuracy with 95% intervals; sampled answers of one prompt are not independent
        trials.
        """
        right = sum(s.correct for _, s in self.greedy)
        n = len(self.greedy)
        sampled = (
            share_interval(self.per_prompt())
            if self.sampled
            else Estimate(float("nan"), float("nan"), float("nan"))
        )
        return Estimate(right / n, *wilson(right, n)), sampled

    def well_formed(self) -> float:
        """Share of all answers that have the form of an answer."""
        scores = [s for _, s in self.greedy] + [s for answers in self.sampled for _, s in answers]
        return sum(s.well_formed for s in scores) / len(scores)

    def metrics(self) -> dict[str, float]:
        """The numbers under the names of metrics.jsonl, without those that were not asked for."""
        out: dict[str, float] = {"eval/well_formed": self.well_formed()}
        for name, e in zip(("greedy", "sampled"), self.accuracy(), strict=True):
            if not math.isnan(e.mean):
                out |= {
                    f"eval/accuracy_{name}": e.mean,
                    f"eval/accuracy_{name}_lo": e.lo,
                    f"eval/accuracy_{name}_hi": e.hi,
                }
        return out


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
    """Evaluate the sampler's model on the first `prompts` examples of `split` (all of it when it has
    fewer).
    """
    world = world or World()
    size = task.size(split)
    if size == 0 or prompts < 1:
        raise UserError(
            f"prompts: expected at least one of {task.name}'s split {split!r}, got {prompts} of {size}"
        )
    mine = world.share(min(prompts, size))
    examples = [task.example(split, i) for i in mine]
    texts = [e.prompt for e in examples]
    shared: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "seed": EVAL_SEED + seed,
        "stop": tuple(task.stop),
    }

    def answers(params: SamplingParams, first: int = 0) -> list[tuple[str, float, list[int]]]:
        talk = dialogue(task, sampler.tokenizer, [e for e in examples for _ in range(params.n)])
        done = sampler.generate(
            texts, params, sequence_offset=first, weight_version=weight_version, environment=talk
        )
        return list(zip(done.text or [], mean_logp(done), done.completions(), strict=True))

    greedy = answers(SamplingParams(temperature=0.0, **shared))
    drawn = answers(SamplingParams(n=samples, **shared), mine.start * samples) if samples else []

    def scored(example: Example, text: str) -> tuple[str, Score]:
        return text, call_user(f"--task: {task.name}'s verifier", task.verify, example, text)

    own = [drawn[i * samples : (i + 1) * samples] for i in range(len(examples))]
    rows = world.gather(
        [
            (
                e,
                scored(e, g),
                [scored(e, t) for t, _, _ in some],
                [logp for _, logp, _ in some],
                [ids for _, _, ids in some],
            )
            for e, (g, _, _), some in zip(examples, greedy, own, strict=True)
        ]
    )
    sampled, logp, tokens = ([r[i] for r in rows] if samples else [] for i in (2, 3, 4))
    return Evaluation([r[0] for r in rows], [r[1] for r in rows], sampled, logp, tokens)


def mean_logp(rollouts: Rollouts) -> list[float]:
    """(S,) mean log-probability of the tokens that the policy chose, nats; 0 for a sequence of none."""
    sequence = torch.repeat_interleave(torch.arange(len(rollouts)), rollouts.cu_seqlens.diff().long().cpu())
    zeros = torch.zeros(len(rollouts), dtype=torch.float64)
    total, count = (
        zeros.index_add(0, sequence, x.double().cpu()) for x in (rollouts.logp, rollouts.completion_mask)
    )
    return (total / count.clamp_min(1)).tolist()


def run(config: Evaluate) -> None:
    """The command `fastrl eval`."""
    set_threads(config.threads)
    device, dtype = resolve_device(config.device, config.dtype)
    task = load_run_task(config.task, config.task_options)
    if task is None:
        raise UserError("--task: expected a task to evaluate on, got none")
    _check_search(config, task)
    reward = None if config.reward is None else load_reward(config.reward, dtype=dtype, device=device)
    model = load_model(config.model, dtype=dtype, device=device)
    sampler = Sampler(model, load_tokenizer(config.tokenizer, config.model, task.tokenizer))
    wanted: dict[str, Any] = {
        "prompts": config.prompts,
        "samples": config.samples,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
    }
    done = evaluate(sampler, task, split=config.split, **wanted)
    for name, e in zip(("greedy", "sampled"), done.accuracy(), strict=True):
        if not math.isnan(e.mean):
            print(f"{name:8} accuracy  {e.mean:6.1%}  (95% interval {e.lo:.1%} to {e.hi:.1%})")
    asked = f"{len(done.greedy)} prompts of {task.name}/{config.split}, {config.samples} samples each"
    print(f"well-formed answers {done.well_formed():.1%}; {asked}")
    found = [] if config.search is None else candidates(done, task, reward)
    table = worth(found, config.search) if config.search else []
    for line in table:
        e, o = line["accuracy"], line["oracle"]
        print(
            f"{config.search} {line['n']:<4} {e.mean:6.1%}  (95% interval {e.lo:.1%} to {e.hi:.1%}), "
            f"oracle {o.mean:.1%}"
        )
    if config.output:
        chosen = [SEARCHES[config.search].choose(c) for c in found] if config.search else []
        save(done, Path(config.output), {"search": table} if table else {}, chosen)


def save(
    done: Evaluation, path: Path, more: Mapping[str, Any] | None = None, chosen: Sequence[int] = ()
) -> None:
    """Write the metrics, whatever `more` there is, and every answer as JSON; `chosen` has which sample a
    search gave.
    """
    answers: list[dict[str, Any]] = [
        {
            "prompt": e.prompt,
            "greedy": {"completion": g, "correct": s.correct, "message": s.message},
            "sampled": [{"completion": t, "correct": s.correct} for t, s in drawn],
        }
        for e, (g, s), drawn in zip(
            done.examples, done.greedy, done.sampled or [[] for _ in done.greedy], strict=True
        )
    ]
    for answer, index in zip(answers, chosen, strict=False):
        answer["chosen"] = index
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**done.metrics(), **(more or {}), "answers": answers}, indent=1))


# --- search -----------------------------------------------------------------------------------------
def candidates(done: Evaluation, task: Any, reward: Reward | None) -> list[Candidates]:
    """Each prompt's samples with what a search sees of them: rewards where there is a reward, answers where
    the task has them.
    """
    every = [(e, text) for e, drawn in zip(done.examples, done.sampled, strict=True) for text, _ in drawn]
    rewards: list[float] = []
    if reward is not None:
        columns = [{"example": e, **e.fields} for e, _ in every]
        tokens = [ids for drawn in done.tokens for ids in drawn]
        rewards = score(
            [reward], [e.prompt for e, _ in every], [text for _, text in every], tokens, columns
        ).reward
    read = getattr(task, "answer", None)
    answers = (
        [] if read is None else [call_user(f"--task: {task.name}'s answer", read, text) for _, text in every]
    )
    out, first = [], 0
    for drawn, logp in zip(done.sampled, done.logp, strict=True):
        part = slice(first, first := first + len(drawn))
        out.append(
            Candidates(
                right=[s.correct for _, s in drawn], logp=logp, reward=rewards[part], answer=answers[part]
            )
        )
    return out


def worth(found: Sequence[Candidates], search: str) -> list[dict[str, Any]]:
    """Accuracy of the search by the number of samples n, 1, 2, 4, ... and all, beside an oracle's, who knows
    which is right.
    """
    total, row = len(found[0].right), SEARCHES[search]
    sizes = sorted({2**i for i in range(total.bit_length()) if 2**i <= total} | {total})
    return [
        {
            "n": n,
            "accuracy": _over_prompts([row.at_k(c, n) for c in found]),
            "oracle": _over_prompts([pass_at_k(total, sum(c.right), n) for c in found]),
        }
        for n in sizes
    ]


def _over_prompts(values: Sequence[float]) -> Estimate:
    """The mean of one probability per prompt; of nothing but 0 and 1, which may all agree by chance, with
    Wilson's interval.
    """
    right, n = sum(values), len(values)
    return (
        Estimate(right / n, *wilson(int(right), n))
        if all(v in (0, 1) for v in values)
        else share_interval(values)
    )


def _check_search(config: Evaluate, task: Any) -> None:
    row = SEARCHES.get(config.search or "")
    for option, value, fine, expected in (
        (
            "--reward",
            config.reward,
            row is not None or config.reward is None,
            "none without a --search that judges samples by it",
        ),
        (
            "--reward",
            config.reward,
            not (row and row.reward and config.reward is None),
            f"model:FOLDER or file.py:fn for {config.search}",
        ),
        ("--samples", config.samples, row is None or config.samples >= 1, "at least 1 to search in"),
        (
            "--search",
            config.search,
            not (row and row.answer) or hasattr(task, "answer"),
            f"another: {task.name} has no answer(completion)",
        ),
    ):
        if not fine:
            raise UserError(f"{option}: expected {expected}, got {value}")
