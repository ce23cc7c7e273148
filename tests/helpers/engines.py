"""What the tests of the rollout engine share: prompts, what two sets of rollouts must have in common, and
CUDA's schedule on a CPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrl import ops
from fastrl.batch.types import Rollouts
from fastrl.model.decoder import Decoder
from fastrl.sampler import SamplingParams, engine, step

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [14, 15]]
LONG = [[(7 * i + j) % 28 + 2 for j in range(n)] for i, n in enumerate((70, 64, 65, 1, 100))]
PARAMS = SamplingParams(n=3, max_new_tokens=12, seed=5)


def trainers(model: Decoder, rollouts: Rollouts) -> Tensor:
    """logp of every token as the learner computes it."""
    with torch.no_grad():
        hidden = model(rollouts.tokens, rollouts.cu_seqlens)[:-1]
        return torch.cat(
            [torch.zeros(1), ops.linear_logp(hidden, model.head_weight, rollouts.tokens[1:]).logp]
        )


def agree(model: Decoder, rollouts: Rollouts) -> None:
    live = rollouts.completion_mask
    assert (rollouts.logp - trainers(model, rollouts))[live].abs().max() < 1e-4


def same(a: Rollouts, b: Rollouts) -> None:
    assert a.completions() == b.completions() and a.finish_reason == b.finish_reason
    assert torch.allclose(a.logp, b.logp, atol=1e-5)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """The host's side of CUDA: snapshots one window late, steps of a bucket's size, several steps each."""

    class Event:
        def record(self) -> None: ...
        def synchronize(self) -> None: ...

    monkeypatch.setattr(engine, "PIPELINED", {"cpu": True})
    monkeypatch.setattr(engine, "WINDOW", {"cpu": 3})
    monkeypatch.setattr(engine, "bucket", lambda b, device: step.bucket(b, torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "Event", Event)
