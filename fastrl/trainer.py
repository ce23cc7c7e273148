"""The loop.  `train(config)` is what `fastrl sft`, `fastrl grpo`, ... call."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from fastrl.config import Run
from fastrl.config.schema import check_types
from fastrl.methods import command_of
from fastrl.methods.method import arithmetic
from fastrl.parallel.device import reproducible
from fastrl.parallel.world import init_world
from fastrl.report import report
from fastrl.run.checkpoint import number_of
from fastrl.run.evaluate import evaluate
from fastrl.run.folder import link_latest, run_folder
from fastrl.run.interrupt import Interrupt, outlasting_terminal
from fastrl.run.log import REWARDS, replace_text
from fastrl.run.session import Session, set_up
from fastrl.tasks import notes
from fastrl.train.optimizer import NotFinite
from fastrl.train.source import Evaluable


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended: steps done, the newest checkpoint, the last step's metrics, and whether it was stopped
    before its last step.

    signal  the number of the signal that asked it to stop, also in its last step; 0 for none
    folder  what it wrote to
    """

    steps: int
    checkpoint: Path | None
    metrics: dict[str, float]
    interrupted: bool
    signal: int = 0
    folder: str = ""

    @property
    def exit_code(self) -> int:
        """0, or what a shell reports for a program that a signal ended."""
        return 128 + self.signal if self.signal else 0


def train(config: Run) -> RunResult:
    """Train as `config` says; the run folder holds everything it leaves behind.

    Ctrl-C, SIGTERM or a closed terminal finishes the step, saves, and returns; a second one raises
    Interrupted.  Raises UserError for whatever the user can mend, and TypeError for what is no configuration.
    """
    command_of(config)
    check_types(config)
    world = init_world()
    with reproducible(), run_folder(config, world) as settled:
        session = set_up(settled)
        if world.is_main:
            session.log.message(link_latest(settled.output_dir))
        stop = Interrupt(
            settled.max_seconds,
            save_seconds=60 * settled.save.minutes,
            grace=settled.save.grace,
            world=world,
        )
        with outlasting_terminal(stop), arithmetic(settled), session.log, stop:
            _say_split(settled, session)
            result = _loop(settled, session, stop)
        if world.is_main and result.steps > 0:
            session.log.message("drawing the report")
            page = report.build(settled.output_dir)
            written = {"checkpoint": result.checkpoint, "report": page}
            session.log.message("  ".join(f"{what} {path}" for what, path in written.items() if path))
    return result


def _say_split(config: Run, run: Session) -> None:
    """What there is to say of the split that is evaluated on, and of a run without a step."""
    task = run.context.task
    if task is not None and config.eval.prompts:
        for note in notes(task, config.eval.split):
            run.log.message(note)
    if config.steps == 0:
        run.log.message("--steps 0: nothing is trained")


def _loop(config: Run, run: Session, stop: Interrupt) -> RunResult:
    world = run.context.world
    metrics: dict[str, float] = {}
    step, saved = run.start, run.newest()
    if not run.evaluated:
        stop.doing("finishing the evaluation before the first step", "only that")
        _evaluate(config, run, step)

    stopping = stop.asked(world)
    while step < config.steps and not stopping:
        stop.doing(f"finishing step {step + 1} of {config.steps}, then saving", _lost(step, saved))
        metrics = _told_step(run, step, saved)
        step += 1

        stopping = stop.asked(world)
        wanted = stopping or step == config.steps or _due(step, config.save.every)
        if wanted or stop.save_due:
            stop.doing(f"saving step {step}", _lost(step, saved))
            saved = run.save(step, temporary=not wanted)
            stop.saved()

        stop.doing(f"finishing the evaluation after step {step}, then saving", _lost(step, saved))
        if _evaluate(config, run, step) and not stopping:
            stopping = stop.agreed(world)
            if stopping and saved != run.at(step):
                saved = run.save(step)

    if step < config.steps:
        run.log.message(f"stopped after step {step} of {config.steps}; {run.how_to_resume(saved)}")
    return RunResult(
        step,
        saved,
        metrics,
        interrupted=step < config.steps,
        signal=stop.signal,
        folder=config.output_dir,
    )


def _told_step(run: Session, step: int, saved: Path | None) -> dict[str, float]:
    """The metrics of a step; whatever breaks it off, the log says from where the run can go on."""
    try:
        return _step(run, step, saved)
    except BaseException:
        text = f"stopped in step {step + 1}, without {_lost(step, saved)}"
        run.log.message(f"{text}; {run.how_to_resume(saved)}" if saved else text)
        raise


def _lost(step: int, saved: Path | None) -> str:
    """What is lost where the step after `step` is broken off."""
    if saved is None:
        return f"all steps, {step + 1} with this one: there is no checkpoint yet"
    count = step - number_of(saved) + 1
    steps = "step" if count == 1 else "steps"
    return f"{count} {steps}: the newest checkpoint is {saved.name}"


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


def _evaluate(config: Run, run: Session, step: int) -> bool:
    """Evaluate after `step` if that is due, and say whether it was; the checkpoint comes first, so that
    nothing that fails here costs a step.
    """
    if config.eval.prompts == 0 or not (step in (0, config.steps) or _due(step, config.eval.every)):
        return False
    began = time.perf_counter()
    if isinstance(run.source, Evaluable):
        metrics = _held_out(config, run, run.source, step)
    else:
        metrics = _answers(config, run)
    if metrics:
        run.log.eval(step, metrics | {"eval/time": time.perf_counter() - began})
    return True


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
