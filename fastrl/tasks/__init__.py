"""Tasks: load a `Task` by name, or from the user's own file as `my_task.py:MyTask`.

A user's task is a class in a file:

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
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from fastrl.errors import UserError, nearest
from fastrl.files import call_user, key_values, load_object
from fastrl.tasks.cards.task import Cards
from fastrl.tasks.checked import CheckedTask
from fastrl.tasks.gsm8k import Gsm8k
from fastrl.tasks.guess import Guess
from fastrl.tasks.task import Conversation, Example, Prompt, Score, Task, Transcript, notes, task_reward

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
    "load_run_task",
    "load_task",
    "notes",
    "task_reward",
]

TASKS: dict[str, Callable[..., Task]] = {
    "cards": Cards,
    "gsm8k": Gsm8k,
    "guess": Guess,
}

_MEMBERS = ("name", "stop", "size", "example", "verify", "tokenizer")
_METHODS = ("size", "example", "verify", "tokenizer")


def load_run_task(name: str | None, options: Sequence[str]) -> Task | None:
    """The task that --task names, with its key=value --task-options; None without a name.

    Raises UserError as `load_task` does, and for an option that is not key=value.
    """
    if name is None:
        return None
    texts = key_values(options, "--task-options")
    return load_task(name, **{key: _option_value(text, key) for key, text in texts.items()})


def load_task(spec: str, **options: object) -> Task:
    """The task named by `spec`: a key of TASKS, or the class (or instance, or factory) at
    `my_task.py:MyTask`.

    Raises UserError for an unknown name or option, a missing file, a name that the file does not define, and
    an object that is not a task.
    """
    made = _find(spec)
    if inspect.isclass(made) or inspect.isfunction(made):
        _check_options(spec, made, options)
        made = made(**options) if spec in TASKS else call_user(f"--task: {spec}", made, **options)
    elif options:
        given = ", ".join(options)
        raise UserError(f"--task: {spec} is an object, not a class: it takes no options, got {given}")

    missing = [m for m in _MEMBERS if not _has_member(made, m)]
    if missing:
        lacks = f"{type(made).__name__} lacks {', '.join(missing)}"
        raise UserError(f"--task: {spec} is not a task: {lacks} (see fastrl.tasks.Task)")
    return made if spec in TASKS else CheckedTask(made, spec)


def _find(spec: str) -> Any:
    if spec in TASKS:
        return TASKS[spec]
    if ":" in spec or spec.endswith(".py"):
        return load_object(spec, "--task")
    known = ", ".join(TASKS)
    raise UserError(
        f"--task: expected one of {known}, or a file like my_task.py:MyTask; "
        f"got {spec!r}{nearest(spec, TASKS)}"
    )


def _has_member(made: object, name: str) -> bool:
    if name in _METHODS:
        return callable(getattr(made, name, None))
    return hasattr(made, name)


# --- options ----------------------------------------------------------------------------------------
def _option_value(text: str, key: str) -> object:
    """The YAML value of an option's text; a list becomes a tuple, which can be hashed."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--task-options: {key}: expected a YAML value, got {text!r}") from error
    return tuple(value) if isinstance(value, list) else value


def _check_options(spec: str, made: Callable[..., object], options: dict[str, object]) -> None:
    parameters = inspect.signature(made).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name, value in options.items():
        if name not in parameters:
            near = nearest(name, parameters)
            known = ", ".join(parameters) or "none"
            raise UserError(f"--task: {spec} has no option {name!r}{near}; it has: {known}")

        annotation = str(parameters[name].annotation)
        if spec in TASKS and not _fits(value, annotation):
            raise UserError(f"--task: {spec}: {name}: expected {annotation}, got {value!r}")


def _fits(value: object, annotation: str) -> bool:
    """Whether an option of a built-in task has the type that its field is annotated with."""
    kinds = {part.strip().partition("[")[0] for part in annotation.split("|")}
    given = "None" if value is None else type(value).__name__
    return given in kinds or (given == "int" and "float" in kinds)
