"""Mathematical answers: what math-verify says, that nothing it is given can hang or run, and what is said
without it.
"""

from __future__ import annotations

import importlib.util
import threading
import time

import pytest

from fastrl.errors import UserError
from fastrl.rewards.functions import load_reward, score
from fastrl.rewards.models import settled_reward
from fastrl.tasks import maths
from fastrl.tasks.gsm8k import Gsm8k
from fastrl.tasks.maths import same_answer
from fastrl.tasks.task import Example

needs = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")


@needs
@pytest.mark.parametrize(
    ("gold", "said", "same"),
    [
        ("1/2", r"\frac{1}{2}", True),
        (r"\sqrt{2}", "2^{1/2}", True),
        ("x^2+1", "1 + x^2", True),
        ("(1,2)", "(1, 2)", True),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("32", "2^5", True),
        ("32", "2^6", False),
        ("18", "18x", False),
        ("18", "18.0", True),
        ("18", "", False),
        ("", "", False),
        ("0.3", "0.3000000000000000001", False),  # plain numbers are exact
    ],
)
def test_answers_are_the_same_or_not(gold, said, same):
    assert same_answer(gold, said) is same


@needs
def test_nothing_is_run_and_threads_may_ask(tmp_path):
    """Wrong implementations: text that is evaluated; alarms, which only the main thread may set."""
    evil = tmp_path / "ran"
    assert not same_answer("1", f"__import__('pathlib').Path('{evil}').touch()")
    assert not evil.exists()
    assert not same_answer("1", "((((" * 50) and not same_answer("1", "x" * 10_000)

    found = []
    thread = threading.Thread(target=lambda: found.append(same_answer("5", r"\sqrt{25}")))
    thread.start()
    thread.join()
    assert found == [True]


@needs
@pytest.mark.slow
def test_no_answer_hangs_or_ends_what_comes_after(monkeypatch):
    """Wrong implementations: a tower of powers that is computed to its end; one after which nothing is
    compared.
    """
    monkeypatch.setattr(maths, "SECONDS", 1)
    fresh = maths.Worker()
    monkeypatch.setattr(maths, "_WORKER", fresh)
    began = time.perf_counter()
    assert not same_answer("1", "9^{9^{9^{9}}}")
    monkeypatch.setattr(maths, "SECONDS", 20)
    assert same_answer("5", r"\sqrt{25}")
    fresh.stop()
    assert time.perf_counter() - began < 90


@needs
def test_the_reward_and_the_task_read_marked_answers():
    reward = load_reward("math:answer")
    completions = [r"so \boxed{\frac{1}{2}}", "#### 0.5", "the answer is $2$.", "no idea", "x"]
    columns = [{"answer": gold} for gold in ("1/2", r"... #### \frac12", "3", "1", None)]
    scored = score([reward], ["p"] * 5, completions, columns=columns)
    assert scored.reward[:4] == [1.0, 1.0, 0.0, 0.0] and scored.reward[4] != scored.reward[4]
    with pytest.raises(UserError, match="expected a column 'answer', there is only"):
        score([reward], ["p"], ["x"])
    assert settled_reward("math:answer") == "math:answer"

    example = Example(prompt="", fields={"answer": "32"})
    assert not Gsm8k().verify(example, r"\boxed{2^5}").correct
    assert Gsm8k(math=True).verify(example, r"\boxed{2^5}").correct
    assert Gsm8k(math=True).verify(example, "#### 32").correct


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(maths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--reward math:answer: .* pip install fastrl-kernels\[math\]"):
        load_reward("math:answer")
    with pytest.raises(UserError, match=r"gsm8k: math: .* pip install fastrl-kernels\[math\]"):
        Gsm8k(math=True)
    with pytest.raises(UserError, match="expected math:COLUMN"):
        load_reward("math:")
    assert Gsm8k().verify(Example(prompt="", fields={"answer": "18"}), "#### 18").correct
