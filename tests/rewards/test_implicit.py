"""The reward in a policy trained on preferences: against whole softmaxes, and as one of several rewards of
GRPO.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import decoder, dpo, drift, grpo, lines, tokenizer

import fastrl.trainer
from fastrl.algorithms.advantage import ADVANTAGES, COMBINE
from fastrl.config import Eval
from fastrl.errors import UserError
from fastrl.methods.grpo.prompts import load_prompts
from fastrl.model.decoder import Decoder
from fastrl.rewards import implicit as module
from fastrl.rewards.functions import function_names, load_reward
from fastrl.tasks import Cards
from fastrl.trainer import train

PROMPTS = ["a:2,3>5|", "b:4>4|", "a:2,3>5|", "b:4>4|"]
COMPLETIONS = ["2+3=5", "", "5", "4,4,4"]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing the plots takes longer than these runs."""
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)


@pytest.fixture
def folders(tmp_path) -> list[str]:
    """A policy, and the reference that it has drifted from."""
    out = []
    for name, size in (("policy", 0.05), ("reference", 0.0)):
        model = decoder()
        drift(model, size)
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
        out.append(str(tmp_path / name))
    return out


def restated(folder: str) -> torch.Tensor:
    """Summed log-probs of completion and end, each sequence alone, through a whole softmax in float64."""
    model, words, out = Decoder.from_pretrained(folder, torch.float64, "cpu"), tokenizer(), []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        p, c = (words(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
        tokens = torch.tensor([*p, *c, words.eos_token_id])
        with torch.no_grad():
            logp = (model(tokens) @ model.head_weight.T).log_softmax(-1)
        out.append(sum(float(logp[t - 1, tokens[t]]) for t in range(len(p), len(tokens))))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("max_tokens", [module.MAX_TOKENS, 12])
def test_it_is_beta_times_the_log_ratio(folders, max_tokens, monkeypatch):
    """Wrong implementations: the prompt's tokens in the sum; a mean over tokens; the end left out; a shift by
    one; the reference's log-prob over the policy's; sequences of one pass that see each other.
    """
    monkeypatch.setattr(module.sequence_logp, "__defaults__", (max_tokens,))
    want = restated(folders[0]) - restated(folders[1])
    for spec, beta in ((",".join(folders), 0.1), (f"{folders[0]}, {folders[1]}, 2.5", 2.5)):
        got = load_reward(f"implicit:{spec}")(PROMPTS, COMPLETIONS)
        assert got == pytest.approx((beta * want).tolist(), abs=3e-5 * beta)
    assert (
        want.abs().min() > 1e-3
        and load_reward(f"implicit:{folders[0]},{folders[0]}")(PROMPTS, COMPLETIONS) == [0.0] * 4
    )
    function = load_reward("implicit:" + ",".join(folders))
    assert function_names([function]) == ["implicit_reward"] and function([], []) == []


def test_what_does_not_fit_the_context_does_not_count(folders, tmp_path):
    """Wrong implementation: a completion cut off at the last place of the context, whose end no longer fits,
    ends the run.
    """
    long = "5" * 200
    cut = load_reward("implicit:" + ",".join(folders))(["a:2>5|"], [long])
    assert cut == load_reward("implicit:" + ",".join(folders))(["a:2>5|"], [long + "5"])


def test_beside_the_verifier_each_reward_is_scaled_apart(folders):
    """normalize_then_sum: z-scores of both by group, their sum whitened over the batch.  Wrong
    implementations: a sum in which the larger reward decides; the verifier's place taken by the functions.
    """
    config = grpo(Path(folders[0]).parent, reward=("task", "implicit:" + ",".join(folders)), eval=Eval())
    score = load_prompts(config, Cards(k=2), tokenizer(), 48, 31).score
    example = Cards(k=2).example("train", 0)
    scored = score(
        [example.prompt] * 4, [example.demo, "5", "5,5", "2"], [[1]] * 4, [{"example": example}] * 4
    )
    assert list(scored.each) == ["cards", "implicit_reward"] and scored.each["cards"][1] == [
        1.0,
        0.0,
        0.0,
        0.0,
    ]
    parts = torch.tensor([values for _, values in scored.each.values()], dtype=torch.float64)
    for scale in (1.0, 100.0):
        scaled = parts * torch.tensor([[1.0], [scale]])
        got = COMBINE["normalize_then_sum"](
            scaled, torch.ones(2, dtype=torch.float64), ADVANTAGES["zscore"], 4, torch.ones(4)
        )
        z = sum((x - x.mean()) / (x.std() + 1e-4) for x in scaled)
        torch.testing.assert_close(got, (z - z.mean()) / (z.std() + 1e-4))
    assert scored.reward == pytest.approx(parts.sum(0).tolist())


def test_a_run_on_the_verifier_and_a_policy_of_dpo(tmp_path):
    """Wrong implementations: metrics of one reward alone; a verifier that is run twice and counted twice."""
    first = dpo(tmp_path, "dpo", eval=Eval())
    train(first)
    decoder().save_pretrained(tmp_path / "other")
    spec = f"implicit:{first.output_dir}/checkpoints/step_12,{tmp_path}/other"
    train(
        grpo(
            tmp_path,
            reward=("task", spec),
            steps=2,
            eval=Eval(),
            multi_objective_aggregation="normalize_then_sum",
        )
    )
    row = lines(tmp_path / "run")[-1]
    assert {"rewards/cards/mean", "rewards/implicit_reward/mean", "correct", "loss"} <= row.keys()
    assert row["reward"] == pytest.approx(
        row["rewards/cards/mean"] + row["rewards/implicit_reward/mean"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "implicit:{0}",
            "--reward: expected implicit:POLICY,REFERENCE or implicit:POLICY,REFERENCE,BETA, "
            "two folders and a positive number, got",
        ),
        ("implicit:{0},{1},0", "a positive number, got implicit"),
        ("implicit:{0},{1},much", "a positive number, got implicit"),
        ("implicit:{0},none", "none is no folder"),
        ("implicit:{0},", "the empty name is no folder"),
    ],
)
def test_other_forms_are_refused(spec, message, folders):
    with pytest.raises(UserError, match=message):
        load_reward(spec.format(*folders))


def test_models_that_do_not_belong_together_are_refused(folders, tmp_path):
    decoder(vocab_size=33).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="with one vocabulary, got 31 and 33"):
        load_reward(f"implicit:{folders[0]},{tmp_path}/other")
    with pytest.raises(UserError, match="--reward: expected a --task, whose verifier `task` is; got none"):
        load_prompts(
            grpo(tmp_path, task=None, dataset="d.jsonl", reward=("task",)), None, tokenizer(), 48, 31
        )
