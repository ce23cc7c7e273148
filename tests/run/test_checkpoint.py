"""Checkpoints are whole or not there, at whatever moment a run dies, and say which file is missing or
damaged.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from runs import decoder, tokenizer
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrl.errors import UserError
from fastrl.run import checkpoint

STATE = {"exp_avg.w": torch.arange(6.0).view(2, 3), "step.w": torch.tensor(3.0)}


def save(run: Path, step: int, keep: int = 0) -> Path:
    return checkpoint.save(
        run,
        step,
        decoder(),
        tokenizer(),
        {k: v + step for k, v in STATE.items()},
        {"version": 2 * step},
        keep=keep,
    )


def steps(run: Path) -> list[int]:
    return [int(p.name.removeprefix("step_")) for p in checkpoint.complete_checkpoints(run)]


def test_a_checkpoint_is_a_hugging_face_folder_and_the_trainers_state(tmp_path):
    path = save(tmp_path, 7)
    state, meta = checkpoint.load(path)
    assert meta == {"step": 7, "version": 14}
    assert state.keys() == STATE.keys() and all(torch.equal(state[k], v + 7) for k, v in STATE.items())
    model, words = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    prompt = words("a:7K>3|", return_tensors="pt").input_ids
    ours = decoder()
    with torch.no_grad():
        assert torch.allclose(model(prompt).logits[0], ours(prompt[0]) @ ours.head_weight.T, atol=1e-4)


@pytest.mark.parametrize(("keep", "left"), [(0, [8, 9, 10, 11]), (2, [10, 11]), (1, [11])])
def test_the_newest_are_kept(tmp_path, keep, left):
    """Wrong implementations: names sorted as text, where step_10 comes before step_9; the oldest kept; other
    folders counted.
    """
    (tmp_path / "checkpoints" / "step_99.bak").mkdir(parents=True)
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep=keep)
    assert steps(tmp_path) == left
    assert (tmp_path / "checkpoints" / "step_99.bak").exists() and not list(tmp_path.glob("checkpoints/.*"))


def test_a_temporary_one_lasts_until_the_next_and_state_is_exact(tmp_path):
    """Wrong implementations: the newest removes itself for being temporary; state in a shorter type."""
    state = {"w": torch.tensor([1 / 3, 1e6 + 1, 1e-30])}
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, decoder(), tokenizer(), state, {}, temporary=True)
        assert steps(tmp_path) == [step]
        found = checkpoint.load(path)[0]["w"]
        assert found.dtype == torch.float32 and torch.equal(found, state["w"])
    save(tmp_path, 3)
    assert steps(tmp_path) == [3]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "checkpoints/step_3/left_over").touch()
    assert not (save(tmp_path, 3) / "left_over").exists() and steps(tmp_path) == [3]


# --- dying ------------------------------------------------------------------------------------------
class Killed(BaseException):
    """Stands in for SIGKILL: nothing of the program runs after it."""


FALLIBLE = (
    (checkpoint, "save_file"),
    (os, "rename"),
    (os, "fsync"),
    (os, "unlink"),
    (os, "rmdir"),
    (Path, "write_text"),
    (Path, "mkdir"),
)


def die_at(patch: pytest.MonkeyPatch, moment: int) -> list[str]:
    """Die just before the moment-th call that changes the disk (0: never).  Returns the list that the calls
    are written to.
    """
    calls: list[str] = []

    def dying(name, real):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == moment:
                raise Killed
            return real(*args, **kwargs)

        return call

    for owner, name in FALLIBLE:
        patch.setattr(owner, name, dying(name, getattr(owner, name)))
    return calls


def test_death_at_any_moment_leaves_whole_checkpoints(tmp_path, monkeypatch):
    """Wrong implementations: written under its own name; removed in place, so that half of one is left under
    its name; the old one removed before the new one is there.
    """
    save(tmp_path / "start", 1)
    with monkeypatch.context() as patch:
        shutil.copytree(tmp_path / "start", tmp_path / "0")
        moments = len(_counted(patch, tmp_path / "0"))
    assert moments > 25
    for moment in range(1, moments + 1):
        run = tmp_path / str(moment)
        shutil.copytree(tmp_path / "start", run)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_at(patch, moment)
            save(run, 2, keep=1)
        assert steps(run) in ([1], [1, 2], [2])
        complete = checkpoint.complete_checkpoints(run)
        assert [checkpoint.load(path)[1]["step"] for path in complete] == steps(run)
        save(run, 3, keep=1)
        assert steps(run) == [3] and [p.name for p in (run / "checkpoints").iterdir()] == ["step_3"], (
            "what was left behind is gone"
        )


def _counted(patch: pytest.MonkeyPatch, run: Path) -> list[str]:
    calls = die_at(patch, 0)
    save(run, 2, keep=1)
    return calls


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path, monkeypatch, error):
    """Wrong implementations: safetensors' own kind of error goes through; what was written stays and keeps
    the disk full.
    """
    save(tmp_path, 1)

    def full(*args):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        UserError,
        match=r"checkpoint .*step_2: could not be written \(.*No space left.*\); "
        r"earlier checkpoints are untouched",
    ):
        save(tmp_path, 2, keep=1)
    assert steps(tmp_path) == [1] and checkpoint.load(checkpoint.complete_checkpoints(tmp_path)[0])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


# --- damage -----------------------------------------------------------------------------------------
def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(40))


def delete(path: Path) -> None:
    path.unlink()


def garble(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("model.safetensors", cut, r"model.safetensors has \d+ bytes, expected \d+"),
        ("trainer.safetensors", cut, r"trainer.safetensors has \d+ bytes, expected \d+"),
        ("model.safetensors", grow, r"model.safetensors has \d+ bytes, expected \d+"),
        ("trainer.safetensors", delete, "trainer.safetensors is missing"),
        ("trainer.safetensors", garble, "trainer.safetensors is damaged"),
        ("tokenizer.json", delete, "tokenizer.json is missing"),
        ("config.json", cut, "config.json has"),
        ("trainer.json", delete, "trainer.json is missing or damaged"),
        ("trainer.json", cut, "trainer.json is missing or damaged"),
        ("trainer.json", garble, "trainer.json is missing or damaged"),
    ],
)
def test_damage_is_named(tmp_path, file, damage, said):
    path = save(tmp_path, 4)
    damage(path / file)
    with pytest.raises(
        UserError, match=f"checkpoint .*/step_4: {said}.*; remove the folder to use an older checkpoint"
    ):
        checkpoint.load(path)


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}", '{"files": 3}'])
def test_a_trainer_json_of_another_form(tmp_path, text):
    path = save(tmp_path, 4)
    (path / "trainer.json").write_text(text)
    with pytest.raises(UserError, match=r"trainer\.json is missing or damaged"):
        checkpoint.load(path)
