"""`fastrl eval` of a checkpoint repeats the evaluation of its run, and says what it took from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import grpo, write_model

from fastrl.config import Eval, Evaluate
from fastrl.config.parse import UsageError, parse
from fastrl.errors import UserError
from fastrl.report import report
from fastrl.run import accuracy, remembered
from fastrl.run.remembered import as_remembered
from fastrl.trainer import train

EVAL = Eval(prompts=7, samples=3, split="val", max_new_tokens=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("remembered")
    patch = pytest.MonkeyPatch()
    patch.setattr(report, "build", lambda folder: None)  # seconds of plots
    config = grpo(folder, model=write_model(folder), steps=2, task_options=("k=2", "test=0.2"), eval=EVAL)
    train(config)
    patch.undo()
    return Path(config.output_dir)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(remembered, "notice", lines.append)
    return lines


def accuracies(path: Path) -> dict[str, float]:
    return {k: v for k, v in json.loads(path.read_text()).items() if k.startswith("eval/accuracy")}


def test_a_checkpoint_needs_nothing_else_and_gives_the_runs_last_number(run, said, tmp_path):
    """Wrong implementations: the task's own defaults, another split, or another number of tokens."""
    out = tmp_path / "out.json"
    accuracy.run(Evaluate(model=str(run), output=str(out)))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval/accuracy_greedy" in row][-1]
    found = accuracies(out)
    assert found and found == {key: last[key] for key in found}
    assert said == [
        "as the checkpoint's run evaluated: --task cards --task-options k=2 test=0.2 "
        "--split val --prompts 7 --samples 3 --max-new-tokens 5"
    ]


def test_what_is_given_wins_and_the_difference_is_said(run, said):
    given = Evaluate(model=str(run), split="train", samples=3, task_options=("k=3",))
    plan = as_remembered(given)
    assert (plan.split, plan.samples, plan.prompts) == ("train", 3, 7)
    assert plan.config.task_options == ("k=3", "test=0.2")
    assert said[1] == "otherwise than the checkpoint's run: --task-options k=3, not 2; --split train, not val"
    plan = as_remembered(Evaluate(model=str(run), task="guess"))
    assert (plan.config.task, plan.config.task_options, plan.split, plan.prompts) == (
        "guess",
        (),
        "test",
        512,
    )
    assert "--task guess, where the run had cards" in said[2]


def test_a_checkpoint_from_before_reads_its_runs_file(run, said):
    (checkpoint,) = (run / "checkpoints").glob("step_2")
    meta = json.loads((checkpoint / "trainer.json").read_text())
    kept = (checkpoint / "trainer.json").read_text()
    (checkpoint / "trainer.json").write_text(json.dumps({k: v for k, v in meta.items() if k != "run"}))
    plan = as_remembered(Evaluate(model=str(checkpoint)))
    (checkpoint / "trainer.json").write_text(kept)
    assert (plan.config.task, plan.split, plan.max_new_tokens) == ("cards", "val", 5)


def test_a_folder_that_remembers_nothing_has_the_defaults(tmp_path):
    plan = as_remembered(Evaluate(model=str(tmp_path), task="cards"))
    assert (plan.split, plan.prompts, plan.samples, plan.max_new_tokens) == ("test", 512, 4, 256)
    with pytest.raises(UserError, match="--task: expected a task to evaluate on, got none"):
        accuracy.run(Evaluate(model=str(tmp_path)))


def test_the_options_of_a_run_are_no_options_of_eval(run):
    with pytest.raises(UsageError, match=rf"of a training run, .* --model {run}, whose newest checkpoint"):
        parse(Evaluate, ["--config", str(run / "config.yaml")])
