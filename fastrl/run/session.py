"""Everything a run needs, built from its configuration: model, tokenizer, data source, learner, log, and
where it left off.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fastrl.config import OnPolicy, Reward, Run, Sampling
from fastrl.config.parse import dump
from fastrl.errors import UserError
from fastrl.files import read_json_lines
from fastrl.methods.grpo.prompts import load_run_task
from fastrl.methods.grpo.rollouts import Source
from fastrl.methods.method import NAMES, OVER_BATCHES, PARTS, SOURCES, Parts
from fastrl.model.decoder import Decoder
from fastrl.model.tokenizer import load_tokenizer
from fastrl.parallel.device import place, set_threads
from fastrl.parallel.world import World, join
from fastrl.run import checkpoint, environment
from fastrl.run.log import METRICS, RunLog
from fastrl.sampler import SAMPLERS, Sampler
from fastrl.tasks import Task
from fastrl.train.learner import Learner

SOURCE = "source."  # before the names of the source's tensors in a checkpoint


@dataclass(slots=True)
class Session:
    """A run under way.

    start, evaluated  the step it began or resumed at, and whether the evaluation due there is done
    version           optimizer steps the weights have seen
    """

    config: Run
    world: World
    model: Any
    tokenizer: Any
    task: Task | None
    sampler: Sampler
    learner: Learner
    source: Source
    log: RunLog
    start: int
    evaluated: bool
    version: int
    max_new_tokens: int

    def save(self, step: int) -> Path | None:
        """Write a checkpoint (the first process does; all wait)."""
        path = None
        if self.world.is_main:
            meta = {"version": self.version, "command": _command(self.config)}
            folder = Path(self.config.output_dir)
            state = self.learner.state() | {f"{SOURCE}{name}": x for name, x in self.source.state().items()}
            path = checkpoint.save(
                folder,
                step,
                self.model,
                self.tokenizer,
                state,
                meta,
                keep=self.config.save.keep,
                others=self.learner.others(),
            )
        self.world.barrier()
        return path

    def newest(self) -> Path | None:
        """The newest whole checkpoint, if there is one."""
        found = checkpoint.whole(Path(self.config.output_dir))
        return found[-1] if found else None

    def rename(self, batches: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The learner's metrics of the step's batches as one, under the names this command logs."""
        row = self.learner.algorithm
        silent = set() if row.kl_coef else {"ref_kl_k3"}  # 0 without a reference model is no measurement
        silent |= set() if row.correction else {"correction_min", "correction_mean", "correction_max"}
        values = {
            key: [b[key] for b in batches if key in b]
            for key in NAMES[type(self.config)]
            if key not in silent
        }
        return {NAMES[type(self.config)][k]: OVER_BATCHES.get(k, _mean)(v) for k, v in values.items() if v}

    def how_to_resume(self, saved: Path | None) -> str:
        """What to type to continue a run that was stopped."""
        if saved is None:
            return "nothing was saved, because no step was done"
        return (
            f"continue with: fastrl {_command(self.config)} --config "
            f"{shlex.quote(f'{self.config.output_dir}/config.yaml')} --resume"
        )


