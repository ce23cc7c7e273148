"""What scores a run's completions: reward functions, a task's verifier, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastrl.errors import UserError
from fastrl.rewards.functions import Prompt, Reward, Scored, score
from fastrl.tasks import Task, task_reward


class Scorer:
    """Scores completions with the reward functions, or with the task's verifier where there are none.

    The share of completions that the verifier calls correct is reported either way.
    """

    def __init__(
        self, task: Task | None, functions: Sequence[Reward], weights: Sequence[float] | None = None
    ) -> None:
        self.verify = [] if task is None else [task_reward(task)]
        self.weights = weights
        self.functions = list(functions)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        said: Sequence[Prompt] | None,
        tokens: list[list[int]],
        columns: Sequence[Mapping[str, Any]],
    ) -> Scored:
        """The rewards of S completions, given their prompts, texts or conversations, drawn tokens and dataset
        rows.
        """
        if said is None:
            raise UserError("--tokenizer: rewards read text, and the run has no tokenizer")
        if not said:  # this process has no share of the prompts
            return Scored([])

        # the last group rewards; a verifier before it is only reported
        groups = [group for group in (self.verify, self.functions) if group]
        results = []
        for i, group in enumerate(groups):
            weights = self.weights if i == len(groups) - 1 else None
            results.append(score(group, prompts, said, tokens, columns, weights=weights))

        verdict, rewards = results[0], results[-1]
        return replace(
            rewards,
            parts=verdict.parts | rewards.parts,
            message=rewards.message if any(rewards.message) else verdict.message,
            extra=verdict.extra | rewards.extra,
        )
