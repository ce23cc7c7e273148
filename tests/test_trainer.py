"""A run from its configuration to its folder: `fastrl sft` and `fastrl grpo` end to end."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import grpo, lines, sft, state, write_model
from support import data_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastrl.trainer
from fastrl.config import Eval, Optim, Save
from fastrl.config.parse import load
from fastrl.errors import UserError
from fastrl.model.decoder import Decoder
from fastrl.parallel.device import reproducible
from fastrl.run.checkpoint import complete_checkpoints
from fastrl.tasks import Cards
from fastrl.tasks.tokens import train_bpe
from fastrl.train.learner import Learner
from fastrl.train.objective import PolicyObjective
from fastrl.trainer import RunResult, train

FILES = {
    "config.yaml",
    "environment.txt",
    "metrics.jsonl",
    "samples.jsonl",
    "checkpoints",
    "report.html",
    "plots",
}


@pytest.fixture
def no_report(monkeypatch):
    """Drawing the plots takes longer than these runs."""
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)


def trained(rows: list[dict]) -> list[dict]:
    return [r for r in rows if "loss" in r]


# --- the folder -------------------------------------------------------------------------------------
def test_sft_leaves_a_model_that_transformers_loads(tmp_path):
    """Wrong implementations: a run that does not learn; a checkpoint without its tokenizer; a plot or a log
    missing.
    """
    config = sft(tmp_path)
    result = train(config)
    run = Path(config.output_dir)
    assert isinstance(result, RunResult) and (result.steps, result.interrupted) == (20, False)
    assert {p.name for p in run.iterdir() if not p.name.startswith("events.")} == FILES
    assert load(type(config), run / "config.yaml") == config
    rows = lines(run)
    losses = [r["loss"] for r in trained(rows)]
    assert [r["step"] for r in trained(rows)] == list(range(1, 21)) and sum(losses[-3:]) < 0.8 * sum(
        losses[:3]
    )
    assert [r["step"] for r in rows if "eval/accuracy_greedy" in r] == [0, 5, 10, 15, 20]
    assert {"loss", "num_tokens", "grad_norm", "learning_rate", "entropy"} <= trained(rows)[0].keys()
    assert complete_checkpoints(run) == [result.checkpoint]
    assert result.metrics["loss"] == losses[-1]
    (events,) = run.glob("events.out.tfevents.*")
    board = EventAccumulator(str(events)).Reload()
    assert [e.value for e in board.Scalars("loss")] == pytest.approx(losses) and len(
        board.Scalars("eval/accuracy_greedy")
    ) == 5
    model, words = (
        AutoModelForCausalLM.from_pretrained(result.checkpoint),
        AutoTokenizer.from_pretrained(result.checkpoint),
    )
    example = Cards(k=2).example("train", 0)
    ids = words(example.prompt + example.demo, return_tensors="pt").input_ids
    ours = Decoder.from_pretrained(result.checkpoint)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits[0], ours(ids[0]) @ ours.head_weight.T, atol=1e-5)


def test_grpo_climbs_its_reward(tmp_path, no_report):
    """Wrong implementations: the sign of the advantage; rollouts from weights that are not those being
    trained; samples lost.
    """
    config = grpo(tmp_path, algorithm="dapo", optim=Optim(lr=2e-2), prompts=8, steps=25, eval=Eval())
    result = train(config)
    rows = lines(config.output_dir)
    rewards = [r["reward"] for r in rows]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1.0, f"{rewards[:5]} to {rewards[-5:]}"
    assert len(rows) == 25 and not any(k.startswith("eval/") for r in rows for k in r)
    wanted = {
        "loss",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "entropy",
        "completions/mean_length",
        "completions/clipped_ratio",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
        "correct",
        "rewards/digits/mean",
        "rollout/tokens",
    }
    assert wanted <= rows[0].keys()
    assert rows[0]["clip_ratio/region_mean"] == 0 and abs(rows[0]["ratio/mean"] - 1) < 1e-4, (
        "the first step is on policy"
    )
    samples = [json.loads(line) for line in Path(config.output_dir, "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == set(range(1, 26)) and {
        "prompt",
        "completion",
        "reward",
        "message",
    } <= samples[0].keys()
    assert all(s["reward"] == sum(c.isdigit() for c in s["completion"]) / 8 for s in samples)
    assert AutoModelForCausalLM.from_pretrained(result.checkpoint)


def test_metrics_of_several_optimizer_steps_are_combined(tmp_path, no_report):
    """Wrong implementation: the last minibatch's metrics stand for all."""
    config = grpo(tmp_path, steps=1, minibatches=2, epochs=2, kl_coef=0.1, eval=Eval())
    seen, real = [], Learner.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Learner, "update", lambda self, batch, step: seen.append(real(self, batch, step)) or seen[-1]
        )
        train(config)
    (row,) = lines(config.output_dir)
    assert len(seen) == 4 and row["num_tokens"] == sum(m["num_tokens"] for m in seen)
    assert row["loss"] == pytest.approx(sum(m["loss"] for m in seen) / 4) and row["ratio/max"] == max(
        m["ratio_max"] for m in seen
    )
    assert row["kl"] > 0


