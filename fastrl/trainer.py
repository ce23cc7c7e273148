"""The loop.  `train(config)` is what `fastrl sft`, `fastrl grpo`, ... call."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from fastrl.config import Run
from fastrl.methods.method import arithmetic
from fastrl.parallel.device import reproducible
from fastrl.report import report
from fastrl.run.evaluate import evaluate
from fastrl.run.interrupt import Interrupt
from fastrl.run.log import REWARDS, replace_text
from fastrl.run.session import Session, set_up
from fastrl.train.optimizer import NotFinite
from fastrl.train.source import Evaluable


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended: steps done, the newest checkpoint, the last step's metrics, and whether it was stopped
    before its last step.
    """

    steps: int
    checkpoint: Path | None
    metrics: dict[str, float]
    interrupted: bool


def train(config: Run) -> RunResult:
    """Train as `config` says; the run folder holds everything it leaves behind.

    Ctrl-C or SIGTERM finishes the step, saves, and returns.  Raises UserError for whatever the user can mend.
    """
    with reproducible():
        session = set_up(config)
        with arithmetic(config), session.log, Interrupt(config.max_seconds) as stop:
            result = _loop(config, session, stop)
    if session.context.world.is_main and result.steps > 0:
        page = report.build(config.output_dir)
        written = {"checkpoint": result.checkpoint, "report": page}
        session.log.message("  ".join(f"{what} {path}" for what, path in written.items() if path))
    return result


def _loop(config: Run, run: Session, stop: Interrupt) -> RunResult:
    metrics: dict[str, float] = {}
    step, saved = run.start, run.newest()
    if not run.evaluated:
        _evaluate(config, run, step)

    stopping = stop.asked(run.context.world)
    while step < config.steps and not stopping:
        metrics = _step(run, step, saved)
        step += 1
        stopping = stop.asked(run.context.world)
        if stopping or step == config.steps or _due(step, config.save.every):
            saved = run.save(step)
        _evaluate(config, run, step)

    if step < config.steps:
        run.log.message(f"stopped after step {step} of {config.steps}; {run.how_to_resume(saved)}")
    return RunResult(step, saved, metrics, step < config.steps)


def _step(run: Session, step: int, saved: Path | None) -> dict[str, float]:
    """Collect the batches of a step, update on each of them, and log it; the step's metrics."""
    began = time.perf_counter()
    data = run.source.collect(step, run.version)
    sampled = time.perf_counter()

    try:
        updates = [run.learner.update(batch, step) for batch in data.batches]
    except NotFinite as error:
        kept = f"the last good checkpoint is {saved}" if saved else "no checkpoint was written before"
        raise NotFinite(f"{error}; {kept}") from error

    run.version += len(data.batches)
    metrics = data.metrics | run.merge_metrics(updates)
    run.log.step(step + 1, metrics | _pace(metrics, began, sampled))
    run.log.samples(step + 1, data.samples)
    return metrics


def _evaluate(config: Run, run: Session, step: int) -> None:
    """Evaluate after `step` if that is due; the checkpoint comes first, so that nothing that fails here costs
    a step.
    """
    if config.eval.prompts == 0 or not (step in (0, config.steps) or _due(step, config.eval.every)):
        return
    began = time.perf_counter()
    if isinstance(run.source, Evaluable):
        metrics = _held_out(config, run, run.source, step)
    else:
        metrics = _answers(config, run)
    if metrics:
        run.log.eval(step, metrics | {"eval/time": time.perf_counter() - began})


def _answers(config: Run, run: Session) -> dict[str, float]:
    """Accuracy of the answers to a task's held-out prompts."""
    wanted, context = config.eval, run.context
    if context.task is None:
        return {}
    done = evaluate(
        context.sampler,
        context.task,
        split=wanted.split,
        prompts=wanted.prompts,
        samples=wanted.samples,
        max_new_tokens=wanted.max_new_tokens or run.max_new_tokens,
        weight_version=run.version,
        world=context.world,
    )
    return done.metrics()


def _held_out(config: Run, run: Session, source: Evaluable, step: int) -> dict[str, float]:
    """Accuracy and calibration of a reward model; rewards.json keeps what the report draws."""
    metrics, table, samples = source.evaluate()
    if run.context.world.is_main:
        replace_text(Path(config.output_dir) / REWARDS, json.dumps({"step": step, **table}))
    run.log.samples(step, samples)
    return metrics


def _pace(metrics: dict[str, float], began: float, sampled: float) -> dict[str, float]:
    now = time.perf_counter()
    tokens = metrics.get("rollout/tokens", metrics["num_tokens"])
    times = {"time/step": now - began, "time/collect": sampled - began, "time/update": now - sampled}
    return times | {"perf/tokens_per_second": tokens / (now - began)}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
