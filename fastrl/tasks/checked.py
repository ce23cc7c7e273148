"""A user's task with what its methods return checked: a mistake is a UserError that says where it is.

Numbers of numpy and torch become Python's.  What a method raises becomes a UserError, too, as that of any
function of the user.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from operator import index as as_integer
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from fastrl.errors import UserError
from fastrl.files import call_user, location, shorten
from fastrl.tasks.returned import NUMBER, is_text, items, number, truth
from fastrl.tasks.task import Example, Message, Score, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")
EXAMPLE = "return Example(prompt=..., demo=..., fields={...})"
SCORE = "return Score(reward=..., correct=..., well_formed=...)"


class CheckedTask:
    """A task whose answers are checked.  Members that `Task` does not have are those of the task itself.

    spec  how the user named it
    """

    def __init__(self, task: Task, spec: str) -> None:
        self._task, self._spec = task, spec
        self.name: str = task.name
        self.stop = self._stops(task.stop)
        if not is_text(task.name) or not task.name:
            self._refuse("name", "a text", task.name)

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._task, name)
        check = _CHECKS.get(name)
        if check is None or not callable(own):
            return own
        return lambda *args: check(self, *args)

    def size(self, split: str) -> int:
        """Number of examples in `split`."""
        size = self._call("size", self._task.size, split)
        try:
            whole = as_integer(size)
        except TypeError:
            whole = -1
        if whole < 0 or isinstance(size, bool):
            self._refuse(f"size({split!r})", "a whole number of 0 or more", size, self._task.size)
        return whole

    def example(self, split: str, index: int) -> Example:
        """Example `index` of `split`."""
        method = self._task.example
        example = self._call("example", method, split, index)
        call = f"example({split!r}, {index})"
        if not isinstance(example, Example):
            self._refuse(call, "an Example", example, method, EXAMPLE)
        if not is_prompt(example.prompt):
            self._refuse(f"{call}: prompt", "text or a list of chat messages", example.prompt, method)
        if example.demo is not None and not is_text(example.demo):
            self._refuse(f"{call}: demo", "text or None", example.demo, method)
        if not isinstance(example.fields, dict) or not all(isinstance(name, str) for name in example.fields):
            self._refuse(f"{call}: fields", "a dict of names and values", example.fields, method)
        return example

    def verify(self, example: Example, completion: str) -> Score:
        """The score of `completion`."""
        method = self._task.verify
        score = self._call("verify", method, example, completion)
        call = f"verify(..., {shorten(completion, 60)})"
        if not isinstance(score, Score):
            self._refuse(call, "a Score", score, method, SCORE)
        reward, correct, well_formed = number(score.reward), truth(score.correct), truth(score.well_formed)
        if reward is None:
            self._refuse(f"{call}: reward", NUMBER, score.reward, method)
        if correct is None:
            self._refuse(f"{call}: correct", "True or False", score.correct, method)
        if well_formed is None:
            self._refuse(f"{call}: well_formed", "True or False", score.well_formed, method)
        if not isinstance(score.message, str):
            self._refuse(f"{call}: message", "text", score.message, method)
        return replace(score, reward=reward, correct=correct, well_formed=well_formed)

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The task's own tokenizer, or None."""
        tokenizer = self._call("tokenizer", self._task.tokenizer)
        methods = ("encode", "decode", "save_pretrained")
        if tokenizer is not None and not all(hasattr(tokenizer, method) for method in methods):
            self._refuse("tokenizer()", "a transformers tokenizer or None", tokenizer, self._task.tokenizer)
        return tokenizer

    def _mistakes(self, example: Example, count: int, index: int) -> list[str]:
        method = self._own("mistakes")
        texts = items(self._call("mistakes", method, example, count, index))
        if texts is None or not all(map(is_text, texts)):
            self._refuse(f"mistakes(..., {count}, {index})", "a list of texts", texts, method)
        return [str(text) for text in texts][:count]

    def _steps(self, example: Example, completion: str) -> tuple[list[str], list[bool]]:
        method = self._own("steps")
        both = items(self._call("steps", method, example, completion))
        parts, right = [items(part) for part in both] if both and len(both) == 2 else (None, None)
        verdicts = [truth(verdict) for verdict in right or ()]
        if parts is None or not all(map(is_text, parts)) or len(parts) != len(verdicts) or None in verdicts:
            wanted = "a list of texts, and one of as many truth values"
            self._refuse(f"steps(..., {shorten(completion, 60)})", wanted, both, method)
        return [str(part) for part in parts], [bool(verdict) for verdict in verdicts]

    def _answer(self, completion: str) -> Hashable:
        method = self._own("answer")
        answer = self._call("answer", method, completion)
        try:
            hash(answer)
        except TypeError:
            call = f"answer({shorten(completion, 60)})"
            self._refuse(call, "a value that can be counted: a text, a number or None", answer, method)
        kept: Hashable = answer
        return kept

    def _own(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self._task, name)
        return method

    def _call(self, name: str, method: Callable[..., T], *args: object) -> T:
        return call_user(f"--task: {self._spec}: {name}", method, *args)

    def _stops(self, stop: object) -> tuple[str, ...]:
        texts = items(stop)
        if texts is None or not all(is_text(text) and text for text in texts):
            self._refuse("stop", 'a tuple of texts like ("\\n",), or () for none', stop)
        return tuple(str(text) for text in texts)

    def _refuse(
        self, what: str, expected: str, got: object, method: object = None, advice: str = ""
    ) -> NoReturn:
        """Raise UserError."""
        where = location(method) if method is not None else ""
        kind = "" if got is None else f"{type(got).__name__} "
        mend = f"; {advice}" if advice else ""
        raise UserError(
            f"--task: {self._spec}{where}: {what}: expected {expected}, got {kind}{shorten(got, 80)}{mend}"
        )