def test_the_reference_stays_where_the_run_began(tmp_path, no_report):
    """Wrong implementations: a reference that shares the policy's storage, or that moves; no KL in the
    gradient.
    """
    config = grpo(tmp_path, steps=6, kl_coef=0.5, eval=Eval())
    train(config)
    rows = lines(config.output_dir)
    assert rows[0]["kl"] < 1e-6 < 1e-4 < rows[-1]["kl"]
    free = replace(config, output_dir=str(tmp_path / "free"), kl_coef=1e-9)
    train(free)
    assert lines(free.output_dir)[-1]["kl"] > 1.2 * rows[-1]["kl"]


def test_checkpoints_at_an_interval(tmp_path, no_report):
    config = sft(tmp_path, steps=7, save=Save(every=2, keep=2), eval=Eval())
    train(config)
    assert [p.name for p in complete_checkpoints(Path(config.output_dir))] == ["step_6", "step_7"]


def test_bfloat16_trains_with_float32_masters(tmp_path, no_report):
    config = sft(tmp_path, steps=3, dtype="bfloat16", eval=Eval())
    train(config)
    kept = state(Path(config.output_dir, "checkpoints/step_3"))
    assert kept["model.safetensors/model.norm.weight"].dtype == torch.bfloat16
    assert kept["trainer.safetensors/master.norm"].dtype == torch.float32
    assert torch.equal(
        kept["trainer.safetensors/master.norm"].bfloat16(), kept["model.safetensors/model.norm.weight"]
    )


def test_gradient_checkpointing_is_the_same_run(tmp_path, no_report):
    plain, saving = (
        sft(tmp_path, name, steps=3, gradient_checkpointing=name == "saving", eval=Eval())
        for name in ("plain", "saving")
    )
    train(plain)
    train(saving)
    assert lines(plain.output_dir) == lines(saving.output_dir)


# --- stopping ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("saved", [True, False])
def test_a_nan_names_step_metric_and_checkpoint_and_overwrites_nothing(
    tmp_path, monkeypatch, no_report, saved
):
    """Wrong implementations: training on; a checkpoint of broken weights; a message without the way back."""
    config = grpo(tmp_path, save=Save(every=2 if saved else 0), eval=Eval())
    real, calls = PolicyObjective.metrics, []

    def metrics(self, rows):
        calls.append(1)
        return real(self, rows) | ({"loss": float("nan")} if len(calls) == 6 else {})

    monkeypatch.setattr(PolicyObjective, "metrics", metrics)
    run = Path(config.output_dir)
    where = (
        f"the last good checkpoint is {run}/checkpoints/step_4"
        if saved
        else "no checkpoint was written before"
    )
    with pytest.raises(
        UserError, match=f"^step 6: loss is nan; the weights are those before this update; {where}$"
    ):
        train(config)
    assert [p.name for p in complete_checkpoints(run)] == (["step_2", "step_4"] if saved else [])
    assert [r["step"] for r in lines(run)] == [1, 2, 3, 4, 5]
    assert all(torch.isfinite(v).all() for p in complete_checkpoints(run) for v in state(p).values())


