"""What a run and the commands say and keep of the kernels, on a simulated CUDA machine; and that a preferred
backend lets whole runs work.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fake_device import canned, fake_device
from runs import grpo, sft, write

import fastrl.trainer
from fastrl import cli, ops
from fastrl.config import Eval
from fastrl.kernels._verdicts.first_use import put
from fastrl.kernels._verdicts.table import TABLE, Verdict
from fastrl.run import environment
from fastrl.trainer import train

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU"
)
SHORT = {"steps": 1, "eval": Eval(prompts=0)}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing the plots takes longer than these runs."""
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)


@contextmanager
def passing(folder: Path, *ops: str) -> Iterator[None]:
    """A machine on which the kernels of these ops pass at once."""
    with fake_device(folder, *ops, start=canned(folder / "log")):
        yield


def test_a_run_says_and_keeps_what_it_ran(tmp_path, capsys):
    """Wrong: a checkpoint that does not know its kernels; a resume on others without a word; kernels that are
    named and not run.
    """
    config = sft(tmp_path, **SHORT)
    with passing(tmp_path, "swiglu", "rms_norm"):
        train(config)
        known = TABLE.verdicts.values()
        assert any(len(v.variants) > 1 for v in known), "their first launches were tried"
    said = capsys.readouterr().out
    assert "kernels: 2 checked on NVIDIA H200 (triton " in said and "rms_norm triton, swiglu triton" in said
    run = Path(config.output_dir)
    kept = json.loads((run / "checkpoints" / "step_1" / "trainer.json").read_text())["kernels"]
    assert kept["swiglu"] == "triton" and kept["rope"] == "cpu"
    text = (run / "environment.txt").read_text()
    assert "kernels on cuda:0" in text and "NVIDIA H200, driver 580.159" in text

    train(sft(tmp_path, resume=True, **SHORT | {"steps": 2}))
    said = capsys.readouterr().out
    changed = "rms_norm cpu, which was triton, swiglu cpu, which was triton"
    assert f"resumed with other kernels, which changes bits: {changed}" in said
    train(sft(tmp_path, resume=True, **SHORT | {"steps": 3}))
    assert "other kernels" not in capsys.readouterr().out


def test_a_failure_stands_in_the_environment(tmp_path):
    with passing(tmp_path, "gae", "swiglu"):
        put(
            ("gae", "triton", torch.float32, None),
            Verdict(False, "forward: an illegal address", date="2026-12-01"),
        )
        text = environment.environment_text()
        assert "gae" in text and "triton FAILED 2026-12-01 (float32): forward: an illegal address" in text
        assert "not checked: about a minute at first use, or now: fastrl check" in text
        assert not (tmp_path / "log").exists(), "it only shows"


def test_check_says_where_there_is_no_gpu(capsys):
    assert cli.main(["check"]) == 0
    assert capsys.readouterr().out == (
        "fastrl check: this machine has no CUDA device; there are no kernels to check\n"
    )


def test_check_prints_every_kernel_and_its_exit_status(tmp_path, capsys):
    """Wrong: an exit status that a script cannot use; verdicts of yesterday."""
    with passing(tmp_path, "gae", "swiglu"):
        assert cli.main(["check"]) == 0
        assert cli.main(["check"]) == 0
        shown = capsys.readouterr().out
        (line,) = {x for x in shown.splitlines() if x.startswith("swiglu ")}
        assert line.endswith("cases, worst 0.5 of budget")
        assert (tmp_path / "log").read_text().count("started") == 2, "it asks again"
    with (
        fake_device(tmp_path, "gae", "swiglu", start=_failing(tmp_path)),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        assert cli.main(["check"]) == 1
    assert "FAILED" in capsys.readouterr().out


def _failing(folder: Path):
    """A child whose first case has a wrong value."""
    wrong = canned(folder / "log")

    def start(command, changes):
        return wrong(command, {**changes, "FASTRL_FAKE_REASON": "error 1.0 against float64, allowed 0.1"})

    return start


# --- a preferred backend ----------------------------------------------------------------------------
@pytest.mark.parametrize("command", ["sft", "grpo", "generate"])
def test_whole_runs_work_with_triton_preferred(command, tmp_path, monkeypatch, capsys):
    """Wrong: attention or need, which have no Triton kernel, ends the run; every linear layer becomes the
    batch-invariant product.
    """
    monkeypatch.setenv("FASTRL_BACKEND", "triton")
    called = []
    linear = ops.linear.__globals__["forward_op"]
    monkeypatch.setitem(ops.linear.__globals__, "forward_op", lambda *a: called.append(a) or linear(*a))
    if command == "generate":
        model = str(tmp_path / "run" / "checkpoints" / "step_1")
        monkeypatch.setenv("FASTRL_BACKEND", "auto")
        train(sft(tmp_path, **SHORT))
        monkeypatch.setenv("FASTRL_BACKEND", "triton")
        prompts = write(tmp_path / "p.txt", "7+\nK\n")
        arguments = ["--model", model, "--prompts", prompts, "--max-new-tokens", "3", "--n", "1"]
        assert cli.main(["generate", *arguments, "--output", str(tmp_path / "out.jsonl")]) == 0
        assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    else:
        make = {"sft": sft, "grpo": grpo}[command]
        few = {"prompts": 2, "group": 2, "max_new_tokens": 3} if command == "grpo" else {"prompts": 2}
        assert train(make(tmp_path, **SHORT | few)).steps == 1
    assert ops.backend("cpu")["swiglu"] == "triton" and ops.backend("cpu")["linear"] != "triton"
    assert called == []
