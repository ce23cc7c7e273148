"""Everything a run needs, built from its configuration: model, tokenizer, data source, learner, log, and where it left off."""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl import checkpoint, environment, ops
from fastrl.adapter import load_model
from fastrl.algorithms import Algorithm, choose_algorithm
from fastrl.algorithms.correction import MISMATCH
from fastrl.algorithms.hybrid import Mixed, choose_hybrid
from fastrl.algorithms.ppo import ActorCritic, choose_ppo
from fastrl.algorithms.preference import Preference, choose_preference
from fastrl.config import Dpo, Grpo, Hybrid, Ppo, Reward, Run, Sampling, Sft
from fastrl.device import place, set_threads
from fastrl.dist import World, join
from fastrl.errors import UserError
from fastrl.experience import Demonstrations, OnPolicy, Source, check_rollouts
from fastrl.files import read_json_lines
from fastrl.intake import demonstrations, demonstrations_of_prompts, load_run_task, prompts_and_rewards
from fastrl.learner import Learner
from fastrl.log import METRICS, RunLog
from fastrl.mixture import MixedLearner, Mixture
from fastrl.model import Decoder
from fastrl.options import dump
from fastrl.ppo_learner import VALUE_METRICS, PpoLearner
from fastrl.ppo_source import PpoSource
from fastrl.preferences import PreferenceLearner
from fastrl.reference import preference_source
from fastrl.reward_learner import REWARD_METRICS, RewardLearner
from fastrl.reward_model import RewardModel
from fastrl.reward_source import choose_reward_loss, comparisons
from fastrl.sampler import SAMPLERS, Sampler
from fastrl.supervised import SupervisedLearner, choose_supervised
from fastrl.tasks import Conversation, Task
from fastrl.tokenizer import load_tokenizer
from fastrl.types import Batch

