"""The recipes are whole, and the demonstration counts what it says it counts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support import data_file
from transformers import AutoTokenizer

from fastrl import pipeline
from fastrl.bench.studies import demo, gsm8k_reward
from fastrl.config import Dpo, Grpo, Hybrid, Joint, Ppo, Reward, Sft
from fastrl.config.parse import load
from fastrl.model.decoder import Decoder
from fastrl.recipes import tokenizer as tokenizer_recipe
from fastrl.report.compare import as_text, build_comparison
from fastrl.report.stats import mean_interval
from fastrl.run.evaluate import Evaluation
from fastrl.tasks import Example, Score, load_run_task

COMMANDS = {
    "cards_sft": Sft,
    "cards_sft_continued": Sft,
    "cards_grpo": Grpo,
    "cards_dpo": Dpo,
    "cards_kto": Dpo,
    "cards_ppo": Ppo,
    "cards_hybrid": Hybrid,
    "cards_chord": Hybrid,
    "cards_fusion": Hybrid,
    "cards_contrast": Hybrid,
    "cards_joint": Joint,
    "cards_reward": Reward,
    "cards_ranking": Reward,
    "cards_outcome": Reward,
    "cards_process": Reward,
    "gsm8k_sft": Sft,
    "gsm8k_read": Sft,
    "gsm8k_reward": Reward,
}
PIPELINES = {"cards_sft_dpo_grpo": ["sft", "dpo", "grpo"]}


def evaluation(right: list[list[bool]]) -> Evaluation:
    """An evaluation whose prompt i has sampled answers right[i]; the greedy answer is the first of them."""
    scored = [[("x", Score(reward=float(r), correct=r, well_formed=True)) for r in row] for row in right]
    return Evaluation(
        [Example(prompt=f"p{i}") for i in range(len(right))], [row[0] for row in scored], scored
    )


def outcome(seed: int, start: list[list[bool]], grpo: list[list[bool]]) -> demo.Outcome:
    arms = {demo.START: evaluation(start), demo.CONTROL: evaluation(start), demo.GRPO: evaluation(grpo)}
    return demo.Outcome(seed, arms, dict.fromkeys(arms, 1.0))


def test_every_recipe_is_a_configuration_of_its_command():
    found = {p.stem for p in demo.RECIPES.glob("*.yaml")}
    assert found == set(COMMANDS) | set(PIPELINES)
    for name, command in COMMANDS.items():
        config = load(command, demo.RECIPES / f"{name}.yaml")
        assert isinstance(config, command) and config.model


def test_every_pipeline_is_made_of_stages_that_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where it writes its stages' resolved options
    for name, stages in PIPELINES.items():
        assert [stage.name for stage in pipeline.read_stages(demo.RECIPES / f"{name}.yaml")] == stages


def test_the_three_arms_share_task_and_model():
    """A control on another task, or a model with another vocabulary than the task's tokenizer, would compare
    nothing.
    """
    configs = [
        load(COMMANDS[n], demo.RECIPES / f"{n}.yaml")
        for n in ("cards_sft", "cards_sft_continued", "cards_grpo", "cards_dpo")
    ]
    assert len({(c.task, c.task_options) for c in configs}) == 1
    task = load_run_task(configs[0].task, configs[0].task_options)
    assert task is not None
    model = Decoder.from_config(json.loads((demo.RECIPES / "cards.config.json").read_text()))
    assert model.config.vocab_size == len(task.tokenizer())
    problems = {
        (tuple(sorted(e.fields["numbers"])), e.fields["target"])
        for e in (task.example("test", i) for i in range(demo.PROMPTS))
    }
    assert len(problems) == demo.PROMPTS >= 500, (
        "each test prompt must be another problem, or the intervals are too narrow"
    )


def test_gains_are_paired_by_prompt_and_averaged_over_seeds_first():
    """Taking the seeds' prompts for independent ones would make the interval of identical seeds sqrt(2) too
    narrow.
    """
    start = [[False, False], [True, False], [False, False], [True, True]]
    grpo = [[True, False], [True, True], [False, False], [True, True]]
    one, two = outcome(0, start, grpo), outcome(1, start, grpo)
    assert one.gain(demo.GRPO) == [0.5, 0.5, 0.0, 0.0]
    assert demo.pooled([one.gain(demo.GRPO), two.gain(demo.GRPO)]) == mean_interval([0.5, 0.5, 0.0, 0.0])


def test_the_comparison_names_every_arm_and_seed(tmp_path):
    outcomes = [outcome(s, [[False, True]] * 4, [[True, True]] * 4) for s in (0, 1)]
    it = demo.summarise(outcomes, tmp_path)
    text = as_text(it)
    for arm in (demo.START, demo.CONTROL, demo.GRPO):
        assert arm in text
    assert it.pooled()[demo.GRPO].mean == pytest.approx(0.5) and it.pooled()[demo.CONTROL].mean == 0
    assert it.answers[0].prompt == "p0" and it.answers[0].after_correct
    page = build_comparison(replace(it, runs={}), tmp_path)
    assert page.read_text().count("GRPO") > 1


def test_an_earlier_demonstration_is_moved_aside(tmp_path):
    folder = tmp_path / "demo"
    (folder / "seed0" / "sft" / "checkpoints" / "step_1").mkdir(parents=True)
    assert demo.fresh(folder) == folder and not folder.exists()
    assert (tmp_path / "demo-1" / "seed0").exists()


def test_the_tokenizer_recipe_makes_a_hugging_face_tokenizer(tmp_path, capsys):
    file = data_file("gsm8k", "train.jsonl")
    few = tmp_path / "few.jsonl"
    few.write_text("".join(file.read_text().splitlines(keepends=True)[:50]))
    out = tmp_path / "tokenizer"
    assert (
        tokenizer_recipe.main(
            [str(few), "--columns", "question", "answer", "--vocab-size", "300", "--output", str(out)]
        )
        == 0
    )
    text = "48/2 = <<48/2=24>>24 clips"
    made = AutoTokenizer.from_pretrained(out)
    assert made.decode(made.encode(text)) == text and len(made) == 300
    assert tokenizer_recipe.main([str(few), "--columns", "prompt", "--output", str(out)]) == 1
    assert "few.jsonl:1: expected text in column 'prompt', got NoneType" in capsys.readouterr().err


def test_graded_solutions_are_grouped_by_problem(tmp_path, capsys):
    """Wrong implementations: verdicts of other solutions; problems in which there is nothing to compare; a
    missing file as a traceback.
    """
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "so 2\n#### 2"}) + "\n")
    assert gsm8k_reward.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "no file" in capsys.readouterr().err

    def line(*right):
        return {"question": "1+2?"} | {
            n: {"solution": f"{n} {r}", "is_correct": r}
            for n, r in zip(gsm8k_reward.GRADED, right, strict=True)
        }

    rows = [line(True, False, False, True), line(True, True, True, True)]
    (tmp_path / "model_solutions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert gsm8k_reward.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    (group,) = [json.loads(x) for x in (tmp_path / "out/groups.jsonl").read_text().splitlines()]
    assert (
        [c.endswith("True") for c in group["completions"]]
        == [True, False, False, True]
        == [s == 1.0 for s in group["scores"]]
    )
    assert json.loads((tmp_path / "out/solutions.jsonl").read_text()) == {
        "prompt": "Question: 1+1?\nAnswer:\n",
        "completion": "so 2\nA: 2",
    }


def test_several_seeds_share_one_folder(tmp_path, monkeypatch, capsys):
    """Wrong implementation: the folder is cleared before every seed, and the report finds only the last one's
    runs.
    """
    folder = tmp_path / "demo"

    def run_seed(seed, place):
        for name in demo.FOLDERS.values():
            (place / name / "checkpoints" / "step_1").mkdir(parents=True)
            (place / name / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "loss": 0.5}\n')
        return outcome(seed, [[False, True]] * 4, [[True, True]] * 4)

    monkeypatch.setattr(demo, "run_seed", run_seed)
    assert demo.main(["--output-dir", str(folder), "--seeds", "2"]) == 0
    assert (folder / "seed0").exists() and (folder / "seed1").exists() and (folder / "report.html").exists()
    assert "GRPO" in capsys.readouterr().out
