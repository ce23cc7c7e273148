"""Two runs never write to one place, and a lock that a killed process left behind stops nobody."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from runs import decoder, lines, sft, tokenizer

import fastrl.trainer
from fastrl import cli
from fastrl.config import Eval, Grpo
from fastrl.errors import UserError
from fastrl.parallel.world import World
from fastrl.run.folder import link_latest, run_folder
from fastrl.run.lock import IN_FOLDER, Holder, claimed
from fastrl.trainer import train


def plant(folder: Path, **changes: object) -> Path:
    """The lock of another process."""
    lock = folder / IN_FOLDER
    folder.mkdir(exist_ok=True)
    lock.write_text(json.dumps(asdict(Holder.this_process()) | changes))
    return lock


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error, claimed(folder, "--output-dir", folder=True):
        pass
    return str(error.value)


def test_a_second_writer_is_told_who_holds_the_place(tmp_path):
    """Wrong implementations: the lock kept after the first is done; released by the one that was refused."""
    folder = tmp_path / "new" / "run"
    with claimed(folder, "--output-dir", folder=True):
        for _ in range(2):
            told = refused(folder)
            assert f"--output-dir: {folder} is in use by process {os.getpid()} on" in told
            assert "wait for it, stop it, or name another" in told
        (folder / "kept").touch()
    with claimed(folder, "--output-dir", folder=True):
        pass
    assert [p.name for p in folder.iterdir()] == ["kept"]
    with claimed(tmp_path / "gone" / "run", "--output-dir", folder=True):
        pass
    assert not (tmp_path / "gone").exists(), "an empty folder is not left behind"


def test_stale_locks_are_recognised_and_foreign_ones_are_not(tmp_path, capsys):
    """Wrong implementations: a killed run locks its folder for ever; a number that the kernel has given to
    another process; a zombie taken for alive; a run on another machine taken for dead.
    """
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    child.stdout.read()  # it has ended, but nobody has waited for it
    ours = Holder.this_process()
    stale = (
        {"pid": child.pid},
        {"pid": 2**22 + 1},
        {"started": ours.started - 1},
        {"boot": "another"},
    )
    for number, changes in enumerate(stale):
        folder = tmp_path / str(number)
        plant(folder, **changes)
        with claimed(folder, "--output-dir", folder=True):
            assert "which is gone; this run takes over" in capsys.readouterr().err
            refused(folder)
    child.wait()

    for changes in ({"host": "elsewhere"}, {"namespace": "pid:[1]"}):
        lock = plant(tmp_path / "foreign", **changes)
        assert f"cannot be seen from here; if it has ended, delete {lock}" in refused(lock.parent)
    lock.write_text("{")
    assert f"according to {lock}, which cannot be read; delete that file" in refused(lock.parent)


def test_every_command_that_writes_asks(tmp_path, capsys, monkeypatch):
    """Wrong implementations: a lock for training alone; the second run's files written before it is told."""
    config = sft(tmp_path, steps=1, eval=Eval())
    plant(Path(config.output_dir))
    with pytest.raises(UserError, match=r"--output-dir: .* is in use by process"):
        train(config)
    assert [p.name for p in Path(config.output_dir).iterdir()] == [IN_FOLDER]
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=f"--output-dir: expected a folder, got {file}"):
        train(replace(config, output_dir=str(file)))

    with pytest.raises(UserError, match=r"--output-dir: /proc/run cannot be written \(No such file"):
        train(replace(config, output_dir="/proc/run"))

    model, out = str(tmp_path / "model"), tmp_path / "out.json"
    decoder().save_pretrained(model)
    tokenizer().save_pretrained(model)
    (tmp_path / "p.txt").write_text("a\n")
    stages = f"output_dir: {tmp_path}/pipe\nstages: [sft: {{model: {model}, task: cards, steps: 1}}]\n"
    (tmp_path / "pipe.yaml").write_text(stages)
    with claimed(out, "x"), claimed(tmp_path / "pipe", "x", folder=True):
        for args in (
            ["generate", "--model", model, "--prompts", f"{tmp_path}/p.txt", "--output", str(out)],
            ["eval", "--model", model, "--task", "cards", "--output", str(out)],
            ["run", str(tmp_path / "pipe.yaml")],
            ["bench", "gae", "--quick", "--output", str(out)],
        ):
            assert cli.main(args) == 1
            assert f"is in use by process {os.getpid()} on" in capsys.readouterr().err, args
    assert not out.exists() and not list(tmp_path.glob("*.lock"))


def test_a_run_that_names_no_folder_gets_one(tmp_path, monkeypatch):
    """Wrong implementations: a newcomer's second run is an error, or overwrites the first; --resume begins
    anew, or continues another command's run; two runs that begin together share a folder.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)
    config = replace(sft(tmp_path, steps=2, eval=Eval()), output_dir="runs/latest")
    with pytest.raises(UserError, match=r"--resume: runs holds no run of fastrl sft; start without"):
        train(replace(config, resume=True))
    assert [train(config).folder, train(replace(config, seed=1)).folder] == ["runs/sft-1", "runs/sft-2"]
    assert os.readlink("runs/latest") == "sft-2"
    with run_folder(Grpo(model="m"), World()) as begun, run_folder(config, World()) as other:
        assert (begun.output_dir, other.output_dir) == ("runs/grpo-1", "runs/sft-3")
        assert link_latest(begun.output_dir) == "" and os.readlink("runs/latest") == "grpo-1"
    assert sorted(os.listdir("runs")) == ["latest", "sft-1", "sft-2"]
    again = train(replace(config, resume=True, steps=3, seed=1))
    assert (again.folder, again.steps) == ("runs/sft-2", 3) and len(lines("runs/latest")) == 3
    assert re.search("output_dir: runs/sft-2\n", Path("runs/latest/config.yaml").read_text())
    assert link_latest("runs/named") == "" and link_latest("elsewhere/sft-7") == ""
