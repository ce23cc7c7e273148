"""Options that only some rows have: one declaration, three spellings, and a refusal that names the rows."""

from __future__ import annotations

import pytest
import yaml
from configs import configured

from fastrl import cli, pipeline
from fastrl.algorithms import ALGORITHMS
from fastrl.algorithms.fusion import FUSIONS
from fastrl.algorithms.hybrid import HYBRIDS
from fastrl.algorithms.ppo import PPO
from fastrl.algorithms.preference import PREFERENCES
from fastrl.algorithms.reward import REWARD_LOSSES
from fastrl.config import (
    AlgorithmChoice,
    Dpo,
    Grpo,
    Hybrid,
    Joint,
    Ppo,
    Reward,
    Run,
    Sft,
    WithAlgorithm,
)
from fastrl.config.parse import UsageError, dump, load, parse, resolve
from fastrl.config.schema import Schema
from fastrl.config.trl import ALIASES
from fastrl.errors import UserError
from fastrl.methods import METHODS, options_of
from fastrl.methods.dpo.options import choose_preference
from fastrl.methods.grpo.options import choose_algorithm
from fastrl.methods.hybrid.pair_options import choose_hybrid
from fastrl.methods.joint.options import choose_joint
from fastrl.methods.ppo.options import choose_ppo
from fastrl.methods.reward.options import choose_reward_loss
from fastrl.run.session import changed

TABLES = {
    Dpo: (choose_preference, PREFERENCES),
    Grpo: (choose_algorithm, ALGORITHMS),
    Ppo: (choose_ppo, PPO),
    Hybrid: (choose_hybrid, HYBRIDS | FUSIONS),
    Joint: (choose_joint, ALGORITHMS),
    Reward: (choose_reward_loss, REWARD_LOSSES),
}
CHORD = AlgorithmChoice("chord", {"mu": 0.5})


def write(folder, text, name="run.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


# --- the spellings ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "args",
    [
        ["--algorithm", "chord", "--algorithm.mu", "0.5"],
        ["--algorithm=chord", "--algorithm.mu=0.5"],
        ["--algorithm.name", "chord", "--algorithm.mu", "0.5"],
        ["--algorithm", "chord", "--mu", "0.5"],
        ["--loss_type", "chord", "--mu", "0.5"],
    ],
    ids=" ".join,
)
def test_the_command_line(args):
    """Wrong implementations: an alias that only one of the spellings has; options read before the algorithm
    is known; the first of two algorithms.
    """
    assert resolve(Hybrid, ["--model", "m", *args]) == Hybrid(model="m", algorithm=CHORD)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "algorithm: {name: chord, mu: 0.5}"),
        ("b.yaml", "algorithm:\n  name: chord\n  mu: 0.5"),
        ("c.yaml", "algorithm: chord\nalgorithm.mu: 0.5"),
        ("d.yaml", "algorithm: chord\nmu: 0.5\nmu_end: null"),
        ("e.yaml", "loss_type: chord\nmu: 5e-1"),
        ("f.toml", "[algorithm]\nname = 'chord'\nmu = 0.5"),
        ("g.json", '{"algorithm": {"name": "chord", "mu": 0.5}}'),
    ],
)
def test_a_file(name, text, tmp_path):
    """Wrong implementations: null taken for a value; 5e-1 for a text."""
    file = write(tmp_path, text, name)
    assert resolve(Hybrid, ["--model", "m", "--config", file]) == Hybrid(model="m", algorithm=CHORD)


def test_the_command_line_overrides_an_option_of_the_file(tmp_path):
    """Wrong implementations: an option of the file that is lost beside another one of the command line; the
    file's algorithm forgotten.
    """
    file = write(tmp_path, "model: m\nalgorithm: {name: chord, mu: 0.9, mu_end: 0.1}\n")
    config = resolve(Hybrid, ["--config", file, "--mu", "0.5"])
    assert config.algorithm == AlgorithmChoice("chord", {"mu": 0.5, "mu_end": 0.1})


