"""GSM8K: grade-school word problems with one exact number as the answer (Cobbe et al., arXiv 2110.14168).

The data is a folder with train.jsonl, lines of {"question": ..., "answer": "... #### 72"}, and for the test
split test.jsonl or model_solutions.jsonl (both are in the data set's release).  The folder is an option, or
the environment variable FASTRL_GSM8K.
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

from fastrl.errors import UserError, require
from fastrl.files import read_json_lines, shorten
from fastrl.tasks.maths import check_math_verify, same_answer
from fastrl.tasks.number import WINDOW, boxed, read_number
from fastrl.tasks.task import Example, Prompt, Score, assign_split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "val", "test")
# the first that exists; the second holds 900 of the 1319 test questions (`note` says so in the log)
TEST_FILES = ("test.jsonl", "model_solutions.jsonl")
INSTRUCTION = (
    "Solve the problem step by step. End with a line `#### ` followed by the answer as a plain number."
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
MARKERS = (  # what introduces an answer: the first of these that occurs, at its last occurrence
    re.compile(r"####"),
    re.compile(r"^[ \t]*A:", re.MULTILINE),
    _BOX,
    re.compile(r"\bthe (?:final )?answer is:?", re.IGNORECASE),
    re.compile(r"\banswer[*_ ]*(?:is|:|=)", re.IGNORECASE),
)
# digits are bounded, so that no number is expensive
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,30})(?:\.[0-9]{1,30})?|\.[0-9]{1,30}"
_NUMBER = re.compile(
    r"(?P<sign>[-\u2212]?)(?:\$ ?)?(?P<sign2>[-\u2212]?)"
    rf"(?P<top>{_DIGITS})(?:/(?P<bottom>[1-9][0-9]{{0,29}}))?"
    r"(?![0-9]|[.,/][0-9])"
)
_ANYWHERE = re.compile(rf"(?<![0-9.,]){_NUMBER.pattern}")
_ANNOTATION = re.compile(r"<<[^<>]*>>")  # the calculator marks in the data set's own solutions


class Problem(NamedTuple):
    question: str
    solution: str
    answer: Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Gsm8k:
    """The task: train and val split train.jsonl by a hash of the question; test is the data set's own."""

    name: ClassVar[str] = "gsm8k"
    stop: ClassVar[tuple[str, ...]] = ()

    folder: str | None = None
    """Folder of the files; FASTRL_GSM8K when not given."""
    val: float = 0.05
    """Share of train.jsonl in the validation split."""
    chat: bool = False
    """Prompts as chat messages, with an instruction, instead of `Question: ...`."""
    annotations: bool = False
    """Keep the <<48/2=24>> marks in demonstrations."""
    last_number: bool = False
    """Where a completion marks no answer, take its last number."""
    math: bool = False
    """Compare marked answers that are no plain number (`2^5`, `\\sqrt{4}`) by math-verify; see maths.py."""

    def __post_init__(self) -> None:
        require(
            "gsm8k: val",
            self.val,
            0 <= self.val < 1,
            "a share of at least 0 and below 1",
        )
        if self.math:
            check_math_verify("gsm8k: math")

    def size(self, split: str) -> int:
        """Number of problems in `split`.

        Raises UserError for an unknown or empty split, missing files and malformed lines.
        """
        return len(self._problems(split))

    def example(self, split: str, index: int) -> Example:
        """Problem `index` of `split`, in file order.  Raises IndexError outside [0, size(split))."""
        problems = self._problems(split)
        size = len(problems)
        if not 0 <= index < size:
            raise IndexError(f"index: expected 0 <= index < {size}, the size of {split!r}; got {index}")

        question, solution, answer = problems[index]
        prompt: Prompt = f"Question: {question}\nAnswer:\n"
        if self.chat:
            prompt = [{"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}]
        demo = solution if self.annotations else _ANNOTATION.sub("", solution)
        return Example(
            prompt=prompt,
            demo=demo,
            fields={"question": question, "answer": str(answer)},
        )

    def verify(self, example: Example, completion: str) -> Score:
        """1 when the completion's answer is exactly the right number.  Well-formed: it marks an answer.
        Total.
        """
        said = marked(completion)
        found = None if said is None else read_number(said)
        answer = self._or_last(found, completion)
        expression = said if self.math and found is None else None
        if expression:
            correct = same_answer(example.fields["answer"], expression)
            message = "correct" if correct else f"expected {example.fields['answer']}, got {expression[:40]}"
            return Score(reward=float(correct), correct=correct, well_formed=True, message=message)
        if answer is None:
            nothing = "no number marked as the answer"
            return Score(
                reward=0.0,
                correct=False,
                well_formed=False,
                message=nothing,
            )

        correct = answer == Fraction(example.fields["answer"])
        message = "correct" if correct else f"expected {example.fields['answer']}, got {answer}"
        return Score(
            reward=float(correct),
            correct=correct,
            well_formed=found is not None,
            message=message,
        )

    def note(self, split: str) -> str:
        """What a log should say of a split: which file stands in for a missing test.jsonl."""
        folder = Path(self._folder()).expanduser()
        if split != "test" or (folder / TEST_FILES[0]).is_file():
            return ""
        present = f"{TEST_FILES[1]}, {self.size(split)} of the 1319 test questions"
        return f"gsm8k: {folder} has no {TEST_FILES[0]}; the split test is {present}"

    def answer(self, completion: str) -> Fraction | None:
        """The number that `completion` comes down to, for a vote; None for none."""
        return self._or_last(extract(completion), completion)

    def _or_last(self, found: Fraction | None, completion: str) -> Fraction | None:
        return last_number(completion) if found is None and self.last_number else found

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """None: any language model's tokenizer will do (`fastrl.tasks.tokens.train_bpe` trains a small
        one).
        """
        return None

    def _problems(self, split: str) -> tuple[Problem, ...]:
        if split not in SPLITS:
            raise UserError(f"gsm8k: expected a split of {', '.join(SPLITS)}; got {split!r}")
        given = self._folder()
        problems = _split(Path(given).expanduser(), split, self.val)
        if not problems:
            raise UserError(f"gsm8k: split {split!r} is empty (val={self.val}, files in {given})")
        return problems

    def _folder(self) -> str:
        given = self.folder or os.environ.get("FASTRL_GSM8K")
        if not given:
            raise UserError("gsm8k: set FASTRL_GSM8K or the option folder to the folder of train.jsonl")
        return given


def extract(text: str) -> Fraction | None:
    """The number that `text` marks as its answer, or None.

    The marker is the last `####`, or else the last `A:`, `\\boxed{`, `the answer is`, or `answer:`; a marker
    without a number after it marks no answer.  Currencies, thousands separators, a unit, a percent sign, a
    final period and marks of LaTeX and Markdown are ignored: see number.py.
    """
    answer = marked(text)
    return None if answer is None else read_number(answer)


def marked(text: str) -> str | None:
    """What `text` marks as its answer, as it stands there; None where nothing is marked."""
    for marker in MARKERS:
        ends = [match.end() for match in marker.finditer(text)]
        if ends:
            if marker is _BOX:
                return boxed(text, ends[-1])
            rest = text[ends[-1] :][: 2 * WINDOW].lstrip(" \t\n*:")
            return boxed(rest, box.end()) if (box := _BOX.search(rest)) else rest.partition("\n")[0]
    return None


def last_number(text: str) -> Fraction | None:
    """The last number anywhere in `text`, or None."""
    last = deque(_ANYWHERE.finditer(text.replace("{,}", ",").replace("\\!", "")), maxlen=1)
    return _value(last[0]) if last else None


def _value(number: re.Match[str]) -> Fraction:
    value = Fraction(number["top"].replace(",", "")) / int(number["bottom"] or 1)
    return -value if number["sign"] or number["sign2"] else value


@lru_cache(maxsize=8)
def _split(folder: Path, split: str, val: float) -> tuple[Problem, ...]:
    if split == "test":
        files = [folder / name for name in TEST_FILES]
        present = [file for file in files if file.is_file()]
        return _read((present or files)[0])

    shares = {"val": val, "train": 1 - val}
    problems = _read(folder / "train.jsonl")
    return tuple(p for p in problems if assign_split(shares, "gsm8k", p.question) == split)


def _read(file: Path) -> tuple[Problem, ...]:
    problems = []
    for where, row in read_json_lines(file):
        question = row.get("question")
        solution = row.get("answer", row.get("ground_truth"))
        if not isinstance(question, str) or not isinstance(solution, str):
            raise UserError(f"{where}: expected a question and an answer, both text; got {shorten(row)}")
        answer = extract(solution)
        if answer is None:
            end = shorten(solution[-60:])
            raise UserError(f"{where}: expected an answer that ends in #### and a number, got {end}")
        problems.append(Problem(question, solution, answer))
    return tuple(problems)
