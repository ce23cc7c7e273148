"""Accuracy on held-out prompts: the same ones every time, counted right, whatever the rest of the run did."""

from __future__ import annotations

import json

import pytest
import torch
from runs import decoder, tokenizer

from fastrl import cli
from fastrl.errors import UserError
from fastrl.report.stats import share_interval, wilson
from fastrl.run.evaluate import Evaluation, evaluate
from fastrl.sampler import Sampler
from fastrl.tasks import Cards, Example, Score

TASK = Cards(k=2)


def example(i: int) -> Example:
    return Example(prompt=f"p{i}")


def score(right: bool, formed: bool = True) -> Score:
    return Score(reward=float(right), correct=right, well_formed=formed)


def run(task=TASK, **changes) -> Evaluation:
    model = changes.pop("model", None) or decoder()
    return evaluate(
        Sampler(model, tokenizer()),
        task,
        **{"split": "val", "prompts": 5, "samples": 3, "max_new_tokens": 6} | changes,
    )


def test_accuracies_and_their_intervals():
    """Wrong implementations: the samples of one prompt counted as independent trials; greedy and sampled
    answers mixed.
    """
    greedy = [("", score(True)), ("", score(False, formed=False))]
    sampled = [[("", score(True)), ("", score(True))], [("", score(True)), ("", score(False))]]
    done = Evaluation([example(0), example(1)], greedy, sampled)
    assert done.per_prompt() == [1.0, 0.5] and done.well_formed() == 5 / 6
    m = done.metrics()
    assert (m["eval/accuracy_greedy"], m["eval/accuracy_greedy_lo"], m["eval/accuracy_greedy_hi"]) == (
        0.5,
        *wilson(1, 2),
    )
    each = share_interval([1.0, 0.5])
    assert (m["eval/accuracy_sampled"], m["eval/accuracy_sampled_lo"], m["eval/accuracy_sampled_hi"]) == (
        0.75,
        each.lo,
        each.hi,
    )
    without = Evaluation([example(0), example(1)], greedy, []).metrics()
    assert sorted(k for k in without if "accuracy" in k) == [
        f"eval/accuracy_greedy{x}" for x in ("", "_hi", "_lo")
    ], "none is NaN"


def test_every_answer_is_verified_against_its_own_prompt():
    """Wrong implementations: prompts and answers in different orders; greedy answers that are samples."""
    done = run()
    again = run()
    assert [e.prompt for e in done.examples] == [e.prompt for e in again.examples]
    assert done.sampled == again.sampled
    assert len({e.prompt for e in done.examples}) == 5
    one = Sampler(decoder(), tokenizer())
    for e, (text, verdict), drawn in zip(done.examples, done.greedy, done.sampled, strict=True):
        alone = evaluate(one, _Only(e), split="val", prompts=1, samples=0, max_new_tokens=6)
        assert alone.greedy == [(text, verdict)] and len(drawn) == 3 and verdict == TASK.verify(e, text)
    assert any(len({t for t, _ in drawn}) > 1 for drawn in done.sampled)


class _Only:
    """A task of one example."""

    name, stop = "only", ()

    def __init__(self, it: Example) -> None:
        self.it = it

    def size(self, split: str) -> int:
        return 1

    def example(self, split: str, index: int) -> Example:
        return self.it

    def verify(self, it: Example, completion: str) -> Score:
        return TASK.verify(it, completion)

    def tokenizer(self) -> None:
        return None


def test_an_evaluation_depends_on_nothing_but_the_weights():
    """Wrong implementations: noise from the global generator, prompts by the run's seed; training that goes
    on differently after it.
    """
    torch.manual_seed(1)
    a = run()
    before = torch.get_rng_state()
    b = run()
    assert a.sampled == b.sampled and torch.equal(before, torch.get_rng_state())
    assert run(seed=1).sampled != a.sampled
    assert [e.prompt for e in run(seed=1).examples] == [e.prompt for e in a.examples]
    assert run(model=decoder(seed=1)).greedy != a.greedy


def test_a_split_smaller_than_asked_for_is_taken_whole():
    done = run(prompts=10**6, samples=0, max_new_tokens=1)
    assert len(done.greedy) == TASK.size("val")
    assert len({e.prompt for e in done.examples}) == TASK.size("val")
    assert done.sampled == []


def test_errors():
    class Raises(_Only):
        def verify(self, it: Example, completion: str) -> Score:
            raise KeyError("answer")

    with pytest.raises(UserError, match="cards: expected a split of train, val, test"):
        run(split="tset")
    with pytest.raises(UserError, match="prompts: expected at least one of cards's split 'val', got 0 of"):
        run(prompts=0)
    with pytest.raises(UserError, match="--task: only's verifier raised KeyError: 'answer'"):
        run(Raises(TASK.example("val", 0)))


def test_the_command(tmp_path, capsys):
    """Wrong implementations: another split than the one asked for; a file that holds less than was shown."""
    decoder().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    args = (
        f"--model {tmp_path}/model --task cards --task-options k=2 --split test --prompts 4 --samples 2 "
        "--max-new-tokens 6"
    )
    assert cli.main(["eval", *args.split(), "--output", f"{tmp_path}/new/e.json"]) == 0
    told = capsys.readouterr().out
    kept = json.loads((tmp_path / "new/e.json").read_text())
    assert "greedy" in told and "sampled" in told and "4 prompts of cards/test, 2 samples each" in told
    want = run(split="test", prompts=4, samples=2)
    assert [a["prompt"] for a in kept["answers"]] == [e.prompt for e in want.examples]
    assert [a["greedy"]["completion"] for a in kept["answers"]] == [text for text, _ in want.greedy]
    assert [len(a["sampled"]) for a in kept["answers"]] == [2] * 4
    assert kept["eval/accuracy_greedy"] == want.metrics()["eval/accuracy_greedy"]