def test_an_algorithm_by_its_name_alone():
    assert Hybrid(model="m", algorithm="chord") == Hybrid(model="m", algorithm=AlgorithmChoice("chord"))
    assert Hybrid(model="m").algorithm == AlgorithmChoice("hpt")


def test_trls_names_of_row_options():
    config = resolve(Grpo, ["--model", "m", "--cliprange", "0.1"])
    assert config.algorithm == AlgorithmChoice("grpo", {"epsilon": 0.1})
    assert resolve(Grpo, ["--model", "m", "--beta", "0.1"]).kl_coef == 0.1
    assert resolve(Dpo, ["--model", "m", "--beta", "0.2"]).algorithm.number("beta") == 0.2
    config = resolve(Dpo, ["--model", "m", "--algorithm", "bco_pair", "--beta", "0.2"])
    assert choose_preference(config).params == {"beta": 0.2}


# --- what is refused --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        (
            Hybrid,
            ["--algorithm", "luffy", "--mu", "0.5"],
            "--mu: luffy has no such option; take an --algorithm that has it: chord, chord_phi",
        ),
        (Hybrid, ["--gamma", "0.5"], "--gamma: hpt has no such option; take .*: luffy, luffy_pairs"),
        (Grpo, ["--algorithm.delta", "3", "--algorithm", "gmpo"], "--delta: gmpo has no such option"),
        (
            Grpo,
            ["--pass-k", "2"],
            "--pass-k: grpo has no .*: pass_at_k, any with --advantage max_at_k",
        ),
        (Dpo, ["--tau", "0.5"], "--tau: dpo has no such option; take .* it: discopop"),
        (Hybrid, ["--algorithm", "chord", "--mu", "1.5"], r"--mu: expected a number in \[0, 1\], got 1.5"),
    ],
)
def test_an_option_of_another_row_is_refused(command, args, message, tmp_path):
    """On the command line, in a file and in Python.  Wrong implementations: an option that is ignored; a
    refusal that does not say which rows have it.
    """
    with pytest.raises(UsageError, match=message):
        parse(command, ["--model", "m", *args])
    options = dict(zip(args[::2], args[1::2], strict=True))
    named = {key[2:].removeprefix("algorithm."): yaml.safe_load(value) for key, value in options.items()}
    named["name"] = named.pop("algorithm", command(model="m").algorithm.name)
    file = write(tmp_path, yaml.safe_dump({"model": "m", "algorithm": named}))
    with pytest.raises(UsageError, match=message) as error:
        load(command, file)
    assert str(error.value).startswith(f"{file}: ")
    name = named.pop("name")
    flat = {key.replace("-", "_"): value for key, value in named.items()}
    with pytest.raises(UserError, match=message):
        command(model="m", algorithm=AlgorithmChoice(name, flat))


def test_options_that_no_row_has_and_values_of_another_type(tmp_path):
    with pytest.raises(UsageError, match=r"unknown option --algorithm\.muu; did you mean --mu\?"):
        parse(Hybrid, ["--model", "m", "--algorithm.muu", "1"])
    with pytest.raises(UsageError, match=r"unknown key 'algorithm\.muu'; did you mean 'mu'\?"):
        load(Hybrid, write(tmp_path, "model: m\nalgorithm: {name: chord, muu: 1}"))
    with pytest.raises(UsageError, match=r"algorithm\.mu: expected float, got 'much' \(str\)"):
        load(Hybrid, write(tmp_path, "model: m\nalgorithm: {name: chord, mu: much}"))
    with pytest.raises(UserError, match="--muu: no algorithm has this option; did you mean 'mu'"):
        Hybrid(model="m", algorithm=AlgorithmChoice("chord", {"muu": 1.0}))
    with pytest.raises(UserError, match="--pairing: expected one of extremes, all, got 'best'"):
        Hybrid(model="m", algorithm=AlgorithmChoice("online_dpo", {"pairing": "best"}))


