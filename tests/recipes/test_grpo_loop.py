"""recipes/grpo_loop.py takes the steps of `fastrl grpo`: weights and metrics, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import grpo, lines, write_model
from torch import Tensor

import fastrl.trainer
from fastrl import ops
from fastrl.batch.types import Batch, Rollouts
from fastrl.config import Eval, Grpo, Optim, Save
from fastrl.model import Decoder
from fastrl.recipes import grpo_loop
from fastrl.sampler import Sampler
from fastrl.tasks import Cards, Example

STEPS, LR, WARMUP = 4, 1e-2, 2
SIZES = {"prompts": 4, "group": 4, "max_new_tokens": 8, "seed": 3}
METRICS = ("reward", "loss", "grad_norm", "learning_rate")
Stepped = tuple[dict[str, float], dict[str, Tensor]]  # a step's metrics, and the weights after it


@dataclass(frozen=True)
class Game:
    """A run that the trainer has done, and what the loop needs to do the same."""

    config: Grpo
    task: Cards
    reward: Callable[[Example, str], float]

    def loop(self, steps: int = STEPS) -> list[Stepped]:
        """The first `steps` steps of the loop."""
        model = begin(self.config.model, SIZES["seed"])
        done = grpo_loop.run(model, self.task, self.reward, steps=STEPS, lr=LR, warmup=WARMUP, **SIZES)
        return [(metrics, weights(model)) for _, metrics in zip(range(steps), done, strict=False)]

    def trained(self) -> list[Stepped]:
        """The trainer's steps."""
        logged = [row for row in lines(self.config.output_dir) if "loss" in row]
        folder = Path(self.config.output_dir, "checkpoints")
        return [
            ({name: row[name] for name in METRICS}, weights(begin(folder / f"step_{step}")))
            for step, row in enumerate(logged, 1)
        ]


def begin(source: str | Path, seed: int = 0) -> Decoder:
    """The model of a folder, or random weights for a config.json."""
    if Path(source).is_dir():
        return Decoder.from_pretrained(source)
    return Decoder.from_config(json.loads(Path(source).read_text()), seed=seed)


def weights(model: Decoder) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(folder: Path, model: str, **changes: Any) -> Grpo:
    config = grpo(
        folder,
        model=model,
        steps=STEPS,
        micro_tokens=4096,  # the loop takes a batch in one pass
        optim=Optim(lr=LR, warmup=WARMUP, schedule="linear"),
        save=Save(every=1, keep=STEPS),
        eval=Eval(),
        **SIZES,
        **changes,
    )
    fastrl.trainer.train(config)
    return config


def digits(example: Example, text: str) -> float:
    """What helpers/runs.py rewards, for one answer."""
    return sum(c.isdigit() for c in text) / 8


@pytest.fixture(scope="module")
def by_digits(tmp_path_factory: pytest.TempPathFactory) -> Game:
    """Random weights, rewarded for digits."""
    folder = tmp_path_factory.mktemp("digits")
    return Game(train(folder, write_model(folder)), Cards(k=2), digits)


@pytest.fixture(scope="module")
def by_verifier(tmp_path_factory: pytest.TempPathFactory) -> Game:
    """A policy that the loop's `imitate` made, rewarded by the game's verifier for form and truth."""
    folder = tmp_path_factory.mktemp("verifier")
    task = Cards(k=2, reward="ladder")
    model = begin(write_model(folder, hidden_size=32))
    grpo_loop.imitate(model, task, steps=60, batch=16, lr=2e-2)
    model.save_pretrained(folder / "start")
    config = train(folder, str(folder / "start"), task_options=("k=2", "reward=ladder"), reward=())
    return Game(config, task, lambda example, text: task.verify(example, text).reward)


@pytest.mark.parametrize("name", ["by_digits", "by_verifier"])
def test_the_loop_takes_the_trainers_steps(name: str, request: pytest.FixtureRequest):
    """Wrong implementations: those below; a learning rate that is a step late; prompts in another order."""
    game: Game = request.getfixturevalue(name)
    looped, trained = game.loop(), game.trained()
    assert [metrics for metrics, _ in looped] == [metrics for metrics, _ in trained]
    assert len(looped) == STEPS
    assert all(same(one, other) for (_, one), (_, other) in zip(looped, trained, strict=True))
    assert len({metrics["reward"] for metrics, _ in looped}) > 1
    assert all(metrics["grad_norm"] > 0 for metrics, _ in looped)


