"""Models as reward functions: what `--reward model:FOLDER` and `--reward implicit:POLICY,REFERENCE` name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastrl.data.messages import as_read, columns_of_rows
from fastrl.errors import UserError
from fastrl.files import hub_advice
from fastrl.model.config import is_scoring
from fastrl.model.folder import model_folder
from fastrl.model.reward import RewardModel
from fastrl.model.tokenizer import load_tokenizer
from fastrl.model.weights import read_config
from fastrl.rewards.implicit import implicit_reward
from fastrl.rewards.maths import math_reward

Prompt = str | list[dict[str, Any]]  # text, or chat messages
Reward = Callable[..., Sequence[float | None]]


def model_reward(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust: bool = False,
) -> Reward:
    """A reward model as a reward function; it reads prompt and completion with its own tokenizer and chat
    template.

    Raises:  UserError for a folder without a trained reward model, or without a tokenizer.
    """
    folder = model_folder(name, "--reward")
    if not folder.is_dir() or not is_scoring(read_config(folder)):
        advice = _beside(folder) if folder.is_dir() else hub_advice(name, "--reward model:")
        raise UserError(
            "--reward: expected the folder of a reward model (`fastrl reward` writes one), "
            f"got model:{name}{advice}"
        )
    tokenizer = load_tokenizer(None, str(folder), trust=trust)
    model = RewardModel.load(folder, dtype, device, tokenizer=tokenizer)
    model.requires_grad_(False)

    def reward_model(
        prompts: Sequence[Prompt],
        completions: Sequence[Prompt],
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Sequence[Any] | None = None,
    ) -> list[float]:
        columns = columns_of_rows(len(prompts), tools=tools, chat_template_kwargs=chat_template_kwargs)
        read = map(as_read, prompts, completions)
        return model.score(list(zip(prompts, read, columns, strict=True)))

    return reward_model


def _beside(folder: Path) -> str:
    """Advice for a folder that holds a policy and, below it, the reward model that was trained with it."""
    inside = [path.parent for path in folder.glob("*/config.json") if is_scoring(read_config(path.parent))]
    return f", a policy; its reward model is model:{inside[0]}" if inside else ", a policy"


# prefix of a reward's name -> what loads it
MODELS: dict[str, Callable[..., Reward]] = {
    "model": model_reward,
    "implicit": implicit_reward,
    "math": math_reward,
}
OF_FOLDERS = ("model", "implicit")


def settled_reward(spec: str) -> str:
    """A reward's name with the newest checkpoints of runs in the place of their folders."""
    kind, colon, names = spec.partition(":")
    if not colon or kind not in OF_FOLDERS:
        return spec
    return f"{kind}:{','.join(_meant(part.strip()) for part in names.split(','))}"


def _meant(name: str) -> str:
    found = model_folder(name, "--reward")
    return name if found == Path(name) else str(found)
