"""Two runs give the same bits, for every command: here, or in another tree.

    FASTRL_BASE=../before pytest tests/run/test_same_bits.py

compares with a checkout of another commit, built: for a change that must not change results.  Bits differ
between machines, so nothing is compared with numbers that are written down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REWARDS, write_model
from safetensors.numpy import load_file

import fastrl.trainer
from fastrl import cli
from fastrl.methods import METHODS

BASE = os.environ.get("FASTRL_BASE")
STEPS = 5 if BASE else 3
RUNS = {
    "sft": "sft",
    "sft_neftune": "sft --neftune-alpha 5 --label-smoothing 0.1",
    "grpo": "grpo --minibatches 2 --refill 1",
    "grpo_kl": "grpo --algorithm gspo --kl-coef 0.1 --correction token_truncate --epochs 2",
    "grpo_carry": "grpo --tail carry --tail-share 0.5",
    "ppo": "ppo --kl-target 0.5 --minibatches 2",
    "ppo_shared": "ppo --critic shared --kl-in loss",
    "dpo": "dpo",
    "kto": "dpo --algorithm kto",
    "reward": "reward --eval.every 2",
    "hybrid_dpo": "hybrid --algorithm grpo_dpo --norms-every 2",
    "hybrid_luffy": "hybrid --algorithm luffy",
    "hybrid_srft": "hybrid --algorithm srft --minibatches 2",
    "hybrid_online": "hybrid --algorithm online_dpo",
    "joint": "joint --reward-every 2 --demonstrations",
}
SHARED = "--model tiny.json --task cards --task-options k=2 --prompts 4 --micro-tokens 200 --optim.lr 1e-2"
SAMPLED = "--group 4 --max-new-tokens 8 --reward rewards.py:digits"
CLOCK = ("time", "eval/time", "perf/")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_model(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    # Drawing the plots takes longer than these runs.
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)
    return tmp_path


def arguments(name: str, output: str) -> list[str]:
    options = f"{RUNS[name]} {SHARED} --steps {STEPS} --eval.prompts 4 --threads 1 --output-dir {output}"
    sampled = RUNS[name].split()[0] in ("grpo", "ppo", "hybrid", "joint")
    return f"{options} {SAMPLED}".split() if sampled else options.split()


def run_base(tree: str, args: list[str]) -> None:
    """The run of another tree, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(tree).resolve()), "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-m", "fastrl", *args], env=environment, check=True)


def left(folder: Path) -> dict[str, object]:
    """What a run leaves behind: metrics without clock times, samples, and the bytes of every tensor."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    samples = folder / "samples.jsonl"
    found: dict[str, object] = {
        "metrics": [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows],
        "samples": samples.read_text() if samples.exists() else None,
    }
    last = folder / "checkpoints" / f"step_{STEPS}"
    for file in sorted(last.rglob("*.safetensors")):
        for key, value in load_file(file).items():
            found[f"{file.relative_to(last)}/{key}"] = (value.shape, value.tobytes())
    return found


def test_every_command_is_run():
    assert {options.split()[0] for options in RUNS.values()} == set(METHODS)


@pytest.mark.parametrize("name", RUNS)
def test_two_runs_leave_the_same_bits(name, folder):
    """Wrong implementations: noise of the global generator; an order that hashing decides; anything of one
    run that the next one sees.
    """
    if BASE:
        run_base(BASE, arguments(name, "first"))
    else:
        assert cli.main(arguments(name, "first")) == 0
    assert cli.main(arguments(name, "second")) == 0

    first, second = left(folder / "first"), left(folder / "second")
    assert first.keys() == second.keys() and len(first) > 4
    assert [key for key in first if first[key] != second[key]] == []
