"""What some tasks give beside prompts and a verifier: wrong answers, and the steps of an answer."""

from __future__ import annotations

from typing import Protocol, TypeGuard

from fastrl.tasks.task import Example, Task


class TaskWithMistakes(Task, Protocol):
    """A task that also gives wrong answers: preference pairs, with the demonstration as the chosen one."""

    def mistakes(self, example: Example, count: int, index: int) -> list[str]:
        """Up to `count` different wrong completions of example `index` of a split."""


class TaskWithSteps(TaskWithMistakes, Protocol):
    """A task that also judges the steps of an answer: process rewards."""

    def steps(self, example: Example, completion: str) -> tuple[list[str], list[bool]]:
        """The parts of a completion, and whether all is right up to the end of each."""


def has_mistakes(task: Task | None) -> TypeGuard[TaskWithMistakes]:
    """Whether the task gives wrong answers."""
    return hasattr(task, "mistakes")


def has_steps(task: Task | None) -> TypeGuard[TaskWithSteps]:
    """Whether the task gives wrong answers and judges steps."""
    return has_mistakes(task) and hasattr(task, "steps")