def batch_deviation(patch: pytest.MonkeyPatch) -> None:
    """The advantage divided by the deviation of the whole batch."""
    right = ops.group_advantage
    patch.setattr(ops, "group_advantage", lambda *args: right(*args, scale="batch_std"))


def biased_deviation(patch: pytest.MonkeyPatch) -> None:
    """The advantage divided by a deviation over n, not n - 1."""
    right = ops.group_advantage
    patch.setattr(ops, "group_advantage", lambda *args: right(*args, unbiased=False))


def reweighed(patch: pytest.MonkeyPatch, factor: Callable[[Batch, Rollouts], Tensor | float]) -> None:
    """Tokens whose weights are `factor` times too large."""
    right = grpo_loop.make_batch

    def wrong(rollouts: Rollouts, advantage: Tensor) -> Batch:
        batch = right(rollouts, advantage)
        return replace(batch, weight=batch.weight * factor(batch, rollouts))

    patch.setattr(grpo_loop, "make_batch", wrong)


def token_mean(patch: pytest.MonkeyPatch) -> None:
    """Every token weighs the same, whatever the length of its answer."""
    reweighed(patch, lambda batch, rollouts: 1 / (batch.weight * rollouts.lengths.sum()))


def local_denominator(patch: pytest.MonkeyPatch) -> None:
    """Answers without a gradient do not count."""
    reweighed(patch, lambda batch, rollouts: len(rollouts) / len(batch))


def repeated_noise(patch: pytest.MonkeyPatch) -> None:
    """Every step draws with the noise of the first."""
    right = Sampler.generate

    def wrong(self: Sampler, *args: Any, sequence_offset: int) -> Rollouts:
        return right(self, *args)

    patch.setattr(Sampler, "generate", wrong)


def unclipped_gradient(patch: pytest.MonkeyPatch) -> None:
    """The gradient is measured and not clipped."""
    right = torch.nn.utils.clip_grad_norm_
    patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, size: right(parameters, 1e9))


WRONG = (batch_deviation, biased_deviation, token_mean, local_denominator, repeated_noise, unclipped_gradient)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_loop_leaves_the_trainers_path(
    wrong: Callable[[pytest.MonkeyPatch], None], by_digits: Game, monkeypatch: pytest.MonkeyPatch
):
    """Wrong implementation: a comparison above that anything passes."""
    wrong(monkeypatch)
    (_, looped), (_, trained) = by_digits.loop()[-1], by_digits.trained()[-1]
    assert not same(looped, trained)


def test_the_plain_forward_differs_by_rounding_only(by_digits: Game, monkeypatch: pytest.MonkeyPatch):
    """Wrong implementation: a shared prompt that the gradient counts once instead of once per answer."""
    right = by_digits.loop(steps=1)[0]
    monkeypatch.setattr(grpo_loop, "shared", lambda batch: None)
    plain = by_digits.loop(steps=1)[0]
    assert plain[0]["reward"] == right[0]["reward"]
    assert plain[0]["grad_norm"] == pytest.approx(right[0]["grad_norm"], rel=1e-5)


def test_a_step_without_a_difference_changes_nothing(by_digits: Game):
    """Wrong implementations: a step of AdamW on no gradient; a division by the deviation 0."""
    game = replace(by_digits, reward=lambda example, text: 1.0)
    metrics, after = game.loop(steps=1)[0]
    assert same(after, weights(begin(game.config.model, SIZES["seed"])))
    assert metrics["reward"] == 1.0 and metrics["grad_norm"] == metrics["loss"] == 0.0


def test_the_command_prints_the_reward_of_every_ten_steps(threads: Any, capsys: pytest.CaptureFixture[str]):
    """Wrong implementations: options that are not passed on, imitation that is skipped."""
    threads(1)
    grpo_loop.main(["--imitate", "2", "--steps", "20", "--prompts", "2", "--group", "2", "--seed", "1"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in printed] == [["step", "10", "reward"], ["step", "20", "reward"]]
