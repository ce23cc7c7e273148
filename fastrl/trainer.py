"""The loop.  `train(config)` is what `fastrl sft`, `fastrl grpo`, ... call."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrl.config import Run
from fastrl.evaluate import evaluate
from fastrl.interrupt import Interrupt
from fastrl.setup import Session, set_up


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended: steps done, the newest checkpoint, the last step's metrics, and whether it was stopped before its last step."""

    steps: int
    checkpoint: Path | None
    metrics: dict[str, float]
    interrupted: bool


def train(config: Run) -> RunResult:
    """Train as `config` says; the run folder holds everything it leaves behind.

    Ctrl-C or SIGTERM finishes the step, saves, and returns.  Raises UserError for whatever the user can mend.
    """
    session = set_up(config)
    with session.log, Interrupt(config.max_seconds) as stop:
        return _loop(config, session, stop)


def _loop(config: Run, run: Session, stop: Interrupt) -> RunResult:
    metrics: dict[str, float] = {}
    step = run.start
    if step == 0:
        _evaluate(config, run, 0)
    while step < config.steps and not stop.asked(run.world):
        began = time.perf_counter()
        data = run.source.collect(step, run.version)
        sampled = time.perf_counter()
        metrics = dict(data.metrics)
        for batch in data.batches:
            metrics |= run.rename(run.learner.update(batch, step))
            run.version += 1
        step += 1
        run.log.step(step, metrics | _pace(data.metrics, metrics, began, sampled))
        run.log.samples(step, data.samples)
        last = step == config.steps
        if last or _due(step, config.eval.every):
            _evaluate(config, run, step)
        if _due(step, config.save.every) and not last:
            run.save(step)
    checkpoint = run.save(step) if step > run.start else run.newest()
    if step < config.steps:
        run.log.message(f"stopped after step {step} of {config.steps}; continue with --resume --output-dir {config.output_dir}")
    return RunResult(step, checkpoint, metrics, step < config.steps)


def _evaluate(config: Run, run: Session, step: int) -> None:
    if config.eval.prompts == 0 or run.task is None:
        return
    began = time.perf_counter()
    length: Any = config.eval.max_new_tokens or run.max_new_tokens
    e = config.eval
    done = evaluate(run.sampler, run.task, split=e.split, prompts=e.prompts, samples=e.samples, max_new_tokens=length, world=run.world)
    run.log.eval(step, done.metrics() | {"eval/time": time.perf_counter() - began})


def _pace(known: dict[str, float], metrics: dict[str, float], began: float, sampled: float) -> dict[str, float]:
    now = time.perf_counter()
    tokens = known.get("rollout/tokens", metrics.get("num_tokens", 0.0))
    return {"time/step": now - began, "time/collect": sampled - began, "time/update": now - sampled, "perf/tokens_per_second": tokens / (now - began)}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
