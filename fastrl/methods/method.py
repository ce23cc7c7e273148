"""What each training command is made of: its data source, its row of which table, its learner, the names of
its metrics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastrl import ops
from fastrl.algorithms.correction import MISMATCH
from fastrl.algorithms.group_preference import GroupPreference
from fastrl.algorithms.hybrid import HybridAlgorithm
from fastrl.algorithms.joint import JointAlgorithm
from fastrl.algorithms.ppo import ActorCriticAlgorithm
from fastrl.algorithms.preference import Preference
from fastrl.algorithms.row import Row
from fastrl.batch.types import Batch
from fastrl.config import Dpo, Grpo, Hybrid, Joint, Ppo, Reward, Run, Sft
from fastrl.config import OnPolicy as OnPolicyConfig
from fastrl.errors import UserError
from fastrl.methods.dpo.batches import PreferenceLearner
from fastrl.methods.dpo.options import choose_preference
from fastrl.methods.dpo.reference import preference_source
from fastrl.methods.grpo.options import check_rollouts, choose_algorithm
from fastrl.methods.grpo.prompts import demonstrations, prompts_and_rewards
from fastrl.methods.grpo.rollouts import Demonstrations, OnPolicy, Source
from fastrl.methods.hybrid.mixture import Known, MixedLearner, Mixture
from fastrl.methods.hybrid.pair_options import choose_fusion, offline
from fastrl.methods.hybrid.pairs import Contrasted, FusedLearner, FusedSource
from fastrl.methods.hybrid.references import demonstrations_of_prompts, pairs_of_prompts
from fastrl.methods.joint.batches import JointSource, offline_comparisons
from fastrl.methods.joint.learner import JOINT_METRICS, JointLearner
from fastrl.methods.joint.options import choose_joint
from fastrl.methods.ppo.batches import PpoSource
from fastrl.methods.ppo.learner import VALUE_METRICS, PpoLearner
from fastrl.methods.ppo.options import choose_ppo
from fastrl.methods.reward.batches import comparisons
from fastrl.methods.reward.learner import REWARD_METRICS, RewardLearner
from fastrl.methods.reward.options import choose_reward_loss
from fastrl.methods.sft.learner import SupervisedLearner
from fastrl.methods.sft.options import SupervisedAlgorithm, choose_supervised
from fastrl.model.adapter import load_model
from fastrl.model.reward import RewardModel
from fastrl.model.tokenizer import has_tokenizer, load_tokenizer
from fastrl.sampler import Sampler
from fastrl.tasks import Conversation, Task
from fastrl.train.learner import Learner

NAMES = {  # ops.policy_loss's diagnostics under TRL's names; what a command's table leaves out is not logged
    Sft: {
        "loss": "loss",
        "num_tokens": "num_tokens",
        "grad_norm": "grad_norm",
        "learning_rate": "learning_rate",
        "entropy": "entropy",
    },
    Dpo: {
        name: name
        for name in (
            "loss",
            "num_tokens",
            "grad_norm",
            "learning_rate",
            "entropy",
            "nll_loss",
            *(f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies")),
            "logps/chosen",
            "logps/rejected",
        )
    },
    Grpo: {
        "loss": "loss",
        "num_tokens": "num_tokens",
        "grad_norm": "grad_norm",
        "learning_rate": "learning_rate",
        "ref_kl_k3": "kl",
        "clip_low": "clip_ratio/low_mean",
        "clip_high": "clip_ratio/high_mean",
        "clip_cap": "clip_ratio/cap_mean",
        "clip_region": "clip_ratio/region_mean",
        "ratio_mean": "ratio/mean",
        "ratio_max": "ratio/max",
        "approx_kl": "approx_kl",
        "ess": "ess",
        "sampler_diff_mean": "sampling/sampling_logp_difference/mean",
        "sampler_diff_max": "sampling/sampling_logp_difference/max",
        "sampler_kl": "sampler/kl",
        "sampler_ess": "sampler/ess",
        "correction_min": "sampling/importance_sampling_ratio/min",
        "correction_mean": "sampling/importance_sampling_ratio/mean",
        "correction_max": "sampling/importance_sampling_ratio/max",
    },
    Reward: {
        "loss": "loss",
        "num_tokens": "num_tokens",
        "grad_norm": "grad_norm",
        "learning_rate": "learning_rate",
    }
    | {name: name for name in REWARD_METRICS},
}
NAMES[Ppo] = NAMES[Grpo] | VALUE_METRICS
NAMES[Hybrid] = NAMES[Grpo] | {
    name: name for name in ("sft_loss", "member_nll", "off_policy_share", "group_kl")
}
NAMES[Hybrid] |= {
    name: name for name in ("grad_norm/rl", "grad_norm/pairs", *(f"pairs/{x}" for x in NAMES[Dpo]))
}
NAMES[Joint] = NAMES[Grpo] | JOINT_METRICS
OVER_BATCHES: dict[str, Callable[[list[float]], float]] = {  # the others are averaged
    "num_tokens": sum,
    "ratio_max": max,
    **dict.fromkeys(MISMATCH, lambda values: values[0]),  # before any weight has changed
}


def arithmetic(config: Run) -> contextlib.AbstractContextManager[None]:
    """What rollouts and learner compute under: exact mode, for a run that asks for it."""
    return ops.exact() if config.exact else contextlib.nullcontext()


# --- data sources -----------------------------------------------------------------------------------
def _demonstrations(
    config: Sft,
    task: Task | None,
    tokenizer: Any,
    sampler: Sampler,
    learner: Learner,
    algorithm: SupervisedAlgorithm,
    device: torch.device,
) -> tuple[Source, int]:
    shape = learner.model.config
    items, size, longest = demonstrations(
        config, task, tokenizer, shape.max_position_embeddings, shape.vocab_size
    )
    source = Demonstrations(
        items,
        size,
        count=config.prompts,
        algorithm=algorithm.policy,
        seed=config.seed,
        device=device,
        world=learner.world,
        weighted=config.sample_weights,
    )
    return source, longest


def _on_policy(
    config: OnPolicyConfig,
    task: Task | None,
    tokenizer: Any,
    sampler: Sampler,
    learner: Learner,
    algorithm: Row,
    device: torch.device,
    make: Callable[..., Source] = OnPolicy,
) -> tuple[Source, int]:
    check_rollouts(config, algorithm, processes=learner.world.size, turns=isinstance(task, Conversation))
    shape = learner.model.config
    prompt, size, score = prompts_and_rewards(
        config, task, tokenizer, shape.max_position_embeddings, shape.vocab_size
    )
    reference: Callable[[Batch], Tensor] | None = None
    if algorithm.needs_reference:  # the reference is where the run began, not where it resumes
        frozen = load_model(
            config.model, dtype=learner.model.dtype, device=device, seed=config.seed
        ).requires_grad_(False)

        def reference(batch: Batch) -> Tensor:
            return learner.logp(frozen, batch)

    def trainer(batch: Batch) -> Tensor:
        return learner.logp(learner.model, batch)

    stop = task.stop if task is not None else ()
    source = make(
        config,
        sampler,
        algorithm,
        prompt=prompt,
        size=size,
        score=score,
        reference=reference,
        trainer=trainer,
        stop=stop,
        world=learner.world,
        game=task if isinstance(task, Conversation) else None,
    )
    return source, config.max_new_tokens


def _preferences(
    config: Dpo,
    task: Task | None,
    tokenizer: Any,
    sampler: Sampler,
    learner: Learner,
    row: Preference,
    device: torch.device,
) -> tuple[Source, int]:
    return preference_source(config, task, tokenizer, learner, row, device, arithmetic)


def _actor_critic(
    config: Ppo,
    task: Task | None,
    tokenizer: Any,
    sampler: Sampler,
    learner: PpoLearner,
    algorithm: ActorCriticAlgorithm,
    device: torch.device,
) -> tuple[Source, int]:
    return _on_policy(
        config, task, tokenizer, sampler, learner, algorithm, device, make=partial(PpoSource, learner)
    )


def _demonstrated(*given: Any) -> Known:
    known = demonstrations_of_prompts(*given)
    return lambda numbers: [(sample,) for sample in known(numbers)]


KNOWN: dict[
    str, Callable[..., Known]
] = {  # what a hybrid's row knows of prompts -> (config, task, tokenizer, context, vocabulary) -> it
    "demonstrations": _demonstrated,
    "pairs": pairs_of_prompts,
    "nothing": lambda *given: lambda numbers: [()] * len(numbers),
}


def _mixture(
    config: Hybrid,
    task: Task | None,
    tokenizer: Any,
    sampler: Sampler,
    learner: Learner,
    algorithm: HybridAlgorithm,
    device: torch.device,
) -> tuple[Source, int]:
    shape = learner.model.config
    known = KNOWN[algorithm.known](config, task, tokenizer, shape.max_position_embeddings, shape.vocab_size)
    return _on_policy(
        config, task, tokenizer, sampler, learner, algorithm, device, make=partial(Mixture, known=known)
    )


def _fused(
    config: Hybrid,
    task: Task | None,
    tokenizer: Any,
    sampler: Sampler,
    learner: Learner,
    algorithm: HybridAlgorithm,
    device: torch.device,
) -> tuple[Source, int]:
    rollouts, longest = _mixture(config, task, tokenizer, sampler, learner, algorithm, device)
    if not (config.algorithm.text("pair_dataset") or config.dataset or hasattr(task, "mistakes")):
        raise UserError(
            "--pair-dataset: expected a file of pairs, "
            f"because task {config.task} has no wrong answers; got none"
        )
    assert algorithm.pairs is not None
    pairs, _ = preference_source(
        offline(config), task, tokenizer, learner, algorithm.pairs.preference, device, arithmetic
    )
    assert isinstance(rollouts, Mixture)
    return FusedSource(rollouts, pairs), longest


def _contrasted(
    config: Hybrid,
    task: Task | None,
    tokenizer: Any,
    sampler: Sampler,
    learner: Learner,
    algorithm: GroupPreference,
    device: torch.device,
) -> tuple[Source, int]:
    return _on_policy(config, task, tokenizer, sampler, learner, algorithm, device, make=Contrasted)


def _kind(
    algorithm: HybridAlgorithm | GroupPreference,
) -> tuple[Callable[..., tuple[Source, int]], Callable[..., Any]]:
    """A hybrid row's source and learner."""
    if isinstance(algorithm, GroupPreference):
        return _contrasted, PreferenceLearner
    return (_mixture, MixedLearner) if algorithm.pairs is None else (_fused, FusedLearner)


