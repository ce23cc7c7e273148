"""What is counted, logged and handed over of a conversation: the policy's tokens, and who said what."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import grpo, lines, write_model

import fastrl.trainer
from fastrl.batch.types import Rollouts
from fastrl.data.messages import as_read
from fastrl.methods.grpo.groups import SampledGroups, rollout_metrics
from fastrl.parallel.world import World
from fastrl.report.report import prompt_text
from fastrl.rewards.functions import Scored, as_message, score
from fastrl.sampler import SamplingParams
from fastrl.sampler.episodes import Dialogue
from fastrl.sampler.jobs import carried_jobs
from fastrl.tasks import Example, Guess, Score
from fastrl.tasks.task import task_reward
from fastrl.tasks.tokens import char_tokenizer

WORDS = char_tokenizer("0123456789-:?<>x")
GAME = Guess(numbers=32, turns=3)


def conversations() -> Rollouts:
    """Two of them: a prompt of 1 token; 2 said, 4 heard, 1 said; and 3 said."""
    chosen = torch.tensor([0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1, 1], dtype=torch.bool)
    zeros = torch.zeros(12)
    return Rollouts(
        tokens=torch.tensor(WORDS.encode("x8?xxxx2x12?", add_special_tokens=False)),
        cu_seqlens=torch.tensor([0, 8, 12], dtype=torch.int32),
        completion_mask=chosen,
        prompt_index=torch.zeros(2, dtype=torch.int64),
        prompt_lengths=torch.ones(2, dtype=torch.int64),
        logp=zeros,
        behaviour_logp=zeros,
        entropy=torch.where(chosen, 2.0, 0.0),
        weight_version=torch.where(chosen, 3, -1),
        finish_reason=["stop", "length"],
        text=["8?xxxx2", "12?"],
    )


# --- what is counted --------------------------------------------------------------------------------
def test_observations_are_in_no_count_and_no_mean():
    """Wrong implementations: lengths, means over tokens, or token lists with what was heard."""
    rollouts = conversations()
    assert rollouts.lengths.tolist() == [3, 3]
    assert [WORDS.decode(ids) for ids in rollouts.completions()] == ["8?2", "12?"]

    items = [("p", {})] * 2
    groups = SampledGroups(items, rollouts, Scored([1.0, 0.0]), [0], 1, [0])
    logged = rollout_metrics(groups, 2, 5, World())
    expected = {
        "entropy": 2.0,
        "sampler/staleness_mean": 2.0,
        "rollout/tokens": 6.0,
        "completions/mean_length": 3.0,
        "completions/max_length": 3.0,
        "completions/min_length": 3.0,
        "completions/clipped_ratio": 0.5,
    }
    assert {name: logged[name] for name in expected} == pytest.approx(expected)


def test_a_carried_conversation_has_drawn_what_the_policy_chose():
    """Wrong implementation: everything after the prompt counted as drawn, observations included, so that the
    conversation ends early.
    """
    waiting = replace(conversations(), finish_reason=["unfinished"] * 2, sequence=torch.tensor([7, 8]))
    jobs = carried_jobs(waiting, SamplingParams(max_new_tokens=5))
    assert [(job.length, job.drawn, job.budget) for job in jobs] == [(8, 3, 5), (4, 3, 5)]


# --- who said what ----------------------------------------------------------------------------------
def test_a_conversation_is_messages_with_roles():
    """Wrong implementations: the task's words as the assistant's; messages without all of the text."""
    talk = Dialogue(GAME, WORDS, [Example(prompt="x", fields={"number": 2})] * 2)
    first, second = talk.messages(conversations())
    assert first == [
        {"role": "assistant", "content": "8?"},
        {"role": "user", "content": "xxxx"},
        {"role": "assistant", "content": "2"},
    ]
    assert second == [{"role": "assistant", "content": "12?"}]

    class Tool(Guess):
        role = "tool"

    other = Dialogue(Tool(), WORDS, talk.examples).messages(conversations())
    assert [m["role"] for m in other[0]] == ["assistant", "tool", "assistant"]
    assert prompt_text(first) == "assistant: 8?\nuser: xxxx\nassistant: 2"


class Spaced:
    """A tokenizer that writes a word's space only behind another word, as SentencePiece's do."""

    def decode(self, ids, *, skip_special_tokens):
        return " ".join(chr(97 + i) for i in ids)


def test_messages_keep_the_spaces_between_turns():
    """Wrong implementation: each turn decoded alone, whose first space is lost."""
    (first, _) = Dialogue(GAME, Spaced(), []).messages(conversations())
    whole = Spaced().decode(conversations().tokens[1:8].tolist(), skip_special_tokens=True)
    assert "".join(message["content"] for message in first) == whole


def test_a_sequence_without_tokens_is_an_empty_message():
    rollouts = conversations()
    nothing = Rollouts(
        tokens=rollouts.tokens[:1],
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        completion_mask=torch.tensor([False]),
        prompt_index=torch.zeros(1, dtype=torch.int64),
        prompt_lengths=torch.ones(1, dtype=torch.int64),
        logp=torch.zeros(1),
        behaviour_logp=torch.zeros(1),
        entropy=torch.zeros(1),
        weight_version=torch.full((1,), -1),
        finish_reason=["length"],
    )
    assert nothing.lengths.tolist() == [0] and nothing.completions() == [[]]
    assert Dialogue(GAME, WORDS, []).messages(nothing) == [[{"role": "assistant", "content": ""}]]


def test_rewards_get_the_messages_and_the_verifier_all_of_their_text():
    """Wrong implementations: a conversation wrapped into one message again; a verifier that sees the last
    turn; a reward model that reads messages behind a prompt of text, through a template.
    """
    talk = [{"role": "assistant", "content": "8?"}, {"role": "user", "content": ">"}]
    talk += [{"role": "assistant", "content": "12?"}]
    assert as_message("x", talk) is talk and as_message([{"role": "user", "content": "x"}], talk) is talk
    assert as_read("x", talk) == "8?>12?" and as_read([{"role": "user", "content": "x"}], talk) is talk

    seen: list[str] = []

    class Reads(Guess):
        def verify(self, example, completion):
            seen.append(completion)
            return Score(reward=1.0, correct=True, well_formed=True)

    columns = [{"example": Example(prompt="x")}] * 2
    score([task_reward(Reads())], ["x", "x"], [talk, "12?"], [[1], [2]], columns)
    assert seen == ["8?>12?", "12?"]


TASK = """
from fastrl.tasks import Example, Score
from fastrl.tasks.tokens import char_tokenizer
HEARD = "x" * 12
class Talks:
    name, stop = "talks", ("?",)
    def size(self, split): return 4
    def example(self, split, index): return Example(prompt="a")
    def verify(self, example, text): return Score(reward=1.0, correct=HEARD in text, well_formed=True)
    def tokenizer(self): return char_tokenizer("ab?x")
    def step(self, transcripts):
        n = len(transcripts)
        return [HEARD] * n, [1.0] * n, [len(t.said) > 1 for t in transcripts]
