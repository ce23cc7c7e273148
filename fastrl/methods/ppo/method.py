"""`fastrl ppo`: reinforcement learning with a critic."""

from __future__ import annotations

from fastrl.algorithms.ppo import ActorCriticAlgorithm, Coefficient
from fastrl.config import Ppo
from fastrl.methods.grpo.method import prompts_of, rollout_source, sampling
from fastrl.methods.method import Context, Method, language_model
from fastrl.methods.ppo.batches import Credit, PpoRollouts
from fastrl.methods.ppo.learner import CRITICS, ActorCritic
from fastrl.methods.ppo.objective import ActorCriticBatch, HeadedPolicy, ValueObjective
from fastrl.methods.ppo.options import choose_ppo
from fastrl.model.critic import Critic, ValueHead
from fastrl.model.language import LanguageModel
from fastrl.report.metrics import LOGGED
from fastrl.train.objective import PolicyObjective
from fastrl.train.source import Source

PpoContext = Context[Ppo, ActorCriticAlgorithm, LanguageModel]


def learner(context: PpoContext) -> ActorCritic:
    """A policy with a head on its hidden states, or with a critic that is a model of its own."""
    kind = CRITICS[context.algorithm.critic]
    return _with_head(context, kind.moves_policy) if kind.head else _with_model(context)


def _with_head(context: PpoContext, moves_policy: bool) -> ActorCritic:
    model, algorithm = context.model, context.algorithm
    head = ValueHead(model.config.hidden_size, model.dtype, model.device)
    plain = PolicyObjective(model, algorithm.policy, context.temperature)
    objective = HeadedPolicy(plain, algorithm, head, moves_policy)

    policy = context.learner(objective, context.weights(model, head=head))
    return ActorCritic(
        policy,
        lambda micro: head(model(micro.tokens, micro.cu_seqlens)),
        critic=None,
        head=head,
        kind=algorithm.critic,
    )


def _with_model(context: PpoContext) -> ActorCritic:
    model, algorithm = context.model, context.algorithm
    # Before the policy's weights get hooks, which a copy would have too.
    start = algorithm.critic_model
    critic = (
        Critic.like(model)
        if start is None
        else Critic.load(start, model, trust=context.config.trust_remote_code)
    )

    plain = PolicyObjective(model, algorithm.policy, context.temperature)
    policy = context.learner(HeadedPolicy(plain, algorithm), context.weights(model))
    values = context.learner(
        ValueObjective(critic, algorithm), context.weights(critic, lr=algorithm.critic_lr)
    )
    return ActorCritic(
        policy,
        lambda micro: critic(micro.tokens, micro.cu_seqlens),
        critic=values,
        head=None,
        kind=algorithm.critic,
    )


def source(context: PpoContext, learner: ActorCritic) -> tuple[Source[ActorCriticBatch], int]:
    """Rollouts with the critic's values."""
    config, algorithm = context.config, context.algorithm
    policy = algorithm.policy
    start = algorithm.reward_kl_coef or policy.kl_coef
    coefficient = Coefficient(start, config.kl_target, config.kl_horizon)

    credit = Credit(config, algorithm, learner.values, coefficient, context.world)
    drawn = rollout_source(context, prompts_of(context, policy), policy, credit.shaping())
    return PpoRollouts(drawn, config, bool(policy.kl_coef), coefficient), config.max_new_tokens


METHOD = Method(
    choose=choose_ppo,
    load=language_model,
    learner=learner,
    source=source,
    metrics=LOGGED["ppo"],
    sampling=sampling,
)