def _hybrid(
    config: Hybrid,
    task: Task | None,
    tokenizer: Any,
    sampler: Sampler,
    learner: Learner,
    algorithm: Any,
    device: torch.device,
) -> tuple[Source, int]:
    return _kind(algorithm)[0](config, task, tokenizer, sampler, learner, algorithm, device)


def _hybrid_learner(model: Any, algorithm: Any, *others: Any, **named: Any) -> Learner:
    learner: Learner = _kind(algorithm)[1](model, algorithm, *others, **named)
    return learner


def _joint(
    config: Joint,
    task: Task | None,
    tokenizer: Any,
    sampler: Sampler,
    learner: JointLearner,
    algorithm: JointAlgorithm,
    device: torch.device,
) -> tuple[Source, int]:
    """The reward model reads text with its own tokenizer, or with the policy's where it brings none or is the
    policy's start.
    """
    brought = config.reward_model
    reads = (
        load_tokenizer(None, brought, task) if brought is not None and has_tokenizer(brought) else tokenizer
    )
    learner.reward.model.tokenizer = reads
    offline = offline_comparisons(config, task, reads, learner, device)
    return _on_policy(
        config,
        task,
        tokenizer,
        sampler,
        learner,
        algorithm,
        device,
        make=partial(JointSource, learner, offline=offline),
    )


@dataclass(frozen=True, slots=True)
class Parts:
    """What a command trains, if it is no language model: how it is loaded, which row of which table, and its
    learner.
    """

    load: Callable[..., Any] = load_model
    choose: Callable[..., Any] = choose_algorithm
    learner: Callable[..., Any] = Learner


PARTS: dict[type, Parts] = {
    Sft: Parts(choose=choose_supervised, learner=SupervisedLearner),
    Dpo: Parts(choose=choose_preference, learner=PreferenceLearner),
    Ppo: Parts(choose=choose_ppo, learner=PpoLearner),
    Hybrid: Parts(choose=choose_fusion, learner=_hybrid_learner),
    Joint: Parts(choose=choose_joint, learner=JointLearner),
    Reward: Parts(RewardModel.load, choose_reward_loss, RewardLearner),
}
SOURCES: dict[type, Callable[..., tuple[Source, int]]] = {
    Sft: _demonstrations,
    Dpo: _preferences,
    Grpo: _on_policy,
    Ppo: _actor_critic,
    Hybrid: _hybrid,
    Joint: _joint,
    Reward: comparisons,
}
