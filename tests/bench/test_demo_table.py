"""The demonstration's table in docs/results.md."""

from __future__ import annotations

from fastrl.bench.results_page import marks
from fastrl.bench.studies.demo_table import CONTROL, DEMO, GRPO, START, demo_block
from fastrl.report.compare import Arm, Comparison, Seed
from fastrl.report.stats import Estimate, mean_interval


def test_the_demonstration_block_has_means_and_intervals():
    """Wrong implementations: a seed's number for the mean; the control's gains taken for GRPO's."""

    def seed(number: int, shift: float) -> Seed:
        shares = {START: 0.25, CONTROL: 0.27, GRPO: 0.4 + shift}
        arms = [
            Arm(name=name, greedy=Estimate(share + 0.1, 0, 1), sampled=Estimate(share, 0, 1))
            for name, share in shares.items()
        ]
        gains = {
            CONTROL: Estimate(0.02, 0.01, 0.03),
            GRPO: Estimate(0.15 + shift, 0.1, 0.2),
        }
        return Seed(seed=number, arms=arms, gains=gains)

    pooled = {CONTROL: Estimate(0.02, 0.01, 0.03), GRPO: Estimate(0.16, 0.14, 0.18)}
    seeds = [seed(0, 0.0), seed(1, 0.02)]
    block = demo_block(Comparison(title="t", prompts=3, seeds=seeds, answers=[], gains=pooled))
    lines = block.splitlines()
    assert (lines[0], lines[-1]) == marks(DEMO)
    assert "| SFT start | 35.0% | 25.0% |  |" in lines
    assert "| GRPO from that start | 51.0% | 41.0% | +16.0 points, +14.0 to +18.0 |" in lines
    ends = mean_interval([0.15, 0.17])
    assert lines[-2] == (
        "GRPO's gain in single seeds: +15.0, +17.0 points; 95% interval over the seeds: "
        f"{100 * ends.lo:+.1f} to {100 * ends.hi:+.1f}."
    )