def reward(prompts, completions, completion_ids, log_metric, log_extra, **columns):
    said = [m["content"] for c in completions for m in c if m["role"] == "assistant"]
    heard = [m["content"] for c in completions for m in c if m["role"] != "assistant"]
    log_metric("confused", float(sum(HEARD in text for text in said)))
    log_metric("heard", float(sum(text == HEARD for text in heard)))
    return [float(len(ids)) for ids in completion_ids]
"""


def test_a_run_hands_over_and_counts_the_same(tmp_path, monkeypatch):
    """Wrong implementations: --overlong-buffer that counts observations of 12 tokens against a budget of 12;
    --reward with observations in completion_ids, or in an assistant's message; samples without roles.
    """
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)
    file = tmp_path / "talks.py"
    file.write_text(TASK)
    config = grpo(
        tmp_path,
        model=write_model(tmp_path, vocab_size=8),
        task=f"{file}:Talks",
        task_options=(),
        reward=(f"{file}:reward", "task"),
        reward_weights=(1.0, 0.0),
        max_new_tokens=12,
        overlong_buffer=2,
        kl_coef=0.01,  # keeps samples without advantage in the batch
        steps=1,
        prompts=4,
    )
    fastrl.trainer.train(config)
    (row,) = [row for row in lines(config.output_dir) if "reward" in row]
    samples = [json.loads(line) for line in Path(config.output_dir, "samples.jsonl").read_text().splitlines()]

    assert row["confused"] == 0 and row["heard"] > 0
    assert row["rollout/tokens"] == row["num_tokens"]
    # the reward is the number of drawn tokens, less DAPO's penalty of those
    counted = row["reward"] - row["rewards/overlong/mean"]
    assert counted == pytest.approx(row["completions/mean_length"])
    assert row["completions/max_length"] <= 12 and row["rewards/overlong/mean"] > -0.7
    assert row["correct"] > 0, "the verifier reads what was heard, too"
    assert all("".join(m["content"] for m in s["messages"]) == s["completion"] for s in samples)
    assert {m["role"] for s in samples for m in s["messages"]} == {"assistant", "user"}