@pytest.mark.parametrize(
    ("command", "option", "owners"),
    [
        (Grpo, "--mu", "hybrid"),
        (Sft, "--epsilon", "grpo, ppo, hybrid, joint"),
        (Ppo, "--advantage", "grpo, hybrid, joint"),
        (Joint, "--refill", "grpo, ppo, hybrid"),
        (Grpo, "--critic", "ppo"),
        (Grpo, "--center_rewards_coefficient", "reward, joint"),
    ],
)
def test_an_option_of_another_command_names_the_command(command, option, owners, tmp_path):
    with pytest.raises(UsageError) as error:
        parse(command, ["--model", "m", option, "1"])
    assert str(error.value) == f"unknown option {option}; it is an option of fastrl {owners}"
    key = option[2:]
    with pytest.raises(UsageError, match=f"unknown key '{key}'; it is an option of fastrl {owners}"):
        load(command, write(tmp_path, f"model: m\n{key}: 1\n"))


# --- help -------------------------------------------------------------------------------------------
def told(capsys, *args):
    assert cli.main([*args, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in METHODS if issubclass(options_of(name), WithAlgorithm)])
def test_help_shows_the_options_of_the_named_algorithm(name, capsys, monkeypatch):
    """Wrong implementations: all rows' options in every help; those of the default; none."""
    monkeypatch.setenv("COLUMNS", "200")
    command = options_of(name)
    plain = told(capsys, name)
    assert "--algorithm." not in plain.replace("--algorithm.OPTION", "") and "--model" in plain
    for row, options in command.rows.items():
        assert row in plain
        shown = told(capsys, name, "--algorithm", row)
        for option in command.all_row_options():
            spelt = f"--algorithm.{option.replace('_', '-')} "
            assert (spelt in shown) == (option in options), (row, option)
            assert (f"--{option.replace('_', '-')} " in shown) == (option in options)


def test_help_understands_an_algorithm_after_an_equals_sign(capsys, monkeypatch):
    """Wrong implementation: the name read with its option, so that its row is not found."""
    monkeypatch.setenv("COLUMNS", "200")
    assert "--algorithm.mu-end " in told(capsys, "hybrid", "--algorithm=chord")


# --- there and back ---------------------------------------------------------------------------------
def test_a_dumped_configuration_loads_to_the_same_object(tmp_path):
    """Wrong implementations: a mapping where a name is enough; options that stand beside the algorithm."""
    plain, chord = Hybrid(model="m", algorithm="chord"), Hybrid(model="m", algorithm=CHORD)
    assert "\nalgorithm: chord\n" in dump(plain) and " mu" not in dump(plain)
    assert "\nalgorithm:\n  name: chord\n  mu: 0.5\n" in dump(chord)
    for config in (plain, chord, Reward(model="m"), Sft(model="m")):
        file = write(tmp_path, dump(config))
        assert load(type(config), file) == config and resolve(type(config), ["--config", file]) == config


def test_a_resumed_run_sees_that_a_row_option_has_changed(tmp_path):
    """Wrong implementation: a comparison of names alone."""
    begun = Hybrid(model="m", algorithm=CHORD, output_dir=str(tmp_path))
    write(tmp_path, dump(begun), "config.yaml")
    assert changed(begun) == {}
    other = Hybrid(model="m", algorithm=AlgorithmChoice("chord", {"mu": 0.4}), output_dir=str(tmp_path))
    assert changed(other) == {"algorithm": ('{"name": "chord", "mu": 0.5}', '{"name": "chord", "mu": 0.4}')}


def test_options_of_rows_in_a_pipeline(tmp_path):
    """In a stage, and shared by the stages whose commands have them.  Wrong implementation: a shared option
    that is dropped without a word because it is no field.
    """
    text = (
        f"output_dir: {tmp_path}/runs\nshared: {{model: m, epsilon: 0.1}}\n"
        "stages:\n  - sft: {}\n  - grpo: {}\n  - hybrid: {algorithm: {name: chord, mu: 0.5}}\n"
    )
    stages = pipeline.read_stages(tmp_path.joinpath(write(tmp_path, text)))
    grpo, hybrid = stages[1].config, stages[2].config
    assert isinstance(grpo, Grpo) and grpo.algorithm == AlgorithmChoice("grpo", {"epsilon": 0.1})
    assert isinstance(hybrid, Hybrid)
    assert hybrid.algorithm == AlgorithmChoice("chord", {"mu": 0.5, "epsilon": 0.1})


