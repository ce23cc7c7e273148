"""GSM8K: grade-school word problems with one exact number as the answer (Cobbe et al., arXiv 2110.14168).

The data is a folder with train.jsonl, lines of {"question": ..., "answer": "... #### 72"}, and for the test
split test.jsonl or model_solutions.jsonl (both of the data set's release).  The folder is an option, or the
environment variable FASTRL_GSM8K.
"""

from __future__ import annotations

import os
import re
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from fastrl.errors import UserError
from fastrl.files import read_json_lines, shorten
from fastrl.tasks.task import Example, Prompt, Score, bucket

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "val", "test")
# the first that is there; the second holds 900 of the 1319 test questions
TEST_FILES = (
    "test.jsonl",
    "model_solutions.jsonl",
)
INSTRUCTION = (
    "Solve the problem step by step. End with a line `#### ` followed by the answer as a plain number."
)
MARKERS = (  # what introduces an answer; of the first that occurs, its last place counts
    re.compile(r"####"),
    re.compile(r"^[ \t]*A:", re.MULTILINE),
    re.compile(r"\\boxed\{"),
    re.compile(r"\bthe (?:final )?answer is:?", re.IGNORECASE),
)
# bounded: no number is expensive
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,30})(?:\.[0-9]{1,30})?|\.[0-9]{1,30}"
_NUMBER = re.compile(
    r"(?P<sign>[-\u2212]?)(?:\$ "
    rf"?)?(?P<sign2>[-\u2212]?)(?P<top>{_DIGITS})(?:/(?P<bottom>[1-9][0-9]{{0,29}}))?(?![0-9]|[.,/][0-9])"
)
_ANYWHERE = re.compile(rf"(?<![0-9.,]){_NUMBER.pattern}")
_ANNOTATION = re.compile(r"<<[^<>]*>>")  # the calculator marks in the data set's own solutions


class Problem(NamedTuple):
    question: str
    solution: str
    answer: Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Gsm8k:
    """The task.  train and val share train.jsonl, by a hash of the question; test is the data set's own."""

    name: ClassVar[str] = "gsm8k"
    stop: ClassVar[tuple[str, ...]] = ()

    folder: str | None = None
    """Where the files are; FASTRL_GSM8K when not given."""
    val: float = 0.05
    """Share of train.jsonl in the validation split."""
    chat: bool = False
    """Prompts as chat messages, with an instruction, instead of `Question: ...`."""
    annotations: bool = False
    """Keep the <<48/2=24>> marks in demonstrations."""
    last_number: bool = False
    """Take the last number of a completion that marks no answer."""

    def __post_init__(self) -> None:
        if not 0 <= self.val < 1:
            raise UserError(f"gsm8k: val: expected a share of at least 0 and below 1, got {self.val}")

    def size(self, split: str) -> int:
        """How many problems `split` has.  Raises UserError for an unknown or empty split, missing files and
        malformed lines.
        """
        return len(self._problems(split))

    def example(self, split: str, index: int) -> Example:
        """Problem `index` of `split`, in file order.  Raises IndexError outside [0, size(split))."""
        problems = self._problems(split)
        if not 0 <= index < len(problems):
            raise IndexError(
                f"index: expected 0 <= index < {len(problems)}, the size of {split!r}; got {index}"
            )
        question, solution, answer = problems[index]
        prompt: Prompt = f"Question: {question}\nAnswer:\n"
        if self.chat:
            prompt = [{"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}]
        demo = solution if self.annotations else _ANNOTATION.sub("", solution)
        return Example(prompt=prompt, demo=demo, fields={"question": question, "answer": str(answer)})

    def verify(self, example: Example, completion: str) -> Score:
        """1 when the completion's answer is exactly the right number.  Well-formed: it marks an answer.
        Total.
        """
        answer, marked = self.answer(completion), extract(completion) is not None
        if answer is None:
            return Score(
                reward=0.0, correct=False, well_formed=False, message="no number marked as the answer"
            )
        correct = answer == Fraction(example.fields["answer"])
        message = "correct" if correct else f"expected {example.fields['answer']}, got {answer}"
        return Score(reward=float(correct), correct=correct, well_formed=marked, message=message)

    def answer(self, completion: str) -> Fraction | None:
        """The number that `completion` comes down to, for a vote; None for none."""
        marked = extract(completion)
        return last_number(completion) if marked is None and self.last_number else marked

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """None: any language model's tokenizer will do (`fastrl.tasks.tokens.train_bpe` makes a small
        one).
        """
        return None

    def _problems(self, split: str) -> tuple[Problem, ...]:
        if split not in SPLITS:
            raise UserError(f"gsm8k: expected a split of {', '.join(SPLITS)}; got {split!r}")
        given = self.folder or os.environ.get("FASTRL_GSM8K")
        if not given:
            raise UserError(
                "gsm8k: set FASTRL_GSM8K (or the option folder) to the folder that holds train.jsonl"
            )
        problems = _split(Path(given).expanduser(), split, self.val)
        if not problems:
            raise UserError(f"gsm8k: split {split!r} is empty (val={self.val}, files in {given})")
        return problems


def extract(text: str) -> Fraction | None:
    """The number `text` marks as its answer: after its last `####`, else `A:`, `\\boxed{`, `the answer is`;
    else None.

    A marker without a number behind it is no answer.  $, thousands commas, a unit, a percent sign and a final
    period are ignored.
    """
    for marker in MARKERS:
        places = [found.end() for found in marker.finditer(text)]
        if places:
            found = _NUMBER.match(text, places[-1] + _blanks(text, places[-1]))
            return _value(found) if found else None
    return None


def last_number(text: str) -> Fraction | None:
    """The last number anywhere in `text`, or None."""
    last = deque(_ANYWHERE.finditer(text), maxlen=1)
    return _value(last[0]) if last else None


def _blanks(text: str, start: int) -> int:
    rest = text[start : start + 16]
    return len(rest) - len(rest.lstrip(" \t*=:"))


def _value(found: re.Match[str]) -> Fraction:
    value = Fraction(found["top"].replace(",", "")) / int(found["bottom"] or 1)
    return -value if found["sign"] or found["sign2"] else value


@lru_cache(maxsize=8)
def _split(folder: Path, split: str, val: float) -> tuple[Problem, ...]:
    if split == "test":
        return _read(
            next((folder / name for name in TEST_FILES if (folder / name).is_file()), folder / TEST_FILES[0])
        )
    shares = {"val": val, "train": 1 - val}
    return tuple(p for p in _read(folder / "train.jsonl") if bucket(shares, "gsm8k", p.question) == split)


def _read(file: Path) -> tuple[Problem, ...]:
    problems = []
    for where, row in read_json_lines(file):
        question, solution = row.get("question"), row.get("answer", row.get("ground_truth"))
        if not isinstance(question, str) or not isinstance(solution, str):
            raise UserError(f"{where}: expected a question and an answer, both text; got {shorten(row)}")
        answer = extract(solution)
        if answer is None:
            raise UserError(
                f"{where}: expected an answer that ends in #### and a number, got {shorten(solution[-60:])}"
            )
        problems.append(Problem(question, solution, answer))
    return tuple(problems)
