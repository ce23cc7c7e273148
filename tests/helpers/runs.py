"""What the tests of training share: a tiny decoder, tiny runs, and what two runs must have in common."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from configs import configured
from decoders import decoder as decoder
from learners import learner_of as learner_of
from learners import leave_gradient as leave_gradient
from safetensors.torch import load_file
from support import tiny_config
from torch import Tensor

import fastrl.trainer
from fastrl.algorithms import ALGORITHMS, Algorithm
from fastrl.batch.types import Batch
from fastrl.config import Dpo, Eval, Grpo, Optim, Run, Sft
from fastrl.data.encode import Sample
from fastrl.methods.grpo.prompts import Prompts
from fastrl.methods.grpo.rollouts import ExtraLogProbs, RolloutSource, Shaping
from fastrl.methods.grpo.sampling import GroupSampler
from fastrl.methods.grpo.shaping import policy_shaping
from fastrl.methods.sft.batches import Demonstrations
from fastrl.model.decoder import Decoder
from fastrl.parallel.world import World
from fastrl.rewards.functions import Scored
from fastrl.run import checkpoint
from fastrl.run.interrupt import Interrupt
from fastrl.sampler import Sampler
from fastrl.tasks import Cards
from fastrl.train.learner import Learner
from fastrl.train.objective import PolicyObjective, batch_logp

# what fastrl.run.log says may differ between two runs of one configuration
CLOCK = (
    "time",
    "time/",
    "eval/time",
    "perf/",
)
REWARDS = '''
def digits(completions, **columns):
    """Something that a model of random weights can get more or less of."""
    return [sum(c.isdigit() for c in text) / 8 for text in completions]
'''


def tokenizer() -> Any:
    return Cards(k=2).tokenizer()


def write_model(folder: Path, **changes: Any) -> str:
    """The config.json of a decoder even smaller, for runs from random weights."""
    small = {
        "vocab_size": 31,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "initializer_range": 0.2,
    }
    return write(
        folder / "tiny.json",
        json.dumps(tiny_config("qwen3", **small | {"max_position_embeddings": 48} | changes)),
    )


def write(path: Path, text: str) -> str:
    """A file that is whole at any moment, though several processes write it."""
    partial = path.with_name(f"{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)
    return str(path)


def sft(folder: Path, name: str = "run", **changes: Any) -> Sft:
    """A run of 20 steps on the card game's demonstrations."""
    options: dict[str, Any] = {
        "model": changes.pop("model", None) or write_model(folder),
        "task": "cards",
        "task_options": ("k=2",),
        "output_dir": str(folder / name),
        "steps": 20,
        "prompts": 6,
        "micro_tokens": 64,
        "optim": Optim(lr=1e-2, schedule="cosine", warmup=3, weight_decay=0.1),
        "eval": Eval(prompts=4, every=5),
    }
    return Sft(**options | changes)


def grpo(folder: Path, name: str = "run", **changes: Any) -> Grpo:
    """A run of 20 steps on a reward that random weights can climb."""
    write(folder / "rewards.py", REWARDS)
    options: dict[str, Any] = {
        "model": changes.pop("model", None) or write_model(folder),
        "task": "cards",
        "task_options": ("k=2",),
        "output_dir": str(folder / name),
        "steps": 20,
        "prompts": 4,
        "group": 4,
        "max_new_tokens": 8,
        "micro_tokens": 64,
        "reward": (f"{folder}/rewards.py:digits",),
        "optim": Optim(lr=1e-2, warmup=2),
        "eval": Eval(prompts=4, every=5),
    }
    return configured(Grpo, **options | changes)


def dpo(folder: Path, name: str = "run", **changes: Any) -> Dpo:
    """A run of 12 steps on the card game's pairs."""
    options: dict[str, Any] = {
        "model": changes.pop("model", None) or write_model(folder),
        "task": "cards",
        "task_options": ("k=2",),
        "output_dir": str(folder / name),
        "steps": 12,
        "prompts": 6,
        "micro_tokens": 100,
        "optim": Optim(lr=1e-2, warmup=2),
        "eval": Eval(prompts=4, every=6),
    }
    return configured(Dpo, **options | changes)


def stop_after(monkeypatch: Any, looks: int) -> None:
    """The next runs are told to stop when they ask for the (looks + 1)-th time: after that many steps."""

    class Stop(Interrupt):
        asked_before = 0

        def asked(self, world: Any) -> bool:
            Stop.asked_before += 1
            return Stop.asked_before > looks

    monkeypatch.setattr(fastrl.trainer, "Interrupt", Stop)


def lines(run: str | Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not (k == "time" or k.startswith(CLOCK[1:]))} for row in rows]


