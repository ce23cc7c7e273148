"""An optimizer step on CUDA waits for the device once: when the loss and the gradient's norm are read.

Run on the pretended device of helpers/host_waits.py, which says what it sees.  Wrong implementations: sizes
of a micro-batch read from the device while the one before it runs; a number of Python's copied to the device;
the norm read apart from the loss; gradients added by a sort of indices that the host knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import actor_critic
import fusions
import hybrids
import pytest
import torch
from contexts import context_of
from host_waits import CUDA, FakeCuda
from judging import reward_model, token_groups
from runs import DEMONSTRATIONS, GROUP, METHODS, TEMPERATURE, decoder, learner, learner_of, on_policy

from fastrl.algorithms import ALGORITHMS
from fastrl.algorithms.fusion import FUSIONS
from fastrl.algorithms.group_preference import OnlinePairs
from fastrl.algorithms.hybrid import HYBRIDS
from fastrl.algorithms.preference import PREFERENCES
from fastrl.algorithms.reward import REWARD_LOSSES
from fastrl.batch.types import Batch
from fastrl.config import Ppo
from fastrl.methods.dpo.batches import pack_units
from fastrl.methods.dpo.objective import UnitObjective
from fastrl.methods.hybrid.objective import Both, HybridObjective, gradients_by_term
from fastrl.methods.ppo.method import learner as ppo_learner
from fastrl.methods.reward.objective import RewardBatch, ScoreObjective
from fastrl.methods.sft.batches import Demonstrations
from fastrl.methods.sft.objective import SupervisedObjective
from fastrl.methods.sft.options import SupervisedAlgorithm
from fastrl.parallel.world import World
from fastrl.train.objective import PolicyObjective

READS = "fastrl/train/learner.py"  # where the one wait is
# a completion's score is in several pairs, whose gradients a small sort adds
IN_PAIRS = ("hybrid, online_dpo", "hybrid, all pairs")
MICRO = 30  # tokens: several micro-batches each
Case = tuple[Any, Callable[[], list[Any]]]  # a learner, and its batches


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    with FakeCuda() as device:
        yield device


def supervised(cuda: FakeCuda, **options: float) -> Case:
    model = decoder()
    cuda.place(model)
    source = Demonstrations(
        lambda some: [DEMONSTRATIONS[i] for i in some],
        3,
        count=3,
        algorithm=ALGORITHMS["sft"],
        seed=0,
        device=CUDA,
        world=World(),
    )
    objective: Any = PolicyObjective(model, ALGORITHMS["sft"])
    if options:
        objective = SupervisedObjective(objective, SupervisedAlgorithm(**options))
    return learner_of(objective, model, 8), lambda: source.collect(0, 0).batches


def policy(cuda: FakeCuda, name: str, **changes: Any) -> Case:
    model = decoder()
    cuda.place(model)
    source = on_policy(model, METHODS[name], **changes)
    return learner(model, METHODS[name], MICRO), lambda: source.collect(0, 0).batches


def ppo(cuda: FakeCuda, kind: str) -> Case:
    model = decoder()
    config, row = Ppo(model="", steps=10, micro_tokens=MICRO), actor_critic.row(critic=kind)
    made = ppo_learner(context_of(config, row, model, temperature=TEMPERATURE))
    learners = [made.policy] if made.critic is None else [made.policy, made.critic]
    cuda.place(model, *(one.weights.masters for one in learners))
    return made, lambda: actor_critic.source(made).collect(0, 0).batches


def preference(cuda: FakeCuda, name: str) -> Case:
    model, row = decoder(), PREFERENCES[name]
    cuda.place(model)

    def batches() -> list[Batch]:
        pairs = [fusions.pair(i) for i in range(3)]
        units = pairs if row.paired else [(one,) for both in pairs for one in both]
        batch = pack_units(units, len(units), CUDA)
        batch = replace(batch, ref_logp=batch.weight - 1.0, baseline=torch.full_like(batch.weight, 0.1))
        return [batch if row.mismatched else replace(batch, baseline=None)]

    return learner_of(UnitObjective(model, row), model, MICRO), batches


def judge(cuda: FakeCuda, name: str) -> Case:
    model, row = reward_model(), REWARD_LOSSES[name]
    cuda.place(model)
    groups = token_groups(name)
    batch = RewardBatch(groups, float(sum(row.units(g.target) for g in groups)))
    return learner_of(ScoreObjective(model, row), model, MICRO), lambda: [batch]


def hybrid(cuda: FakeCuda, name: str) -> Case:
    model = decoder()
    cuda.place(model)
    source = hybrids.mixture(model, HYBRIDS[name])
    return hybrids.learner(model, HYBRIDS[name], MICRO), lambda: source.collect(0, 0).batches


def with_pairs(cuda: FakeCuda, name: str) -> Case:
    """With every gradient's norm measured."""
    model, row = decoder(), FUSIONS[name]
    cuda.place(model)
    cuda.patches.setattr(fusions, "CPU", CUDA)
    cuda.patches.setattr(fusions, "anchor", lambda batch: batch.weight - 1.0)
    source = fusions.fused(model, row, norms_every=1)
    policy = HybridObjective(PolicyObjective(model, row), row)
    assert row.pairs is not None
    both = Both(policy, UnitObjective(model, row.pairs.preference))
    return learner_of(both, model, MICRO, gradients=gradients_by_term), lambda: source.collect(0, 0).batches