def set_up(config: Run) -> Session:
    """Build the session.  Raises UserError for whatever is wrong with the configuration,
    before any training.
    """
    _check(config)
    set_threads(config.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # else each torch.empty is written twice
    world = join()
    device, dtype = place(config.device, config.dtype)
    resumed = _resume_from(config)
    state, meta = (
        checkpoint.load(resumed) if resumed else ({}, {"step": 0, "version": 0, "command": _command(config)})
    )
    if meta["command"] != _command(config):
        raise UserError(
            f"--resume: {config.output_dir} holds a run of fastrl {meta['command']}; "
            "continue it with that, or name another folder"
        )
    parts = PARTS.get(type(config), Parts())
    algorithm = parts.choose(config)
    task = load_run_task(config.task, config.task_options)
    source_folder = str(resumed or config.model)
    model = parts.load(source_folder, dtype=dtype, device=device, seed=config.seed)
    if config.exact and not isinstance(model, Decoder):
        raise UserError(
            "--exact: expected a model that the fast decoder takes (Llama, Qwen2, Qwen3), "
            f"got {config.model}; run without it"
        )
    model.gradient_checkpointing = config.gradient_checkpointing
    tokenizer = load_tokenizer(config.tokenizer, source_folder, task)
    chosen, sampling = (
        (config.sampler, config.sampling) if isinstance(config, OnPolicy) else ("fastrl", Sampling())
    )
    sampler = SAMPLERS[chosen](model, tokenizer, sampling)
    learner = parts.learner(
        model,
        algorithm,
        config.optim,
        steps=config.steps,
        micro_tokens=config.micro_tokens,
        temperature=config.sampling.temperature if isinstance(config, OnPolicy) else 1.0,
        world=world,
    )
    if resumed:
        for name, (other, _) in learner.others().items():
            other.read(resumed / name)
        learner.load_state(state)
    source, length = SOURCES[type(config)](config, task, tokenizer, sampler, learner, algorithm, device)
    source.load_state({name.removeprefix(SOURCE): x for name, x in state.items() if name.startswith(SOURCE)})
    start, other = meta["step"], changed(config) if resumed else {}
    texts = {"config.yaml": dump(config), "environment.txt": environment.report()} if world.is_main else {}
    log = RunLog(
        config.output_dir,
        config.steps,
        name=_command(config),
        resume_step=start if resumed else None,
        texts=texts,
        enabled=world.is_main,
    )
    if other:
        log.message(
            "resumed with other options: "
            + ", ".join(f"{k} {now}, which was {was}" for k, (was, now) in other.items())
        )
    evaluated = (
        world.max(
            float(world.is_main and resumed is not None and _evaluated(Path(config.output_dir), start))
        )[0]
        > 0
    )
    return Session(
        config,
        world,
        model,
        tokenizer,
        task,
        sampler,
        learner,
        source,
        log,
        start,
        evaluated,
        meta["version"],
        length,
    )


def _check(config: Run) -> None:
    e = config.eval
    # a reward model is judged on a dataset's held-out lines, too
    judged = config.task is not None or isinstance(config, Reward)
    for option, value, fine, expected in (
        ("--steps", config.steps, config.steps >= 0, "0 or more"),
        ("--prompts", config.prompts, config.prompts >= 1, "at least 1"),
        ("--micro-tokens", config.micro_tokens, config.micro_tokens >= 1, "at least 1"),
        ("--optim.lr", config.optim.lr, 0 <= config.optim.lr < math.inf, "a number of 0 or more"),
        ("--optim.warmup", config.optim.warmup, config.optim.warmup >= 0, "0 or more"),
        ("--save.keep", config.save.keep, config.save.keep >= 0, "0 or more"),
        (
            "--eval.prompts",
            e.prompts,
            e.prompts == 0 or judged,
            "0 without a --task, whose verifier evaluates",
        ),
    ):
        if not fine:
            raise UserError(f"{option}: expected {expected}, got {value}")


def _resume_from(config: Run) -> Path | None:
    found = checkpoint.whole(Path(config.output_dir))
    if not config.resume:
        if found:
            mend = "continue it with --resume, or name another folder"
            raise UserError(f"--output-dir: {config.output_dir} already holds {found[-1].name}; {mend}")
        return None
    if not found:
        raise UserError(f"--resume: {config.output_dir} holds no whole checkpoint; start without --resume")
    return found[-1]


def changed(config: Run) -> dict[str, tuple[str, str]]:
    """What the run in the configuration's output folder was begun with, and what it is now, of each option
    that differs, as JSON.
    """
    saved = Path(config.output_dir) / "config.yaml"
    if not saved.is_file():
        return {}
    was, now = (yaml.safe_load(text) for text in (saved.read_text(encoding="utf-8"), dump(config)))
    differ = [key for key in now if key != "resume" and was.get(key) != now[key]]
    return {key: (json.dumps(was.get(key)), json.dumps(now[key])) for key in differ}


def _evaluated(folder: Path, step: int) -> bool:
    """Whether the log of a resumed run has the evaluation of the step it resumes at: it may have been stopped
    before that was done.
    """
    rows = (row for _, row in read_json_lines(folder / METRICS))
    return any(row["step"] == step and any(key.startswith("eval/") for key in row) for row in rows)


def _command(config: Run) -> str:
    return type(config).__name__.lower()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
