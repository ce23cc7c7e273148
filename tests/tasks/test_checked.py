"""What a user's task returns: the right types of any library, or a located error; never an internal one."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastrl.errors import UserError
from fastrl.rewards.functions import score
from fastrl.sampler.episodes import Dialogue
from fastrl.sampler.turns import Turn
from fastrl.tasks import Example, Gsm8k, Score, load_task
from fastrl.tasks.checked import CheckedTask
from fastrl.tasks.returned import LARGEST, is_text, number, truth
from fastrl.tasks.task import is_conversation, notes
from fastrl.tasks.tokens import char_tokenizer

GOOD = Score(reward=1.0, correct=True, well_formed=True)


def score_of(reward: object = 1, **given: object) -> Score:
    return Score(**{"reward": reward, "correct": True, "well_formed": True, **given})


class Returns:
    """A task whose methods return what the test gives."""

    name, stop = "planted", ("?",)

    def __init__(self, **returned: object) -> None:
        self.returned = returned

    def _give(self, method: str, default: object) -> object:
        value = self.returned.get(method, default)
        if isinstance(value, BaseException):
            raise value
        return value

    def size(self, split):
        return self._give("size", 3)

    def example(self, split, index):
        return self._give("example", Example(prompt="1+1="))

    def verify(self, example, completion):
        return self._give("verify", GOOD)

    def tokenizer(self):
        return self._give("tokenizer", None)

    def mistakes(self, example, count, index):
        return self._give("mistakes", ["3"])

    def steps(self, example, completion):
        return self._give("steps", (["1", "2"], [True, False]))

    def answer(self, completion):
        return self._give("answer", "2")


CALLS = {
    "size": lambda task: task.size("train"),
    "example": lambda task: task.example("train", 2),
    "verify": lambda task: task.verify(Example(prompt="1"), "2"),
    "tokenizer": lambda task: task.tokenizer(),
    "mistakes": lambda task: task.mistakes(Example(prompt="1"), 2, 0),
    "steps": lambda task: task.steps(Example(prompt="1"), "12"),
    "answer": lambda task: task.answer("2"),
}


def call(method: str, value: object) -> object:
    return CALLS[method](CheckedTask(Returns(**{method: value}), "t.py:T"))


@pytest.mark.parametrize(
    "method, value, message",
    [
        (
            "example",
            {"prompt": "1"},
            r"example\('train', 2\): expected an Example, got dict .*return Example",
        ),
        ("example", None, r"expected an Example, got None; return Example\("),
        ("example", Example(prompt=3), "prompt: expected text or a list of chat messages, got int 3"),
        ("example", Example(prompt=[]), r"prompt: expected text or a list of chat messages, got list \[\]"),
        ("example", Example(prompt="\ud800"), "prompt: expected text"),
        ("example", Example(prompt=[{"role": "user"}]), "prompt: expected text"),
        ("example", Example(prompt="1", demo=2), "demo: expected text or None, got int 2"),
        ("example", Example(prompt="1", fields=[1]), "fields: expected a dict of names and values, got list"),
        ("size", "3", r"size\('train'\): expected a whole number of 0 or more, got str '3'"),
        ("size", -1, "expected a whole number"),
        ("size", 2.0, "expected a whole number"),
        ("verify", True, r"verify\(..., '2'\): expected a Score, got bool True; return Score\(reward"),
        ("verify", None, "expected a Score, got None"),
        (
            "verify",
            score_of(float("nan")),
            "reward: expected a finite .* nan",
        ),
        ("verify", score_of(None), "reward: expected a finite number"),
        ("verify", score_of(10**400), "reward: expected .* at most 1e"),
        (
            "verify",
            score_of(correct=None),
            "correct: expected True or False, got None",
        ),
        ("verify", score_of(well_formed="yes"), "well_formed: expected True or False"),
        ("verify", score_of(message=3), "message: expected text"),
        ("tokenizer", "gpt2", "expected a transformers tokenizer or None, got str 'gpt2'"),
        ("mistakes", "3", "expected a list of texts"),
        ("mistakes", [3], "expected a list of texts"),
        ("steps", (["1"], [True, False]), "a list of texts, and one of as many truth values"),
        ("steps", None, "truth values, got None"),
        ("answer", ["2"], "a value that can be counted"),
        ("answer", (["2"],), "a value that can be counted"),
        ("verify", KeyError("x"), r"t.py:T: verify raised KeyError: 'x'\n  at .*test_checked.py"),
        ("size", SystemExit(0), "size raised SystemExit"),
        ("size", UserError("my own words"), "^my own words$"),
    ],
)
def test_a_wrong_return_value_is_located(method, value, message):
    """Wrong implementation: 'dict' object has no attribute 'prompt', as an internal error; a run that
    sys.exit() in a task ends with 0.
    """
    with pytest.raises(UserError, match=message) as caught:
        call(method, value)
    if "expected" in message:
        assert f"({__file__}:" in str(caught.value)  # where the method is


def test_values_of_numpy_and_torch_become_pythons():
    kept = call(
        "verify", Score(reward=np.float32(0.5), correct=np.bool_(True), well_formed=torch.tensor(False))
    )
    assert (kept.reward, kept.correct, kept.well_formed) == (0.5, True, False)
    assert [type(x) for x in (kept.reward, kept.correct, kept.well_formed)] == [float, bool, bool]
    assert call("size", np.int64(7)) == 7
    assert call("mistakes", np.array(["1", "2", "3"])) == ["1", "2"]
    assert call("steps", [("a", "b"), np.array([1, 0])]) == (["a", "b"], [True, False])
    assert call("answer", None) is None


@pytest.mark.parametrize(
    "member, value, message",
    [
        ("stop", "</x>", r"stop: expected a tuple of texts like .* got str '</x>'"),
        ("stop", None, "stop: expected a tuple of texts"),
        ("stop", ("",), "stop: expected a tuple of texts"),
        ("name", None, "name: expected a text, got None"),
    ],
)
def test_members_are_checked_when_the_task_is_loaded(member, value, message, tmp_path):
    """Wrong implementation: `stop = "</x>"` read as its characters."""
    file = tmp_path / "t.py"
    file.write_text(
        "class T:\n    name, stop = 'n', ()\n"
        + "".join(f"    def {name}(self, *args): return None\n" for name in ("size", "example", "verify"))
        + f"    def tokenizer(self): return None\n    {member} = {value!r}\n"
    )
    with pytest.raises(UserError, match=message):
        load_task(f"{file}:T")


def test_other_members_are_the_tasks_own():
    task = CheckedTask(Returns(), "t.py:T")
    assert (task.name, task.stop, task.returned) == ("planted", ("?",), {})
    assert not hasattr(task, "step") and not is_conversation(task)
    assert not hasattr(task, "__len__")


# --- several turns ----------------------------------------------------------------------------------
WORDS = char_tokenizer("0123456789?<>")


class Talk(Returns):
    def step(self, transcripts):
        return self._give("step", None)


@pytest.mark.parametrize(
    "answer, message",
    [
        (None, "expected three lists .observations, rewards, done., got None"),
        ({"a": 1}, "expected three lists"),
        (
            ([None, ">"], [0, 0], [False, True]),
            r"observations\[0\]: expected text where the conversation goes on",
        ),
        ((["<", 3], [0, 0], [False, False]), r"observations\[1\]: expected text"),
        (([">"], [0, 0], [True, True]), "observations: expected a list of 2, one for each transcript"),
        ((">>", [0, 0], [True, True]), "observations: expected a list of 2"),
        (([">", ">"], 1.0, [True, True]), "rewards: expected a list of 2"),
        (([">", ">"], [0, None], [True, True]), r"rewards\[1\]: expected a finite number"),
        (([">", ">"], [0, float("inf")], [True, True]), r"rewards\[1\]: expected a finite number"),
        (([">", ">"], [0, 0], [None, True]), r"done\[0\]: expected True or False"),
        ((["\ud800", ">"], [0, 0], [False, True]), r"observations\[0\]: expected text"),
    ],
)
def test_what_a_step_returns_is_located(answer, message):
    turns = [Turn(i, WORDS.encode("1?"), [True, True]) for i in (0, 1)]
    task = CheckedTask(Talk(step=answer), "t.py:T")
    with pytest.raises(UserError, match=rf"planted's step \({__file__}:\d+\): {message}"):
        Dialogue(task, WORDS, [Example(prompt="1")] * 2)(turns)


def test_lists_arrays_and_tensors_are_steps_too():
    turns = [Turn(i, WORDS.encode("1?"), [True, True]) for i in (0, 1)]
    answer = [np.array([">", ""]), torch.tensor([0.5, 2.0]), np.array([False, True])]
    talk = Dialogue(CheckedTask(Talk(step=answer), "t.py:T"), WORDS, [Example(prompt="1")] * 2)
    assert talk(turns) == [WORDS.encode(">"), None] and talk.rewards == [0.5, 2.0]


# --- anything at all --------------------------------------------------------------------------------
class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def anything(rng: random.Random, depth: int = 0) -> object:
    """A value of any type that user code might return by mistake."""
    simple = [
        None,
        True,
        0,
        -3,
        1.5,
        float("nan"),
        float("inf"),
        1e308,
        10**400,
        10**5000,
        "",
        "text",
        "\ud800",
        b"x",
        3j,
        Fraction(1, 3),
        Hostile(),
        object,
        print,
        np.bool_(True),
        np.float32(2),
        np.int64(3),
        np.zeros((2, 2)),
        np.array(1.0),
        np.array(["a", "b"]),
        np.array([None, 1.0]),
        np.zeros(0),
        torch.tensor(1.0),
        torch.tensor([True, False]),
        torch.zeros(2, 2),
        torch.zeros(2) * 1j,
        torch.zeros(2, requires_grad=True),
        {1, 2},
        (x for x in "ab"),
        GOOD,
        Example(prompt="p"),
    ]
    if depth > 2 or rng.random() < 0.6:
        return rng.choice(simple)
    several = [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    return rng.choice([several, tuple(several), {str(i): x for i, x in enumerate(several)}])


def mixed(rng: random.Random, method: str) -> object:
    """A return value that is nearly right."""
    x = [anything(rng) for _ in range(4)]
    near = {
        "example": lambda: Example(prompt=x[0], demo=x[1], fields=x[2]),
        "verify": lambda: Score(reward=x[0], correct=x[1], well_formed=x[2], message=x[3]),
        "steps": lambda: (x[0], x[1]),
        "step": lambda: (x[0], x[1], [x[2], x[3]]),
    }
    return near.get(method, lambda: x[0])() if rng.random() < 0.7 else x[0]


@pytest.mark.parametrize("method", [*CALLS, "step"])
def test_any_return_value_is_taken_or_refused(method):
    """Wrong implementation: a TypeError, OverflowError or ValueError about a value of the user's."""
    rng = random.Random(method)
    turns = [Turn(i, WORDS.encode("1?"), [True, True]) for i in (0, 1)]
    refused = 0
    for _ in range(400):
        value = mixed(rng, method)
        try:
            if method == "step":
                Dialogue(CheckedTask(Talk(step=value), "t.py:T"), WORDS, [Example(prompt="1")] * 2)(turns)
            else:
                call(method, value)
        except UserError as error:
            assert "t.py:T" in str(error) or "planted's step" in str(error)
            refused += 1
    assert refused > 50


