"""The page and the text of a demonstration: the arms, the seeds, and what is compared with what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrl.report.compare import Answer, Arm, Comparison, Seed, as_text, build_comparison, headline
from fastrl.report.stats import Estimate, mean_interval


def arm(name: str, accuracy: float) -> Arm:
    e = Estimate(accuracy, accuracy - 0.03, accuracy + 0.03)
    return Arm(name=name, greedy=e, sampled=e, well_formed=0.99, seconds=60.0)


def seed(number: int, start: float, gain: float) -> Seed:
    gains = {"control": Estimate(0.01, -0.01, 0.03), "GRPO": Estimate(gain, gain - 0.02, gain + 0.02)}
    return Seed(
        seed=number,
        arms=[arm("start", start), arm("control", start + 0.01), arm("GRPO", start + gain)],
        gains=gains,
    )


def comparison(seeds: int, folder: Path | None = None, **more) -> Comparison:
    runs = {}
    if folder is not None:
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps({"step": s, "time": 1.0, "reward": 0.1 * s}) + "\n" for s in range(1, 5))
        )
        runs = {"GRPO": folder}
    answers = [
        Answer(prompt="1 2 <3>", before="1+2", after="1*2*3", before_correct=False, after_correct=True)
    ]
    all_seeds = [seed(i, 0.3 + 0.01 * i, 0.06 + 0.01 * i) for i in range(seeds)]
    return Comparison(title="Cards", prompts=1000, seeds=all_seeds, answers=answers, runs=runs, **more)


def test_the_difference_over_seeds_is_the_mean_of_paired_differences():
    """Wrong implementation: the interval of one seed for all of them, or the difference of the two means'
    unpaired intervals.
    """
    over = mean_interval([0.06, 0.07, 0.08])
    assert comparison(3).pooled()["GRPO"] == pytest.approx(over)
    assert comparison(1).pooled()["GRPO"] == pytest.approx((0.06, 0.04, 0.08))
    mine = {"GRPO": Estimate(0.05, 0.04, 0.06), "control": Estimate(0.0, -0.01, 0.01)}
    assert comparison(3, gains=mine).pooled() == mine


def test_the_headline_gives_each_arm_against_the_first():
    said = headline(comparison(1))
    assert said.startswith("start: 30.0% of sampled answers to 1,000 unseen prompts are correct (seed 0).")
    assert "control: 31.0% (+1.0 points; 95% interval -1.0 to +3.0)." in said
    assert "GRPO: 36.0% (+6.0 points; 95% interval +4.0 to +8.0)." in said


def test_the_text_shows_every_seed_and_the_control():
    told = as_text(comparison(3, notes=["Equal wall time."])).splitlines()
    rows = [line.split() for line in told]
    assert [r[:2] for r in rows if r and r[0].isdigit()] == [
        [str(s), name] for s in range(3) for name in ("start", "control", "GRPO")
    ]
    assert "+8.0 [+6.0, +10.0]" in next(line for line in told if line.startswith("    2  GRPO"))
    assert [r[1] for r in rows if r and r[0] == "all"] == ["control", "GRPO"]
    assert told[-1] == "Equal wall time."


def test_the_page_has_the_result_the_curves_and_the_answers_side_by_side(tmp_path):
    path = build_comparison(comparison(3, tmp_path / "run"), tmp_path / "out")
    source = path.read_text(encoding="utf-8")
    assert {p.name for p in (tmp_path / "out" / "plots").iterdir()} == {"accuracy.png", "reward.png"}
    assert "Accuracy on 1,000 unseen prompts" in source
    assert all(f"seed {i}" in source for i in range(3))
    assert "1 2 &lt;3&gt;" in source
    assert (
        source.index("1+2") < source.index("wrong") < source.index("1*2*3") < source.index("correct</span>")
    )
    assert "GRPO, sampled: 38.0%" in source, "the figure's description in words"


def test_one_seed_needs_no_table_of_seeds(tmp_path):
    source = build_comparison(comparison(1), tmp_path / "out").read_text(encoding="utf-8")
    assert "Sampled accuracy by seed" not in source
    assert "Seed 0, 95% intervals" in source
