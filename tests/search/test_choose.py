"""Search at inference: best of n and votes against their definitions, and `fastrl eval --search`."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
from runs import decoder, tokenizer

from fastrl import cli
from fastrl.report.stats import wilson
from fastrl.run.evaluate import Evaluation, candidates, evaluate, search_accuracy
from fastrl.sampler import Sampler
from fastrl.search import SEARCHES, Candidates, best_at_k, best_of, pass_at_k, vote
from fastrl.search.choose import vote_at_k
from fastrl.tasks import Cards, Example, Score
from fastrl.tasks.gsm8k import Gsm8k

CARDS = Cards(k=2)


def made(right, reward=(), answer=(), logp=None) -> Candidates:
    return Candidates(
        right=right, logp=[0.0] * len(right) if logp is None else logp, reward=reward, answer=answer
    )


# --- pass@k -----------------------------------------------------------------------------------------
def test_pass_at_k_is_unbiased():
    """The mean over every subset.  Wrong implementation: 1 - (1 - c/n)^k, which is below it."""
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3) and pass_at_k(10, 3, 5) == pytest.approx(
        0.916667, abs=1e-6
    )
    assert pass_at_k(4, 1, 2) == 0.5 and pass_at_k(4, 3, 2) == 1 and pass_at_k(3, 0, 3) == 0
    for n, c, k in [(6, 2, 3), (7, 1, 4), (5, 5, 2)]:
        drawn = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, drawn)) / len(drawn))
    for bad in [(4, 5, 1), (4, 1, 0), (4, 1, 5)]:
        with pytest.raises(ValueError, match="pass_at_k: expected"):
            pass_at_k(*bad)


# --- best of n --------------------------------------------------------------------------------------
def test_best_of_k_is_the_mean_over_every_subset():
    """Wrong implementations: the first k samples alone; ties that the later, or the right, one wins; NaN for
    the highest reward.
    """
    dice = random.Random(0)
    for _ in range(30):
        n = dice.randint(1, 6)
        reward = [dice.choice([0.0, 1.0, 2.0, math.nan]) for _ in range(n)]
        right = [dice.random() < 0.5 for _ in range(n)]
        for k in range(1, n + 1):
            total, orders = 0.0, list(itertools.permutations(range(n), k))  # every order alike: ties by lot
            for order in orders:
                total += right[order[best_of(made([right[i] for i in order], [reward[i] for i in order]))]]
            assert best_at_k(made(right, reward), k) == pytest.approx(total / len(orders))


def test_with_the_verifier_as_reward_the_best_of_k_is_pass_at_k():
    for n, c in [(8, 3), (5, 0), (5, 5)]:
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            assert best_at_k(made(right, [float(r) for r in right]), k) == pytest.approx(pass_at_k(n, c, k))
    with pytest.raises(ValueError, match="best_at_k: expected 1 <= k <= 2"):
        best_at_k(made([True, False], [0.0, 1.0]), 3)


# --- votes ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("p", "n", "want"), [(0.6, 5, 0.68256), (0.6, 1, 0.6), (0.3, 3, 0.216)])
def test_the_majority_of_independent_votes(p, n, want):
    """Exactly, over every outcome: below one half voting hurts."""
    found = 0.0
    for right in itertools.product([True, False], repeat=n):
        chosen = vote(made(right, answer=["yes" if r else "no" for r in right]))
        found += math.prod(p if r else 1 - p for r in right) * right[chosen]
    assert found == pytest.approx(want, abs=1e-12)


def test_ties_go_to_the_likelier_answer():
    """Wrong implementations: the sum of log-probs, by which shorter camps win; the first one seen; votes for
    no answer.
    """
    answer = ["a", "b", "b", "a", None, None, None]
    logp = [-0.1, -0.4, -0.5, -0.9, 0.0, 0.0, 0.0]
    # -0.45 against -0.5, though a's best is better
    assert vote(made([False] * 7, answer=answer, logp=logp)) == 1
    assert vote(made([False] * 7, answer=answer, logp=[-0.9, *logp[1:3], -0.1, 0, 0, 0])) == 1
    assert vote(made([False] * 7, answer=answer, logp=[-0.1, *logp[1:3], -0.1, 0, 0, 0])) == 0
    assert vote(made([True, False], answer=[None, None])) == 0


def test_a_weighted_vote_counts_the_sigmoid_of_rewards():
    """Wrong implementations: negative votes; the highest reward alone; None (NaN) that spreads."""
    answer = ["a", "b", "b", "c"]
    assert vote(made([False] * 4, [3.0, -0.5, 0.0, math.nan], answer)) == 0  # 0.95 against 0.38 + 0.5
    assert vote(made([False] * 4, [3.0, 0.0, 0.0, math.nan], answer)) == 1  # 0.95 against 1
    assert vote(made([False] * 2, [-50.0, -40.0], ["a", "b"])) == 1


def test_votes_of_k_share_no_answer():
    """Wrong implementation: a window that slides, whose votes are not independent."""
    c = made([True, True, False, False, False, False, True], answer=["x", "x", "y", "y", "z", "y", "x"])
    assert vote_at_k(c, 3) == 0.5 and vote_at_k(c, 1) == pytest.approx(3 / 7) and vote_at_k(c, 7) == 1.0


def test_what_a_solution_comes_down_to():
    """Wrong implementation: votes by text, in which 18 and 18.00 are two answers."""
    task = Gsm8k()
    assert task.answer("so\n#### 18") == task.answer("A: 18.00") and task.answer("18") is None
    assert Gsm8k(last_number=True).answer("it is 18") == 18


# --- the command ------------------------------------------------------------------------------------
def evaluation(right: list[list[bool]]) -> Evaluation:
    texts = [
        [(f"t{i}{j}", Score(reward=float(r), correct=r, well_formed=True)) for j, r in enumerate(row)]
        for i, row in enumerate(right)
    ]
    tokens = [[[i, j] for j in range(len(row))] for i, row in enumerate(right)]
    examples = [Example(prompt=f"p{i}") for i in range(len(right))]
    return Evaluation(examples, [row[0] for row in texts], texts, [[0.0] * len(r) for r in right], tokens)


def test_every_sample_has_its_own_reward():
    """Wrong implementations: rewards of another prompt's samples, or of its tokens; an oracle that is the
    search's own accuracy.
    """
    done = evaluation([[True, False, False], [False, False, True]])
    seen = []

    def judge(prompts, completions, completion_ids):
        seen.extend(zip(prompts, completions, completion_ids, strict=True))
        return [float(c.endswith("2")) for c in completions]

    found = candidates(done, CARDS, judge)
    assert seen == [(f"p{i}", f"t{i}{j}", [i, j]) for i in range(2) for j in range(3)]
    assert [c.reward for c in found] == [[0.0, 0.0, 1.0]] * 2 and [
        SEARCHES["best_of"].choose(c) for c in found
    ] == [2, 2]
    table = search_accuracy(found, "best_of")
    assert [line["n"] for line in table] == [1, 2, 3]
    assert [line["accuracy"].mean for line in table] == pytest.approx([1 / 3, (1 / 6 + 2 / 3) / 2, 0.5])
    assert [line["oracle"].mean for line in table] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert table[-1]["accuracy"][1:] == wilson(1, 2) and table[-1]["oracle"].lo < 0.5, (
        "two prompts that agree are no certainty"
    )


def test_the_log_prob_of_an_answer_is_the_mean_over_its_tokens():
    """Wrong implementations: prompt tokens in the mean; a sum, which makes long answers unlikely."""
    done = evaluate(
        Sampler(decoder(), tokenizer()), CARDS, split="val", prompts=3, samples=2, max_new_tokens=6
    )
    flat = [x for row in done.logp for x in row]
    assert (
        [len(row) for row in done.logp] == [2] * 3 and all(-6 < x < 0 for x in flat) and len(set(flat)) == 6
    )
    read = [
        [tokenizer().decode(ids, skip_special_tokens=True).replace(" ", "") for ids in row]
        for row in done.tokens
    ]
    assert read == [[text for text, _ in row] for row in done.sampled]


REWARD = "def long(completions, **columns):\n    return [float(len(c)) for c in completions]\n"


def test_the_command_searches(tmp_path, capsys):
    decoder().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "r.py").write_text(REWARD)
    args = (
        f"eval --model {tmp_path}/model --task cards --task-options k=2 --prompts 3 --samples 4 "
        "--max-new-tokens 6 --threads 1"
    )
    out = f"--output {tmp_path}/e.json"
    assert (
        cli.main([*args.split(), *out.split(), "--search", "best_of", "--reward", f"{tmp_path}/r.py:long"])
        == 0
    )
    assert "best_of 4" in capsys.readouterr().out
    kept = json.loads((tmp_path / "e.json").read_text())
    assert [line["n"] for line in kept["search"]] == [1, 2, 4]
    for answer in kept["answers"]:
        lengths = [len(s["completion"]) for s in answer["sampled"]]
        assert answer["chosen"] == lengths.index(max(lengths))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--search best_of", "--reward: expected model:FOLDER or file.py:fn for best_of, got None"),
        ("--search vote", "--search: expected another: cards has no answer(completion), got vote"),
        (
            "--search best_of --reward r.py:f --samples 0",
            "--samples: expected at least 1 to search in, got 0",
        ),
        (
            "--reward r.py:f",
            "--reward: expected none without a --search that judges samples by it, got r.py:f",
        ),
    ],
)
def test_what_does_not_go_together(options, message, capsys):
    assert cli.main(["eval", "--model", "m", "--task", "cards", *options.split()]) == 1
    assert message in capsys.readouterr().err


def test_an_answer_without_a_reward_loses_to_a_bad_one():
    """Wrong: NaN as 0, which beats every reward below it."""
    pair = Candidates(right=[False, True], logp=[0.0, 0.0], reward=[float("nan"), -1.0], answer=["a", "b"])
    assert best_of(pair) == 1