# --- declarations and tables ------------------------------------------------------------------------
VALUES = {  # of options that are no number
    "rl": "dapo",
    "preference": "ipo",
    "group_statistics": "own",
    "members": "chosen",
    "pair_dataset": "pairs.jsonl",
    "reference": "live",
    "pairing": "all",
    "anchor": "old",
    "step_separator": ";",
    "delta": 9.5,
    "pass_k": 3,
    "gate": 0.25,
    "label_smoothing": 0.25,
    "pairs": 3,
    "mu_warmup": 3,
    "mu_decay": 3,
    "pair_warmup": 3,
    "pair_decay": 3,
    "norms_every": 3,
}
OF_THE_SOURCE = {  # what changes the data, not the row
    "solved",
    "demo_reward",
    "rejected_reward",
    "pair_dataset",
    "pairs",
    "reference",
    "norms_every",
    "step_separator",
}
DECLARED = [
    (command, name, option)
    for command in TABLES
    for name, options in command.rows.items()
    for option in options
]


@pytest.mark.parametrize(("command", "name", "option"), DECLARED)
def test_what_a_row_declares_changes_that_row(command, name, option):
    """Wrong implementations: an option that a row is said to have and has not; one that is taken and
    ignored.
    """
    choose, table = TABLES[command]
    assert name in table
    shared = {"model": "m", "algorithm": name}
    if option.startswith("epsilon") or option == "delta":
        shared |= {"rl": "grpo"} if command is Hybrid else {}
    if (command, name) == (Joint, "max_rl"):
        shared["advantage"] = "zscore"
    plain = configured(command, **shared)
    given = configured(command, **shared | {option: VALUES.get(option, 0.45)})
    assert (choose(given) != choose(plain)) == (option not in OF_THE_SOURCE)


@pytest.mark.parametrize("command", TABLES)
def test_every_bound_of_a_row_can_be_set(command):
    """Wrong implementation: a row that clips, or a loss with parameters, without a declaration."""
    _, table = TABLES[command]
    for name, row in table.items():
        options = command.rows.get(name, {})
        if command in (Grpo, Joint, Ppo) and name != "sft":
            surrogate = getattr(row, "policy", row).surrogate
            assert ("low" in surrogate.params and surrogate.params["low"] > 0) == ("epsilon" in options)
        elif command is Dpo:
            assert set(row.params) - {"baseline"} == set(options) - {"nll_coef"}
            assert row.paired == ("nll_coef" in options)
        elif command is Reward:
            assert row.compares == ("center" in options)
        elif command is Hybrid and hasattr(row, "rule"):
            assert set(row.rule.params) <= set(options)
            assert (row.member is not None) == ("demo_reward" in options)


@pytest.mark.parametrize("command", [options_of(name) for name in METHODS])
def test_names_are_unambiguous(command: type[Run]):
    """Wrong implementation: --gamma of one row that is also a general option, and means that."""
    schema = Schema.of(command)
    last = {path.split(".")[-1] for path in schema.general}
    assert not schema.of_rows.keys() & (last | {"name"})
    kinds = {}
    if issubclass(command, WithAlgorithm):
        for options in command.rows.values():
            for option, declared in options.items():
                assert kinds.setdefault(option, declared.kind) == declared.kind
    assert not ALIASES.keys() & schema.general.keys()


def test_an_option_of_0_is_one_that_was_given():
    """Wrong implementation: values that are false taken for options that are not set."""
    found = resolve(Hybrid, ["--model", "m", "--algorithm", "chord", "--algorithm.mu", "0"])
    assert found.algorithm.options == {"mu": 0.0}
