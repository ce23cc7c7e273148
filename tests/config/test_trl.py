"""TRL's names: each is an option of ours that means the same, or is refused with what to give instead."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from fastrl.algorithms.correction import CORRECTIONS
from fastrl.algorithms.objective import ALGORITHMS
from fastrl.algorithms.presets import SEMANTICS
from fastrl.config import Dpo, Generate, Grpo, Ppo, Reward, Sft
from fastrl.config.parse import UsageError, parse, resolve
from fastrl.config.schema import OPTION, TRAINING, Schema
from fastrl.config.trl import ALIASES, BOUNDS, INSTEAD, ONLY, OTHER_ROWS

TRAINERS = {"SFTConfig": Sft, "DPOConfig": Dpo, "GRPOConfig": Grpo, "RewardConfig": Reward, "KTOConfig": Dpo}
OTHERS = {"RLOOConfig": Grpo, "ModelConfig": Sft, "ScriptArguments": Sft}  # what their scripts take besides
OWN = {"debug"}  # an option of every command, and of transformers: another thing, refused in files


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="TRL is not installed")


@pytest.mark.parametrize("name", [*TRAINERS, *OTHERS])
def test_every_field_of_trl_is_an_option_or_says_what_to_give_instead(name, trl, tmp_path):
    """Wrong implementations: a name without any answer, or with that of the option that looks alike
    (--eval_steps: did you mean --steps?); an answer on the command line and none in a file.
    """
    config = getattr(trl, name, None)
    if config is None:
        pytest.skip(f"this TRL has no {name}")
    command = (TRAINERS | OTHERS)[name]
    schema = Schema.of(command)
    for field in dataclasses.fields(config):
        if schema.find(field.name) is not None or field.name in OWN:
            continue
        told = []
        for spelling in (field.name, field.name.replace("_", "-")):
            with pytest.raises(UsageError, match=f"unknown option --{spelling}[:;]") as caught:
                parse(command, ["--model", "m", f"--{spelling}", "1"])
            told.append(str(caught.value).partition(f"--{spelling}")[2])
        file = tmp_path / f"{field.name}.yaml"
        file.write_text(f"model: m\n{field.name}: 1\n")
        with pytest.raises(UsageError) as caught:
            parse(command, ["--config", str(file)])
        told.append(str(caught.value).rpartition(f"{field.name!r}")[2] or str(caught.value))
        assert told[0] == told[1], field.name
        assert told[0] in str(caught.value) or field.name == "optim", field.name
        assert "did you mean" not in told[0] and "--help" not in told[0], (field.name, told[0])


def test_advice_names_options_that_are_there():
    """Wrong implementation: an option renamed here, and not in the advice."""
    schemas = [Schema.of(command) for command in TRAINING.values()]
    for name, text in INSTEAD.items():
        for option in OPTION.findall(text):
            assert any(s.find(option.replace("-", "_")) for s in schemas), (name, option)
    for name, ours in ALIASES.items():
        commands = ONLY.get(name, TRAINING)
        assert any(Schema.of(TRAINING[command]).find(ours) for command in commands), name


def test_a_name_means_the_same_or_is_no_alias():
    """Values that differ from TRL's stand in the tables of --semantics and of corrections.  Wrong
    implementations: `--loss_type dapo` with the paper's clip of 0.28; a bound of 2 in place of TRL's 3.
    """
    differ = {name for name, columns in SEMANTICS["trl"].items() if columns}
    assert differ == set(OTHER_ROWS) < ALGORITHMS.keys()
    theirs = {"token_truncate", "token_mask", "sequence_truncate", "sequence_mask"}
    ours = {"correction_min": lambda row: row.low == 0, "correction_max": lambda row: row.high == 3}
    for mode in theirs:
        row = CORRECTIONS[mode]
        assert BOUNDS.get(mode, ()) == tuple(bound for bound, same in ours.items() if not same(row))


@pytest.mark.parametrize(
    "command, args, message",
    [
        (Grpo, ["--loss_type", "dapo"], "loss_type: TRL's dapo has other constants.*add --semantics trl"),
        (Grpo, ["--max_steps=9", "--epochs=2"], "max_steps: it counts optimizer steps.*give --steps"),
        (Ppo, ["--save_steps=9", "--num_mini_batches=2"], "save_steps: it counts optimizer steps"),
        (Grpo, ["--vllm_importance_sampling_mode", "token_truncate"], "give --correction-max, or write"),
        (Sft, ["--epochs", "3"], "unknown option --epochs: give --steps: epochs x rows / --prompts"),
        (Sft, ["--use_vllm"], "give --sampler vllm, an option of fastrl grpo, ppo, hybrid, joint"),
        (Sft, ["--loss_type", "nll"], "--loss_type: the loss is fixed by the command"),
        (Dpo, ["--label_smoothing_factor", "0.1"], "give --label-smoothing"),
        (Sft, ["--num_iterations", "2"], "--num_iterations: give --epochs, .* an option of fastrl grpo"),
        (Generate, ["--batch_size", "2"], "unknown option --batch_size; see fastrl --help"),
    ],
)
def test_names_that_would_mean_something_else(command, args, message):
    with pytest.raises(UsageError, match=message):
        parse(command, ["--model", "m", *args])


def test_names_that_mean_the_same():
    same = resolve(Grpo, ["--model=m", "--loss_type=dapo", "--semantics=trl", "--save_steps=5"])
    assert (same.algorithm.name, same.save.every) == ("dapo", 5)
    file_free = resolve(
        Sft,
        ["--model=m", "--adam_beta1=0.8", "--max-grad-norm=2", "--weight_decay=0.1", "--save-total-limit=1"],
    )
    optim = file_free.optim
    assert (optim.beta1, optim.clip, optim.weight_decay, file_free.save.keep) == (0.8, 2.0, 0.1, 1)
    sampling = resolve(Grpo, ["--model=m", "--temperature=0.5", "--top_k=3", "--min_p=0.1"]).sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0.5, 3, 0.1)
    assert typing.cast("Dpo", resolve(Dpo, ["--model=m", "--loss_type=sigmoid"])).algorithm.name == "sigmoid"


def test_a_name_in_a_file_is_checked_too(tmp_path):
    """Wrong implementation: the meaning compared only for what the command line says."""
    file = tmp_path / "run.yaml"
    file.write_text("model: m\nmax_steps: 9\nepochs: 2\nfsdp_config: {a: 1}\n")
    with pytest.raises(UsageError, match=r"'fsdp_config.a': there is no sharding"):
        parse(Grpo, ["--config", str(file)])
    file.write_text("model: m\nmax_steps: 9\nepochs: 2\n")
    with pytest.raises(UsageError, match="max_steps: it counts optimizer steps"):
        parse(Grpo, ["--config", str(file)])
    assert resolve(Grpo, ["--config", str(file), "--steps", "4"]).steps == 4