NAMES = {  # ops.policy_loss's diagnostics under TRL's names; what a command's table leaves out is not logged
    Sft: {"loss": "loss", "num_tokens": "num_tokens", "grad_norm": "grad_norm", "learning_rate": "learning_rate", "entropy": "entropy"},
    Dpo: {
        name: name
        for name in (
            "loss", "num_tokens", "grad_norm", "learning_rate", "entropy", "nll_loss",
            *(f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies")), "logps/chosen", "logps/rejected",
        )
    },
    Grpo: {
        "loss": "loss", "num_tokens": "num_tokens", "grad_norm": "grad_norm", "learning_rate": "learning_rate",
        "ref_kl_k3": "kl", "clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean", "clip_cap": "clip_ratio/cap_mean",
        "clip_region": "clip_ratio/region_mean", "ratio_mean": "ratio/mean", "ratio_max": "ratio/max", "approx_kl": "approx_kl",
        "ess": "ess", "sampler_diff_mean": "sampling/sampling_logp_difference/mean",
        "sampler_diff_max": "sampling/sampling_logp_difference/max", "sampler_kl": "sampler/kl", "sampler_ess": "sampler/ess",
        "correction_min": "sampling/importance_sampling_ratio/min", "correction_mean": "sampling/importance_sampling_ratio/mean",
        "correction_max": "sampling/importance_sampling_ratio/max",
    },
    Reward: {"loss": "loss", "num_tokens": "num_tokens", "grad_norm": "grad_norm", "learning_rate": "learning_rate"}
    | {name: name for name in REWARD_METRICS},
}  # fmt: skip
NAMES[Hybrid] = NAMES[Grpo] | {name: name for name in ("sft_loss", "member_nll", "off_policy_share")}
NAMES[Ppo] = NAMES[Grpo] | VALUE_METRICS
SOURCE = "source."  # before the names of the source's tensors in a checkpoint
OVER_BATCHES: dict[str, Callable[[list[float]], float]] = {  # the others are averaged
    "num_tokens": sum, "ratio_max": max,
    **dict.fromkeys(MISMATCH, lambda values: values[0]),  # before any weight has changed
}  # fmt: skip


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
            path = checkpoint.save(folder, step, self.model, self.tokenizer, state, meta, keep=self.config.save.keep)
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
        values = {key: [b[key] for b in batches if key in b] for key in NAMES[type(self.config)] if key not in silent}
        return {NAMES[type(self.config)][k]: OVER_BATCHES.get(k, _mean)(v) for k, v in values.items() if v}

    def how_to_resume(self, saved: Path | None) -> str:
        """What to type to continue a run that was stopped."""
        if saved is None:
            return "nothing was saved, because no step was done"
        return f"continue with: fastrl {_command(self.config)} --config {shlex.quote(f'{self.config.output_dir}/config.yaml')} --resume"


def set_up(config: Run) -> Session:
    """Build the session.  Raises UserError for whatever is wrong with the configuration, before any training."""
    _check(config)
    set_threads(config.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # else each torch.empty is written twice
    world = join()
    device, dtype = place(config.device, config.dtype)
    resumed = _resume_from(config)
    state, meta = checkpoint.load(resumed) if resumed else ({}, {"step": 0, "version": 0, "command": _command(config)})
    if meta["command"] != _command(config):
        raise UserError(
            f"--resume: {config.output_dir} holds a run of fastrl {meta['command']}; continue it with that, or name another folder"
        )
    parts = PARTS.get(type(config), Parts())
    algorithm = parts.choose(config)
    task = load_run_task(config.task, config.task_options)
    source_folder = str(resumed or config.model)
    model = parts.load(source_folder, dtype=dtype, device=device, seed=config.seed)
    if config.exact and not isinstance(model, Decoder):
        raise UserError(f"--exact: expected a model that the fast decoder takes (Llama, Qwen2, Qwen3), got {config.model}; run without it")
    model.gradient_checkpointing = config.gradient_checkpointing
    tokenizer = load_tokenizer(config.tokenizer, source_folder, task)
    chosen, sampling = (config.sampler, config.sampling) if isinstance(config, Grpo) else ("fastrl", Sampling())
    sampler = SAMPLERS[chosen](model, tokenizer, sampling)
    learner = parts.learner(
        model, algorithm, config.optim, steps=config.steps, micro_tokens=config.micro_tokens,
        temperature=config.sampling.temperature if isinstance(config, Grpo) else 1.0, world=world,
    )  # fmt: skip
    if resumed:
        learner.load_state(state)
    source, length = SOURCES[type(config)](config, task, tokenizer, sampler, learner, algorithm, device)
    source.load_state({name.removeprefix(SOURCE): x for name, x in state.items() if name.startswith(SOURCE)})
    start = meta["step"]
    texts = {"config.yaml": dump(config), "environment.txt": environment.report()} if world.is_main else {}
    log = RunLog(
        config.output_dir, config.steps, name=_command(config), resume_step=start if resumed else None, texts=texts, enabled=world.is_main
    )
    evaluated = world.max(float(world.is_main and resumed is not None and _evaluated(Path(config.output_dir), start)))[0] > 0
    return Session(config, world, model, tokenizer, task, sampler, learner, source, log, start, evaluated, meta["version"], length)


def arithmetic(config: Run) -> contextlib.AbstractContextManager[None]:
    """What rollouts and learner compute under: exact mode, for a run that asks for it."""
    return ops.exact() if config.exact else contextlib.nullcontext()


def _check(config: Run) -> None:
    e = config.eval
    judged = config.task is not None or isinstance(config, Reward)  # a reward model is judged on a dataset's held-out lines, too
    for option, value, fine, expected in (
        ("--steps", config.steps, config.steps >= 0, "0 or more"),
        ("--prompts", config.prompts, config.prompts >= 1, "at least 1"),
        ("--micro-tokens", config.micro_tokens, config.micro_tokens >= 1, "at least 1"),
        ("--optim.lr", config.optim.lr, 0 <= config.optim.lr < math.inf, "a number of 0 or more"),
        ("--optim.warmup", config.optim.warmup, config.optim.warmup >= 0, "0 or more"),
        ("--save.keep", config.save.keep, config.save.keep >= 0, "0 or more"),
        ("--eval.prompts", e.prompts, e.prompts == 0 or judged, "0 without a --task, whose verifier evaluates"),
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


def _evaluated(folder: Path, step: int) -> bool:
    """Whether the log of a resumed run has the evaluation of the step it resumes at: it may have been stopped before that was done."""
    rows = (row for _, row in read_json_lines(folder / METRICS))
    return any(row["step"] == step and any(key.startswith("eval/") for key in row) for row in rows)


def _command(config: Run) -> str:
    return type(config).__name__.lower()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _demonstrations(
    config: Sft, task: Task | None, tokenizer: Any, sampler: Sampler, learner: Learner, algorithm: Algorithm, device: torch.device
) -> tuple[Source, int]:
    shape = learner.model.config
    items, size, longest = demonstrations(config, task, tokenizer, shape.max_position_embeddings, shape.vocab_size)
    return Demonstrations(
        items, size, count=config.prompts, algorithm=algorithm, seed=config.seed, device=device, world=learner.world,
        weighted=config.sample_weights,
    ), longest  # fmt: skip


def _on_policy(
    config: Grpo, task: Task | None, tokenizer: Any, sampler: Sampler, learner: Learner, algorithm: Algorithm, device: torch.device,
    make: Callable[..., OnPolicy] = OnPolicy,
) -> tuple[Source, int]:  # fmt: skip
    check_rollouts(config, algorithm, processes=learner.world.size, turns=isinstance(task, Conversation))
    shape = learner.model.config
    prompt, size, score = prompts_and_rewards(config, task, tokenizer, shape.max_position_embeddings, shape.vocab_size)
    reference: Callable[[Batch], Tensor] | None = None
    if algorithm.needs_reference:  # the reference is where the run began, not where it resumes
        frozen = load_model(config.model, dtype=learner.model.dtype, device=device, seed=config.seed).requires_grad_(False)

        def reference(batch: Batch) -> Tensor:
            return learner.logp(frozen, batch)

    def trainer(batch: Batch) -> Tensor:
        return learner.logp(learner.model, batch)

    stop = task.stop if task is not None else ()
    source = make(
        config, sampler, algorithm, prompt=prompt, size=size, score=score, reference=reference, trainer=trainer, stop=stop,
        world=learner.world, game=task if isinstance(task, Conversation) else None,
    )  # fmt: skip
    return source, config.max_new_tokens


def _mixture(
    config: Hybrid, task: Task | None, tokenizer: Any, sampler: Sampler, learner: Learner, algorithm: Mixed, device: torch.device
) -> tuple[Source, int]:
    shape = learner.model.config
    known = demonstrations_of_prompts(config, task, tokenizer, shape.max_position_embeddings, shape.vocab_size)
    return _on_policy(config, task, tokenizer, sampler, learner, algorithm, device, make=partial(Mixture, demonstrations=known))


def _preferences(
    config: Dpo, task: Task | None, tokenizer: Any, sampler: Sampler, learner: Learner, row: Preference, device: torch.device
) -> tuple[Source, int]:
    return preference_source(config, task, tokenizer, learner, row, device, arithmetic)


def _actor_critic(
    config: Ppo, task: Task | None, tokenizer: Any, sampler: Sampler, learner: PpoLearner, algorithm: ActorCritic, device: torch.device
) -> tuple[Source, int]:
    return _on_policy(config, task, tokenizer, sampler, learner, algorithm, device, make=partial(PpoSource, learner))


@dataclass(frozen=True, slots=True)
class Parts:
    """What a command trains, if it is no language model: how it is loaded, which row of which table, and its learner."""

    load: Callable[..., Any] = load_model
    choose: Callable[..., Any] = choose_algorithm
    learner: Callable[..., Any] = Learner


PARTS: dict[type, Parts] = {
    Sft: Parts(choose=choose_supervised, learner=SupervisedLearner),
    Dpo: Parts(choose=choose_preference, learner=PreferenceLearner),
    Hybrid: Parts(choose=choose_hybrid, learner=MixedLearner),
    Ppo: Parts(choose=choose_ppo, learner=PpoLearner),
    Reward: Parts(RewardModel.load, choose_reward_loss, RewardLearner),
}
SOURCES: dict[type, Callable[..., tuple[Source, int]]] = {
    Sft: _demonstrations,
    Dpo: _preferences,
    Grpo: _on_policy,
    Hybrid: _mixture,
    Ppo: _actor_critic,
    Reward: comparisons,
}