def contrasted(cuda: FakeCuda, row: Any) -> Case:
    model = decoder()
    cuda.place(model)
    row = replace(row, group=GROUP)
    source = fusions.contrasted(model, row)
    return learner_of(UnitObjective(model, row), model, 2 * MICRO), lambda: source.collect(0, 0).batches


ALL_PAIRS = replace(FUSIONS["online_dpo"], comparison=OnlinePairs("all"))
CASES: dict[str, Callable[[FakeCuda], Case]] = {
    "sft": supervised,
    "sft, smoothed": lambda cuda: supervised(cuda, label_smoothing=0.1, z_loss=1e-3),
    "grpo": lambda cuda: policy(cuda, "grpo"),
    "grpo in minibatches": lambda cuda: policy(cuda, "grpo", minibatches=2, epochs=2),
    "grpo with a KL and entropy": lambda cuda: policy(cuda, "grpo+kl+entropy"),
    "gspo": lambda cuda: policy(cuda, "gspo+kl"),
    "gmpo": lambda cuda: policy(cuda, "gmpo"),
    "ppo": lambda cuda: ppo(cuda, "separate"),
    "ppo, shared": lambda cuda: ppo(cuda, "shared"),
    "dpo": lambda cuda: preference(cuda, "dpo"),
    "ld_dpo": lambda cuda: preference(cuda, "ld_dpo"),
    "orpo": lambda cuda: preference(cuda, "orpo"),
    "kto": lambda cuda: preference(cuda, "kto"),
    **{f"reward, {name}": (lambda cuda, name=name: judge(cuda, name)) for name in REWARD_LOSSES},
    **{f"hybrid, {name}": (lambda cuda, name=name: hybrid(cuda, name)) for name in ("hpt", "luffy", "srft")},
    "hybrid, grpo_dpo": lambda cuda: with_pairs(cuda, "grpo_dpo"),
    "hybrid, online_dpo": lambda cuda: contrasted(cuda, FUSIONS["online_dpo"]),
    "hybrid, all pairs": lambda cuda: contrasted(cuda, ALL_PAIRS),
    "hybrid, lists": lambda cuda: contrasted(cuda, FUSIONS["group_softmax"]),
}


@pytest.mark.parametrize("name", CASES)
def test_an_optimizer_step_waits_once_and_sorts_nothing(name, cuda):
    """ActorCritic with a critic of its own takes two optimizer steps."""
    trained, collect = CASES[name](cuda)
    batches = collect()
    cuda.waits.clear()
    cuda.sorts.clear()
    steps = 2 if name == "ppo" else 1
    for number, batch in enumerate(batches):
        metrics = trained.update(batch, number)
        assert metrics["num_tokens"] > 0 and metrics["grad_norm"] > 0
        assert [str(w) for w in cuda.waits if not w.where.startswith(READS)] == []
        assert len(cuda.waits) == steps
        assert name in IN_PAIRS or [str(s) for s in cuda.sorts] == []
        cuda.waits.clear()
