"""`fastrl joint` from end to end: resume, checkpoints of two models, its report, and that the oracle's reward
rises.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cotraining import joint
from judging import reward_model
from runs import assert_same_run, decoder, grpo, lines, state, straight_and_resumed, tokenizer, write_model

import fastrl.trainer
from fastrl.bench.studies import demo
from fastrl.config import AlgorithmChoice, Eval, HeldOut, Joint, Optim, Reward, Sft
from fastrl.errors import UserError
from fastrl.model.reward import RewardModel
from fastrl.report.report import build
from fastrl.run.session import set_up
from fastrl.tasks import Cards

SPLIT = {"minibatches": 2, "epochs": 2}
KEYS = ("joint/oracle", "joint/proxy", "joint/correlation", "joint/accuracy")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing the plots takes longer than these runs."""
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)


def judge_of(run: str | Path, step: int) -> Path:
    return Path(run, f"checkpoints/step_{step}/reward_model")


@pytest.mark.parametrize(
    "changes",
    [
        {"reward_every": 2, "offline_share": 0.5, "kl_coef": 0.1, "reward_lr": 3e-3, **SPLIT},
        {
            "dtype": "bfloat16",
            "reward_epochs": 2,
            "reward_loss": "plackett_luce",
            "algorithm": "dr_grpo",
            "calibration": 5,
        },
        {"reward_every": 4, "tail": "carry", "tail_share": 0.3, "demonstrations": True},
    ],
    ids=["waiting-offline-kl", "bfloat16-epochs-ranked", "waiting-carried"],
)
def test_five_steps_are_three_and_two(changes, tmp_path, monkeypatch):
    """Bit for bit.  Wrong implementations: a reward model, its moments or its masters that begin again, or
    made of the resumed policy; another calibration set, or its scale measured by weights that have not been
    read yet; comparisons that waited, lost or twice; offline comparisons from the start.
    """
    straight, resumed = straight_and_resumed(monkeypatch, joint, tmp_path, 3, **changes)
    assert_same_run(straight.output_dir, resumed.output_dir, 5)
    a, b, old = (
        state(judge_of(*x))
        for x in ((straight.output_dir, 5), (resumed.output_dir, 5), (resumed.output_dir, 3))
    )
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], old[k]) for k in a), "it went on learning"


def test_the_same_seed_gives_the_same_bits_and_another_one_others(tmp_path):
    """Wrong implementation: a head drawn by torch's global generator."""
    torch.manual_seed(1)
    first = fastrl.trainer.train(joint(tmp_path, "a", steps=2))
    torch.manual_seed(2)
    fastrl.trainer.train(joint(tmp_path, "b", steps=2))
    fastrl.trainer.train(joint(tmp_path, "c", steps=2, seed=1))
    assert_same_run(tmp_path / "a", tmp_path / "b", 2)
    heads = [state(judge_of(tmp_path / name, 2))["model.safetensors/score.weight"] for name in "abc"]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert first.metrics["joint/groups"] >= 1


def test_both_models_are_in_the_checkpoint(tmp_path):
    """The reward model rewards another run, and goes on being trained by `fastrl reward`.  Wrong
    implementations: its weights from before the last update; no tokenizer beside it; files of the two folders
    taken for each other's, or not in the list of what must be there.
    """
    result = fastrl.trainer.train(joint(tmp_path, steps=3))
    folder = judge_of(tmp_path / "run", 3)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        "Qwen3ForSequenceClassification"
    ]
    model = RewardModel.load(folder)
    model.tokenizer = tokenizer()
    again: Any = grpo(
        tmp_path, "other", model=str(result.checkpoint), steps=1, reward=(f"model:{folder}",), eval=Eval()
    )
    fastrl.trainer.train(again)
    rows = [json.loads(line) for line in (tmp_path / "other/samples.jsonl").read_text().splitlines()]
    want = model.score([(r["prompt"], r["completion"]) for r in rows])
    assert [r["reward"] for r in rows] == pytest.approx(want, abs=1e-5)
    fastrl.trainer.train(
        Reward(
            model=str(folder),
            task="cards",
            task_options=("k=2",),
            steps=1,
            output_dir=str(tmp_path / "rm"),
            eval=HeldOut(prompts=0),
        )
    )
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"reward_model/config.json is missing"):
        fastrl.trainer.train(joint(tmp_path, steps=4, resume=True))


def test_a_reward_model_with_a_tokenizer_of_its_own(tmp_path):
    """Wrong implementation: the policy's tokens read by a model with another vocabulary."""
    task = Cards(k=2, filler=1)
    own = tmp_path / "rm"
    judge = reward_model(max_position_embeddings=64, vocab_size=40)
    judge.save_pretrained(own)
    shuffled = task.tokenizer()
    shuffled.add_tokens(["7>"])
    shuffled.save_pretrained(own)
    fastrl.trainer.train(joint(tmp_path, steps=1, reward_model=str(own), optim=Optim(lr=0.0)))
    judge.tokenizer = shuffled
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    raw = judge.score([(r["prompt"], r["completion"]) for r in rows])
    told = lines(tmp_path / "run")[-1]
    assert [r["proxy"] for r in rows] == pytest.approx(
        [(s - told["joint/shift"]) / told["joint/scale"] for s in raw], rel=1e-4, abs=1e-5
    )
    assert [r["reward"] for r in rows] == [r["proxy"] for r in rows] and all(
        0 <= r["oracle"] <= 1 for r in rows
    )


