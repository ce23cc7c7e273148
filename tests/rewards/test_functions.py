"""Reward functions: TRL's signature in, rewards or a clear error out; never a silent 0."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastrl.errors import UserError
from fastrl.files import shorten
from fastrl.rewards.functions import function_names, load_reward, score
from fastrl.tasks import Cards, task_reward

PROMPTS, COMPLETIONS = ["p0", "p1", "p2"], ["one", "three", "eleven"]
ROWS = [{"answer": "one", "level": 1}, {"answer": "two"}, {"answer": "eleven", "level": 3}]


def length(completions, **columns):
    return [float(len(c)) for c in completions]


def right(completions, answer):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def odd_only(prompts, completions, **columns):
    return [None if i % 2 == 0 else 5.0 for i in range(len(completions))]


def never(completions, **columns):
    return [None] * len(completions)


def floats(values):
    return [None if math.isnan(v) else v for v in values]


def test_functions_get_trls_arguments():
    seen = {}

    def spy(prompts, completions, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0.0] * len(prompts)

    score([spy], PROMPTS, COMPLETIONS, [[1], [2], [3, 4]], ROWS)
    assert {k: v for k, v in seen.items() if not k.startswith("log_")} == {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "completion_ids": [[1], [2], [3, 4]],
        "answer": ["one", "two", "eleven"],
        "level": [1, None, 3],
    }
    assert callable(seen["log_extra"]) and callable(seen["log_metric"])


def test_conversations_become_messages():
    """TRL's functions read completion[0]["content"] when the prompt is a list of messages."""
    chat = [{"role": "user", "content": "hi"}]

    def content(completions):
        return [float(c[0]["content"] == "one" and c[0]["role"] == "assistant") for c in completions]

    assert score([content], [chat, chat], ["one", "two"]).reward == [1.0, 0.0]
    assert score([length], ["hi"], ["one"]).reward == [3.0]


def test_combining_and_not_applicable():
    """Turning None into 0 gives 1.5 instead of 3 for sample 0, and 0 instead of NaN where nothing applies."""
    found = score([length, odd_only, right], PROMPTS, COMPLETIONS, None, ROWS, weights=[1.0, 0.1, 2.0])
    assert found.reward == pytest.approx([3 + 2, 5 + 0.5 + 0, 6 + 2])
    assert floats(found.parts["rewards/odd_only/mean"]) == [None, 5.0, None]
    assert found.parts["rewards/length/mean"] == [3.0, 5.0, 6.0] and found.parts["rewards/right/mean"] == [
        1.0,
        0.0,
        1.0,
    ]
    assert floats(score([never, odd_only], PROMPTS, COMPLETIONS).reward) == [None, 5.0, None]
    assert floats(score([never], PROMPTS, COMPLETIONS).reward) == [None, None, None]
    assert score([never], [], []).reward == []


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([1.0, 0.0, 2.0]),
        np.array([1.0, 0.0, 2.0], np.float32),
        (True, False, 2),
        [np.float32(1), 0, torch.tensor(2.0)],
    ],
)
def test_what_counts_as_numbers(values):
    assert score([lambda completions: values], PROMPTS, COMPLETIONS).reward == [1.0, 0.0, 2.0]


def test_logging_as_in_trl():
    def logs(completions, log_extra, log_metric):
        log_extra("message", ["a", "b", "c"])
        log_extra("seen", [1, 2, 3])
        log_metric("share", 0.25)
        return [0.0, 0.0, 0.0]

    found = score([logs], PROMPTS, COMPLETIONS)
    assert (
        found.message == ["a", "b", "c"]
        and found.extra == {"seen": [1, 2, 3]}
        and found.parts["share"] == [0.25] * 3
    )
    assert score([length], PROMPTS, COMPLETIONS).message == ["", "", ""]
    with pytest.raises(UserError, match="log_extra: expected 3 values for 'x', one per completion; got 1"):
        score([lambda completions, log_extra: log_extra("x", [1])], PROMPTS, COMPLETIONS)


def test_the_tasks_verifier_as_a_reward():
    task = Cards(reward="ladder")
    examples = [task.example("train", i) for i in range(4)]
    answers = [examples[0].demo, examples[1].demo + ";", "", examples[3].demo]
    found = score(
        [task_reward(task), length],
        [e.prompt for e in examples],
        answers,
        None,
        [{"example": e} for e in examples],
        weights=[1, 0],
    )
    assert found.reward == [1.0, 0.0, 0.0, 1.0] == found.parts["rewards/cards/mean"]
    assert (
        found.message[0] == "correct"
        and found.message[1].startswith("expected 2 steps")
        and found.parts["correct"] == [0.5] * 4
    )


