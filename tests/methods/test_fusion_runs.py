"""Fusions from end to end: what they are at their ends, resume, datasets, and the pipeline of SFT, DPO and
GRPO.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from fusion_runs import encoder, fusion
from runs import assert_same_run, dpo, grpo, lines, state, straight_and_resumed, tokenizer, write_model

import fastrl.run.session
import fastrl.trainer
from fastrl import cli, pipeline
from fastrl.bench.studies import demo
from fastrl.config import Eval, Hybrid, Optim
from fastrl.errors import UserError
from fastrl.methods.hybrid.known import pairs_of_prompts
from fastrl.tasks import Cards, Example
from fastrl.trainer import train

CONSTANT = {"pair_coef": 1.0, "pair_coef_end": 1.0, "optim": Optim(lr=1e-2)}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing the plots takes longer than these runs."""
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)
    monkeypatch.setattr(pipeline, "write_report", lambda stages, folder: folder)


def assert_same_weights(one: Any, other: Any, step: int, steps: int) -> None:
    a, b = (state(Path(run.output_dir, f"checkpoints/step_{n}")) for run, n in ((one, step), (other, steps)))
    assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []


# --- the ends -----------------------------------------------------------------------------------------
def test_a_run_without_pairs_is_the_run_of_grpo(tmp_path):
    """Bit for bit, optimizer state included.  Wrong implementations: pairs drawn from the noise of the
    rollouts; other prompts; a loss that is weighed by a share.
    """
    shared: dict[str, Any] = {
        "steps": 4,
        "minibatches": 2,
        "epochs": 2,
        "micro_tokens": 128,
        "optim": Optim(lr=1e-2),
        "eval": Eval(),
    }
    ours, theirs = fusion(tmp_path, "ours", pair_coef=0.0, **shared), grpo(tmp_path, "theirs", **shared)
    train(ours), train(theirs)
    assert_same_weights(ours, theirs, 4, 4)
    assert [r["reward"] for r in lines(ours.output_dir)] == [r["reward"] for r in lines(theirs.output_dir)]


@pytest.mark.parametrize("name", ["dpo", "rpo"])
def test_a_run_without_completions_is_the_run_of_dpo(name, tmp_path):
    """Bit for bit, a minibatch an optimizer step.  Wrong implementations: other pairs than `fastrl dpo` has;
    another reference; pairs that stay while a minibatch goes; a weight that is not 1.
    """
    ours = fusion(tmp_path, "ours", preference=name, rl_coef=0.0, steps=3, minibatches=2, **CONSTANT)
    theirs = dpo(
        tmp_path,
        "theirs",
        algorithm=name,
        steps=6,
        prompts=4,
        micro_tokens=128,
        optim=CONSTANT["optim"],
        eval=Eval(),
    )
    train(ours), train(theirs)
    assert_same_weights(ours, theirs, 3, 6)


@pytest.mark.parametrize(
    "changes",
    [
        {"norms_every": 2, "minibatches": 2, "pair_decay": 5, "kl_coef": 0.1},
        {"algorithm": "luffy_pairs"},
        {"algorithm": "online_dpo", "pairing": "all"},
        {"algorithm": "group_softmax", "anchor": "old", "epochs": 2},
    ],
    ids=lambda c: c.get("algorithm", "grpo_dpo"),
)
def test_six_steps_are_three_and_three(changes, tmp_path, monkeypatch):
    """Wrong implementations: a weight that begins again; a reference made of the resumed weights; other pairs
    after a resume.
    """
    straight, resumed = straight_and_resumed(monkeypatch, fusion, tmp_path, 3, **changes)
    assert_same_run(straight.output_dir, resumed.output_dir, 6)
    if "norms_every" in changes:
        rows = lines(resumed.output_dir)
        assert {"hybrid/pair_coef", "pairs/loss", "pairs/rewards/margins", "pairs/logps/chosen"} <= rows[
            0
        ].keys()
        assert ["grad_norm/rl" in row for row in rows] == [True, False] * 3
        assert rows[0]["pairs/loss"] == pytest.approx(0.6931, abs=2e-2), (
            "of the first minibatch ln 2, of the second already less"
        )


def test_the_first_pairs_cost_ln_2(tmp_path):
    """Wrong implementations: a reference that is not the start; a loss that is reported with its weight."""
    train(fusion(tmp_path, steps=1, pair_coef=0.3))
    assert lines(tmp_path / "run")[0]["pairs/loss"] == pytest.approx(0.693147, abs=1e-5)
    train(fusion(tmp_path, "online", steps=1, algorithm="online_dpo"))
    assert lines(tmp_path / "online")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


# --- data ---------------------------------------------------------------------------------------------
ROWS = [
    {"prompt": f"a:{n}>5|", "chosen": f"{n},{n}", "rejected": "" if n == 3 else f"{n}"} for n in range(2, 6)
]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "d.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder / name)


