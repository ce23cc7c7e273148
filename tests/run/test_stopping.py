"""Signals, clocks and lost terminals: nothing is lost without a word, and the exit code tells the truth."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import assert_same_run, lines, sft

import fastrl.trainer
from fastrl import cli
from fastrl.config import Eval, Save
from fastrl.errors import Interrupted, UserError
from fastrl.parallel.world import World
from fastrl.run import checkpoint
from fastrl.run.interrupt import Interrupt, outlasting_terminal
from fastrl.run.log import RunLog
from fastrl.trainer import train


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Drawing the plots takes longer than these runs; whoever starts the tests may have SIGHUP ignored."""
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)


def at_step(patch: pytest.MonkeyPatch, number: int, act) -> None:
    """Call `act` inside step `number`, when its metrics are logged."""
    real = RunLog.step

    def step(self, n, metrics):
        real(self, n, metrics)
        if n == number:
            act()

    patch.setattr(RunLog, "step", step)


def kill(*numbers: int):
    def act():
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


def steps(folder: str) -> list[str]:
    return [path.name for path in checkpoint.complete_checkpoints(Path(folder))]


# --- signals ----------------------------------------------------------------------------------------
def test_a_signal_says_at_once_what_happens_saves_and_gives_its_exit_code(tmp_path, capfd):
    """Wrong implementations: exit code 0, so that `sft && grpo` goes on; silence until the step is over; a
    closed terminal (SIGHUP) that loses the run, or its second SIGHUP that stops at once.
    """
    config = sft(tmp_path, steps=6, eval=Eval())
    told = (
        (
            2,
            (signal.SIGINT,),
            "SIGINT: finishing step 2 of 6, then saving; again stops now and loses all",
        ),
        (
            3,
            (signal.SIGTERM,),
            "SIGTERM: finishing step 3 of 6, then saving; after 300 s, or again, it",
        ),
        (
            4,
            (signal.SIGHUP, signal.SIGHUP),
            "again, it stops now and loses 1 step: the newest checkpoint",
        ),
        (6, (signal.SIGINT,), "SIGINT: finishing step 6 of 6"),
    )
    for step, signals, line in told:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, step, kill(*signals))
            result = train(replace(config, resume=step > 2))
        assert (result.steps, result.exit_code) == (step, 128 + signals[0])
        assert steps(config.output_dir)[-1] == f"step_{step}" and line in capfd.readouterr().err
    straight = sft(tmp_path, "straight", steps=6, eval=Eval())
    assert train(straight).exit_code == 0
    assert_same_run(straight.output_dir, config.output_dir, 6)


def test_a_second_signal_stops_now_and_says_what_is_lost(tmp_path, capfd, monkeypatch):
    """Wrong implementations: a lock left behind; no word of the checkpoint that there is."""
    config = sft(tmp_path, steps=6, eval=Eval(), save=Save(every=2))
    at_step(monkeypatch, 4, kill(signal.SIGHUP, signal.SIGTERM, signal.SIGTERM))
    with pytest.raises(Interrupted) as stopped:
        train(config)
    assert stopped.value.number == signal.SIGTERM and steps(config.output_dir) == ["step_2"]
    told = capfd.readouterr()
    assert "SIGTERM: stopping now, without 2 steps: the newest checkpoint is step_2" in told.err
    assert "stopped in step 4, without 2 steps" in told.out and "continue with: fastrl sft" in told.out
    assert not list(Path(config.output_dir).glob(".*lock*"))


def test_a_step_that_hangs_is_left_after_its_grace():
    """Wrong implementation: a reward that hangs holds the run until it is killed with -9."""
    with pytest.raises(Interrupted), Interrupt(grace=0.05):
        os.kill(os.getpid(), signal.SIGTERM)
        assert not threading.Event().wait(20), "interrupted"
        pytest.fail("the step went on")


def test_the_copy_of_a_signal_that_torchrun_hands_on_is_not_a_second_one():
    world = World(1, 2)
    with Interrupt(world=world) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == 0


def test_nohup_stays_in_force():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupt() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked(World())


