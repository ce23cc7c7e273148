"""Everything a run needs, built from its configuration: model, tokenizer, data source, learner, log, and
where it left off.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fastrl import ops
from fastrl.algorithms.row import Loggable
from fastrl.config import OnPolicy, Run
from fastrl.config.parse import dump
from fastrl.errors import UserError, require
from fastrl.files import read_json_lines
from fastrl.kernels._verdicts.summary import difference, sentence
from fastrl.methods import command_of, method_of
from fastrl.methods.method import AnyContext, AnyMethod, Context, Origin
from fastrl.model.decoder import Decoder
from fastrl.model.folder import model_folder
from fastrl.model.tokenizer import align_ends
from fastrl.model.widths import kernel_widths
from fastrl.parallel.device import resolve_device, set_threads
from fastrl.parallel.kernels import settle_kernels
from fastrl.parallel.world import World, init_world
from fastrl.report.metric import Need, over_batches
from fastrl.rewards.models import settled_reward
from fastrl.run import checkpoint, environment
from fastrl.run.banner import banner
from fastrl.run.log import METRICS, RunLog
from fastrl.run.remembered import to_remember
from fastrl.sampler import SAMPLERS
from fastrl.sampler.engine import PAGE
from fastrl.tasks import load_run_task
from fastrl.train.learner import Trainable
from fastrl.train.source import Source

SOURCE = "source."  # before the names of the source's tensors in a checkpoint


@dataclass(slots=True)
class Session:
    """A run under way.

    start           the step it began or resumed at
    evaluated       whether the evaluation due at that step is done
    version         updates so far, skipped ones (no loss tokens) included; sampled tokens are stamped with it
    max_new_tokens  longest completion of an evaluation, unless --eval.max-new-tokens says otherwise
    """

    method: AnyMethod
    context: AnyContext
    learner: Trainable[Any]
    source: Source[Any]
    log: RunLog
    start: int
    evaluated: bool
    version: int
    max_new_tokens: int

    def save(self, step: int, *, temporary: bool = False) -> Path:
        """Write a checkpoint (the first process does; all wait, and all stop where it fails).

        temporary  the next checkpoint replaces it
        """
        return self.context.world.from_main(lambda: self._write(step, temporary))

    def at(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return checkpoint.folder_of(Path(self.context.config.output_dir), step)

    def _write(self, step: int, temporary: bool) -> Path:
        context, config = self.context, self.context.config
        source = {f"{SOURCE}{name}": x for name, x in self.source.state().items()}
        tensors = self.learner.state() | source
        kernels = ops.backend(context.device)
        meta = {
            "version": self.version,
            "command": command_of(config),
            "kernels": kernels,
            **to_remember(config, self.max_new_tokens),
        }
        return checkpoint.save(
            Path(config.output_dir),
            step,
            context.model,
            context.tokenizer,
            tensors,
            meta,
            keep=config.save.keep,
            others=self.learner.companions(),
            temporary=temporary,
        )

    def newest(self) -> Path | None:
        """The newest whole checkpoint, if there is one."""
        found = checkpoint.complete_checkpoints(Path(self.context.config.output_dir))
        return found[-1] if found else None

    def merge_metrics(self, batches: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """One dict from the metrics of the step's updates, under the names that this command logs; KL and
        correction metrics are left out where the algorithm has none.
        """
        algorithm: Loggable = self.context.algorithm
        has: dict[Need, bool] = {
            "reference": bool(algorithm.kl_coef),
            "correction": bool(algorithm.correction),
        }
        lacking = [need for need, present in has.items() if not present]
        return over_batches(self.method.metrics, batches, lacking)

    def how_to_resume(self, saved: Path | None) -> str:
        """What to type to continue a run that was stopped."""
        if saved is None:
            return "nothing was saved, because no step was done"
        config = self.context.config
        file = shlex.quote(f"{config.output_dir}/config.yaml")
        return f"continue with: fastrl {command_of(config)} --config {file} --resume"


def set_up(config: Run) -> Session:
    """Build the session.  Raises UserError for what is wrong with the configuration, before any training."""
    config = _settled(config)
    method = method_of(command_of(config))
    check_options(config, method)
    set_threads(config.threads)
    world = init_world()

    world.from_main(lambda: checkpoint.remove_partial(Path(config.output_dir)))
    resumed = _resume_from(config)
    state, meta = _saved(resumed, config)
    folder = str(resumed or config.model)
    context = _context(config, method, folder, world)

    learner = method.learner(context)
    if resumed:
        for name, (other, _) in learner.companions().items():
            other.read(resumed / name)
        learner.load_state(state)

    source, longest = method.source(context, learner)
    of_source = {k.removeprefix(SOURCE): x for k, x in state.items() if k.startswith(SOURCE)}
    source.load_state(of_source)

    start = meta["step"]
    log = _open_log(config, start if resumed else None, world)
    log.message(banner(context))
    _name_kernels(log, context.device, meta.get("kernels", {}))
    evaluated = world.is_main and resumed is not None and _evaluated(Path(config.output_dir), start)
    return Session(
        method=method,
        context=context,
        learner=learner,
        source=source,
        log=log,
        start=start,
        evaluated=world.max(float(evaluated))[0] > 0,
        version=meta["version"],
        max_new_tokens=longest,
    )


def _settled(config: Run) -> Run:
    """The options with a run's newest checkpoint in the place of its folder: what is recorded stays the same
    model when that run goes on.
    """
    settled = replace(config, model=_meant(config.model, "--model"))
    if config.tokenizer is not None:
        settled = replace(settled, tokenizer=_meant(config.tokenizer, "--tokenizer"))
    if isinstance(settled, OnPolicy):
        settled = replace(settled, reward=tuple(settled_reward(spec) for spec in settled.reward))
    return settled


def _meant(name: str, option: str) -> str:
    found = model_folder(name, option)
    return name if found == Path(name) else str(found)


def _saved(resumed: Path | None, config: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The checkpoint's tensors and its meta data; those of a run that has not begun where there is none."""
    command = command_of(config)
    if resumed is None:
        return {}, {"step": 0, "version": 0, "command": command}

    state, meta = checkpoint.load(resumed)
    if meta["command"] != command:
        raise UserError(
            f"--resume: {config.output_dir} holds a run of fastrl {meta['command']}; "
            "continue it with that, or name another folder"
        )
    return state, meta


