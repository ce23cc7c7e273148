"""Tasks of several turns: the game that comes with the library, the environment made of it,
and a run on it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import decoder, grpo, lines, write_model

import fastrl.trainer
from fastrl.errors import UserError
from fastrl.run.evaluate import evaluate
from fastrl.sampler import Sampler, Turn
from fastrl.sampler.episodes import Dialogue, dialogue
from fastrl.tasks import Cards, Example, Guess, Transcript, load_task

GAME = Guess(numbers=32, turns=3)
WORDS = GAME.tokenizer()


def example(number: int) -> Example:
    return Example(prompt="0-31:", fields={"number": number})


def turn(index: int, *parts: str) -> Turn:
    """What was said and heard, the policy first."""
    tokens, chosen = [], []
    for i, part in enumerate(parts):
        ids = WORDS.encode(part, add_special_tokens=False)
        tokens += ids
        chosen += [i % 2 == 0] * len(ids)
    return Turn(index, tokens, chosen)


# --- the game ---------------------------------------------------------------------------------------
def test_the_game_answers_by_its_number():
    """Wrong implementations: larger for smaller; a price for the first guess; a game that goes on for ever,
    or after nonsense.
    """
    said = [("20?",), ("8?",), ("12?",), ("1?", "2?", "12?"), ("1?", "2?", "3?"), ("x?",), ("?",)]
    transcripts = [Transcript(example(12), s, (">",) * (len(s) - 1)) for s in said]
    observations, rewards, done = GAME.step(transcripts)
    assert list(observations) == ["<", ">", "", "", ">", "", ""]
    assert list(rewards) == pytest.approx([0, 0, 1.0, 0.8, 0, 0, 0])
    assert list(done) == [False, False, True, True, True, True, True]


def test_the_verifier_reads_the_whole_game():
    """Wrong implementations: the first guess judged; more guesses than allowed; a text without a guess that
    raises.
    """
    for text, right, formed in (
        ("20?<12?", True, True),
        ("12?>20?", False, True),
        ("1?>2?>3?>12?", False, True),
        ("", False, False),
        ("9", False, False),
    ):
        score = GAME.verify(example(12), text)
        assert (score.correct, score.reward, score.well_formed) == (right, float(right), formed), text
    games = [GAME.example("train", i).fields["number"] for i in range(400)]
    assert set(games) == set(range(32)) and games != [
        GAME.example("val", i % 200).fields["number"] for i in range(400)
    ]
    assert load_task("guess", numbers=8).verify(GAME.example("test", 3), GAME.example("test", 3).demo).correct
    for bad in ({"numbers": 1}, {"turns": 0}):
        with pytest.raises(UserError, match="guess: "):
            Guess(**bad)


# --- the environment --------------------------------------------------------------------------------
def test_turns_become_transcripts_and_back():
    """Wrong implementations: rewards of one sequence on another; turns merged; an observation that ends with
    a special token.
    """
    talk = Dialogue(GAME, WORDS, [example(12), example(30), example(5)])
    assert talk([turn(2, "8?"), turn(0, "12?")]) == [WORDS.encode("<", add_special_tokens=False), None]
    assert talk([turn(1, "12?", ">", "30?")]) == [None]
    assert talk.rewards == pytest.approx([1.0, 0.9, 0.0])
    assert dialogue(Cards(k=2), WORDS, []) is None


def test_a_step_that_answers_wrongly_is_named():
    class Short(Guess):
        def step(self, transcripts):
            return ["<"], [0.0], [False]

    class Silent(Guess):
        def step(self, transcripts):
            return [""] * len(transcripts), [0.0] * len(transcripts), [False] * len(transcripts)

    two = [turn(0, "1?"), turn(1, "2?")]
    with pytest.raises(
        UserError, match=r"guess's step .*: observations: expected a list of 2, one for each transcript, got"
    ):
        Dialogue(Short(), WORDS, [example(1)] * 2)(two)
    with pytest.raises(UserError, match=r"guess's step .*: observations\[0\]: expected text where"):
        Dialogue(Silent(), WORDS, [example(1)] * 2)(two)


# --- a run ------------------------------------------------------------------------------------------
def test_a_run_talks_and_its_observations_are_not_trained_on(tmp_path, monkeypatch):
    """Wrong implementations: rewards of the verifier instead of the turns'; observations in the loss;
    evaluation of the first turn.
    """
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)
    model = write_model(tmp_path, vocab_size=len(WORDS))
    config = grpo(
        tmp_path,
        model=model,
        task="guess",
        task_options=("numbers=4", "turns=3"),
        reward=(),
        max_new_tokens=10,
        steps=6,
        prompts=8,
    )
    fastrl.trainer.train(config)
    rows = lines(config.output_dir)
    assert any("reward" in row for row in rows) and any("eval/accuracy_greedy" in row for row in rows)
    samples = [json.loads(line) for line in Path(config.output_dir, "samples.jsonl").read_text().splitlines()]
    heard = [s for s in samples if set("<>") & set(s["completion"])]
    assert heard, "somebody was answered"
    for row in rows:
        if "num_tokens" in row and "rollout/tokens" in row:
            assert row["num_tokens"] <= row["rollout/tokens"]


def test_an_evaluation_plays_the_whole_game():
    model = decoder(vocab_size=len(WORDS), eos_token_id=None, max_position_embeddings=64)
    done = evaluate(
        Sampler(model, WORDS),
        Guess(numbers=4, turns=4),
        split="val",
        prompts=20,
        samples=4,
        max_new_tokens=30,
    )
    texts = [text for answers in done.sampled for text, _ in answers]
    assert any(text.count("?") > 1 for text in texts)
