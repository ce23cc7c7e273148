"""Options of the commands that use a model: `fastrl generate` and `fastrl eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastrl.config.run import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Complete prompts with a trained model."""

    model: str
    prompts: str = "-"
    """A file with one prompt a line (or .jsonl with a prompt column); - is standard input."""
    output: str = "-"
    """A .jsonl file to write; - is the terminal."""
    resume: bool = False
    """Continue the output file of an interrupted run, with the completions it would have had."""
    tokenizer: str | None = None
    n: int = 1
    """Completions of each prompt."""
    max_new_tokens: int = 256
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = 0
    sampler: Literal["fastrl", "vllm"] = "fastrl"
    """Rollout engine: fastrl's own, or vLLM if it is installed."""
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Accuracy of a model on a task's split, greedy and sampled, with 95% intervals."""

    model: str
    task: str
    task_options: tuple[str, ...] = ()
    """Options of the task, key=value with values in YAML."""
    split: str = "test"
    prompts: int = 512
    samples: int = 4
    max_new_tokens: int = 256
    search: Literal["best_of", "vote"] | None = None
    """Select one answer from the samples: that of the highest --reward, or that of most samples (weighted by
    --reward, if given).
    """
    reward: str | None = None
    """Scores the samples: a reward model (model:FOLDER) or a function (my_rewards.py:fn)."""
    output: str | None = None
    """A .json file for the numbers and every answer."""
    tokenizer: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = 0
