"""Options: file, command line and defaults meet in one configuration; every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrl.config import AlgorithmChoice, Evaluate, Grpo, Hybrid, Optim, Ppo, Sampling, Save, Sft
from fastrl.config.parse import UsageError, dump, load, parse, resolve
from fastrl.config.schema import check_types
from fastrl.errors import UserError
from fastrl.methods import command_of


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    """Wrong implementation: a file value that beats an explicit option, or an option that resets its whole
    group.
    """
    file = write(tmp_path, "model: m\nsteps: 7\noptim:\n  lr: 0.5\n  warmup: 3\n")
    config = resolve(Grpo, ["--config", file, "--optim.lr", "1e-4"])
    assert config == Grpo(model="m", steps=7, optim=Optim(lr=1e-4, warmup=3))


def test_a_later_file_overrides_an_earlier_one(tmp_path):
    base = write(tmp_path, "model: m\nsteps: 7\nseed: 1\n", "a.yaml")
    over = write(tmp_path, 'steps = 9\n[optim]\nschedule = "cosine"\n', "b.toml")
    assert resolve(Sft, [f"--config={base}", "--config", over]) == Sft(
        model="m", steps=9, seed=1, optim=Optim(schedule="cosine")
    )


def test_a_dumped_configuration_loads_to_the_same_object(tmp_path):
    """Wrong implementation: tuples that come back as lists, 1e-05 as a string, None as 'None', groups
    flattened.
    """
    config = Grpo(
        model="m",
        reward=("a.py:f", "b.py:g"),
        kl="k3",
        kl_coef=1e-05,
        task="24 # points",
        output_dir="yes",
        steps=20,
        optim=Optim(lr=3e-6, schedule="cosine"),
        sampling=Sampling(top_p=0.9),
        save=Save(every=5),
        gradient_checkpointing=True,
    )
    file = write(tmp_path, dump(config))
    assert load(Grpo, file) == config
    assert resolve(Grpo, ["--config", file]) == config


def test_every_command_takes_the_invocation_options():
    asked = parse(Evaluate, ["--model", "m", "--task", "cards", "--dry-run", "--debug"])
    assert (asked.dry_run, asked.debug) == (True, True)
    assert type(asked.config) is Evaluate


def test_lists_and_both_spellings_of_a_name():
    config = resolve(
        Grpo, ["--model", "m", "--reward", "a.py:f", "b.py:g", "--output_dir", "x", "--max-new-tokens=5"]
    )
    assert (config.reward, config.output_dir, config.max_new_tokens) == (("a.py:f", "b.py:g"), "x", 5)
    assert resolve(Grpo, ["--model", "m", "--output-dir", "x"]).output_dir == "x"
    assert resolve(Grpo, ["--model", "m", "--no-resume"]).resume is False


TRL = {
    "model_name_or_path": "q",
    "dataset_name": "d.jsonl",
    "num_generations": 4,
    "learning_rate": 0.001,
    "max_completion_length": 9,
    "max_steps": 3,
    "loss_type": "bnpo",
    "beta": 0.25,
    "num_iterations": 1,
    "vllm_importance_sampling_mode": "token_mask",
    "vllm_importance_sampling_clip_min": 0.25,
    "vllm_importance_sampling_clip_max": 4.0,
}
TRL_SFT = {"neftune_noise_alpha": 5.0, "label_smoothing_factor": 0.25}


def test_trl_spellings_of_sft():
    args = ["--model", "m", *(part for k, v in TRL_SFT.items() for part in (f"--{k}", str(v)))]
    assert resolve(Sft, args) == Sft(model="m", neftune_alpha=5.0, label_smoothing=0.25)


TRL_PPO = {
    "num_ppo_epochs": 4,
    "num_mini_batches": 2,
    "cliprange": 0.1,
    "cliprange_value": 0.3,
    "kl_estimator": "k3",
}


@pytest.mark.parametrize("where", ["command line", "command line with =", "file"])
def test_trl_spellings(where, tmp_path):
    """Wrong implementation: aliases on the command line only."""
    expected = Grpo(
        model="q",
        dataset="d.jsonl",
        group=4,
        max_new_tokens=9,
        steps=3,
        optim=Optim(lr=0.001),
        reward=("r.py:f",),
        algorithm="bnpo",
        kl_coef=0.25,
        epochs=1,
        correction="token_mask",
        correction_min=0.25,
        correction_max=4.0,
    )
    if where == "file":
        text = "".join(f"{k}: {v}\n" for k, v in TRL.items()) + "reward_funcs: r.py:f\n"
        args = ["--config", write(tmp_path, text)]
    elif where == "command line":
        args = [part for k, v in TRL.items() for part in (f"--{k}", str(v))] + ["--reward_funcs", "r.py:f"]
    else:
        args = [f"--{k}={v}" for k, v in TRL.items()] + ["--reward_funcs=r.py:f"]
    assert resolve(Grpo, args) == expected


def test_an_option_goes_before_trls_spelling_of_another(capsys):
    """Wrong implementations: --beta of `fastrl hybrid`, a preference loss's own, taken for TRL's name of
    --kl-coef; a help that says so.
    """
    config = resolve(Hybrid, ["--model=m", "--algorithm=grpo_dpo", "--beta=0.5"])
    assert (config.algorithm.number("beta"), config.kl_coef) == (0.5, None)
    with pytest.raises(SystemExit):
        parse(Hybrid, ["--help"])
    told = capsys.readouterr().out
    assert "--num_generations = --group" in told and "--beta = --kl-coef" not in told


def test_trl_spellings_of_ppo():
    """Wrong implementation: the clip of the ratio and that of the values taken for each other."""
    args = [f"--{k}={v}" for k, v in TRL_PPO.items()]
    assert resolve(Ppo, ["--model=m", *args]) == Ppo(
        model="m",
        algorithm=AlgorithmChoice("ppo", {"epsilon": 0.1}),
        epochs=4,
        minibatches=2,
        value_clip=0.3,
        kl="k3",
    )


@pytest.mark.parametrize(
    "option, nearest",
    [
        ("--stpes", "--steps"),
        ("--optim.warm", "--optim.warmup"),
        ("--lr", "--optim.lr"),
        ("--learning_rte", "--optim.lr"),
        ("--dryrun", "--dry-run"),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest(option, nearest):
    with pytest.raises(UsageError) as error:
        parse(Grpo, ["--model", "m", option, "3"])
    assert str(error.value) == f"unknown option {option}; did you mean {nearest}?"


def test_an_option_of_another_command_is_unknown():
    """Wrong implementation: an alias accepted for a command that has no such option, then dropped."""
    with pytest.raises(UsageError, match="unknown option --num_generations"):
        parse(Sft, ["--model", "m", "--num_generations", "3"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("stpes: 3", "unknown key 'stpes'; did you mean 'steps'?"),
        ("optim:\n  warm: 3", "unknown key 'optim.warm'; did you mean 'optim.warmup'?"),
        ("learning-rte: 3", "did you mean 'optim.lr'?"),
        ("optim: 3", "optim: expected a group of options (lr, warmup"),
        ("steps: many", "steps: expected int, got 'many' (str)"),
        ("steps: 1.5", "steps: expected int, got 1.5 (float)"),
        ("steps: true", "steps: expected int, got True (bool)"),
        ("steps: null", "steps: expected int, got None (NoneType)"),
        ("resume: 1", "resume: expected bool, got 1 (int)"),
        ("model: 7", "model: expected str, got 7 (int)"),
        ("optim.lr: fast", "optim.lr: expected float, got 'fast' (str)"),
        ("optim:\n  lr: [1]", "optim.lr: expected float, got [1] (list)"),
        ("optim.lr: true", "optim.lr: expected float, got True (bool)"),
        ("kl: k4", "kl: expected one of k1, k2, k3, k3+, k1_is, k3_is, abs or null, got 'k4' (str)"),
        ("reward: [3]", "reward: expected a list of str, got [3] (list)"),
        ("max_steps: 3\nsteps: 4", "'steps' is set twice (the second time as 'steps')"),
        ("steps: 3\nsteps: 4", "key 'steps' is set twice"),
        ("steps: [", "not valid YAML"),
        ("- steps", "expected options by name, got list"),
    ],
)
def test_a_mistake_in_a_file_is_named(text, message, tmp_path):
    file = write(tmp_path, text)
    with pytest.raises(UsageError) as error:
        parse(Grpo, ["--model", "m", "--config", file])
    assert message in str(error.value)
    assert str(error.value).startswith(file + ": ")
    assert "\n" not in str(error.value)


def test_numbers_as_yaml_reads_them(tmp_path):
    """Wrong implementation: YAML 1.1 reads 1e-4 as a string, and a strict check refuses it; an int is a float
    too.
    """
    config = resolve(
        Grpo,
        ["--model", "m", "--config", write(tmp_path, "optim: {lr: 1e-4, clip: 1}\nkl_coef: None\nsave:\n")],
    )
    assert (config.optim.lr, config.optim.clip, config.kl_coef) == (1e-4, 1.0, None)
    assert isinstance(config.optim.clip, float)


@pytest.mark.parametrize("name, text", [("a.toml", "steps = "), ("a.txt", "steps: 3"), ("a.json", "{")])
def test_other_files(name, text, tmp_path):
    with pytest.raises(UsageError, match=name):
        parse(Grpo, ["--config", write(tmp_path, text, name)])


def test_empty_and_json_files(tmp_path):
    assert resolve(Grpo, ["--model", "m", "--config", write(tmp_path, "")]) == Grpo(model="m")
    assert load(Grpo, write(tmp_path, '{"model": "m", "steps": 3}', "a.json")) == Grpo(model="m", steps=3)


def test_what_is_required(tmp_path, capsys):
    """Wrong implementation: a required option whose placeholder reaches the trainer as its value."""
    with pytest.raises(SystemExit) as stop:
        parse(Sft, ["--steps", "3"], prog="fastrl sft")
    assert stop.value.code == 2
    assert "--model" in capsys.readouterr().err
    with pytest.raises(UsageError, match="required option 'model'"):
        load(Sft, write(tmp_path, "steps: 3"))
    assert resolve(Sft, ["--config", write(tmp_path, "model: m")]).model == "m"
    with pytest.raises(UsageError, match="--config: expected a file"):
        parse(Sft, ["--config"])


# --- given twice, and paths -------------------------------------------------------------------------
@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["--dataset", "a", "--dataset", "b"],
            "--dataset: given twice, as `--dataset a` and as `--dataset b`",
        ),
        (["--dataset=a", "--dataset_name", "b"], "as `--dataset=a` and as `--dataset_name b`; give it once"),
        (["--reward", "a", "b", "--reward=c"], "it takes several values: --reward a b c"),
        (["--optim.lr", "1", "--learning-rate", "2"], "--optim.lr: given twice"),
        (["--algorithm", "grpo", "--epsilon", "1", "--algorithm.epsilon=2"], "epsilon: given twice"),
        (["--resume", "--no-resume"], "--resume: given twice, as `--resume` and as `--no-resume`"),
        (["--config", "--steps", "3"], "--config: expected a file, got nothing"),
    ],
)
def test_an_option_given_twice_is_an_error(args, message):
    """Wrong implementation: the first value dropped without a word."""
    with pytest.raises(UsageError) as error:
        parse(Grpo, ["--model", "m", *args])
    assert message in str(error.value)


def test_the_home_directory(tmp_path, monkeypatch):
    """~ in every path, wherever it is written; a text that is no path keeps it."""
    monkeypatch.setenv("HOME", "/home/me")
    file = write(
        tmp_path, "model: ~/m\noutput_dir: ~/out\nreward: [~/r.py:f, 'model:~/rm', 'implicit:~/a,~/b']\n"
    )
    config = resolve(Grpo, ["--config", file, "--dataset=~/d.jsonl", "--columns", "~/q=prompt"])
    assert (config.model, config.output_dir, config.dataset) == (
        "/home/me/m",
        "/home/me/out",
        "/home/me/d.jsonl",
    )
    assert config.reward == ("/home/me/r.py:f", "model:/home/me/rm", "implicit:/home/me/a,/home/me/b")
    assert config.columns == ("~/q=prompt",)
    assert load(Grpo, file).model == "/home/me/m"
    args = ["--model=m", "--algorithm=grpo_dpo", "--pair-dataset=~/p.jsonl"]
    assert resolve(Hybrid, args).algorithm.text("pair_dataset") == "/home/me/p.jsonl"


@pytest.mark.parametrize(
    "config, message",
    [
        (Grpo(model="m", steps="3"), r"--steps: expected int, got '3' \(str\)"),
        (Grpo(model="m", optim=Optim(lr="1e-3")), r"--optim.lr: expected float, got '1e-3' \(str\)"),
        (Grpo(model=None), r"--model: expected str, got None"),
        (Grpo(model="m", reward="a.py:f"), ""),
        (Sft(model="m", turns="some"), "--turns: expected one of all, last, got 'some'"),
        (Sft(model="m", resume=1), "--resume: expected bool, got 1"),
    ],
)
def test_values_given_in_python_have_their_options_type(config, message):
    """Wrong implementation: a comparison of text with a number, deep in the trainer."""
    if message:
        with pytest.raises(UserError, match=message):
            check_types(config)
    else:
        check_types(config)


def test_what_is_no_configuration_is_refused():
    """Wrong implementation: a bare StopIteration."""
    with pytest.raises(TypeError, match=r"expected a configuration of fastrl.config \(Sft, .*, got str"):
        command_of("sft")
