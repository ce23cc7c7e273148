"""The demonstration's table in docs/results.md."""

from __future__ import annotations

from collections.abc import Sequence

from fastrl.bench.results_page import marks
from fastrl.report.compare import Comparison
from fastrl.report.stats import Estimate, mean_interval

DEMO = "demo"  # the name of the table's block
START, CONTROL, GRPO = "SFT start", "SFT continued", "GRPO"
LABELS = {
    START: START,
    CONTROL: "SFT continued for the same wall time (control)",
    GRPO: "GRPO from that start",
}


def demo_block(comparison: Comparison) -> str:
    """Everything between the marks of the demonstration, marks included."""
    begin, end = marks(DEMO)
    count = len(comparison.seeds)
    of = f"mean of {count} seeds" if count > 1 else "one seed"
    head = f"| {of} (`make demo-seeds`) | greedy | sampled at temperature 1 | difference, 95% interval |"
    lines = [begin, head, "|---|---|---|---|"]

    for name, label in LABELS.items():
        arms = [arm for seed in comparison.seeds for arm in seed.arms if arm.name == name]
        greedy = _mean([arm.greedy.mean for arm in arms])
        sampled = _mean([arm.sampled.mean for arm in arms])
        gain = comparison.pooled().get(name)
        lines.append(f"| {label} | {greedy:.1%} | {sampled:.1%} | {_points(gain)} |")

    if count > 1:
        single = [seed.gains[GRPO].mean for seed in comparison.seeds]
        shown = ", ".join(f"{100 * gain:+.1f}" for gain in single)
        over_seeds = _ends(mean_interval(single))
        lines += [
            "",
            f"GRPO's gain in single seeds: {shown} points; 95% interval over the seeds: {over_seeds}.",
        ]
    return "\n".join([*lines, end])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _points(gain: Estimate | None) -> str:
    return "" if gain is None else f"{100 * gain.mean:+.1f} points, {_ends(gain)}"


def _ends(gain: Estimate) -> str:
    return f"{100 * gain.lo:+.1f} to {100 * gain.hi:+.1f}"
