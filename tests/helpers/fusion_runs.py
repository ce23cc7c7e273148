"""Tiny runs of fusions: a reward that random weights can climb, with the card game's pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs import configured
from runs import REWARDS, decoder, tokenizer, write_model

from fastrl.config import Hybrid, Optim
from fastrl.methods.hybrid.known import PromptEncoder


def fusion(folder: Path, name: str = "run", **changes: Any) -> Hybrid:
    (folder / "rewards.py").write_text(REWARDS)
    options: dict[str, Any] = {
        "model": changes.pop("model", None) or write_model(folder),
        "task": "cards",
        "task_options": ("k=2",),
        "output_dir": str(folder / name),
        "steps": 6,
        "prompts": 4,
        "group": 4,
        "max_new_tokens": 8,
        "micro_tokens": 128,
        "reward": (f"{folder}/rewards.py:digits",),
        "optim": Optim(lr=1e-2, warmup=2),
        "algorithm": "grpo_dpo",
    }
    return configured(Hybrid, **options | changes)


def encoder(config: Hybrid) -> PromptEncoder:
    """What encodes demonstrations and pairs in these runs."""
    return PromptEncoder(config, tokenizer(), decoder(max_position_embeddings=48).config)