def test_names():
    assert function_names([length, right, length, length]) == ["length", "right", "length_2", "length_3"]


# --- what goes wrong ---------------------------------------------------------------------------------
SOURCE = """
def raises(prompts, completions, **kwargs):
    return [helper(c) for c in completions]

def helper(text):
    return {"one": 1.0, "eleven": 2.0}[text]

def raises_on_many(prompts, completions, **kwargs):
    assert len(prompts) == 1, "one at a time"
    return [1.0]

def short(completions, **kwargs): return [1.0, 2.0]
def long(completions, **kwargs): return [1.0] * 4
def text(completions, **kwargs): return [1.0, "two", 3.0]
def nan(completions, **kwargs): return [1.0, 2.0, float("nan")]
def infinite(completions, **kwargs): return [float("inf"), 2.0, 3.0]
def nested(completions, **kwargs): return [[1.0], [2.0], [3.0]]
def scalar(completions, **kwargs): return 1.0
def nothing(completions, **kwargs): pass
def generator(completions, **kwargs): return (1.0 for c in completions)
def needs(completions, anwser): return [1.0] * 3
async def late(completions, **kwargs): return [1.0] * 3
class Thing: pass
VALUE = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "raises",
            r"reward raises raised KeyError: 'three'\n  at {file}:6 in helper: "
            r".*\n  on sample 1 of 3:\n    prompt:     'p1'\n .* 'three'",
        ),
        (
            "raises_on_many",
            r"raised AssertionError: one at a time\n  at {file}:9 .*\n  on a batch of 3 \(no sample "
            r"fails alone\)",
        ),
        (
            "short",
            r"reward short \({file}:12\): expected 3 rewards, one per completion; "
            r"got 2\n  on sample 2 of 3:\n    prompt:     'p2'",
        ),
        ("long", r"reward long \({file}:13\): expected 3 rewards, one per completion; got 4"),
        (
            "text",
            r"reward text \({file}:14\): expected a finite number or None, got 'two'\n  on sample 1 of 3",
        ),
        (
            "nan",
            r"expected a finite number or None, got nan\n  on sample 2 of 3:\n    prompt: "
            r"    'p2'\n    completion: 'eleven'",
        ),
        ("infinite", r"expected a finite number or None, got inf\n  on sample 0"),
        ("nested", r"expected a finite number or None, got \[1.0\]"),
        ("scalar", r"reward scalar \({file}:18\): expected a list of 3 rewards, got 1.0"),
        ("nothing", r"expected a list of 3 rewards, got None"),
        ("generator", r"expected a list of 3 rewards, got <generator"),
        (
            "needs",
            r"reward needs \({file}:21\): it needs 'anwser', and there is only answer, level, "
            r"prompts, completions",
        ),
    ],
)
def test_errors_name_the_function_and_show_the_sample(file, name, message):
    """A wrong implementation turns these into rewards of 0, or into an error that says neither which function
    nor which sample.
    """
    with pytest.raises(UserError, match=message.replace("{file}", str(file))) as caught:
        score([load_reward(f"{file}:{name}")], PROMPTS, COMPLETIONS, None, ROWS)
    assert (caught.value.__cause__ is None) == (not name.startswith("raises")), (
        "--debug shows the function's own traceback"
    )


def test_functions_that_cannot_be_loaded(file):
    for name, message in (
        ("late", "is async; reward functions are called synchronously"),
        ("Thing", "expected a function at .*:Thing"),
        ("VALUE", "expected a function at .*:VALUE, got 3"),
        ("shrt", r"defines no 'shrt'; did you mean 'short'\?"),
    ):
        with pytest.raises(UserError, match=message):
            load_reward(f"{file}:{name}")
    with pytest.raises(UserError, match=r"--reward: no file nowhere.py"):
        load_reward("nowhere.py:fn")
    with pytest.raises(UserError, match="expected a file and a name in it"):
        load_reward("accuracy")


def test_long_samples_are_shortened():
    def fails(completions):
        raise RuntimeError("no")

    with pytest.raises(UserError) as caught:
        score([fails], ["x" * 10_000], ["start" + "y" * 10_000 + "end"])
    assert len(str(caught.value)) < 800 and "'start" in str(caught.value) and "end'" in str(caught.value)
    assert len(shorten("z" * 999, 100)) <= 100


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="expected one entry per sample in each, got \\[3, 2\\]"):
        score([length], PROMPTS, ["a", "b"])
    with pytest.raises(ValueError, match="a weight for each, got 1 and 2"):
        score([length], PROMPTS, COMPLETIONS, weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="at least one function"):
        score([], PROMPTS, COMPLETIONS)