_CHECKS: dict[str, Callable[..., object]] = {
    "mistakes": CheckedTask._mistakes,
    "steps": CheckedTask._steps,
    "answer": CheckedTask._answer,
}


def is_prompt(prompt: object) -> bool:
    """Whether it is a text, or a list of chat messages, of Unicode text."""
    if not isinstance(prompt, list):
        return is_text(prompt)
    return bool(prompt) and all(_is_message(message) for message in prompt)


def _is_message(message: Message) -> bool:
    if not isinstance(message, dict) or not is_text(message.get("role")):
        return False
    content = message.get("content")
    return is_text(content) or (not isinstance(content, str) and bool(content or message.get("tool_calls")))


def turns(answer: object, count: int) -> tuple[Sequence[str], list[float], list[bool]] | str:
    """What a task's `step` returned for `count` conversations: observations ("" where one is over), rewards
    and whether each is over; or what is wrong with it.
    """
    parts = items(answer)
    if parts is None or len(parts) != 3:
        return f"expected three lists (observations, rewards, done), got {shorten(answer, 120)}"

    columns: list[list[object]] = []
    for name, part in zip(("observations", "rewards", "done"), parts, strict=True):
        column = items(part)
        if column is None or len(column) != count:
            return f"{name}: expected a list of {count}, one for each transcript, got {shorten(part, 120)}"
        columns.append(column)

    texts: list[str] = []
    rewards: list[float] = []
    done: list[bool] = []
    for i, (text, reward, over) in enumerate(zip(*columns, strict=True)):
        earned, ended = number(reward), truth(over)
        if earned is None:
            return f"rewards[{i}]: expected {NUMBER}, got {shorten(reward, 80)}"
        if ended is None:
            return f"done[{i}]: expected True or False, got {shorten(over, 80)}"
        if not ended and (not is_text(text) or not text):
            return f"observations[{i}]: expected text where the conversation goes on, got {shorten(text, 80)}"
        texts.append("" if ended else str(text))
        rewards.append(earned)
        done.append(ended)
    return texts, rewards, done
