"""Accuracy of a model on a task's held-out split: greedy and sampled, with intervals."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrl.adapter import load_model
from fastrl.config import Evaluate
from fastrl.device import place, set_threads
from fastrl.dialogue import dialogue
from fastrl.dist import World
from fastrl.errors import UserError
from fastrl.files import call_user
from fastrl.intake import load_run_task
from fastrl.sampler import Sampler, SamplingParams
from fastrl.stats import Estimate, mean_interval, wilson
from fastrl.tasks import Example, Score, Task
from fastrl.tokenizer import load_tokenizer

EVAL_SEED = 20_000_003  # the noise of evaluations, never the training's


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of `prompts` held-out prompts: one greedy answer each, and `samples` drawn at temperature 1.

    greedy (P,), sampled (P, n) answers with their scores, in the order of the prompts
    """

    examples: list[Example]
    greedy: list[tuple[str, Score]]
    sampled: list[list[tuple[str, Score]]]

    def per_prompt(self) -> list[float]:
        """Share of each prompt's sampled answers that are right."""
        return [sum(s.correct for _, s in answers) / len(answers) for answers in self.sampled]

    def accuracy(self) -> tuple[Estimate, Estimate]:
        """Greedy and sampled accuracy with 95% intervals; sampled answers of one prompt are not independent trials."""
        right = sum(s.correct for _, s in self.greedy)
        n = len(self.greedy)
        sampled = mean_interval(self.per_prompt()) if self.sampled else Estimate(float("nan"), float("nan"), float("nan"))
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
                out |= {f"eval/accuracy_{name}": e.mean, f"eval/accuracy_{name}_lo": e.lo, f"eval/accuracy_{name}_hi": e.hi}
        return out


def evaluate(
    sampler: Sampler, task: Task, *, split: str, prompts: int, samples: int, max_new_tokens: int, seed: int = 0,
    weight_version: int = 0, world: World | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluate the sampler's model on the first `prompts` examples of `split` (all of it when it has fewer)."""
    world = world or World()
    size = task.size(split)
    if size == 0 or prompts < 1:
        raise UserError(f"prompts: expected at least one of {task.name}'s split {split!r}, got {prompts} of {size}")
    mine = world.share(min(prompts, size))
    examples = [task.example(split, i) for i in mine]
    texts = [e.prompt for e in examples]
    shared: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": EVAL_SEED + seed, "stop": tuple(task.stop)}

    def answers(params: SamplingParams, first: int = 0) -> list[str]:
        talk = dialogue(task, sampler.tokenizer, [e for e in examples for _ in range(params.n)])
        return sampler.generate(texts, params, sequence_offset=first, weight_version=weight_version, environment=talk).text or []

    greedy = answers(SamplingParams(temperature=0.0, **shared))
    drawn = answers(SamplingParams(n=samples, **shared), mine.start * samples) if samples else []

    def scored(example: Example, text: str) -> tuple[str, Score]:
        return text, call_user(f"--task: {task.name}'s verifier", task.verify, example, text)

    rows = world.gather(
        [
            (e, scored(e, g), [scored(e, t) for t in drawn[i * samples : (i + 1) * samples]])
            for i, (e, g) in enumerate(zip(examples, greedy, strict=True))
        ]
    )
    return Evaluation([e for e, _, _ in rows], [g for _, g, _ in rows], [s for _, _, s in rows] if samples else [])


def run(config: Evaluate) -> None:
    """The command `fastrl eval`."""
    set_threads(config.threads)
    device, dtype = place(config.device, config.dtype)
    task = load_run_task(config.task, config.task_options)
    if task is None:
        raise UserError("--task: expected a task to evaluate on, got none")
    model = load_model(config.model, dtype=dtype, device=device)
    sampler = Sampler(model, load_tokenizer(config.tokenizer, config.model, task))
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
    if config.output:
        save(done, Path(config.output))


def save(done: Evaluation, path: Path) -> None:
    """Write the metrics and every answer as JSON."""
    answers = [
        {
            "prompt": e.prompt,
            "greedy": {"completion": g, "correct": s.correct, "message": s.message},
            "sampled": [{"completion": t, "correct": s.correct} for t, s in drawn],
        }
        for e, (g, s), drawn in zip(done.examples, done.greedy, done.sampled or [[] for _ in done.greedy], strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**done.metrics(), "answers": answers}, indent=1))