def test_the_policys_start_reads_as_the_policy_does(tmp_path):
    """Wrong implementation: --tokenizer for the policy alone, beside a reward model that reads with the one
    in their common folder.
    """
    model, words = tmp_path / "start", tmp_path / "words"
    decoder().save_pretrained(model)
    shuffled = tokenizer()
    shuffled.add_tokens(["7>"])
    shuffled.save_pretrained(model)
    tokenizer().save_pretrained(words)
    run = set_up(joint(tmp_path, model=str(model), tokenizer=str(words)))
    with run.log:
        assert run.learner.judge.model.tokenizer is run.context.tokenizer


def test_completions_that_fill_the_context(tmp_path):
    """Wrong implementation: an end-of-sequence token that the reward model's context has no place for."""
    short = write_model(tmp_path, max_position_embeddings=18)
    fastrl.trainer.train(joint(tmp_path, model=short, steps=2, max_new_tokens=18))
    assert max(row["completions/max_length"] for row in lines(tmp_path / "run")) > 8
    assert all(row["completions/clipped_ratio"] > 0 for row in lines(tmp_path / "run"))


def test_a_run_tells_proxy_from_oracle(tmp_path):
    """Wrong implementations: the oracle under the name of the reward that the policy gets; panels that
    nothing fills.
    """
    result = fastrl.trainer.train(joint(tmp_path, steps=2, overlong_buffer=2))
    names = (
        "proxy",
        "oracle",
        "correlation",
        "accuracy",
        "pairs",
        "tied",
        "shift",
        "scale",
        "loss",
        "groups",
        "grad_norm",
        "lr",
    )
    assert {f"joint/{name}" for name in names} <= result.metrics.keys()
    first = lines(tmp_path / "run")[0]
    assert first["rewards/digits/mean"] == pytest.approx(first["joint/oracle"]) and first[
        "joint/proxy"
    ] == pytest.approx(0, abs=1e-6)
    assert first["reward"] == pytest.approx(first["joint/proxy"] + first["rewards/overlong/mean"], abs=1e-6)
    page = build(tmp_path / "run").read_text()
    for title in (
        "Proxy and oracle",
        "Proxy against oracle",
        "Fresh comparisons won",
        "Loss of the reward model",
        "Policy loss",
    ):
        assert f"{title}</figcaption>" in page or title in page
    assert "Oracle&#x27;s reward" in page or "Oracle's reward" in page


# --- learning ----------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_oracles_reward_rises_with_a_reward_model_that_learns_along(tmp_path):
    """From one SFT start, the reward model taught right answers from wrong ones first.  Wrong
    implementations: any sign, order or scale by which the proxy rises alone; a reward model that the policy
    leaves behind.
    """
    fixed: dict[str, Any] = {"task": "cards", "task_options": ("k=2", "rules=b"), "threads": 1}
    fall: dict[str, Any] = {"warmup": 5, "schedule": "linear"}
    model = str(demo.RECIPES / "cards.config.json")
    first = Optim(lr=4e-3, schedule="linear", warmup=10, weight_decay=0.01)
    sft = Sft(
        **fixed,
        model=model,
        steps=100,
        prompts=128,
        optim=first,
        output_dir=str(tmp_path / "sft"),
        eval=Eval(),
    )
    start = str(fastrl.trainer.train(sft).checkpoint)
    taught = Reward(
        **fixed,
        model=start,
        algorithm=AlgorithmChoice("plackett_luce", {"center": 0.01}),
        group=4,
        steps=300,
        prompts=128,
        eval=HeldOut(prompts=0),
        optim=Optim(lr=3e-3, floor=0.02, **fall),
        output_dir=str(tmp_path / "reward"),
    )
    judge = str(fastrl.trainer.train(taught).checkpoint)
    config = Joint(
        **fixed,
        model=start,
        reward_model=judge,
        algorithm="dr_grpo",
        steps=60,
        prompts=64,
        group=8,
        minibatches=2,
        max_new_tokens=16,
        optim=Optim(lr=4e-4, floor=0.3, **fall),
        reward_lr=4e-4,
        reward_epochs=4,
        demonstrations=True,
        output_dir=str(tmp_path / "joint"),
        eval=Eval(),
    )
    fastrl.trainer.train(config)
    rows = lines(tmp_path / "joint")
    first_ten, last_ten = (
        {k: sum(r[k] for r in some) / 10 for k in KEYS} for some in (rows[:10], rows[-10:])
    )
    print(first_ten, last_ten)
    # 0.12; a mean of ten steps deviates by 0.02
    assert last_ten["joint/oracle"] - first_ten["joint/oracle"] > 0.06, (
        first_ten,
        last_ten,
    )
    assert last_ten["joint/proxy"] > first_ten["joint/proxy"] and last_ten["joint/correlation"] > 0.4