def test_any_reward_is_a_number_or_refused():
    """Wrong implementations: an internal error for a numpy bool, an integer of 400 digits or a 2-D array."""
    rng = random.Random(0)
    taken = 0
    for _ in range(1500):
        value = anything(rng) if rng.random() < 0.4 else [anything(rng), rng.choice([1.0, None, True])]

        def planted(completions, value=value):
            return value

        try:
            rewards = score([planted], ["p", "q"], ["a", "b"]).reward
        except UserError as error:
            assert "reward planted" in str(error) and "sample" in str(error)
        else:
            assert len(rewards) == 2 and all(r != r or abs(r) <= LARGEST for r in rewards)
            taken += 1
    assert taken > 100


def test_numbers_and_truths():
    assert [number(x) for x in (True, np.bool_(False), np.float64(2), torch.tensor([3]), Fraction(1, 2))] == [
        1.0,
        0.0,
        2.0,
        3.0,
        0.5,
    ]
    assert [number(x) for x in ("1", None, 1j, float("nan"), 1e16, 10**400, [1.0])] == [None] * 7
    assert [truth(x) for x in (True, np.bool_(False), 1, 0.0)] == [True, False, True, False]
    assert [truth(x) for x in (2, "True", None, [True])] == [None] * 4
    assert is_text("é") and not is_text("\udc80") and not is_text(b"x")


def test_gsm8k_says_which_file_its_test_split_is(tmp_path):
    """Wrong implementation: 900 problems measured as if they were the test set, without a word."""
    line = '{"question": "1+1?", "answer": "#### 2"}\n'
    for name in ("train.jsonl", "model_solutions.jsonl"):
        (tmp_path / name).write_text(line)
    task = Gsm8k(folder=str(tmp_path))
    (said,) = notes(task, "test")
    assert f"{tmp_path} has no test.jsonl; the split test is model_solutions.jsonl, 1 of the 1319" in said
    assert notes(task, "val") == []
    (tmp_path / "test.jsonl").write_text(line)
    assert notes(task, "test") == []
    assert notes(CheckedTask(Returns(), "t.py:T"), "test") == []