def test_every_command_ends_with_the_number_of_its_signal(monkeypatch, capsys):
    """Wrong implementation: killed without closing its files and its lock."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "_dispatch", lambda args: kill(signal.SIGTERM)())
    assert cli.main(["env"]) == 143 and capsys.readouterr().err == "fastrl: ended by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_step_that_fails_keeps_what_there_is(tmp_path, monkeypatch, capsys):
    """Wrong implementations: exit code 0; metrics of the steps before it lost; no word of how to go on."""
    config = sft(tmp_path, steps=6, eval=Eval(), save=Save(every=2))
    monkeypatch.setitem(cli.COMMANDS, "env", replace(cli.COMMANDS["env"], target="fastrl.planted:run"))
    monkeypatch.setitem(sys.modules, "fastrl.planted", SimpleNamespace(run=lambda options: train(config)))
    at_step(monkeypatch, 4, lambda: 1 / 0)
    assert cli.main(["env"]) == 1 and steps(config.output_dir) == ["step_2"]
    told = capsys.readouterr()
    assert "stopped in step 4, without 2 steps: the newest checkpoint is step_2; continue with" in told.out
    assert "internal error: ZeroDivisionError" in told.err
    assert [row["step"] for row in lines(config.output_dir)] == [1, 2, 3, 4]
    assert not list(Path(config.output_dir).glob(".*lock*"))


# --- the clock --------------------------------------------------------------------------------------
@pytest.mark.parametrize(("save", "left"), [(Save(every=2), ["step_4", "step_6"]), (Save(), ["step_6"])])
def test_a_checkpoint_of_the_clock_is_replaced_by_the_next(save, left, tmp_path, monkeypatch):
    """Wrong implementations: no checkpoint before the last step by default; one more for every interval
    kept; the checkpoints that were asked for crowded out; other bits.
    """
    written = []
    real = checkpoint.save

    def saving(run, step, *args, **options):
        path = real(run, step, *args, **options)
        written.append(steps(str(run)))
        return path

    straight = sft(tmp_path, "straight", steps=6, eval=Eval(), save=replace(save, minutes=0))
    train(straight)
    monkeypatch.setattr(checkpoint, "save", saving)
    often = sft(tmp_path, "often", steps=6, eval=Eval(), save=replace(save, minutes=1e-9))
    train(often)
    assert len(written) == 6 and all(f"step_{n}" in found for n, found in enumerate(written, 1))
    assert steps(often.output_dir) == left and all(len(found) <= 3 for found in written)
    assert_same_run(straight.output_dir, often.output_dir, 6)


def test_the_first_process_decides_when_to_save():
    """Wrong implementation: each process looks at its own clock, so that one waits in a barrier alone."""
    asked = []

    class Other(World):
        def max(self, *values: float) -> list[float]:
            asked.append(values)
            return list(values)

    for rank, due in ((0, True), (1, False)):
        with Interrupt(save_seconds=1e-9) as stop:
            assert not stop.asked(Other(rank, 2)) and stop.save_due is due


# --- terminals, folders and disks that go away --------------------------------------------------------
def test_output_that_nobody_reads_stops_the_run_and_loses_nothing(tmp_path, monkeypatch):
    """Wrong implementations: BrokenPipeError in the middle of a step; an exit code of 0."""
    config = sft(tmp_path, steps=6, eval=Eval())
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        at_step(patch, 2, lambda: (os.close(reader), print("more", flush=True)))
        result = train(config)
    assert result.exit_code == 141 and steps(config.output_dir) == ["step_2"]


def test_a_closed_terminal_is_silence(monkeypatch):
    """Wrong implementation: a detached run dies of its first line after the terminal closed."""

    class Closed:
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def fileno(self) -> int:
            return spare

    spare = os.open(os.devnull, os.O_WRONLY)
    monkeypatch.setattr(sys, "stdout", Closed())
    with Interrupt() as stop, outlasting_terminal(stop):
        print("a step")
        assert not stop.asked(World())
    os.close(spare)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own
def test_a_folder_that_is_removed_ends_the_run_with_a_word(tmp_path, monkeypatch):
    """Wrong implementation: the run goes on writing into files that have no name."""
    config = sft(tmp_path, steps=6, eval=Eval())
    at_step(monkeypatch, 2, lambda: os.rename(config.output_dir, tmp_path / "moved"))
    with pytest.raises(UserError, match=r"metrics\.jsonl: removed or replaced while the run was writing"):
        train(config)


def test_a_full_disk_is_named_with_the_bytes(tmp_path, monkeypatch):
    """Wrong implementations: `[Errno 28]` without a path; a leftover that keeps the disk full."""
    config = sft(tmp_path, steps=4, eval=Eval(), save=Save(every=2))

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    at_step(monkeypatch, 3, lambda: monkeypatch.setattr(checkpoint, "save_file", full))
    with pytest.raises(UserError, match=r"step_4: could not .*No space left.*it takes about [\d,]{6,} bytes"):
        train(config)
    kept = Path(config.output_dir, "checkpoints")
    assert [path.name for path in kept.iterdir()] == ["step_2"]
    (kept / ".step_3.partial").mkdir()  # of a crash
    monkeypatch.undo()
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)
    train(replace(config, resume=True, steps=2))
    assert [path.name for path in kept.iterdir()] == ["step_2"] and len(lines(config.output_dir)) == 2
    with pytest.raises(UserError, match=r"report: 9 bytes could not be written \(No such file"):
        fastrl.run.log.replace_text(tmp_path / "nowhere" / "report", "ninebytes")