def _context(config: Run, method: AnyMethod, folder: str, world: World) -> AnyContext:
    """Model, tokenizer, task and sampler of the run, from a folder of weights."""
    algorithm = method.choose(config)
    device, dtype = resolve_device(config.device, config.dtype)
    task = load_run_task(config.task, config.task_options)
    origin = Origin(config, algorithm, folder, dtype, device, task)
    model = method.load(origin)
    settle_kernels(device, kernel_widths(model.config, PAGE), dtype, world)
    if config.exact and not isinstance(model, Decoder):
        raise UserError(
            "--exact: expected a model that the fast decoder takes (Llama, Qwen2, Qwen3), "
            f"got {config.model}; run without it"
        )
    model.gradient_checkpointing = config.gradient_checkpointing

    tokenizer = origin.tokenizer
    align_ends(model, tokenizer)
    name, sampling = method.sampling(config)
    return Context(
        config=config,
        algorithm=algorithm,
        model=model,
        tokenizer=tokenizer,
        task=task,
        sampler=SAMPLERS[name](model, tokenizer, sampling),
        sampling=sampling,
        device=device,
        world=world,
    )


def _open_log(config: Run, resume_step: int | None, world: World) -> RunLog:
    """The run's log; a resumed run is told of options that are not what it began with."""
    resumed = resume_step is not None
    differ = changed(config) if resumed else {}
    lacks = resumed and not (Path(config.output_dir) / "config.yaml").is_file()
    texts = {}
    if world.is_main:
        texts = {"config.yaml": dump(config), "environment.txt": environment.environment_text()}
    log = RunLog(
        config.output_dir,
        config.steps,
        name=command_of(config),
        resume_step=resume_step,
        texts=texts,
        enabled=world.is_main,
    )
    if lacks:
        log.message("config.yaml was missing: whether options are those that the run began with is not known")
    if differ:
        listed = ", ".join(f"{option} {now}, which was {was}" for option, (was, now) in differ.items())
        log.message(f"resumed with other options: {listed}")
    return log


def _name_kernels(log: RunLog, device: torch.device, saved: Mapping[str, str]) -> None:
    """Say which kernels run on a GPU, and where they are not those that the checkpoint was written with."""
    chosen = ops.backend(device)
    line = sentence(device, chosen)
    if line:
        log.message(line)
    if saved and saved != chosen:
        log.message(f"resumed with other kernels, which changes bits: {difference(saved, chosen)}")


def check_options(config: Run, method: AnyMethod) -> None:
    """Refuse options that no run can have.  Raises UserError naming the option."""
    require("--steps", config.steps, config.steps >= 0, "0 or more")
    require("--prompts", config.prompts, config.prompts >= 1, "at least 1")
    require("--micro-tokens", config.micro_tokens, config.micro_tokens >= 1, "at least 1")

    optim, keep = config.optim, config.save.keep
    require("--optim.lr", optim.lr, 0 <= optim.lr < math.inf, "a number of 0 or more")
    require("--optim.warmup", optim.warmup, optim.warmup >= 0, "0 or more")
    require("--save.keep", keep, keep >= 0, "0 or more")

    # A reward model is judged on a dataset's held-out lines, too.
    judged, prompts = config.task is not None or method.held_out, config.eval.prompts
    verified = "0 without a --task, whose verifier evaluates"
    require("--eval.prompts", prompts, prompts == 0 or judged, verified)


def _resume_from(config: Run) -> Path | None:
    found = checkpoint.complete_checkpoints(Path(config.output_dir))
    if not config.resume:
        if found:
            mend = "continue it with --resume, or name another folder"
            raise UserError(f"--output-dir: {config.output_dir} already holds {found[-1].name}; {mend}")
        return None
    if not found:
        raise UserError(f"--resume: {config.output_dir} holds no whole checkpoint; start without --resume")
    return found[-1]


def changed(config: Run) -> dict[str, tuple[str, str]]:
    """Options that differ from those that the run in config.output_dir began with: name -> (old, new), each
    as JSON text.
    """
    saved = Path(config.output_dir) / "config.yaml"
    if not saved.is_file():
        return {}
    now = yaml.safe_load(dump(config))
    try:
        was = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{saved}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(was, dict):
        advice = "remove the file to go on with the options that are given"
        raise UserError(f"{saved}: expected the options that the run began with, got {was!r}; {advice}")
    differ = [key for key in now if key != "resume" and was.get(key) != now[key]]
    return {key: (json.dumps(was.get(key)), json.dumps(now[key])) for key in differ}


def _evaluated(folder: Path, step: int) -> bool:
    """Whether the log has the evaluation of `step`: a run may stop after saving and before evaluating."""
    rows = (row for _, row in read_json_lines(folder / METRICS))
    return any(row["step"] == step and any(key.startswith("eval/") for key in row) for row in rows)