def state(folder: str | Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights, moments, masters."""
    return {
        f"{file.name}/{k}": v
        for file in sorted(Path(folder).glob("*.safetensors"))
        for k, v in load_file(file).items()
    }


def assert_same_run(one: str | Path, other: str | Path, step: int) -> None:
    """Bit for bit: weights and optimizer state of the checkpoint, metrics and samples of every step."""
    folders = [Path(run, f"checkpoints/step_{step}") for run in (one, other)]
    metas = [checkpoint.load(folder)[1] for folder in folders]
    assert metas[0] == metas[1] and metas[0]["version"] >= step
    a, b = (state(folder) for folder in folders)
    assert a.keys() == b.keys() and len(a) > 10
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert lines(one) == lines(other)
    assert Path(one, "samples.jsonl").read_text() == Path(other, "samples.jsonl").read_text()


def straight_and_resumed(
    monkeypatch: Any, make: Callable[..., Run], folder: Path, stop_at: int, **changes: Any
) -> tuple[Run, Run]:
    """One run done in one go, and one stopped after `stop_at` steps and resumed; their configurations."""
    straight, stopped = (make(folder, name, **changes) for name in ("straight", "stopped"))
    fastrl.trainer.train(straight)
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        assert fastrl.trainer.train(stopped).steps == stop_at
    fastrl.trainer.train(replace(stopped, resume=True))
    return straight, stopped


# --- batches ----------------------------------------------------------------------------------------
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10]]
GROUP, BUDGET, TEMPERATURE, SEED = 4, 9, 0.8, 2
SCORES = [1.0, 0.0, 0.5, 0.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 1.0, 0.25]  # the second group is all equal
DEMONSTRATIONS = [
    Sample([3, 4, 5, 6], [False, False, True, True]),
    Sample([7, 8], [False, True]),
    Sample([9, 10, 11, 12, 13, 14], [False, True, True, True, False, True]),
]
EXTRA = {  # rows with every term of the loss
    "grpo+kl+entropy": replace(ALGORITHMS["grpo"], kl="k3", kl_coef=0.1, entropy_coef=0.01),
    "gspo+kl": replace(ALGORITHMS["gspo"], kl="k2", kl_coef=0.2),
}
METHODS = {**ALGORITHMS, **EXTRA}


def reference(batch: Batch) -> Tensor:
    """Some log-probs of a reference model."""
    return batch.old_logp * 0.9 - 0.1


def on_policy(
    model: Decoder,
    algorithm: Algorithm,
    scores: Sequence[float] = SCORES,
    world: World | None = None,
    trainer: Any = reference,
    **changes: Any,
) -> RolloutSource:
    """Rollouts of `model` for PROMPTS, scored by `scores` whatever they are."""
    options: dict[str, Any] = {
        "model": "",
        "prompts": len(PROMPTS),
        "group": GROUP,
        "max_new_tokens": BUDGET,
        "seed": SEED,
    }
    config = configured(Grpo, **options | changes)
    config = replace(config, sampling=replace(config.sampling, temperature=TEMPERATURE))

    prompts = scored_prompts(scores, GROUP)
    extra = ExtraLogProbs(reference if algorithm.kl_coef else None, trainer, algorithm.correction)
    return rollouts_of(config, Sampler(model), prompts, algorithm, extra, world or World())


def rollouts_of(
    config: Grpo,
    sampler: Any,
    prompts: Prompts,
    algorithm: Algorithm,
    extra: ExtraLogProbs | None = None,
    world: World | None = None,
    shaping: Shaping | None = None,
) -> RolloutSource:
    """Rollouts with the policy's own shaping, or another."""
    world = world or World()
    groups = GroupSampler(config, sampler, prompts, world)
    shaping = shaping or policy_shaping(config, algorithm, world)
    return RolloutSource(config, groups, extra or ExtraLogProbs(), shaping, world)


def rescore(source: RolloutSource, score: Callable[..., Scored]) -> None:
    """Let the source's completions be scored by `score` from now on."""
    source.groups.prompts = replace(source.groups.prompts, score=score)


def logp(model: Any, batch: Batch, temperature: float = TEMPERATURE) -> Tensor:
    """(T,) log-probs of the batch's loss tokens under `model`."""
    return batch_logp(model, batch, micro_tokens=20, temperature=temperature)


def scored_prompts(scores: Sequence[float], group: int) -> Prompts:
    """PROMPTS, their completions scored by `scores` whatever they are."""

    def score(prompts: list[Any], texts: Any, tokens: Any, columns: Sequence[Any]) -> Scored:
        return Scored([scores[c["id"] * group + i % group] for i, c in enumerate(columns)])

    return Prompts(lambda i: (PROMPTS[i], {"id": i}), len(PROMPTS), score)


def make_batch(name: str, model: Decoder, **changes: Any) -> Batch:
    """One optimizer step's batch for a row of METHODS."""
    if name != "sft":
        return on_policy(model, METHODS[name], **changes).collect(0, 0).batches[0]
    return demonstrations().collect(0, 0).batches[0]


def demonstrations(world: World | None = None) -> Demonstrations:
    """A source of DEMONSTRATIONS, all of them at every step."""
    return Demonstrations(
        lambda some: [DEMONSTRATIONS[i] for i in some],
        3,
        count=3,
        algorithm=ALGORITHMS["sft"],
        seed=0,
        device=torch.device("cpu"),
        world=world or World(),
    )


def learner(
    model: Decoder,
    algorithm: Algorithm,
    micro_tokens: int = 10**6,
    optim: Optim | None = None,
    world: World | None = None,
    temperature: float | None = None,
) -> Learner[Batch]:
    """A learner of the policy loss."""
    temperature = temperature or (1.0 if algorithm.advantage is None else TEMPERATURE)
    objective = PolicyObjective(model, algorithm, temperature)
    return learner_of(objective, model, micro_tokens=micro_tokens, optim=optim, world=world)


def gradient(trained: Learner[Any], batch: Any) -> tuple[dict[str, float], Tensor]:
    """The step's metrics, and its whole gradient as one vector."""
    metrics = leave_gradient(trained, batch)
    masters = trained.weights.masters
    grads = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in masters])
    trained.weights.clear()
    return metrics, grads


def drift(model: Decoder, size: float) -> None:
    """Move the weights, as optimizer steps since the sampling would."""
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=noise, dtype=torch.float64).to(p.dtype), alpha=size)


def relative(a: Tensor, b: Tensor) -> float:
    """Distance of two vectors by the second's length."""
    return float((a.double() - b.double()).norm() / b.double().norm())
