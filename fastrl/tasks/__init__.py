"""The tasks: a name or `my_task.py:MyTask` in, a `Task` out.

A task of one's own is a class in a file:

    from fastrl.tasks import Example, Score
    from fastrl.tasks.tokens import char_tokenizer

    class Doubles:
        name, stop = "doubles", ()

        def size(self, split):
            return 100

        def example(self, split, index):  # the same for the same arguments, always
            n = 2 * index + (split != "train")
            return Example(prompt=f"{n}+{n}=", demo=str(2 * n), fields={"answer": str(2 * n)})

        def verify(self, example, completion):  # never raises
            right = completion == example.fields["answer"]
            return Score(reward=float(right), correct=right, well_formed=completion.isdigit(), message="")

        def tokenizer(self):  # or None, when the model brings one
            return char_tokenizer("0123456789+=")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fastrl.errors import UserError, nearest
from fastrl.files import call_user, load_object
from fastrl.tasks.cards.task import Cards
from fastrl.tasks.gsm8k import Gsm8k
from fastrl.tasks.guess import Guess
from fastrl.tasks.task import Conversation, Example, Prompt, Score, Task, Transcript, task_reward

__all__ = [
    "TASKS",
    "Cards",
    "Conversation",
    "Example",
    "Gsm8k",
    "Guess",
    "Prompt",
    "Score",
    "Task",
    "Transcript",
    "load_task",
    "task_reward",
]

TASKS: dict[str, Callable[..., Task]] = {
    "cards": Cards,
    "gsm8k": Gsm8k,
    "guess": Guess,
}

_MEMBERS = ("name", "stop", "size", "example", "verify", "tokenizer")
_METHODS = ("size", "example", "verify", "tokenizer")


def load_task(spec: str, **options: Any) -> Task:
    """The task named by `spec`: a key of TASKS, or the class (or instance, or factory) at
    `my_task.py:MyTask`.

    Raises UserError for an unknown name or option, a file or a name in it that is missing, and an object that
    is no task.
    """
    if spec in TASKS:
        made: Any = TASKS[spec]
    elif ":" in spec or spec.endswith(".py"):
        made = load_object(spec, "--task")
    else:
        raise UserError(
            f"--task: expected one of {', '.join(TASKS)}, or a file like my_task.py:MyTask; "
            f"got {spec!r}{nearest(spec, TASKS)}"
        )
    if inspect.isclass(made) or inspect.isfunction(made):
        _check_options(spec, made, options)
        made = made(**options) if spec in TASKS else call_user(f"--task: {spec}", made, **options)
    elif options:
        raise UserError(
            f"--task: {spec} is an object, not a class: it takes no options, got {', '.join(options)}"
        )
    missing = [
        m for m in _MEMBERS if not hasattr(made, m) or (m in _METHODS and not callable(getattr(made, m)))
    ]
    if missing:
        raise UserError(
            f"--task: {spec} is not a task: {type(made).__name__} lacks {', '.join(missing)} (see "
            "fastrl.tasks.Task)"
        )
    return made


def _check_options(spec: str, made: Callable[..., Any], options: dict[str, Any]) -> None:
    parameters = inspect.signature(made).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in options:
        if name not in parameters:
            known = ", ".join(parameters) or "none"
            raise UserError(
                f"--task: {spec} has no option {name!r}{nearest(name, parameters)}; it has: {known}"
            )
        annotation = str(parameters[name].annotation)
        if spec in TASKS and not _fits(options[name], annotation):
            raise UserError(f"--task: {spec}: {name}: expected {annotation}, got {options[name]!r}")


def _fits(value: Any, annotation: str) -> bool:
    """Whether the value of a built-in task's option has the type its field is annotated with."""
    kinds = {part.strip().partition("[")[0] for part in annotation.split("|")}
    given = "None" if value is None else type(value).__name__
    return given in kinds or (given == "int" and "float" in kinds)