def test_nothing_is_started_when_the_evaluation_cannot_be_done(tmp_path, no_report):
    with pytest.raises(
        UserError, match=r"--eval\.prompts: expected 0 without a --task, whose verifier evaluates, got 4"
    ):
        train(sft(tmp_path, task=None, dataset="x.jsonl"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "--steps: expected 0 or more, got -1"),
        ({"prompts": 0}, "--prompts: expected at least 1, got 0"),
        ({"micro_tokens": 0}, "--micro-tokens: expected at least 1, got 0"),
        ({"optim": Optim(lr=float("nan"))}, "--optim.lr: expected a number of 0 or more, got nan"),
        ({"optim": Optim(warmup=-1)}, "--optim.warmup: expected 0 or more, got -1"),
        ({"save": Save(keep=-1)}, "--save.keep: expected 0 or more, got -1"),
        ({"device": "tpu"}, "--device: expected auto, cpu, cuda or cuda:N; got 'tpu'"),
        ({"device": "meta"}, "--device: expected auto, cpu, cuda or cuda:N; got 'meta'"),
    ],
)
def test_options_without_a_meaning_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(sft(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_no_steps_leave_the_evaluation_of_the_start(tmp_path, no_report):
    result = train(sft(tmp_path, steps=0))
    assert (result.steps, result.checkpoint, result.interrupted) == (0, None, False)
    assert [r["step"] for r in lines(tmp_path / "run")] == [0]


# --- real text --------------------------------------------------------------------------------------
def test_sft_on_gsm8k(tmp_path, no_report):
    """The data set's own lines through a BPE tokenizer trained on them."""
    text = data_file("gsm8k", "train.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    (tmp_path / "train.jsonl").write_text("\n".join(text) + "\n")
    train_bpe(text, 400).save_pretrained(tmp_path / "tokenizer")
    model = write_model(tmp_path, vocab_size=400, hidden_size=32, max_position_embeddings=1024)
    config = sft(
        tmp_path,
        model=model,
        task=None,
        task_options=(),
        dataset=str(tmp_path / "train.jsonl"),
        tokenizer=str(tmp_path / "tokenizer"),
        columns=("question=prompt", "answer=completion"),
        steps=8,
        micro_tokens=2048,
        eval=Eval(),
    )
    result = train(config)
    losses = [r["loss"] for r in lines(config.output_dir)]
    assert len(losses) == 8 and losses[-1] < 0.9 * losses[0]
    assert AutoModelForCausalLM.from_pretrained(result.checkpoint).config.vocab_size == 400
    words = AutoTokenizer.from_pretrained(result.checkpoint)
    assert words.decode(words.encode(text[0])) == text[0]


# --- settings of the process ------------------------------------------------------------------------
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
def test_a_run_leaves_torchs_settings_as_they_were(before, fails, tmp_path, no_report, monkeypatch):
    """Wrong implementations: deterministic mode stays on, after a run or one that raised; a run that does
    not have it; cuBLAS's workspaces left to chance.
    """
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    seen, step = [], fastrl.trainer._step

    def watched(*args):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]))
        assert not torch.utils.deterministic.fill_uninitialized_memory
        if fails:
            raise ZeroDivisionError
        return step(*args)

    monkeypatch.setattr(fastrl.trainer, "_step", watched)
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        train(sft(tmp_path, steps=1, eval=Eval(prompts=0)))
    assert seen == [(True, ":4096:8")]
    assert torch.are_deterministic_algorithms_enabled() == before[0]
    assert torch.is_deterministic_algorithms_warn_only_enabled() == before[1]
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_cublas_is_told_before_cuda_starts_or_the_user_is(monkeypatch):
    """Wrong implementations: a setting of the user's replaced; a warning where nothing is wrong, or again."""
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.setenv(name, ":16:8")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with reproducible():
            assert os.environ[name] == ":16:8"
    monkeypatch.delenv(name)
    with (
        pytest.warns(UserWarning, match="CUBLAS_WORKSPACE_CONFIG: expected :4096:8 before CUDA starts"),
        reproducible(),
    ):
        assert os.environ[name] == ":4096:8"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with reproducible():
            pass
