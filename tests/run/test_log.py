"""The log of a run: what is on disk after any way a run can end, and what a person sees."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastrl.run.log import RunLog, keep_until


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_clock(path: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if not k.startswith(("time", "perf/", "eval/time"))}
        for row in rows(path)
    ]


def screen(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def record(log: RunLog, first: int, last: int) -> None:
    """What a trainer writes between two steps, an evaluation at every fifth among it."""
    for step in range(first, last + 1):
        log.step(step, {"loss": 1 / step, "time/step": 0.1, "perf/tokens_per_second": 5.0 * step})
        log.samples(step, [{"prompt": "p", "completion": f"c{step}", "reward": 0.5}])
        if step % 5 == 0:
            log.eval(step, {"accuracy": step / 100, "eval/time": 0.3})


def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path):
    """Wrong implementations: appending after a crash (steps 11 and 12 twice), dropping the evaluation of the
    checkpoint's own step.
    """
    with RunLog(tmp_path / "whole", 20, quiet=True) as log:
        record(log, 1, 20)
    with RunLog(tmp_path / "parts", 20, quiet=True) as log:
        record(log, 1, 12)
    for file in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / "parts" / file).open("a") as f:
            f.write('{"step": 13, "lo')  # the write that the crash cut off
    with RunLog(tmp_path / "parts", 20, resume_step=10, quiet=True) as log:
        record(log, 11, 20)
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert without_clock(tmp_path / "whole" / file) == without_clock(tmp_path / "parts" / file)
    assert not (tmp_path / "parts" / "previous-1").exists()


def test_time_goes_on_over_a_resume(tmp_path):
    """Wrong implementation: a clock that starts again at zero, and with it every curve over time."""
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "time": 100.0}\n{"step": 2, "time": 200.0}\n{"step": 3, "time": 300.0}\n'
    )
    with RunLog(tmp_path, 5, resume_step=2, quiet=True) as log:
        log.step(3, {})
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert 200.0 <= rows(tmp_path / "metrics.jsonl")[-1]["time"] < 260.0


def test_keep_until_replaces_the_file_in_one_move(tmp_path, monkeypatch):
    """Wrong implementation: truncate and rewrite in place, which loses the whole file to a crash in
    between.
    """
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def crash(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", crash)
        keep_until(path, 1)
    assert [row["step"] for row in rows(path)] == [1, 2]
    assert keep_until(path, 1) == 0.0
    assert [row["step"] for row in rows(path)] == [1]
    assert keep_until(tmp_path / "absent.jsonl", 1) == 0.0


def test_a_new_run_never_overwrites_an_earlier_one(tmp_path):
    """Wrong implementation: opening metrics.jsonl with "w", or appending one run to another."""
    (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
    for value in (1.0, 2.0, 3.0):
        with RunLog(tmp_path, 1, quiet=True, texts={"config.yaml": f"loss: {value}\n"}) as log:
            log.step(1, {"loss": value})
    found = {
        folder: rows(tmp_path / folder / "metrics.jsonl")[0]["loss"]
        for folder in (".", "previous-1", "previous-2")
    }
    assert found == {".": 3.0, "previous-1": 1.0, "previous-2": 2.0}
    assert (tmp_path / "previous-2" / "config.yaml").read_text() == "loss: 2.0\n"
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    assert (tmp_path / "checkpoints" / "step_1").is_dir(), "a checkpoint may be what the new run starts from"


def test_numbers_that_json_has_not_become_null(tmp_path):
    """Wrong implementation: json.dumps writes NaN, which no JSON reader but Python's takes."""
    with RunLog(tmp_path, 1, quiet=True) as log:
        log.step(1, {"loss": math.nan, "kl": math.inf, "reward": 0.5})
        log.samples(1, [{"prompt": "p", "reward": math.nan}])
    text = (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "samples.jsonl").read_text()
    parsed = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the file"))
        for line in text.splitlines()
    ]
    assert (parsed[0]["loss"], parsed[0]["kl"], parsed[0]["reward"], parsed[1]["reward"]) == (
        None,
        None,
        0.5,
        None,
    )
    assert list(parsed[0])[:2] == ["step", "time"]


