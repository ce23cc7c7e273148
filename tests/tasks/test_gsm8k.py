"""GSM8K: reading answers, exact comparison, and the graded solutions of the data set's release."""

from __future__ import annotations

import json
import time
from collections import Counter
from fractions import Fraction

import pytest
from support import data_file

from fastrl.errors import UserError
from fastrl.tasks.gsm8k import Gsm8k, extract, last_number
from fastrl.tasks.task import Example

GRADED = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 48+24 = 72\n#### 72", 72),
        ("#### 1,234,567", 1234567),
        ("#### $18.00.", 18),
        ("#### -$5", -5),
        ("#### $-5", -5),
        ("#### \u2212 5", None),
        ("#### \u22125", -5),
        ("#### 3.0", 3),
        ("#### .5", Fraction(1, 2)),
        ("#### 3/4 of a cake", Fraction(3, 4)),
        ("#### 50%", 50),
        ("#### 18 eggs", 18),
        ("A: 18", 18),
        ("first\n A: 90,000", 90000),
        ("The answer is 42.", 42),
        ("Thus the final answer is: **42**", 42),
        (r"so it is \boxed{18}.", 18),
        ("#### 1\n#### 2", 2),  # the last of its kind: naming many answers gains nothing
        ("A: 5\n#### 7", 7),
        ("#### seven", None),
        ("the answer is 7\n#### seven", None),  # an empty marker is not passed over for a weaker one
        ("####", None),
        ("72", None),
        ("VITAMIN A: 18", None),  # only at the start of a line
        ("#### 1,23", None),
        ("#### 1.2.3", None),
        ("#### 5/0", None),
        ("#### 7\u0663", 7),  # digits of other scripts are text
        ("#### " + "9" * 31, None),
        ("", None),
    ],
)
def test_reading_the_marked_answer(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("10-3", 3), ("from 5 to -2 degrees", -2), ("72", 72), ("a1,234.", 1234), ("none", None)],
)
def test_the_last_number(text, answer):
    assert last_number(text) == answer


def test_comparison_is_exact():
    """A float comparison takes 0.1 + 0.2 for 0.30000000000000004,
    and a text comparison tells 18 from 18.00.
    """
    task, example = Gsm8k(), Example(prompt="", fields={"answer": "3/10"})
    assert task.verify(example, "#### 0.30").correct
    assert not task.verify(example, "#### 0.3000000000000000001").correct
    score = task.verify(example, "it is .3")
    assert (score.correct, score.well_formed, score.reward) == (False, False, 0.0)
    lenient = Gsm8k(last_number=True).verify(example, "it is .3")
    assert (lenient.correct, lenient.well_formed, lenient.reward) == (True, False, 1.0)


def test_bounded_time():
    start = time.perf_counter()
    task, example = Gsm8k(last_number=True), Example(prompt="", fields={"answer": "1"})
    for text in (
        "9" * 10**6,
        " " * 10**6,
        "#### " * 10**5,
        "#### " + " " * 10**6,
        "-$" * 10**5,
        "1,111" * 10**5,
        "the answer is " * 10**5,
    ):
        task.verify(example, text)
    assert time.perf_counter() - start < 5


@pytest.fixture
def real(request):
    return Gsm8k(folder=str(data_file("gsm8k", "train.jsonl").parent))


def test_agreement_with_3600_graded_solutions(real):
    """The release's own labels. Comparing texts instead of numbers disagrees (80,000 and 80000;
    3 and 3.0).
    """
    agree, as_text, total = 0, 0, Counter()
    for index, line in enumerate(data_file("gsm8k", "model_solutions.jsonl").open(encoding="utf-8")):
        row = json.loads(line)
        example = real.example("test", index)
        assert example.fields["question"] == row["question"]
        for name in GRADED:
            solution, label = row[name]["solution"], row[name]["is_correct"]
            total[label] += 1
            agree += real.verify(example, solution).correct == label
            as_text += (solution.rpartition("A: ")[2] == row["ground_truth"].rpartition("A: ")[2]) == label
    assert total == {True: 1392, False: 2208}
    assert agree == 3600
    assert as_text < 3600


def test_the_real_training_set(real):
    assert real.size("train") + real.size("val") == 7473
    assert 300 < real.size("val") < 450
    assert real.size("test") == 900
    questions = {
        s: {real.example(s, i).fields["question"] for i in range(real.size(s))}
        for s in ("train", "val", "test")
    }
    assert not questions["train"] & questions["val"]
    assert not questions["test"] & (questions["train"] | questions["val"])
    for split, found in questions.items():
        for i in range(0, len(found), 7):
            example = real.example(split, i)
            assert real.verify(example, example.demo).correct and "<<" not in example.demo
    example = real.example("train", 0)
    assert example.prompt.startswith("Question: Natalia sold clips")
    assert example.prompt.endswith("in April and May?\nAnswer:\n")
    assert example.demo.startswith("Natalia sold 48/2 = 24 clips") and example.demo.endswith("#### 72")
    marked = Gsm8k(folder=real.folder, annotations=True, chat=True).example("train", 0)
    assert "<<48/2=24>>24" in marked.demo
    assert marked.prompt[0]["role"] == "user"
    assert "####" in marked.prompt[0]["content"]


def write(folder, *lines, name="train.jsonl"):
    folder.joinpath(name).write_text("\n".join(lines))
    return str(folder)


GOOD = json.dumps({"question": "1+1?", "answer": "#### 2"})


def test_the_split_depends_on_the_question_alone(tmp_path):
    """A split by position would move questions between train and val when a line is added in front."""
    rows = [json.dumps({"question": f"{i}+1?", "answer": f"#### {i + 1}"}) for i in range(200)]
    tmp_path.joinpath("b").mkdir()
    first, second = (
        Gsm8k(folder=write(tmp_path, *rows), val=0.3),
        Gsm8k(folder=write(tmp_path / "b", GOOD, *rows[::-1]), val=0.3),
    )
    held = [{t.example("val", i).fields["question"] for i in range(t.size("val"))} for t in (first, second)]
    assert 40 < len(held[0]) < 80 and held[1] - {"1+1?"} == held[0] - {"1+1?"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "train.jsonl:2: expected a JSON object"),
        ('{"question": "1+1?"}', "train.jsonl:2: expected a question and an answer"),
        ('{"question": "1+1?", "answer": "two"}', "train.jsonl:2: expected an answer that ends in ####"),
    ],
)
def test_malformed_lines(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        Gsm8k(folder=write(tmp_path, GOOD, line)).size("train")


def test_where_the_data_is(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTRL_GSM8K", raising=False)
    with pytest.raises(UserError, match="set FASTRL_GSM8K"):
        Gsm8k().size("train")
    monkeypatch.setenv("FASTRL_GSM8K", write(tmp_path, GOOD))
    assert Gsm8k(val=0.0).size("train") == 1
    with pytest.raises(UserError, match=r"no file .*test\.jsonl"):
        Gsm8k().size("test")
    with pytest.raises(UserError, match="expected a split of train, val, test; got 'dev'"):
        Gsm8k().size("dev")
    with pytest.raises(UserError, match="split 'val' is empty"):
        Gsm8k(val=0.0).size("val")
    with pytest.raises(IndexError):
        Gsm8k(val=0.0).example("train", 1)
