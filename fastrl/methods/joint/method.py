"""`fastrl joint`: a policy and the reward model that rewards it, trained side by side."""

from __future__ import annotations

from dataclasses import replace

from fastrl.algorithms.joint import JointAlgorithm
from fastrl.config import AlgorithmChoice, HeldOut, Joint, Reward
from fastrl.errors import UserError
from fastrl.methods.grpo.method import prompts_of, rollout_source, sampling
from fastrl.methods.grpo.prompts import Prompts
from fastrl.methods.grpo.shaping import policy_shaping
from fastrl.methods.joint.batches import ComparisonBuffer, JointRollouts, Oracle
from fastrl.methods.joint.judge import Judge
from fastrl.methods.joint.learner import JointBatch, JointLearner
from fastrl.methods.joint.options import choose_joint
from fastrl.methods.method import Context, Method, language_model
from fastrl.methods.reward.batches import Comparisons
from fastrl.methods.reward.method import comparisons
from fastrl.methods.reward.objective import ScoreObjective
from fastrl.model.language import LanguageModel, Tokenizer
from fastrl.model.reward import RewardModel
from fastrl.model.tokenizer import has_tokenizer, load_tokenizer
from fastrl.report.metrics import LOGGED
from fastrl.tasks.extras import has_mistakes
from fastrl.train.objective import PolicyObjective
from fastrl.train.source import Source

JointContext = Context[Joint, JointAlgorithm, LanguageModel]


def learner(context: JointContext) -> JointLearner:
    """A policy, and a reward model with an optimizer of its own."""
    config, model, algorithm = context.config, context.model, context.algorithm
    plain = PolicyObjective(model, algorithm.policy, context.temperature)
    policy = context.learner(plain, context.weights(model))

    judging = _reward_model(context)
    objective = ScoreObjective(judging, algorithm.reward_loss)
    reward = context.learner(objective, context.weights(judging, lr=algorithm.reward_lr))
    judge = Judge(judging, size=config.calibration, micro_tokens=config.micro_tokens, world=context.world)
    return JointLearner(policy, reward, judge, epochs=algorithm.reward_epochs)


def _reward_model(context: JointContext) -> RewardModel:
    """Where the reward model starts.  Raises UserError for one that judges steps."""
    model, algorithm = context.model, context.algorithm
    try:
        judging = RewardModel.load(
            algorithm.reward_model,
            dtype=model.dtype,
            device=model.device,
            seed=algorithm.seed,
            tokenizer=_reads_with(context),
        )
    except UserError as error:
        raise UserError(f"--reward-model: {str(error).removeprefix('--model: ')}") from error
    if judging.steps is not None:
        raise UserError(
            "--reward-model: expected a model that scores whole completions, "
            f"got {algorithm.reward_model}, which scores their steps"
        )
    judging.gradient_checkpointing = model.gradient_checkpointing
    return judging


def _reads_with(context: JointContext) -> Tokenizer:
    """The reward model's own tokenizer, or the policy's where it brings none or is the policy's start."""
    brought = context.config.reward_model
    if brought is None or not has_tokenizer(brought):
        return context.tokenizer
    return load_tokenizer(None, brought, trust=context.config.trust_remote_code)


def source(context: JointContext, learner: JointLearner) -> tuple[Source[JointBatch], int]:
    """The policy's rollouts, rewarded by the judge, and the comparisons that the oracle makes of them."""
    config, policy = context.config, context.algorithm.policy
    judge = learner.judge
    offline = _offline(context, learner)

    prompts = prompts_of(context, policy)
    _check(config, prompts)
    oracle = Oracle(
        config,
        context.algorithm.reward_loss,
        judge,
        prompts.score,
        context.tokenizer,
        context.world,
        config.demonstrations,
    )
    buffer = ComparisonBuffer(config, oracle, offline, context.world)
    shaping = replace(policy_shaping(config, policy, context.world), extend=buffer.extend)
    drawn = rollout_source(context, replace(prompts, score=oracle.judged), policy, shaping)
    return JointRollouts(drawn, buffer), config.max_new_tokens


def _check(config: Joint, prompts: Prompts) -> None:
    if prompts.game is not None:
        raise UserError(
            "--task: expected a task of one turn, whose completions a reward model can read; "
            f"got {config.task}"
        )
    _, columns = prompts.item(0)
    if config.demonstrations and getattr(columns.get("example"), "demo", None) is None:
        raise UserError(
            "--demonstrations: expected a --task with demonstrations to compare with, "
            f"got {config.task}; leave it out, or give --offline-share"
        )


def _offline(context: JointContext, learner: JointLearner) -> Comparisons | None:
    """The comparisons that make up `offline_share` of an update's groups, ties among the policy's own
    counted; None at a share of 0.
    """
    config = context.config
    own = config.prompts * config.reward_every
    share = config.offline_share
    count = round(own * share / (1 - share))
    if share == 0:
        return None
    if count == 0:
        raise UserError(
            "--offline-share: expected a share that gives at least one offline group beside the "
            f"{own} of the "
            f"policy, got {share}, which rounds to none; raise it, or leave it out"
        )
    if config.offline is None and not has_mistakes(context.task):
        raise UserError(
            "--offline-share: expected a --task with wrong answers to compare with its demonstrations, "
            f"got {config.task}; give --offline FILE"
        )

    loss = AlgorithmChoice(config.reward_loss, {"center": config.center})
    options = Reward(
        model=config.model,
        task=config.task,
        dataset=config.offline,
        algorithm=loss,
        prompts=count,
        max_tokens=config.max_tokens,
        micro_tokens=config.micro_tokens,
        seed=config.seed,
        holdout=0.0,
        eval=HeldOut(prompts=0),
    )
    model = learner.judge.model
    tokenizer = model.tokenizer or context.tokenizer
    return comparisons(
        Context(
            config=options,
            algorithm=context.algorithm.reward_loss,
            model=model,
            tokenizer=tokenizer,
            task=context.task,
            sampler=context.sampler,
            sampling=context.sampling,
            device=context.device,
            world=context.world,
        )
    )


METHOD = Method(
    choose=choose_joint,
    load=language_model,
    learner=learner,
    source=source,
    metrics=LOGGED["joint"],
    sampling=sampling,
)
