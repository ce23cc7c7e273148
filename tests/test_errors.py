"""What a user can get wrong, at the command line: one line that says where and what to do, an exit code, no
traceback, nothing lost.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import REWARDS, sft, tokenizer, write_model

import fastrl.trainer
from fastrl import cli
from fastrl.config import Eval, Save
from fastrl.errors import UserError, choose, require
from fastrl.trainer import train

BAD_REWARDS = """
def raises(completions, **columns):
    return [1 / (i - 2) for i, _ in enumerate(completions)]

def too_few(completions, **columns):
    return [0.0 for _ in completions[1:]]

def words(completions, **columns):
    return ["good" for _ in completions]

def wants(completions, answer):
    return [0.0 for _ in completions]
"""
SILENT = """
from fastrl.tasks import Cards, Example

class Silent(Cards):
    __slots__ = ()

    def example(self, split, index):
        return Example(prompt="7")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files that are fine, files that are not, and a finished run."""
    it = tmp_path_factory.mktemp("errors")
    write_model(it)
    (it / "rewards.py").write_text(REWARDS)
    (it / "bad_rewards.py").write_text(BAD_REWARDS)
    (it / "silent.py").write_text(SILENT)
    (it / "good.jsonl").write_text('{"prompt": "7", "completion": "3"}\n')
    (it / "broken.jsonl").write_text('{"prompt": "7", "completion": "3"}\n{"prompt": "7", "compl\n')
    (it / "column.jsonl").write_text('{"prompt": "7", "completion": "3"}\n{"prompt": "7", "answer": "3"}\n')
    (it / "long.jsonl").write_text('{"prompt": "7"}\n{"prompt": "' + "7" * 60 + '"}\n')
    (it / "key.yaml").write_text("model: m\noptim: {lr: 1.0e-3}\nsteps: 3\nmicro_token: 9\n")
    (it / "value.yaml").write_text("model: m\nsteps: many\n")
    (it / "empty").mkdir()
    tokenizer().save_pretrained(it / "bad_tokenizer")
    (it / "bad_tokenizer/tokenizer.json").write_text("{")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastrl.trainer.report, "build", lambda run: None)
        train(sft(it, "done", steps=2, save=Save(every=1), eval=Eval()))
    return it


CARDS = "--model tiny.json --task cards --task-options k=2"
SFT, GRPO = f"sft {CARDS}", f"grpo --max-new-tokens 4 {CARDS}"
MISTAKES = {  # what it is about: the command, the exit code, what is said
    "a malformed dataset line": (
        "sft --model tiny.json --task cards --dataset broken.jsonl",
        1,
        r"broken\.jsonl:2: expected a JSON object, got .* at column \d+\)",
    ),
    "a line without its columns": (
        "sft --model tiny.json --task cards --dataset column.jsonl",
        1,
        r"column\.jsonl:2: expected the columns prompt \+ completion",
    ),
    "a column that is not there": (
        f"{SFT} --dataset good.jsonl --columns question=prompt",
        1,
        r"good\.jsonl:1: expected a column 'question'",
    ),
    "an unknown key": (
        "sft --config key.yaml",
        2,
        r"key\.yaml: unknown key 'micro_token'; did you mean 'micro_tokens'\?",
    ),
    "a value of the wrong type": (
        "sft --config value.yaml",
        2,
        r"value\.yaml: steps: expected int, got 'many' \(str\)",
    ),
    "an unknown option": (
        "sft --model tiny.json --stps 3",
        2,
        r"unknown option --stps; did you mean --steps\?",
    ),
    "a missing dataset": (
        f"{SFT} --dataset none.jsonl",
        1,
        r"dataset none\.jsonl: no such file \(looked in .*\)",
    ),
    "a missing config": ("sft --config none.yaml", 1, r"none\.yaml: No such file or directory"),
    "a missing model": (
        "sft --model none --task cards",
        1,
        r"model: expected a Hugging Face folder, .* got 'none', which is not there",
    ),
    "a folder that is no model": (
        "sft --model empty --task cards",
        1,
        r"empty: expected a Hugging Face model folder with a config\.json",
    ),
    "a missing reward file": (f"{GRPO} --reward none.py:fn", 1, r"--reward: no file none\.py"),
    "a missing reward function": (
        f"{GRPO} --reward rewards.py:digit",
        1,
        r"--reward: rewards\.py defines no 'digit'; did you mean 'digits'\?",
    ),
    "a reward that raises": (
        f"{GRPO} --reward bad_rewards.py:raises",
        1,
        r"reward raises raised ZeroDivisionError: .*\n  at .*bad_rewards\.py:3 in .*",
    ),
    "too few rewards": (
        f"{GRPO} --reward bad_rewards.py:too_few",
        1,
        r"reward too_few \(.*bad_rewards\.py:5\): expected 256 rewards, .*; got 255",
    ),
    "rewards that are no numbers": (
        f"{GRPO} --reward bad_rewards.py:words",
        1,
        r"reward words .*: expected a finite number or None, got 'good'",
    ),
    "a reward without its column": (
        f"{GRPO} --reward bad_rewards.py:wants",
        1,
        r"reward wants .*: it needs 'answer', and there is only .*target",
    ),
    "a prompt longer than the context": (
        "grpo --model tiny.json --task cards --dataset long.jsonl --reward rewards.py:digits",
        1,
        r"long\.jsonl:2: a prompt of 60 tokens leaves no room for a completion in the model's context of 48",
    ),
    "a dataset without a reward": (
        "grpo --model tiny.json --task cards --dataset good.jsonl",
        1,
        r"--reward: expected a reward function for the dataset's",
    ),
    "an unknown task": (
        "sft --model tiny.json --task crads",
        1,
        r"--task: expected one of cards, gsm8k, .* got 'crads'; did you mean 'cards'\?",
    ),
    "an unknown option of a task": (
        f"{SFT} kk=3",
        1,
        r"--task: cards has no option 'kk'; did you mean 'k'\?",
    ),
    "a task without demonstrations": (
        "sft --model tiny.json --task silent.py:Silent",
        1,
        r"--task: cards has no demonstrations; give a --dataset",
    ),
    "nothing to train on": (
        "sft --model done/checkpoints/step_2",
        1,
        r"--dataset or --task: expected one of them",
    ),
    "an unknown algorithm": (
        f"{GRPO} --algorithm gpro",
        1,
        r"--algorithm: expected one of grpo, dr_grpo, .*; got 'gpro'",
    ),
    "greedy samples": (
        f"{GRPO} --sampling.temperature 0",
        1,
        r"--sampling\.temperature: expected a positive number, got 0",
    ),
    "a group of one": (f"{GRPO} --group 1", 1, r"--group: expected at least 2"),
    "no tokenizer": (
        "sft --model tiny.json --dataset good.jsonl",
        1,
        r"--tokenizer: tiny\.json has no tokenizer files and the task brings none",
    ),
    "a tokenizer that cannot be read": (
        f"{SFT} --tokenizer bad_tokenizer",
        1,
        r"--tokenizer: bad_tokenizer holds no tokenizer that transformers can read",
    ),
    "a missing tokenizer": (
        f"{SFT} --tokenizer none",
        1,
        r"--tokenizer: expected a folder with tokenizer files, got none",
    ),
    "a small budget": (
        f"{SFT} --micro-tokens 5",
        1,
        r"cards train\[\d+\]: a sequence of up to \d+ tokens .*; raise --micro-tokens \(5\) to at least \d+",
    ),
    "a small budget for rollouts": (
        f"{GRPO} --micro-tokens 5 --reward rewards.py:digits",
        1,
        r"--micro-tokens: a sequence of \d+ tokens does not fit into 5",
    ),
    "a small cache": (
        f"{GRPO} --sampling.max-tokens-in-flight 9",
        1,
        r"max_tokens_in_flight: sequence 0 alone may need 64 tokens of cache",
    ),
    "no GPU": (
        f"{SFT} --device cuda",
        1,
        r"--device: got 'cuda', but this machine has no CUDA device; use --device cpu",
    ),
    "a run that is there": (
        f"{SFT} --output-dir done",
        1,
        r"--output-dir: done already holds step_2; continue it with --resume",
    ),
    "no run to resume": (
        f"{SFT} --resume",
        1,
        r"--resume: out holds no whole checkpoint; start without --resume",
    ),
    "prompts that are not there": (
        "generate --model done/checkpoints/step_2 --prompts none.txt",
        1,
        r"--prompts: no file none\.txt",
    ),
    "a model without tokenizer": (
        "generate --model tiny.json --prompts good.jsonl",
        1,
        r"--tokenizer: tiny\.json has no tokenizer files",
    ),
    "an unknown split": (
        "eval --model tiny.json --task cards --split tset",
        1,
        r"cards: expected a split of train, val, test",
    ),
    "no prompts": (
        "eval --model tiny.json --task cards --prompts 0",
        1,
        r"prompts: expected at least one of cards's split 'test', got 0",
    ),
    "a filter out of range": (f"{GRPO} --sampling.top-p 0", 1, r"top_p: expected in \(0, 1\], got 0\.0"),
}
# the offending sample is shown below the line
TOLD_AT_LENGTH = {
    "a reward that raises",
    "too few rewards",
    "rewards that are no numbers",
}
NOT_ON_A_GPU = {"no GPU"}


def run(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(folder)
    shutil.rmtree(folder / "out", ignore_errors=True)
    args = command.split()
    if args[0] in ("sft", "grpo") and "--output-dir" not in args:
        args += ["--output-dir", "out"]
    return cli.main(args)


@pytest.mark.parametrize("about", MISTAKES)
def test_a_mistake_is_one_line_and_an_exit_code(about, folder, monkeypatch, capsys):
    """Wrong implementations: a traceback in the user's face; an error that does not say what to change; exit
    code 0.
    """
    if about in NOT_ON_A_GPU and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    command, code, said = MISTAKES[about]
    assert run(command, folder, monkeypatch) == code
    told = capsys.readouterr().err
    assert re.match(f"fastrl: error: {said}", told), told
    assert "Traceback" not in told and "internal error" not in told
    lines = told.rstrip("\n").split("\n")
    assert len(lines) == 1 or (about in TOLD_AT_LENGTH and "sample" in told)
    assert not list(folder.glob("out/checkpoints/*")), (
        "a run that could not begin leaves nothing to trip over"
    )


@pytest.mark.parametrize("about", ["a malformed dataset line", "an unknown key", "a reward that raises"])
def test_debug_shows_the_traceback(about, folder, monkeypatch, capsys):
    command, code, said = MISTAKES[about]
    assert run(f"{command} --debug", folder, monkeypatch) == code
    told = capsys.readouterr().err
    assert told.startswith("Traceback (most recent call last)") and re.search(f"fastrl: error: {said}", told)
    if about == "a reward that raises":
        assert "bad_rewards.py" in told and "ZeroDivisionError" in told.partition("fastrl: error")[0], (
            "the user's own frame is in it"
        )


def damage_weights(checkpoint: Path) -> str:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return r"model\.safetensors has \d+ bytes, expected \d+"


def damage_state(checkpoint: Path) -> str:
    (checkpoint / "trainer.json").unlink()
    return r"trainer\.json is missing or damaged"


@pytest.mark.parametrize("damage", [damage_weights, damage_state])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_continues(
    damage, folder, tmp_path, monkeypatch, capsys
):
    """Wrong implementations: training goes on from what is left; the advice does not work."""
    shutil.copytree(folder / "done", tmp_path / "done")
    shutil.copy(folder / "tiny.json", tmp_path)
    newest = tmp_path / "done/checkpoints/step_2"
    said = damage(newest)
    command = f"{SFT} --output-dir done --steps 3 --prompts 2 --resume"
    assert run(command, tmp_path, monkeypatch) == 1
    told = capsys.readouterr().err
    assert re.fullmatch(
        rf"fastrl: error: checkpoint done/checkpoints/step_2: {said}.*; "
        r"remove the folder to use an older checkpoint\n",
        told,
    )
    shutil.rmtree(newest)
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda it: None)
    assert run(command, tmp_path, monkeypatch) == 0
    assert (tmp_path / "done/checkpoints/step_3").exists()


def test_damaged_weights_of_a_model_name_the_tensor(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder / "done/checkpoints/step_2", tmp_path / "model")
    damage_weights(tmp_path / "model")
    assert run("eval --model model --task cards", tmp_path, monkeypatch) == 1
    assert re.match(
        r"fastrl: error: model/model\.safetensors: truncated: tensor model\.\S+ ends at byte \d+, "
        r"the file at \d+",
        capsys.readouterr().err,
    )


def test_a_reward_that_fails_later_loses_nothing(folder, tmp_path, monkeypatch, capsys):
    """Wrong implementation: what was saved before the error is not what can be resumed."""
    shutil.copy(folder / "tiny.json", tmp_path)
    (tmp_path / "later.py").write_text(
        REWARDS + "\nSTEPS = []\n\ndef later(completions, **columns):\n    STEPS.append(1)\n"
        "    assert len(STEPS) < 4, 'no more'\n    return digits(completions)\n"
    )
    options = f"{GRPO} --prompts 2 --group 2 --reward later.py:later --steps 5 --save.every 2"
    assert run(options, tmp_path, monkeypatch) == 1
    assert "reward later raised AssertionError: no more" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out/checkpoints").iterdir()] == ["step_2"]
    (tmp_path / "later.py").write_text(REWARDS.replace("digits", "later"))
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda it: None)
    assert cli.main([*options.split(), "--output-dir", "out", "--resume"]) == 0


# --- the two checks ---------------------------------------------------------------------------------
def test_a_requirement_that_is_met_says_nothing():
    """Wrong implementation: `ok` is taken for `bad`."""
    require("--steps", 3, True, "at least 1")


def test_a_requirement_that_is_not_met_names_the_option_and_the_value():
    with pytest.raises(UserError) as error:
        require("--steps", 0, False, "at least 1")
    assert str(error.value) == "--steps: expected at least 1, got 0"


def test_the_chosen_entry_is_returned_even_if_it_is_false():
    """Wrong implementation: `table.get(name) or raise`."""
    assert choose("none", {"mean": 1, "none": 0}, "--baseline") == 0


@pytest.mark.parametrize(
    "name, ending",
    [("gpro", "got 'gpro'; did you mean 'grpo'?"), ("xyz", "got 'xyz'")],
    ids=["near", "far"],
)
def test_an_unknown_name_is_refused_with_the_table(name, ending):
    with pytest.raises(UserError) as error:
        choose(name, {"grpo": 1, "dapo": 2}, "--algorithm")
    assert str(error.value) == f"--algorithm: expected one of grpo, dapo; {ending}"
