"""From what the user named to what is trained on: every line is checked before the first step, and named when
it is wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import tokenizer

from fastrl.config import Grpo, Sft
from fastrl.data.encode import encode_prompt
from fastrl.errors import UserError
from fastrl.methods.grpo.prompts import Scorer, load_prompts
from fastrl.methods.sft.batches import DemonstrationEncoder, demonstrations
from fastrl.tasks import Cards, Example, Score

CONTEXT, VOCABULARY = 48, 31
REWARDS = """
def length(completions, **columns):
    return [float(len(c)) for c in completions]

def hint(completions, hint, **columns):
    return [None if h is None else float(h in c) for c, h in zip(completions, hint)]
"""


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def learn(config: Sft, task: Any = None, context: int = CONTEXT, vocabulary: int = VOCABULARY):
    """What the options name to imitate, how much of it, and the longest sequence."""
    encode = DemonstrationEncoder(config, tokenizer(), context, vocabulary)
    return *demonstrations(encode, task), encode.longest


def ask(config: Grpo, task: Any = None, context: int = CONTEXT, vocabulary: int = VOCABULARY):
    """The prompts, how many there are, and what scores them."""
    prompts = load_prompts(config, task, tokenizer(), context, vocabulary)
    return prompts.item, prompts.size, prompts.score


# --- demonstrations ---------------------------------------------------------------------------------
def test_a_tasks_demonstrations_end_in_eos_and_train_the_completion():
    """Wrong implementations: loss on the prompt; no end-of-sequence token; examples of another split."""
    task, words = Cards(k=2), tokenizer()
    items, size, longest = learn(Sft(model="m"), task)
    assert (size, longest) == (task.size("train"), CONTEXT)
    for i, sample in zip((5, 0), items([5, 0]), strict=True):
        example = task.example("train", i)
        assert words.decode(sample.tokens) == f"{example.prompt}{example.demo}<eos>"
        assert sample.mask == [False] * len(example.prompt) + [True] * (len(example.demo or "") + 1)


def test_a_datasets_demonstrations(tmp_path):
    data = write(tmp_path / "d.jsonl", {"question": "7+", "answer": "3"}, {"question": "K", "answer": "44"})
    items, size, longest = learn(
        Sft(model="m", dataset=data, columns=("question=prompt", "answer=completion"), max_tokens=20)
    )
    assert (size, longest) == (2, 20) and [tokenizer().decode(s.tokens) for s in items([1, 0, 1])] == [
        "K44<eos>",
        "7+3<eos>",
        "K44<eos>",
    ]


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        (
            {"prompt": "7" * 30, "completion": "7" * 20},
            {},
            r"d.jsonl:2: 51 tokens \(30 of the prompt, 21 of the completion\), but a sequence may have 48",
        ),
        (
            {"prompt": "7", "completion": "7" * 8},
            {"max_tokens": 9},
            r"d.jsonl:2: 10 tokens .*, but a sequence may have 9; .* --max-tokens",
        ),
        (
            {"prompt": "7", "completion": "7" * 8},
            {"micro_tokens": 9},
            r"d.jsonl:2: a sequence of up to 10 tokens .*; raise --micro-tokens \(9\) to at least 10",
        ),
        ("{not json", {}, r"d.jsonl:2: expected a JSON object"),
        (
            {"prompt": "hello", "completion": "7"},
            {},
            r"d.jsonl:2: the tokenizer has no tokens for part of 'hello'",
        ),
    ],
)
def test_a_line_that_cannot_be_trained_on_is_named_before_training(tmp_path, row, changes, message):
    """Wrong implementations: an error at the step that meets the line; a silent truncation."""
    data = write(tmp_path / "d.jsonl", {"prompt": "7", "completion": "3"}, row)
    with pytest.raises(UserError, match=message):
        learn(Sft(model="m", dataset=data, **changes))


def test_a_tokenizer_of_another_model_is_named(tmp_path):
    """Wrong implementation: an index error from the embedding."""
    data = write(tmp_path / "d.jsonl", {"prompt": "7", "completion": "|"})
    (token,) = tokenizer().encode("|")
    with pytest.raises(
        UserError,
        match=rf"d.jsonl:1: .* token {token}, but the model's vocabulary has {token}; "
        r"use the tokenizer that belongs to the model",
    ):
        learn(Sft(model="m", dataset=data), vocabulary=token)
    with pytest.raises(UserError, match=r"cards train\[0\]: .* use the tokenizer that belongs to the model"):
        learn(Sft(model="m"), Cards(k=2), vocabulary=token)[0]([0])


def test_nothing_to_train_on():
    class Silent(Cards):
        __slots__ = ()

        def example(self, split: str, index: int) -> Example:
            return Example(prompt="7")

    with pytest.raises(
        UserError,
        match="--dataset or --task: expected one of them, to have demonstrations to train on; got neither",
    ):
        learn(Sft(model="m"))
    with pytest.raises(UserError, match="--task: cards has no demonstrations; give a --dataset"):
        learn(Sft(model="m"), Silent())


# --- prompts ----------------------------------------------------------------------------------------
def test_a_tasks_prompts_come_with_what_the_verifier_needs():
    task = Cards(k=2)
    prompt, size, score = ask(Grpo(model="m"), task)
    text, columns = prompt(3)
    example = task.example("train", 3)
    assert (text, size, columns["example"], columns["target"]) == (
        example.prompt,
        task.size("train"),
        example,
        example.fields["target"],
    )
    done = score([text] * 2, [example.demo, "7"], [[3], [4]], [columns] * 2)
    assert (
        done.reward == [1.0, 0.0]
        and done.parts["correct"] == [0.5, 0.5]
        and "expected" not in done.message[0]
        and done.message[1]
    )


def test_a_datasets_prompts_and_rewards(tmp_path):
    """Wrong implementations: the reference answer handed to the sampler; columns lost; a missing reward
    counted as 0.
    """
    (tmp_path / "r.py").write_text(REWARDS)
    data = write(
        tmp_path / "d.jsonl",
        {"prompt": "7", "completion": "1", "hint": "3"},
        {"prompt": "K", "completion": "2", "hint": None},
    )
    prompt, size, score = ask(
        Grpo(model="m", dataset=data, reward=(f"{tmp_path}/r.py:length", f"{tmp_path}/r.py:hint"))
    )
    assert size == 2 and prompt(1) == ("K", {"hint": None})
    done = score(["7", "K"], ["13", "7"], [[1], [2]], [prompt(0)[1], prompt(1)[1]])
    assert (
        done.reward == [3.0, 1.0]
        and done.parts["rewards/length/mean"] == [2.0, 1.0]
        and done.parts["rewards/hint/mean"][0] == 1.0
    )


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        (
            {"prompt": "7" * 48},
            {},
            "d.jsonl:2: a prompt of 48 tokens leaves no room for a completion in the model's context of 48",
        ),
        (
            {"prompt": "7" * 9},
            {"max_tokens": 9},
            "d.jsonl:2: a prompt of 9 tokens leaves no room for a completion in --max-tokens of 9",
        ),
        (
            {"prompt": "7" * 9},
            {"micro_tokens": 20, "max_new_tokens": 12},
            r"d.jsonl:2: a sequence of up to 21 tokens .* --micro-tokens \(20\)",
        ),
        ({"prompt": "hello"}, {}, "d.jsonl:2: the tokenizer has no tokens for part of 'hello'"),
        ({"prompt": ""}, {}, "d.jsonl:2: prompt: expected at least one token, got none"),
    ],
)
def test_a_prompt_that_cannot_be_sampled_from_is_named_before_training(tmp_path, row, changes, message):
    """Wrong implementations: an error hours later, at the step that draws the prompt; one that says
    prompts[3].
    """
    (tmp_path / "r.py").write_text(REWARDS)
    data = write(tmp_path / "d.jsonl", {"prompt": "7"}, row)
    with pytest.raises(UserError, match=message):
        ask(Grpo(model="m", dataset=data, reward=(f"{tmp_path}/r.py:length",), **changes))
    assert (
        ask(
            Grpo(
                model="m",
                dataset=write(tmp_path / "e.jsonl", {"prompt": "7" * 47}),
                reward=(f"{tmp_path}/r.py:length",),
            )
        )[1]
        == 1
    )


def test_nothing_to_sample_from(tmp_path):
    data = write(tmp_path / "d.jsonl", {"prompt": "7"})
    with pytest.raises(
        UserError,
        match="--task or --dataset: expected one of them, to have prompts to sample from; got neither",
    ):
        ask(Grpo(model="m"))
    with pytest.raises(UserError, match="--reward: expected a reward function for the dataset's prompts"):
        ask(Grpo(model="m", dataset=data))
    (tmp_path / "r.py").write_text(REWARDS)
    with pytest.raises(UserError, match=r"t.jsonl:1: expected a prompt column to sample from, got text"):
        ask(
            Grpo(
                model="m",
                dataset=write(tmp_path / "t.jsonl", {"text": "7"}),
                reward=(f"{tmp_path}/r.py:length",),
            )
        )


# --- scoring ----------------------------------------------------------------------------------------
def test_the_verifier_is_reported_beside_reward_functions():
    """Wrong implementations: with --reward the task's verdict is not computed, or replaces the reward."""
    task = Cards(k=2)
    columns = [{"example": task.example("train", i)} for i in (0, 1)]
    demos = [c["example"].demo for c in columns]
    done = Scorer(task, [lambda completions: [7.0, None]])([""] * 2, demos, [[1], [1]], columns)
    assert done.reward[0] == 7.0 and done.reward[1] != done.reward[1]
    assert done.parts["correct"] == [1.0, 1.0] and done.parts["well_formed"] == [1.0, 1.0]
    assert (
        done.message
        == [task.verify(c["example"], text).message for c, text in zip(columns, demos, strict=True)]
        != ["", ""]
    )


def test_a_users_verifier_that_raises_is_named():
    """Wrong implementation: an internal error."""

    class Broken:
        name, stop = "broken", ()

        def verify(self, example: Example, completion: str) -> Score:
            raise ZeroDivisionError("no")

    with pytest.raises(UserError, match=r"(?s)broken raised ZeroDivisionError: no.*on sample 0 of 1"):
        Scorer(Broken(), [])(["7"], ["7"], [[1]], [{"example": Example(prompt="7")}])


def test_no_completions_are_not_scored():
    """Wrong implementation: the user's function is called with empty lists by a process that has no share."""
    assert Scorer(Cards(k=2), [lambda completions: 1 / 0])([], [], [], []).reward == []
    with pytest.raises(UserError, match="--tokenizer: rewards read text, and the run has no tokenizer"):
        Scorer(Cards(k=2), [])(["7"], None, [[1]], [{}])


def test_prompts_are_tokenised_as_before_a_completion():
    sample = learn(Sft(model="m"), Cards(k=2))[0]([0])[0]
    prompt = encode_prompt(Cards(k=2).example("train", 0).prompt, tokenizer())
    assert sample.tokens[: len(prompt)] == prompt and sample.mask.index(True) == len(prompt)
