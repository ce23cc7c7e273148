"""Options of the commands that use a model: `fastrl generate` and `fastrl eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastrl.config.run import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Complete prompts with a trained model."""

    model: str
    """Hugging Face folder, or the folder of a run."""
    prompts: str = "-"
    """A file with one prompt a line (or .jsonl with a prompt column); - is standard input."""
    output: str = "-"
    """A .jsonl file to write; - is the terminal."""
    resume: bool = False
    """Continue the output file of an interrupted run, with the completions it would have had."""
    tokenizer: str | None = None
    """Hugging Face tokenizer folder; defaults to the model's."""
    chat_template: str | None = None
    """A file with a chat template (Jinja), in place of the tokenizer's own."""
    trust_remote_code: bool = False
    """Run the code that the folders of models and tokenizers bring (auto_map), where transformers does not
    know them.  Read it first.
    """
    n: int = 1
    """Completions of each prompt."""
    max_new_tokens: int = 256
    """Longest completion, tokens."""
    seed: int = 0
    """Seed of the sampling noise."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; auto is float32 on CPU and bfloat16 on CUDA."""
    threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""
    sampler: Literal["fastrl", "vllm"] = "fastrl"
    """Rollout engine: fastrl's own, or vLLM if it is installed."""
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Accuracy of a model on a task's split, greedy and sampled, with 95% intervals.

    A checkpoint remembers how its run evaluated: what is not given here is as it was there.
    """

    model: str
    """Hugging Face folder, or the folder of a run."""
    task: str | None = None
    """A built-in task (cards, gsm8k or guess), or a class in a file of yours: my_task.py:MyTask; defaults to
    that of the checkpoint's run.
    """
    task_options: tuple[str, ...] = ()
    """Options of the task, key=value with values in YAML; beside those of the checkpoint's run."""
    split: str | None = None
    """The task's split; the run's, or test."""
    prompts: int | None = None
    """Prompts of the split, from its beginning; as many as in the run, or 512."""
    samples: int | None = None
    """Completions drawn per prompt at temperature 1, in addition to the greedy one; as in the run, or 4."""
    max_new_tokens: int | None = None
    """Longest completion, tokens; as in the run, or 256."""
    search: Literal["best_of", "vote"] | None = None
    """Select one answer from the samples: that of the highest --reward, or that of most samples (weighted by
    --reward, if given).
    """
    reward: str | None = None
    """Scores the samples: a reward model (model:FOLDER) or a function (my_rewards.py:fn)."""
    output: str | None = None
    """A .json file for the numbers and every answer."""
    tokenizer: str | None = None
    """Hugging Face tokenizer folder; defaults to the model's."""
    chat_template: str | None = None
    """A file with a chat template (Jinja), in place of the tokenizer's own."""
    trust_remote_code: bool = False
    """Run the code that the folders of models and tokenizers bring (auto_map), where transformers does not
    know them.  Read it first.
    """
    seed: int = 0
    """Seed of the sampling noise."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; auto is float32 on CPU and bfloat16 on CUDA."""
    threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""