def test_a_dataset_with_pairs(tmp_path):
    """Wrong implementations: sides swapped; those of another line; an empty side that is a completion of
    nothing but its end.
    """
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    options: dict[str, Any] = {
        "task": None,
        "task_options": (),
        "tokenizer": str(tmp_path / "tokenizer"),
        "steps": 1,
    }
    config = fusion(tmp_path, dataset=write(tmp_path, ROWS), algorithm="grpo_pairs", **options)
    items = pairs_of_prompts(encoder(config), None)
    (chosen, rejected), (other, none) = items([2, 1])
    spoken = ["".join(tokenizer().convert_ids_to_tokens(x.tokens)[:-1]) for x in (chosen, rejected, other)]
    assert (
        spoken == ["a:4>5|4,4", "a:4>5|4", "a:3>5|3,3"]
        and none is None
        and chosen.mask == [False] * 6 + [True] * 4
    )
    train(config)
    assert lines(tmp_path / "run")[-1]["hybrid/demonstrated"] == 1
    whole = [r for r in ROWS if r["rejected"]]
    train(fusion(tmp_path, "same", dataset=write(tmp_path, whole, "whole.jsonl"), **options))
    other_file = write(tmp_path, whole[:1], "pairs.jsonl")
    train(
        fusion(
            tmp_path,
            "apart",
            dataset=write(tmp_path, [{"prompt": "a:2>5|"}], "p.jsonl"),
            pair_dataset=other_file,
            prompts=1,
            **options,
        )
    )
    assert all("pairs/loss" in lines(tmp_path / name)[-1] for name in ("same", "apart"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a:2>5|"}, "d.jsonl:1: expected the columns prompt, chosen and rejected, got prompt"),
        (
            {"prompt": "2", "chosen": "3", "rejected": "3"},
            "d.jsonl:1: chosen, rejected: expected two different completions, got '3' twice",
        ),
        (
            {"prompt": "2", "chosen": [{"role": "assistant", "content": "3"}], "rejected": "4"},
            "d.jsonl:1: chosen: expected what follows",
        ),
    ],
)
def test_a_line_that_cannot_be_used_is_named(row, message, tmp_path):
    with pytest.raises(UserError, match=message):
        pairs_of_prompts(encoder(fusion(tmp_path, dataset=write(tmp_path, [row]))), None)


def test_a_task_without_a_pair_for_a_prompt(tmp_path, monkeypatch):
    class Bare(Cards):
        @property
        def mistakes(self) -> Any:  # type: ignore[override]
            raise AttributeError

    class Some(Cards):
        def example(self, split: str, index: int) -> Example:
            e = Cards.example(self, split, index)
            return Example(prompt=e.prompt, demo=None if index == 1 else e.demo, fields=e.fields)

        def mistakes(self, example: Example, count: int, index: int) -> list[str]:
            return [] if index < 2 else Cards.mistakes(self, example, count, index)

    monkeypatch.setattr(fastrl.run.session, "load_run_task", lambda *named: Bare(k=2))
    with pytest.raises(
        UserError,
        match="--pair-dataset: expected a file of pairs, because task cards has no wrong answers; got none",
    ):
        train(fusion(tmp_path))
    items = pairs_of_prompts(encoder(Hybrid(model="m")), Some(k=2))
    assert [[x is not None for x in pair] for pair in items([0, 1, 2])] == [
        [True, False],
        [False, False],
        [True, True],
    ]
    bare: Any = SimpleNamespace(name="bare")
    with pytest.raises(
        UserError, match=r"--task: expected a task with wrong answers to pair .*, got bare; give a --dataset"
    ):
        pairs_of_prompts(encoder(Hybrid(model="m")), bare)


def test_a_dry_run_shows_the_configuration(capsys):
    args = [
        "hybrid",
        "--model",
        "m",
        "--algorithm",
        "grpo_dpo",
        "--pair-coef",
        "0.5",
        "--preference",
        "ipo",
        "--task",
        "cards",
    ]
    assert cli.main([*args, "--dry-run"]) == 0
    told = yaml.safe_load(capsys.readouterr().out.split("\n", 1)[1])
    assert told["algorithm"] == {"name": "grpo_dpo", "pair_coef": 0.5, "preference": "ipo"}


# --- SFT, DPO, GRPO -----------------------------------------------------------------------------------
def test_the_pipeline_of_three_stages(tmp_path):
    """The recipe, shortened.  Wrong implementations: GRPO from SFT's policy; a KL to SFT's policy, which
    begins large; DPO's reference under other weights than its start; a stage without its NLL.
    """
    tree = yaml.safe_load((demo.RECIPES / "cards_sft_dpo_grpo.yaml").read_text())
    assert [next(iter(stage)) for stage in tree["stages"]] == ["sft", "dpo", "grpo"] and tree["stages"][1][
        "dpo"
    ]["algorithm"]["nll_coef"] > 0
    assert "model" not in tree["stages"][2]["grpo"] and tree["stages"][2]["grpo"]["kl_coef"] > 0
    tree |= {"output_dir": str(tmp_path / "pipe")}
    tree["shared"] |= {"task_options": ["k=2"], "eval": {"prompts": 0}}
    short = {"prompts": 4, "micro_tokens": 128, "optim": {"lr": 1e-2}}
    for stage, more in zip(
        tree["stages"],
        ({"model": write_model(tmp_path), "steps": 3, "max_tokens": 48}, {"steps": 12}, {"steps": 1}),
        strict=True,
    ):
        next(iter(stage.values())).update(short | more)
    tree["stages"][2]["grpo"] |= {"group": 4, "max_new_tokens": 8, "minibatches": 1}
    (tmp_path / "pipe.yaml").write_text(yaml.safe_dump(tree))
    pipeline.run(SimpleNamespace(file=str(tmp_path / "pipe.yaml")))
    folder = tmp_path / "pipe"
    first, last = lines(folder / "2-dpo")[0], lines(folder / "2-dpo")[-1]
    assert (
        first["loss"] - first["nll_loss"] == pytest.approx(0.693147, abs=1e-4)
        and last["rewards/margins"] > 0.1
    )
    (row,) = lines(folder / "3-grpo")
    assert abs(row["kl"]) < 1e-6, "the policy is its own reference at the first step"
    told = yaml.safe_load((folder / "3-grpo/config.yaml").read_text())
    assert told["model"] == str(folder / "2-dpo/checkpoints/step_12")
