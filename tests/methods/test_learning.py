"""The learning table: what is run, what is not run twice, and what the table makes of the results."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fastrl.bench.results_page import marks, newest
from fastrl.bench.studies import learning
from fastrl.bench.studies.demo import command
from fastrl.bench.studies.learning import METHODS, answers
from fastrl.bench.studies.learning_plot import draw
from fastrl.bench.studies.learning_table import RESULT, START, as_text, gather, publish
from fastrl.config import Grpo
from fastrl.config.parse import resolve
from fastrl.errors import UserError
from fastrl.methods import options_of
from fastrl.report.stats import mean_interval, paired_interval, wilson

SVG = "{http://www.w3.org/2000/svg}"
WHO = {"commit": "abc", "dirty": False, "packages": {"torch": "2"}, "threads": 1}


def write(folder: Path, method: str, seed: int, **found) -> None:
    run = folder / method / f"seed{seed}"
    run.mkdir(parents=True)
    (run / RESULT).write_text(json.dumps({"method": method, "seed": seed, "identity": WHO, **found}))


def right(*values: float) -> dict:
    return {"greedy": [float(v > 0.5) for v in values], "sampled": list(values)}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two seeds of one method, whose prompts gain 0.5, 0 and 0 and 0.25, 0.25 and 0; one of dpo and of a
    reward model.
    """
    for seed, start in enumerate(([0.0, 1.0, 0.5], [0.25, 0.5, 0.5])):
        write(tmp_path, START, seed, **right(*start), margin=[1.0, -2.0, 4.0])
    write(tmp_path, "grpo", 0, seconds=10.0, **right(0.5, 1.0, 0.5))
    write(tmp_path, "grpo", 1, seconds=20.0, **right(0.5, 0.75, 0.5))
    write(tmp_path, "dpo", 0, seconds=5.0, **right(0.0, 1.0, 0.5), margin=[3.0, 1.0, 5.0])
    write(
        tmp_path, "reward", 0, seconds=5.0, accuracy=[0.9, 0.85, 0.95], kinds={"false_step": [0.5, 0.4, 0.6]}
    )
    return tmp_path


COMMANDS = {"grpo": ["grpo"], "dpo": ["dpo"], "reward": ["reward"], "never run": []}


def test_differences_are_to_the_start_of_the_same_seed(folder):
    """Wrong implementations: one seed's noise for all starts; prompts of several seeds taken for independent
    ones; methods that were not run as rows of zeros.
    """
    found = gather(folder, COMMANDS)
    assert list(found["methods"]) == ["grpo", "dpo", "reward"] and found["commits"] == ["abc"]
    grpo = found["methods"]["grpo"]
    assert grpo["gain"]["over_prompts"] == mean_interval([0.375, 0.125, 0.0])
    assert grpo["gain"]["over_seeds"] == mean_interval([0.5 / 3, 0.5 / 3])
    assert [s["gain"] for s in grpo["seeds"]] == [
        paired_interval([0.0, 1.0, 0.5], [0.5, 1.0, 0.5]),
        paired_interval([0.25, 0.5, 0.5], [0.5, 0.75, 0.5]),
    ]
    assert grpo["seeds"][0]["greedy"] == [1 / 3, *wilson(1, 3)]
    dpo = found["methods"]["dpo"]
    assert dpo["margin_gain"] == {"over_prompts": mean_interval([2.0, 3.0, 1.0]), "over_seeds": None}
    assert (
        dpo["margins"][0]["before"]["ranked_right"][0] == pytest.approx(2 / 3)
        and dpo["margins"][0]["after"]["ranked_right"][0] == 1
    )


def test_the_table_says_what_was_found(folder):
    text = as_text(gather(folder, COMMANDS))
    assert "| grpo | 33.3% | 62.5% | +16.7 points" in text and "+16.7, +16.7 | 15 |" in text
    assert (
        "| dpo | 66.7% before, 100.0% after | 100.0% [43.9%, 100.0%] | margin 1.0 nats before, "
        "3.0 after: +2.0," in text
    )
    assert "| reward | 90.0% | 90.0% [85.0%, 95.0%] | false step 50.0% |" in text
    assert "never run" not in text


