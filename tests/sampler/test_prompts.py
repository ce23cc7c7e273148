"""Prompts of every form, as tokens."""

from __future__ import annotations

import array
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastrl.errors import UserError
from fastrl.methods.grpo.sampling import GroupSampler
from fastrl.parallel.world import World
from fastrl.run.evaluate import evaluate
from fastrl.sampler.prompts import tokenize
from fastrl.tasks import Example
from fastrl.tasks.tokens import char_tokenizer

LETTERS = char_tokenizer("abcdefgh ")
LETTERS.chat_template = (
    "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ mood }}"
)
ASK = [{"role": "user", "content": "a"}]
EXTRAS = {"tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "gh"}}


@pytest.mark.parametrize(
    "tokens",
    [
        [3, 4],
        (3, 4),
        np.array([3, 4]),
        np.array([3, 4], dtype=np.uint16),
        [np.int32(3), np.int64(4)],
        torch.tensor([3, 4]),
        [torch.tensor(3), 4],
        array.array("i", [3, 4]),
        range(3, 5),
    ],
    ids=repr,
)
def test_tokens_of_any_kind(tokens):
    """Datasets give arrays; taken for messages, they fail with a traceback."""
    (got,) = tokenize([tokens], None, 9)
    assert got == [3, 4] and all(type(t) is int for t in got)


@pytest.mark.parametrize(
    "wrong", [np.array([[3]]), torch.tensor([1.5]), np.array(["a"]), 3, None, {"a": 1}, b"ab"]
)
def test_prompts_of_no_kind(wrong):
    with pytest.raises(UserError, match=r"prompts\[0\]: expected text, a list of messages, or token ids"):
        tokenize([wrong], LETTERS, 99)


@pytest.mark.parametrize("wrong", [[True], [1.5], ["a"], [3, None]])
def test_lists_of_no_kind(wrong):
    with pytest.raises(UserError, match=r"prompts\[0\]"):
        tokenize([wrong], LETTERS, 99)


class Caught(Exception):
    """The sampler was called."""


class Sampler:
    """Keeps the prompts that it is asked for."""

    tokenizer = LETTERS

    def generate(self, prompts, *args, **kwargs):
        raise Caught(tokenize(prompts, LETTERS, 99))


def test_rows_extras_reach_the_prompts_of_rl_and_of_evaluation():
    """RL on a prompt without its tools trains another behaviour than the one that is deployed."""
    right = LETTERS.encode("fagh")
    config = SimpleNamespace(tail="finish", sampling=SimpleNamespace(max_tokens_in_flight=9))
    sampler = GroupSampler.__new__(GroupSampler)
    sampler.config, sampler.sampler, sampler.params = config, Sampler(), None
    sampler.tail = sampler.pending = None
    with pytest.raises(Caught) as caught:
        sampler._generate([(ASK, EXTRAS)], 0, 0, None)
    assert caught.value.args[0] == [right]

    example = Example(prompt=ASK, fields=EXTRAS)
    task = SimpleNamespace(name="t", stop=(), size=lambda split: 1, example=lambda split, i: example)
    with pytest.raises(Caught) as caught:
        evaluate(Sampler(), task, split="test", prompts=1, samples=0, max_new_tokens=1, world=World())
    assert caught.value.args[0] == [right]
