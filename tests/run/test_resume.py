"""A run that was stopped, by whatever, and resumed is the run that was not: weights, optimizer, metrics and
samples, bit for bit.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import assert_same_run, grpo, lines, sft, state, stop_after, straight_and_resumed

import fastrl.run.interrupt
import fastrl.trainer
from fastrl import cli
from fastrl.config import Eval, Save
from fastrl.errors import UserError
from fastrl.parallel.world import World
from fastrl.run import checkpoint
from fastrl.run.interrupt import Interrupt
from fastrl.run.log import RunLog
from fastrl.trainer import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing the plots takes longer than these runs."""
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)


# --- bit for bit ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (sft, {}),
        (sft, {"dtype": "bfloat16"}),
        (grpo, {}),
        (grpo, {"minibatches": 2, "epochs": 2, "kl_coef": 0.1, "algorithm": "gspo"}),
        (grpo, {"tail": "carry", "tail_share": 0.3}),
        (
            grpo,
            {
                "minibatches": 2,
                "group": 2,
                "algorithm": "reinforce++",
                "refill": 2,
                "correction": "sequence_truncate",
            },
        ),
    ],
    ids=[
        "sft",
        "sft-bfloat16",
        "grpo",
        "gspo-minibatches-epochs-kl",
        "grpo-carried",
        "whitened-refill-correction",
    ],
)
def test_twenty_steps_are_ten_and_ten(make, changes, tmp_path, monkeypatch):
    """Wrong implementations: moments, schedule, prompts or noise that begin again; a reference model made of
    the resumed weights; masters rounded to bfloat16 on the way; an evaluation done twice or not at all;
    completions that were carried over lost.
    """
    straight, resumed = straight_and_resumed(monkeypatch, make, tmp_path, 10, **changes)
    assert_same_run(straight.output_dir, resumed.output_dir, 20)
    assert [r["step"] for r in lines(resumed.output_dir) if "eval/well_formed" in r] == [0, 5, 10, 15, 20]
    first, last = (state(Path(resumed.output_dir, f"checkpoints/step_{n}")) for n in (10, 20))
    assert all(not torch.equal(first[k], last[k]) for k in first if k.startswith("trainer")), (
        "it went on training"
    )


def test_stopped_at_every_step(tmp_path, monkeypatch):
    """Wrong implementation: state that is only right after one resumption."""
    straight, stopped = sft(tmp_path, "straight", steps=5), sft(tmp_path, "stopped", steps=5)
    train(straight)
    for step in range(1, 5):
        with monkeypatch.context() as patch:
            stop_after(patch, 1)
            assert train(replace(stopped, resume=step > 1)).steps == step
    assert train(replace(stopped, resume=True)).steps == 5
    assert_same_run(straight.output_dir, stopped.output_dir, 5)


# --- ways to stop -----------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(number, tmp_path, monkeypatch, capsys):
    """Wrong implementations: the step lost; a command that does not work when it is typed."""
    config, real, old = grpo(tmp_path, "run", steps=9), RunLog.step, signal.getsignal(number)

    def step(self, n, metrics):
        real(self, n, metrics)
        if n == 4:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "step", step)
        result = train(config)
    assert (result.steps, result.interrupted, result.checkpoint) == (
        4,
        True,
        Path(config.output_dir, "checkpoints/step_4"),
    )
    assert signal.getsignal(number) is old
    told = capsys.readouterr().out
    assert "stopped after step 4 of 9; continue with: fastrl grpo" in told
    command = told.partition("continue with: fastrl ")[2].splitlines()[0]
    assert cli.main(shlex.split(command)) == 0
    straight = grpo(tmp_path, "straight", steps=9)
    train(straight)
    assert_same_run(straight.output_dir, config.output_dir, 9)


def test_a_second_signal_ends_it_at_once():
    with pytest.raises(KeyboardInterrupt), Interrupt() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked(World())
        os.kill(os.getpid(), signal.SIGINT)


def test_one_process_asked_is_all_asked():
    """Wrong implementation: the process that got the signal leaves, and the others wait for it in the next
    sum.
    """

    class Other(World):
        def max(self, *values: float) -> list[float]:
            return [1.0 for _ in values]

    with Interrupt() as stop:
        assert stop.asked(Other()) and not stop.asked(World())


def test_a_time_limit_stops_like_a_signal(tmp_path, monkeypatch):
    """Wrong implementation: the limit is looked at before the first step only."""
    ticks = iter(range(10**6))
    straight, limited = sft(tmp_path, "straight", steps=9), sft(tmp_path, "limited", steps=9, max_seconds=4.5)
    train(straight)
    with monkeypatch.context() as patch:
        patch.setattr(fastrl.run.interrupt, "time", type("Clock", (), {"monotonic": lambda: next(ticks)}))
        done = train(limited)
        assert 0 < done.steps < 9 and done.exit_code == 0, "a limit that was asked for is a normal end"
    assert train(replace(limited, resume=True, max_seconds=0.0)).steps == 9
    assert_same_run(straight.output_dir, limited.output_dir, 9)


def test_stopped_before_the_first_step(tmp_path, monkeypatch, capsys):
    """Wrong implementation: told to resume from a checkpoint that was never written."""
    stop_after(monkeypatch, 0)
    result = train(sft(tmp_path))
    assert (result.steps, result.checkpoint, result.interrupted) == (0, None, True)
    assert (
        "stopped after step 0 of 20; nothing was saved, because no step was done" in capsys.readouterr().out
    )


