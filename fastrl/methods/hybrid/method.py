"""`fastrl hybrid`: demonstrations or preferences, and verified rewards, in one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastrl.algorithms.group_preference import GroupPreference
from fastrl.algorithms.hybrid import HybridAlgorithm
from fastrl.config import Hybrid
from fastrl.data.encode import Sample
from fastrl.errors import UserError
from fastrl.methods.dpo.objective import UnitObjective
from fastrl.methods.dpo.reference import preference_source
from fastrl.methods.grpo.method import prompts_of, rollout_source, sampling
from fastrl.methods.grpo.rollouts import RolloutSource
from fastrl.methods.hybrid.contrast import Contrast
from fastrl.methods.hybrid.known import PromptEncoder, demonstrations_of_prompts, pairs_of_prompts
from fastrl.methods.hybrid.members import Joining, Known
from fastrl.methods.hybrid.objective import Both, HybridObjective, gradients_by_term
from fastrl.methods.hybrid.options import DEMO_REWARD, REJECTED_REWARD, check_mixture
from fastrl.methods.hybrid.pair_options import choose_hybrid, offline
from fastrl.methods.hybrid.pairs import PolicyAndPairs
from fastrl.methods.method import Context, Method, arithmetic, language_model
from fastrl.model.language import LanguageModel
from fastrl.report.metrics import LOGGED
from fastrl.tasks.extras import has_mistakes
from fastrl.train.learner import Learner, Trainable
from fastrl.train.objective import PolicyObjective
from fastrl.train.source import Source

HybridContext = Context[Hybrid, HybridAlgorithm, LanguageModel]
GroupContext = Context[Hybrid, GroupPreference, LanguageModel]
AnyContext = Context[Hybrid, HybridAlgorithm | GroupPreference, LanguageModel]


# --- demonstrations, or pairs beside rollouts ---------------------------------------------------------
def _demonstrations(context: HybridContext) -> Known:
    encode = PromptEncoder(context.config, context.tokenizer, context.model.config)
    known = demonstrations_of_prompts(encode, context.task, context.world)
    return lambda numbers: [(sample,) for sample in known(numbers)]


def _pairs(context: HybridContext) -> Known:
    encode = PromptEncoder(context.config, context.tokenizer, context.model.config)
    return pairs_of_prompts(encode, context.task, context.world)


def _nothing(context: HybridContext) -> Known:
    empty: tuple[Sample | None, ...] = ()
    return lambda numbers: [empty] * len(numbers)


KNOWN: dict[str, Callable[[HybridContext], Known]] = {  # what an algorithm knows of prompts
    "demonstrations": _demonstrations,
    "pairs": _pairs,
    "nothing": _nothing,
}


def _hybrid_learner(context: HybridContext) -> Learner[Any]:
    model, algorithm = context.model, context.algorithm
    policy = PolicyObjective(model, algorithm, context.temperature)
    objective = HybridObjective(policy, algorithm)
    if algorithm.pairs is None:
        return context.learner(objective, context.weights(model))

    pairs = UnitObjective(model, algorithm.pairs.preference, context.temperature)
    return context.learner(Both(objective, pairs), context.weights(model), gradients_by_term)


def _hybrid_source(context: HybridContext) -> Source[Any]:
    sampled = _joined(context)
    if context.algorithm.pairs is None:
        return sampled

    config, task = context.config, context.task
    pair_dataset = config.algorithm.text("pair_dataset")
    if not (pair_dataset or config.dataset or has_mistakes(task)):
        raise UserError(
            "--pair-dataset: expected a file of pairs, "
            f"because task {config.task} has no wrong answers; got none"
        )
    pairs = context.algorithm.pairs
    beside = Context(
        config=offline(config),
        algorithm=pairs.preference,
        model=context.model,
        tokenizer=context.tokenizer,
        task=task,
        sampler=context.sampler,
        sampling=context.sampling,
        device=context.device,
        world=context.world,
    )
    preferences, _ = preference_source(beside, arithmetic)
    return PolicyAndPairs(config, sampled, preferences, pairs)


def _joined(context: HybridContext) -> RolloutSource:
    """Rollouts whose groups are joined by what is known of their prompts."""
    config, algorithm = context.config, context.algorithm
    known = KNOWN[algorithm.known](context)
    prompts = prompts_of(context, algorithm.policy)
    check_mixture(config, algorithm, turns=prompts.game is not None)

    rewards = (
        config.algorithm.number("demo_reward", DEMO_REWARD),
        config.algorithm.number("rejected_reward", REJECTED_REWARD),
    )
    joining = Joining(config, algorithm, known, rewards, context.world)
    return rollout_source(context, prompts, algorithm.policy, joining.shaping())


# --- completions of a group against each other --------------------------------------------------------
def _group_learner(context: GroupContext) -> Learner[Any]:
    objective = UnitObjective(context.model, context.algorithm, context.temperature)
    return context.learner(objective, context.weights(context.model))


def _group_source(context: GroupContext) -> Source[Any]:
    contrast = Contrast(context.config, context.algorithm, context.world)
    return rollout_source(context, prompts_of(context, None), None, contrast.shaping())


# --- the command --------------------------------------------------------------------------------------
# kind of algorithm -> its learner and its source
BUILDERS: dict[type, tuple[Callable[[Any], Learner[Any]], Callable[[Any], Source[Any]]]] = {
    HybridAlgorithm: (_hybrid_learner, _hybrid_source),
    GroupPreference: (_group_learner, _group_source),
}


def learner(context: AnyContext) -> Learner[Any]:
    """The learner of the algorithm's kind."""
    of_kind, _ = BUILDERS[type(context.algorithm)]
    return of_kind(context)


def source(context: AnyContext, learner: Trainable[Any]) -> tuple[Source[Any], int]:
    """The rollouts of the algorithm's kind, with what goes beside them."""
    _, of_kind = BUILDERS[type(context.algorithm)]
    return of_kind(context), context.config.max_new_tokens


METHOD = Method(
    choose=choose_hybrid,
    load=language_model,
    learner=learner,
    source=source,
    metrics=LOGGED["hybrid"],
    sampling=sampling,
)
