"""`fastrl grpo`: reinforcement learning from verified rewards, the GRPO family."""

from __future__ import annotations

from typing import Any, TypeVar

from fastrl.algorithms import Algorithm
from fastrl.batch.types import Batch
from fastrl.config import Grpo, OnPolicy, Sampling
from fastrl.methods.grpo.options import check_rollouts, choose_algorithm
from fastrl.methods.grpo.prompts import Prompts, load_prompts
from fastrl.methods.grpo.rollouts import ExtraLogProbs, RolloutSource, Shaping
from fastrl.methods.grpo.sampling import GroupSampler
from fastrl.methods.grpo.shaping import policy_shaping
from fastrl.methods.method import Context, Method, language_model
from fastrl.model.language import LanguageModel
from fastrl.report.metrics import LOGGED
from fastrl.tasks.task import is_conversation
from fastrl.train.learner import Learner, Trainable
from fastrl.train.objective import PolicyObjective
from fastrl.train.source import Source

C = TypeVar("C", bound=OnPolicy)
OnPolicyContext = Context[C, Any, LanguageModel]  # of any command whose batches are rollouts
GrpoContext = Context[Grpo, Algorithm, LanguageModel]


def learner(context: GrpoContext) -> Learner[Batch]:
    """A learner that minimises the policy loss."""
    model = context.model
    return context.learner(
        PolicyObjective(model, context.algorithm, context.temperature), context.weights(model)
    )


def source(context: GrpoContext, learner: Trainable[Batch]) -> tuple[Source[Batch], int]:
    """The on-policy source, and the longest completion to expect, tokens."""
    config, algorithm = context.config, context.algorithm
    shaping = policy_shaping(config, algorithm, context.world)
    return rollout_source(context, prompts_of(context, algorithm), algorithm, shaping), config.max_new_tokens


def prompts_of(context: OnPolicyContext[C], algorithm: Algorithm | None) -> Prompts:
    """The run's prompts and rewards, after a look at options that rollouts cannot have.

    algorithm  whose advantage says how many completions of a prompt it needs; None asks for one
    """
    config, shape = context.config, context.model.config
    advantage = None if algorithm is None else algorithm.advantage
    check_rollouts(
        config,
        least=1 if advantage is None else advantage.least,
        processes=context.world.size,
        turns=is_conversation(context.task),
    )
    prompts = load_prompts(
        config,
        context.task,
        context.tokenizer,
        shape.max_position_embeddings,
        shape.vocab_size,
        context.world,
    )
    context.tell(prompts.rows, prompts.size, "prompts")
    return prompts


def rollout_source(
    context: OnPolicyContext[C],
    prompts: Prompts,
    algorithm: Algorithm | None,
    shaping: Shaping,
    *,
    reference: bool | None = None,
) -> RolloutSource:
    """Rollouts of the run's policy.

    algorithm  the policy's part of the method, for its correction; None where the loss compares completions
    reference  whether batches need the reference's log-probs; None asks the method's algorithm
    """
    config = context.config
    needed = context.algorithm.needs_reference if reference is None else reference
    frozen = context.reference_model() if needed else None
    extra = ExtraLogProbs(
        reference=None if frozen is None else lambda batch: context.logp(frozen, batch),
        trainer=lambda batch: context.logp(context.model, batch),
        correction=None if algorithm is None else algorithm.correction,
    )
    groups = GroupSampler(config, context.sampler, prompts, context.world)
    return RolloutSource(config, groups, extra, shaping, context.world)


def sampling(config: OnPolicy) -> tuple[str, Sampling]:
    """The sampler that the options name, and its settings."""
    return config.sampler, config.sampling


METHOD = Method(
    choose=choose_algorithm,
    load=language_model,
    learner=learner,
    source=source,
    metrics=LOGGED["grpo"],
    sampling=sampling,
)
