"""Naming a task: the built-in ones, and a user's own file."""

from __future__ import annotations

import textwrap

import pytest

import fastrl.tasks
from fastrl.errors import UserError
from fastrl.tasks import TASKS, Cards, Example, Gsm8k, load_run_task, load_task, task_reward
from fastrl.tasks.task import assign_split, draw

DOCUMENTED = textwrap.dedent(fastrl.tasks.__doc__.partition("in a file:\n")[2])


def test_built_in_tasks():
    assert load_task("cards") == Cards()
    assert load_task("cards", k=2, targets=(1, 20)) == Cards(k=2, targets=(1, 20))
    assert load_task("cards", limit=None, val=0).limit is None
    assert isinstance(load_task("gsm8k", folder="x"), Gsm8k) and set(TASKS) == {"cards", "gsm8k", "guess"}


def test_the_documented_task(tmp_path):
    """The example in the package's docstring, as a user would paste it."""
    tmp_path.joinpath("my_task.py").write_text(DOCUMENTED)
    task = load_task(f"{tmp_path}/my_task.py:Doubles")
    example = task.example("train", 4)
    assert (example.prompt, example.demo) == ("8+8=", "16")
    assert task.verify(example, "16").correct and not task.verify(example, "x").well_formed
    assert task.tokenizer().encode(example.prompt + example.demo)
    reward = task_reward(task)
    logged: dict = {}
    found = reward(
        completions=["16", "x", [{"role": "assistant", "content": "16"}]],
        example=[example] * 3,
        log_extra=logged.__setitem__,
        log_metric=logged.__setitem__,
    )
    assert found == [1.0, 0.0, 1.0] and reward.__name__ == "doubles"
    assert logged["correct"] == logged["well_formed"] == pytest.approx(2 / 3)
    assert logged["message"] == [
        "",
        "",
        "",
    ]


def test_a_task_with_options_neighbours_and_dataclasses(tmp_path):
    """Files run with exec() outside sys.modules cannot define dataclasses,
    nor import what lies beside them.
    """
    tmp_path.joinpath("beside.py").write_text("BASE = 7")
    tmp_path.joinpath("mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass, "
        "field\nfrom beside import BASE\n"
        + DOCUMENTED.replace("class Doubles:", "@dataclass\nclass Doubles:\n    start: int = BASE\n")
        + "\nREADY = Doubles(start=1)\n"
    )
    assert load_task(f"{tmp_path}/mine.py:Doubles").start == 7
    assert load_task(f"{tmp_path}/mine.py:Doubles", start=9).start == 9
    assert load_task(f"{tmp_path}/mine.py:READY").start == 1
    assert type(load_task(f"{tmp_path}/mine.py:Doubles")) is type(load_task(f"{tmp_path}/mine.py:READY")), (
        "a file is run once"
    )
    with pytest.raises(UserError, match="is an object, not a class"):
        load_task(f"{tmp_path}/mine.py:READY", start=2)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (
            "crads",
            {},
            r"expected one of cards, gsm8k, guess, or a file like my_task.py:MyTask; got 'crads'; "
            r"did you mean 'cards'\?",
        ),
        ("cards", {"kk": 3}, r"cards has no option 'kk'; did you mean 'k'\?; it has: k, targets"),
        ("cards", {"k": "three"}, "--task: cards: k: expected int, got 'three'"),
        ("cards", {"targets": 24}, r"--task: cards: targets: expected tuple\[int, int\], got 24"),
        (
            "cards",
            {"targets": (1, "x")},
            r"cards: targets: expected two numbers, 1 <= low <= high, got \(1, 'x'\)",
        ),
        ("cards", {"limit": "no"}, r"--task: cards: limit: expected int \| None, got 'no'"),
        ("gsm8k", {"val": None}, "--task: gsm8k: val: expected float, got None"),
        ("my_task.py", {}, r"expected a file and a name in it, like my_file.py:MyName; got 'my_task.py'"),
        ("absent.py:Task", {}, r"--task: no file absent.py \(looked in "),
        (
            "{}/bad.py:Doubels",
            {},
            r"bad.py defines no 'Doubels'; did you mean 'Doubles'\?; it defines: Doubles",
        ),
        (
            "{}/bad.py:Doubles",
            {},
            r"bad.py:Doubles is not a task: Doubles lacks name, stop, size, verify, tokenizer",
        ),
        ("{}/bad.py:NUMBER", {}, r"bad.py:NUMBER is not a task: int lacks name"),
        ("{}/syntax.py:Task", {}, r"syntax.py raised SyntaxError[\s\S]*at .*syntax.py:2"),
        (
            "{}/raises.py:Task",
            {},
            r"raises.py raised ZeroDivisionError: division by zero\n  at .*raises.py:2 in <module>: "
            r"y = 1 / 0",
        ),
        ("{}/bad.py:Raises", {}, r"bad.py:Raises raised KeyError: 'x'\n  at .*bad.py:7 in __init__"),
        ("{}/bad.py:Raises", {"size": 3}, r"has no option 'size'; it has: none"),
    ],
)
def test_errors_name_the_file_and_the_fix(spec, options, message, tmp_path):
    tmp_path.joinpath("bad.py").write_text(
        "NUMBER = 3\nclass Doubles:\n    def example(self): ...\n    size = 3\n"
        "class Raises:\n    def __init__(self):\n        raise KeyError('x')\n"
    )
    tmp_path.joinpath("syntax.py").write_text("x = 1\nclass Task\n")
    tmp_path.joinpath("raises.py").write_text("x = 1\ny = 1 / 0\n")
    with pytest.raises(UserError, match=message):
        load_task(spec.format(tmp_path), **options)


def test_draw_and_bucket_are_the_same_everywhere():
    """hash() of text differs in every process."""
    assert draw("a", 1) == 4115538386074285390
    shares = {"val": 0.1, "test": 0.2, "train": 0.7}
    found = [assign_split(shares, i) for i in range(5000)]
    assert all(abs(found.count(name) / 5000 - share) < 0.02 for name, share in shares.items())
    assert Example(prompt="x") == Example(prompt="x", demo=None, fields={})


# --- options ----------------------------------------------------------------------------------------
def test_task_options_are_yaml():
    """Wrong implementations: every value a string; a list that cannot be hashed."""
    assert load_run_task("cards", ("k=2", "targets=[1,20]", "limit=null", "rules=ab")) == Cards(
        k=2, targets=(1, 20), limit=None, rules="ab"
    )
    assert load_run_task(None, ()) is None


@pytest.mark.parametrize("text", ["k", "=2"])
def test_an_option_without_a_value(text):
    with pytest.raises(UserError, match=f"--task-options: expected key=value, got '{text}'"):
        load_run_task("cards", (text,))


def test_an_option_that_is_no_yaml():
    with pytest.raises(UserError, match=r"--task-options: k: expected a YAML value, got '\[2'"):
        load_run_task("cards", ("k=[2",))
