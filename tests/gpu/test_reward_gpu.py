"""Reward models on a GPU: the CPU's scores and steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from judging import grads, reward_model, token_groups
from learners import learner_of, leave_gradient

from fastrl.algorithms.reward import REWARD_LOSSES
from fastrl.methods.reward.objective import RewardBatch, ScoreObjective
from fastrl.model.reward import RewardModel

pytestmark = pytest.mark.gpu


def on_gpu(model: RewardModel, dtype: torch.dtype = torch.float32) -> RewardModel:
    other = reward_model(dtype=dtype)
    other.load_state_dict(model.state_dict())
    return other.to("cuda")


def test_scores_are_the_cpus():
    """Wrong implementations: TF32 products; rows of scores from another stream's copy."""
    model, groups = reward_model(), token_groups("bradley_terry", 9)
    sequences = [s for g in groups for s in g.tokens]
    assert on_gpu(model).score(sequences) == pytest.approx(model.score(sequences), abs=1e-4)


@pytest.fixture
def deterministic():
    """What `fastrl reward` runs under."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_a_step_is_the_cpus_and_the_same_twice(name, deterministic):
    """Wrong implementations: targets left on the host; a scatter with duplicate indices, whose sums differ
    from run to run.
    """
    groups = token_groups(name, 9)
    row = replace(REWARD_LOSSES[name], center=0.1 if REWARD_LOSSES[name].compares else 0.0)
    batch = RewardBatch(groups, float(sum(row.units(g.target) for g in groups)))
    model, found = reward_model(), []
    for it in (model, on_gpu(model), on_gpu(model)):
        metrics = leave_gradient(learner_of(ScoreObjective(it, row), it, micro_tokens=60), batch)
        found.append((metrics["loss"], grads(it).cpu()))
    (a, g), (b, h), (c, again) = found
    assert b == c and torch.equal(h, again)
    assert b == pytest.approx(a, rel=1e-4) and (h - g).norm() < 1e-3 * g.norm()
