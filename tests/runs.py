"""What the tests of training share: a tiny decoder, tiny runs, and what two runs must have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from support import tiny_config
from torch import Tensor

import fastrl.trainer
from fastrl.config import Eval, Grpo, Optim, Run, Save, Sft
from fastrl.interrupt import Interrupt
from fastrl.model import Decoder
from fastrl.tasks import Cards

CLOCK = ("time", "time/", "eval/time", "perf/")  # what fastrl.log says may differ between two runs of one configuration
REWARDS = '''
def digits(completions, **columns):
    """Something that a model of random weights can get more or less of."""
    return [sum(c.isdigit() for c in text) / 8 for text in completions]
'''


def tokenizer() -> Any:
    return Cards(k=2).tokenizer()


def decoder(family: str = "qwen3", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Decoder:
    """A decoder of random weights that are large enough for its distributions to be far from uniform."""
    return Decoder.from_config(tiny_config(family, **{"vocab_size": 31, "initializer_range": 0.4} | changes), dtype=dtype, seed=seed)


def write_model(folder: Path, **changes: Any) -> str:
    """The config.json of a decoder even smaller, for runs from random weights."""
    small = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.2}
    path = folder / "tiny.json"
    path.write_text(json.dumps(tiny_config("qwen3", **small, **{"max_position_embeddings": 48} | changes)))
    return str(path)


def sft(folder: Path, name: str = "run", **changes: Any) -> Sft:
    """A run of 20 steps on the card game's demonstrations."""
    options = {
        "model": write_model(folder), "task": "cards", "task_options": ("k=2",), "output_dir": str(folder / name), "steps": 20,
        "prompts": 6, "micro_tokens": 64, "optim": Optim(lr=1e-2, schedule="cosine", warmup=3, weight_decay=0.1),
        "eval": Eval(prompts=4, every=5),
    }  # fmt: skip
    return Sft(**options | changes)


def grpo(folder: Path, name: str = "run", **changes: Any) -> Grpo:
    """A run of 20 steps on a reward that random weights can climb."""
    (folder / "rewards.py").write_text(REWARDS)
    options = {
        "model": write_model(folder), "task": "cards", "task_options": ("k=2",), "output_dir": str(folder / name), "steps": 20,
        "prompts": 4, "group": 4, "max_new_tokens": 8, "micro_tokens": 64, "reward": (f"{folder}/rewards.py:digits",),
        "optim": Optim(lr=1e-2, warmup=2), "eval": Eval(prompts=4, every=5),
    }  # fmt: skip
    return Grpo(**options | changes)


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


def state(checkpoint: str | Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights, moments, masters."""
    return {f"{file.name}/{k}": v for file in sorted(Path(checkpoint).glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_run(one: str | Path, other: str | Path, step: int) -> None:
    """Bit for bit: weights and optimizer state of the checkpoint, metrics and samples of every step."""
    a, b = (state(Path(run, f"checkpoints/step_{step}")) for run in (one, other))
    assert a.keys() == b.keys() and len(a) > 10
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert lines(one) == lines(other)
    assert Path(one, "samples.jsonl").read_text() == Path(other, "samples.jsonl").read_text()


def straight_and_resumed(monkeypatch: Any, make: Callable[..., Run], folder: Path, stop_at: int, **changes: Any) -> tuple[Run, Run]:
    """One run done in one go, and one stopped after `stop_at` steps and resumed; their configurations."""
    straight, stopped = (make(folder, name, **changes) for name in ("straight", "stopped"))
    fastrl.trainer.train(straight)
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        assert fastrl.trainer.train(stopped).steps == stop_at
    fastrl.trainer.train(replace(stopped, resume=True))
    return straight, stopped


def save_every(n: int, keep: int = 2) -> Save:
    return Save(every=n, keep=keep)