# --- ways to die ------------------------------------------------------------------------------------
DYING = """
import os, signal, sys
from fastrl import cli
from fastrl.run import checkpoint
real = checkpoint.save_file
def save_file(tensors, path):
    if "step_6" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    real(tensors, path)
checkpoint.save_file = save_file
sys.exit(cli.main(sys.argv[1:]))
"""


def test_kill_nine_in_the_middle_of_a_checkpoint(tmp_path):
    """Wrong implementations: half a checkpoint under its own name; lines of steps that were lost kept in the
    logs.
    """
    straight, killed = (
        sft(tmp_path, name, steps=9, save=Save(every=3), eval=Eval(prompts=4, every=3))
        for name in ("straight", "killed")
    )
    train(replace(straight, output_dir=str(tmp_path / "first"), steps=0))  # writes config.yaml
    args = [
        "sft",
        "--config",
        str(tmp_path / "first/config.yaml"),
        "--steps",
        "9",
        "--output-dir",
        killed.output_dir,
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", DYING, *args], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = Path(killed.output_dir, "checkpoints")
    assert [p.name for p in checkpoint.complete_checkpoints(Path(killed.output_dir))] == ["step_3"]
    assert (kept / ".step_6.partial/model.safetensors").exists() and lines(killed.output_dir)[-1]["step"] == 6
    train(straight)
    assert train(replace(killed, resume=True)).steps == 9
    assert_same_run(straight.output_dir, killed.output_dir, 9)
    assert [p.name for p in sorted(kept.iterdir())] == ["step_6", "step_9"]


def test_dying_in_an_evaluation_costs_no_step_and_no_evaluation(tmp_path, monkeypatch):
    """Wrong implementations: the checkpoint waits for the evaluation; the resumed run leaves it out."""
    straight, dying = (
        sft(tmp_path, name, steps=9, save=Save(every=3), eval=Eval(prompts=4, every=3))
        for name in ("straight", "dying")
    )
    train(straight)

    calls: list[int] = []

    def evaluate(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        real = fastrl.trainer.evaluate
        patch.setattr(fastrl.trainer, "evaluate", evaluate)
        with pytest.raises(MemoryError):
            train(dying)
    assert [p.name for p in checkpoint.complete_checkpoints(Path(dying.output_dir))] == ["step_3"]
    train(replace(dying, resume=True))
    assert_same_run(straight.output_dir, dying.output_dir, 9)


# --- resuming ---------------------------------------------------------------------------------------
def test_a_run_that_goes_on_otherwise_says_so(tmp_path, capsys):
    """Wrong implementations: other options taken without a word, or dropped; words about a run that goes on
    as it was.
    """
    config = sft(tmp_path, steps=2)
    train(config)
    capsys.readouterr()
    train(replace(config, resume=True))
    assert "other options" not in capsys.readouterr().out
    train(replace(config, resume=True, steps=3, micro_tokens=512))
    assert (
        f"resumed with other options: steps 3, which was 2, micro_tokens 512, which was {config.micro_tokens}"
        in capsys.readouterr().out
    )


def test_a_finished_run_can_be_resumed_and_made_longer(tmp_path):
    """Wrong implementations: a finished run does a step more;
    another checkpoint of the same step is written.
    """
    config = sft(tmp_path, steps=4, eval=Eval())
    done = train(config)
    written = done.checkpoint.stat().st_mtime_ns
    again = train(replace(config, resume=True))
    assert (again.steps, again.checkpoint, again.interrupted) == (4, done.checkpoint, False)
    assert done.checkpoint.stat().st_mtime_ns == written and len(lines(config.output_dir)) == 4
    assert train(replace(config, resume=True, steps=6)).steps == 6
    assert [r["step"] for r in lines(config.output_dir)] == [1, 2, 3, 4, 5, 6]


def test_refusals(tmp_path):
    """Wrong implementations: a run overwritten without a word; the checkpoint of another command taken for
    one's own.
    """
    config = sft(tmp_path, steps=1, eval=Eval())
    with pytest.raises(UserError, match=r"--resume: .*run holds no whole checkpoint; start without --resume"):
        train(replace(config, resume=True))
    train(config)
    before = state(tmp_path / "run/checkpoints/step_1")
    with pytest.raises(
        UserError,
        match=r"--output-dir: .*run already holds step_1; continue it with --resume, or name another folder",
    ):
        train(config)
    with pytest.raises(
        UserError,
        match=r"--resume: .*run holds a run of fastrl sft; continue it with that, or name another folder",
    ):
        train(grpo(tmp_path, resume=True))
    after = state(tmp_path / "run/checkpoints/step_1")
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_the_clock_counts_on(tmp_path, monkeypatch):
    """The "time" of metrics.jsonl does not begin again."""
    began = time.monotonic()
    _, resumed = straight_and_resumed(monkeypatch, sft, tmp_path, 2, steps=4, eval=Eval())
    times = [
        json.loads(line)["time"]
        for line in Path(resumed.output_dir, "metrics.jsonl").read_text().splitlines()
    ]
    assert times == sorted(times) and times[-1] <= time.monotonic() - began