def test_a_line_is_on_disk_when_the_step_is_over(tmp_path):
    """Wrong implementation: a buffered file, whose last lines die with the process."""
    with RunLog(tmp_path, 2, quiet=True) as log:
        log.step(1, {"loss": 1.0})
        log.samples(1, [{"completion": "\ud800 \u2028 é"}])
        assert rows(tmp_path / "metrics.jsonl")[0]["loss"] == 1.0
        assert rows(tmp_path / "samples.jsonl")[0] == {"step": 1, "completion": "\ud800 \u2028 é"}


def test_a_tensor_is_refused_by_name(tmp_path):
    """Wrong implementation: float(tensor), a hidden wait for the device at every metric."""
    import torch

    with (
        RunLog(tmp_path, 1, quiet=True) as log,
        pytest.raises(TypeError, match=r"metric 'loss': expected a Python number, got Tensor"),
    ):
        log.step(1, {"loss": torch.tensor(1.0)})


def test_tensorboard_gets_every_scalar(tmp_path):
    with RunLog(tmp_path, 3, quiet=True) as log:
        record(log, 1, 5)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("loss")] == [
        (s, round(1 / s, 4)) for s in range(1, 6)
    ]
    assert [e.step for e in events.Scalars("eval/accuracy")] == [5]


def test_only_the_first_rank_writes(tmp_path):
    with RunLog(tmp_path / "run", 5, enabled=False, resume_step=1) as log:
        record(log, 1, 5)
        log.message("hello")
    assert not (tmp_path / "run").exists()


def test_plain_lines_are_few_but_always_the_first_and_the_last(tmp_path):
    """Wrong implementation: a line per step (a thousand of them here), or none after the last multiple."""
    console = screen()
    with RunLog(tmp_path, 1003, name="sft", console=console) as log:
        for step in range(1, 1004):
            log.step(step, {"loss": 2.0, "accuracy": 0.5, "perf/tokens_per_second": 12345.6})
        log.message("done [bold]")
    told = console.file.getvalue().splitlines()
    assert told[0].startswith("sft step 1/1003  loss 2  accuracy 0.500  tok/s 12,346")
    assert told[-2].startswith("sft step 1003/1003")
    assert told[-1] == "done [bold]"
    assert 15 <= len(told) <= 30


def test_an_evaluation_is_told_with_its_interval(tmp_path):
    console = screen()
    with RunLog(tmp_path, 5, console=console) as log:
        log.eval(
            0,
            {
                "eval/accuracy_greedy": 0.5,
                "accuracy_greedy_lo": 0.4,
                "accuracy_greedy_hi": 0.61,
                "eval/time": 2.0,
            },
        )
    assert console.file.getvalue() == "grpo eval at step 0  accuracy_greedy 0.5 [0.4, 0.61]\n"
    assert rows(tmp_path / "metrics.jsonl")[0]["eval/accuracy_greedy_lo"] == 0.4


def test_a_terminal_shows_a_bar_and_messages_above_it(tmp_path):
    console = screen(terminal=True)
    with RunLog(tmp_path, 4, console=console, resume_step=2) as log:
        log.step(3, {"reward": 0.25, "loss": 0.125, "perf/tokens_per_second": 1000.0})
        log.message("saved")
    told = console.file.getvalue()
    assert all(part in told for part in ("3/4", "reward 0.250", "tok/s 1,000", "ETA", "saved"))


def test_quiet_shows_nothing(tmp_path, capsys):
    with RunLog(tmp_path, 2, quiet=True) as log:
        record(log, 1, 5)
        log.message("hello")
    told = capsys.readouterr()
    assert told.out + told.err == ""


def test_whatever_a_function_logs_fits_a_line(tmp_path):
    """Wrong implementations: an internal error for NaN within a list, a key that is no text, or an object."""
    values = [[math.nan, 1.5], {1: (2, math.inf)}, np.float32(0.5), torch.tensor([1, 2]), 10**5000, {3}]
    loop: list[object] = []
    loop.append(loop)
    with RunLog(tmp_path, 1, quiet=True) as log:
        log.samples(1, [{"prompt": "p", "logged": value} for value in [*values, loop]])
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    kept = [row["logged"] for row in rows]
    assert kept[:4] == [[None, 1.5], {"1": [2, None]}, 0.5, [1, 2]]
    assert "int" in kept[4] and kept[5] == "{3}" and "[[" in json.dumps(kept[6])