def test_the_page_is_written_from_the_file(folder, tmp_path):
    """Wrong implementations: a block that grows; results that the table of benchmarks tries to read."""
    begin, end = marks("learning")
    page, results = tmp_path / "results.md", tmp_path / "results"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    results.mkdir()
    found = gather(folder, COMMANDS)
    for _ in range(2):
        publish(found, folder, results, page)
        text = page.read_text()
        assert (
            text.startswith("before\n")
            and text.endswith("after\n")
            and "old" not in text
            and text.count("| grpo |") == 1
        )
        assert page.with_name("learning.svg").read_text() == draw(found)
    (kept,) = results.glob("*.json")
    assert kept.name == f"learning-{found['date'][:10]}.json" and newest(results) == []
    again = json.loads(kept.read_text())
    assert as_text(again) == as_text(found), "the file has everything that the table shows"
    page.write_text("no marks")
    with pytest.raises(UserError, match="expected one <!-- learning:begin -->"):
        publish(found, folder, None, page)


def test_the_figure_has_every_gain_at_its_place(folder):
    """Wrong implementations: an axis that leaves out 0 or an end of an interval; a method without a line."""
    found = gather(folder, COMMANDS)
    drawn = ElementTree.fromstring(draw(found))
    texts = [node.text for node in drawn.iter(f"{SVG}text")]
    methods = [name for name, row in found["methods"].items() if "gain" in row]
    assert [text for text in texts if text in methods] == methods and "0" in texts

    marks_at = {
        node.text: float(node.attrib["x"])
        for node in drawn.iter(f"{SVG}text")
        if node.attrib.get("text-anchor") == "middle"
    }
    first, *_, last = marks_at.items()
    per_point = (last[1] - first[1]) / (int(last[0]) - int(first[0]))
    centres = [float(node.attrib["cx"]) for node in drawn.iter(f"{SVG}circle")]
    for name, centre in zip(methods, centres, strict=True):
        points = 100 * found["methods"][name]["gain"]["over_prompts"][0]
        assert centre == pytest.approx(marks_at["0"] + points * per_point, abs=0.2)


def test_what_was_done_is_not_done_again(tmp_path, monkeypatch):
    """Wrong implementations: a result of a run that was stopped; a whole checkpoint that the command line
    does not resume from; the time of a run's last part as that of the run.
    """
    called: list[tuple[str, ...]] = []
    reached = iter([2, 3])

    def call(*arguments: str) -> float:
        called.append(arguments)
        (tmp_path / f"grpo/seed1/checkpoints/step_{next(reached)}").mkdir(parents=True)
        return 1.5

    monkeypatch.setattr(learning, "call", call)
    method = learning.Method(
        "grpo", "cards_grpo", ("--steps", "3"), measure=lambda checkpoint, run, seed: {"at": checkpoint.name}
    )
    with pytest.raises(
        UserError, match="seed1: stopped before step 3; run the same command again to continue"
    ):
        learning.train("grpo", method, 1, ["--model", "m"], tmp_path)
    assert not list(tmp_path.rglob(RESULT))
    for _ in range(2):
        learning.train("grpo", method, 1, ["--model", "m"], tmp_path)
    assert len(called) == 2 and "--resume" not in called[0] and "--resume" in called[1]
    kept = json.loads((tmp_path / "grpo/seed1" / RESULT).read_text())
    assert (kept["method"], kept["seed"], kept["seconds"], kept["at"]) == ("grpo", 1, None, "step_3")


def test_on_policy_methods_have_one_budget():
    """Wrong implementations: options that the command refuses; another task than the start's; more
    completions for one of them.
    """
    budgets, tasks = set(), set()
    for name, method in METHODS.items():
        words = command(method.command, method.recipe, "--model", "m", *method.options)
        config = resolve(options_of(method.command), words[words.index(method.command) + 1 :])
        if method.start in ("cards", "judged"):
            tasks.add((config.task, config.task_options))
        if isinstance(config, Grpo):
            budgets.add((config.steps, config.prompts, config.group, config.max_new_tokens, config.optim))
            assert method.measure is answers, name
    assert len(budgets) == 1 and len(tasks) == 1
    assert sum(m.command == "grpo" for m in METHODS.values()) >= 6
    assert {"ppo", "hpt", "joint", "grpo_dpo", "dpo", "sft continued"} <= METHODS.keys()
