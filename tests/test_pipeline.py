"""Pipelines: stages that feed each other, stop and go on, and one report."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from runs import REWARDS, state, stop_after, write_model

import fastrl.trainer
from fastrl import cli, pipeline
from fastrl.errors import UserError
from fastrl.run import checkpoint
from fastrl.trainer import RunResult

SMALL = {"steps": 4, "prompts": 2, "micro_tokens": 64, "optim": {"lr": 0.01}}


def write(folder: Path, *stages: dict[str, Any], name: str = "pipe", **top: Any) -> Path:
    """A pipeline of tiny stages on the card game."""
    (folder / "rewards.py").write_text(REWARDS)
    file = folder / f"{name}.yaml"
    shared = {"task": "cards", "task_options": ["k=2"], "seed": 3}
    file.write_text(
        yaml.safe_dump({"output_dir": str(folder / name), "shared": shared, "stages": list(stages)} | top)
    )
    return file


def chain(folder: Path, name: str = "pipe", **changes: Any) -> Path:
    first = {"sft": SMALL | {"model": write_model(folder)}}
    sampled = SMALL | {"group": 4, "max_new_tokens": 8, "reward": [f"{folder}/rewards.py:digits"]}
    return write(
        folder,
        first,
        {"grpo": sampled | changes},
        {"grpo": sampled | {"name": "more", "max_new_tokens": 6}},
        name=name,
    )


def run(file: Path) -> None:
    pipeline.run(SimpleNamespace(file=str(file)))


def test_stages_feed_each_other(tmp_path, capsys):
    """Wrong implementations: every stage from the first one's model; shared options that a stage overrides
    lost; a report of one stage.
    """
    run(chain(tmp_path))
    folder = tmp_path / "pipe"
    names = ["1-sft", "2-grpo", "3-more"]
    configs = [yaml.safe_load((folder / n / "config.yaml").read_text()) for n in names]
    assert [c["model"] for c in configs[1:]] == [str(folder / n / "checkpoints/step_4") for n in names[:2]]
    assert all(c["seed"] == 3 and c["task"] == "cards" for c in configs)
    ends = [state(folder / n / "checkpoints/step_4") for n in names]
    weights = [k for k in ends[0] if k.startswith("model.safetensors")]
    assert all(any(not torch.equal(a[k], b[k]) for k in weights) for a, b in pairwise(ends))
    page = (folder / "report.html").read_text()
    assert all(f'href="{n}/report.html"' in page for n in names) and page.count("<h2>") == 4
    assert all((folder / n / "report.html").is_file() for n in names)
    capsys.readouterr()
    (tmp_path / "tiny.json").unlink()  # a stage that is done needs nothing any more
    run(tmp_path / "pipe.yaml")
    assert capsys.readouterr().out.count("done before") == 3


@pytest.fixture
def no_report(monkeypatch):
    """Drawing the plots takes longer than these runs."""
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)
    monkeypatch.setattr(pipeline, "write_report", lambda stages, folder: folder)


@pytest.mark.usefixtures("no_report")
def test_a_stopped_pipeline_goes_on(tmp_path, monkeypatch):
    """Wrong implementations: stages that are done run again; a half-done stage begun again; other numbers
    than in one go.
    """
    straight, stopped = chain(tmp_path, "straight"), chain(tmp_path, "stopped")
    run(straight)
    with monkeypatch.context() as patch:
        # the first stage looks once before its steps and after each; then two steps of the second
        stop_after(patch, 4 + 1 + 2)
        with pytest.raises(
            UserError, match=r"stopped in stage 'grpo'; continue with: fastrl run .*stopped.yaml"
        ):
            run(stopped)
    assert checkpoint.complete_checkpoints(tmp_path / "stopped/2-grpo")[-1].name in ("step_1", "step_2")
    run(stopped)
    for n in ("1-sft", "2-grpo", "3-more"):
        a, b = (state(tmp_path / run_ / n / "checkpoints/step_4") for run_ in ("straight", "stopped"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), n


def test_what_is_wrong_is_said_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr(fastrl.pipeline, "train", lambda config: pytest.fail("nothing may be trained"))
    model = write_model(tmp_path)
    for stages, message in (
        ([{"sfd": {}}], r"stage 1: unknown command 'sfd'; did you mean 'sft'\?"),
        (
            [{"sft": {"model": model}}, {"sft": {}}],
            "stage 2: a second stage is called 'sft'; give it another name, like `name: sft-2`",
        ),
        ([{"sft": {"model": "{grpo}"}}], r"stage 1: '\{grpo\}' names stage 'grpo'; stages before it: none"),
        (
            [{"sft": {"model": model, "output_dir": "x"}}],
            "stage 1: output_dir and resume: expected none, the pipeline sets both",
        ),
        ([{"sft": {"model": model, "stebs": 3}}], "unknown key 'stebs'; did you mean 'steps'"),
        ([{"sft": {"steps": 3}}], "required option 'model' is missing"),
        (["sft"], "stage 1: expected one command with its options"),
        ([], "expected the keys output_dir and stages"),
    ):
        with pytest.raises(UserError, match=message):
            run(write(tmp_path, *stages))
    with pytest.raises(UserError, match="unknown key 'stage'; did you mean 'stages'"):
        run(write(tmp_path, {"sft": {"model": model}}, stage=[]))
    with pytest.raises(UserError, match="expected a pipeline's YAML file, got no file"):
        run(tmp_path / "none.yaml")


@pytest.mark.usefixtures("no_report")
def test_a_stage_begun_with_other_options_is_refused(tmp_path):
    """Wrong implementation: a changed stage that is taken for done."""
    run(chain(tmp_path))
    with pytest.raises(
        UserError, match=r"stage 'grpo': .* was begun with group = 4, now it is 3; name another output_dir"
    ):
        run(chain(tmp_path, group=3))


def test_the_command(tmp_path, capsys):
    assert cli.main(["run", str(tmp_path / "none.yaml")]) == 1
    assert "expected a pipeline's YAML file" in capsys.readouterr().err
    assert cli.main(["run", str(chain(tmp_path)), "--dry-run"]) == 0
    assert json.dumps(str(tmp_path / "pipe.yaml"))[1:-1] in capsys.readouterr().out


def test_what_a_later_stage_lacks_is_said_before_the_first_trains(tmp_path, monkeypatch, capsys):
    """Wrong implementations: hours of training, and then no such file; a key reported against a file that the
    user never wrote; stage files of a pipeline that is refused, or of a dry run.
    """
    monkeypatch.setattr(fastrl.pipeline, "train", lambda config: pytest.fail("nothing may be trained"))
    first = {"sft": SMALL | {"model": write_model(tmp_path)}}
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{\n')
    (tmp_path / "answers.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "fails.py").write_text("1 / 0\n")
    rewarded = {"group": 2, "reward": [f"{tmp_path}/rewards.py:digits"]}
    for options, message in (
        ({"dataset": "nowhere.jsonl"}, "dataset nowhere.jsonl: no such file"),
        ({"dataset": f"{tmp_path}/broken.jsonl"}, "broken.jsonl:2: expected a JSON object"),
        ({"dataset": f"{tmp_path}/answers.jsonl"}, "answers.jsonl:1: expected a prompt column"),
        ({"reward": [f"{tmp_path}/rewards.py:digit"]}, "defines no 'digit'; did you mean 'digits'"),
        ({"reward": [f"{tmp_path}/fails.py:f"]}, "fails.py raised ZeroDivisionError"),
        ({"reward": ["model:nowhere"]}, "--reward: expected a folder, got nowhere"),
        ({"model": "nowhere"}, "--model: expected a folder, got nowhere, which is not there"),
        ({"tokenizer": "nowhere"}, "--tokenizer: expected a folder with tokenizer files, got nowhere"),
        ({"task": "card"}, "--task: expected one of cards"),
        ({"micro_tokens": 0}, "--micro-tokens: expected at least 1"),
        ({"grop": 3}, "unknown key 'grop'; did you mean"),
        ({"optim": {"lr": "fast"}}, "optim.lr: expected"),
    ):
        stage = {"grpo": rewarded | options}
        file = write(tmp_path, first, stage)
        text = file.read_text()
        assert cli.main(["run", str(file)]) in (1, 2)
        told = capsys.readouterr().err
        assert f"{file}:" in told and "stage 2" in told and message in told, told
        if "grop" in options:
            line = 1 + text[: text.index("grop:")].count("\n")
            assert f"{file}:{line}: stage 2" in told
        assert not (tmp_path / "pipe").exists()

    capsys.readouterr()
    assert cli.main(["run", str(chain(tmp_path)), "--dry-run"]) == 0
    told = capsys.readouterr().out
    nowhere = yaml.safe_load((tmp_path / "pipe.yaml").read_text())
    del nowhere["output_dir"]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(nowhere))
    assert str(pipeline.read_stages(tmp_path / "other.yaml")[0].folder) == "runs/other/1-sft"
    assert "stage 2, grpo: fastrl grpo, 4 steps, in" in told and "task cards" in told
    assert f"model {tmp_path}/pipe/1-sft/checkpoints/step_4: of an earlier stage" in told
    assert not (tmp_path / "pipe").exists()


@pytest.mark.usefixtures("no_report")
def test_a_signal_stops_the_pipeline_with_its_exit_code(tmp_path, monkeypatch, capsys):
    """Wrong implementations: the next stage begins; exit code 1, which says that something failed."""

    def train(config):
        trained.append(config)
        return RunResult(2, None, {}, interrupted=False, signal=15)

    trained: list[Any] = []
    monkeypatch.setattr(pipeline, "train", train)
    assert cli.main(["run", str(chain(tmp_path))]) == 143 and len(trained) == 1
    assert "stopped in stage 'sft'; continue with: fastrl run" in capsys.readouterr().out
