"""Start, control and method side by side on unseen prompts, as a page and as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastrl.report.page import Html, figures, paragraph, section, table, text, verdict
from fastrl.report.plots import IntervalRow, intervals
from fastrl.report.report import panels, prompt_text, read_run, setup_section, write_page
from fastrl.report.stats import Estimate, mean_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One model on the test prompts.

    greedy, sampled   fraction of answers correct, and its 95% interval
    well_formed       fraction of sampled answers of the right form, or None
    seconds           training time, s, or None
    """

    name: str
    greedy: Estimate
    sampled: Estimate
    well_formed: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """One seed.

    gains  paired difference in sampled accuracy of each later arm to the first, by arm name
    """

    seed: int
    arms: Sequence[Arm]
    gains: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One prompt, answered before and after training."""

    prompt: object
    before: str
    after: str
    before_correct: bool | None = None
    after_correct: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The results of a demonstration.

    prompts   unseen prompts that each arm answered
    gains     arm name -> difference to the first arm, paired by prompt, all seeds pooled; None: the mean of
              the seeds' differences with Student's interval over seeds, which includes the variation between
              seeds
    runs      curve name -> run folder
    """

    title: str
    prompts: int
    seeds: Sequence[Seed]
    answers: Sequence[Answer] = ()
    runs: Mapping[str, Path] = field(default_factory=dict)
    gains: Mapping[str, Estimate] | None = None
    notes: Sequence[str] = ()

    def pooled(self) -> Mapping[str, Estimate]:
        """The paired difference to the first arm by arm name, over all seeds."""
        if self.gains is not None:
            return self.gains
        if len(self.seeds) == 1:
            return self.seeds[0].gains
        pooled = {}
        for name in self.seeds[0].gains:
            pooled[name] = mean_interval([s.gains[name].mean for s in self.seeds])
        return pooled


def build_comparison(it: Comparison, out: str | Path) -> Path:
    """Write report.html and plots/ of a comparison into `out`; returns the path of report.html."""
    out = Path(out)
    runs = {name: read_run(Path(folder)) for name, folder in it.runs.items()}
    title = f"Accuracy on {it.prompts:,} unseen prompts"
    unit = "answers correct, 95% interval"
    picture = intervals(
        _rows(it),
        title=title,
        unit=unit,
        path=out / "plots" / "accuracy.png",
    )
    accuracy = figures([(title, picture)], wide=True)
    notes = [paragraph(note) for note in it.notes]
    result = section("Result", accuracy, _arms(it), _seeds(it), *notes)
    curves = section("Curves", figures(panels(runs, out / "plots")))
    answers = section("Answers before and after", _answers(it))
    setup = setup_section(runs) if runs else Html("")
    return write_page(
        out,
        it.title,
        headline(it),
        result,
        curves,
        answers,
        setup,
    )


def headline(it: Comparison) -> str:
    """The result in sentences: each arm's sampled accuracy against the first arm's."""
    first = it.seeds[0].arms[0].name
    seeds = f"mean of {len(it.seeds)} seeds" if len(it.seeds) > 1 else f"seed {it.seeds[0].seed}"
    accuracy = {name: pooled["sampled"].mean for name, pooled in _pooled_arms(it).items()}
    answers = f"sampled answers to {it.prompts:,} unseen prompts are correct"
    sentences = [f"{first}: {accuracy[first]:.1%} of {answers} ({seeds})."]
    for name, gain in it.pooled().items():
        interval = f"95% interval {100 * gain.lo:+.1f} to {100 * gain.hi:+.1f}"
        sentences.append(f"{name}: {accuracy[name]:.1%} ({100 * gain.mean:+.1f} points; {interval}).")
    return " ".join(sentences)


def as_text(it: Comparison) -> str:
    """The comparison for a terminal: every seed, every arm, and the paired differences in percentage
    points.
    """
    width = max(len(arm.name) for seed in it.seeds for arm in seed.arms)
    columns = f"{'greedy':>22}  {'sampled':>22}  well-formed  difference, sampled"
    lines = [it.title, headline(it), "", f"{'seed':>5}  {'':<{width}}  {columns}"]
    for seed in it.seeds:
        for arm in seed.arms:
            lines.append(f"{seed.seed:>5}  {arm.name:<{width}}  {_arm_line(arm, seed.gains)}".rstrip())
    if len(it.seeds) > 1:
        lines += [f"  all  {name:<{width}}  {_points(gain)} points" for name, gain in it.pooled().items()]
    return "\n".join([*lines, *it.notes])


def _arm_line(arm: Arm, gains: Mapping[str, Estimate]) -> str:
    gain = _points(gains[arm.name]) if arm.name in gains else ""
    formed = "" if arm.well_formed is None else f"{arm.well_formed:.1%}"
    return f"{_share(arm.greedy):>22}  {_share(arm.sampled):>22}  {formed:>11}  {gain}"


# --- the parts --------------------------------------------------------------------------------------
def _by_arm(it: Comparison) -> dict[str, list[Arm]]:
    """Each arm's results, one per seed."""
    by_arm: dict[str, list[Arm]] = {arm.name: [] for arm in it.seeds[0].arms}
    for seed in it.seeds:
        for arm in seed.arms:
            by_arm[arm.name].append(arm)
    return by_arm


def _pooled_arms(it: Comparison) -> dict[str, dict[str, Estimate]]:
    """Accuracy by arm and kind: a single seed's own interval, or the mean of the seeds with the interval over
    seeds.
    """
    pooled = {}
    for name, arms in _by_arm(it).items():
        greedy = [arm.greedy for arm in arms]
        sampled = [arm.sampled for arm in arms]
        pooled[name] = {"greedy": _pool(greedy), "sampled": _pool(sampled)}
    return pooled


def _pool(estimates: Sequence[Estimate]) -> Estimate:
    if len(estimates) == 1:
        return estimates[0]
    return mean_interval([e.mean for e in estimates])


def _rows(it: Comparison) -> list[IntervalRow]:
    by_arm = _by_arm(it)
    rows = []
    for name, estimates in _pooled_arms(it).items():
        singles: dict[str, list[float]] = {}
        if len(it.seeds) > 1:
            singles["greedy"] = [arm.greedy.mean for arm in by_arm[name]]
            singles["sampled"] = [arm.sampled.mean for arm in by_arm[name]]
        rows.append(
            IntervalRow(
                label=name,
                estimates=estimates,
                singles=singles,
            )
        )
    return rows


def _arms(it: Comparison) -> Html:
    pooled = _pooled_arms(it)
    gains = it.pooled()
    rows = []
    for name, arms in _by_arm(it).items():
        formed = [arm.well_formed for arm in arms if arm.well_formed is not None]
        seconds = [arm.seconds for arm in arms if arm.seconds is not None]
        greedy = _share(pooled[name]["greedy"])
        sampled = _share(pooled[name]["sampled"])
        gain = _points(gains[name]) if name in gains else ""
        share = f"{sum(formed) / len(formed):.1%}" if formed else ""
        time = f"{sum(seconds) / len(seconds):.0f} s" if seconds else ""
        rows.append((name, greedy, sampled, gain, share, time))

    several = len(it.seeds) > 1
    over = f"Seed {it.seeds[0].seed}, 95% intervals"
    if several:
        over = f"Mean of {len(it.seeds)} seeds with its 95% interval over seeds"
    how = "over seeds" if several and it.gains is None else "paired by prompt"
    caption = f"{over}. Difference: points of sampled accuracy to the first row, 95% interval {how}."
    header = ("Model", "Greedy", "Sampled", "Difference", "Well-formed", "Training time")
    return table(header, rows, caption=caption, numbers=True)


def _seeds(it: Comparison) -> Html:
    if len(it.seeds) < 2:
        return Html("")
    first, *others = [arm.name for arm in it.seeds[0].arms]
    rows = []
    for seed in it.seeds:
        sampled = {arm.name: arm.sampled.mean for arm in seed.arms}
        accuracy = [f"{sampled[name]:.1%}" for name in (first, *others)]
        gains = [_points(seed.gains[name]) for name in others]
        rows.append((f"seed {seed.seed}", *accuracy, *gains))
    header = ("Seed", first, *others, *(f"{name}: difference" for name in others))
    caption = "Sampled accuracy by seed; differences in percentage points with 95% intervals."
    return table(header, rows, caption=caption, numbers=True)


def _answers(it: Comparison) -> Html:
    rows = []
    for answer in it.answers:
        before = Html(f"{text(answer.before)}\n{verdict(answer.before_correct)}")
        after = Html(f"{text(answer.after)}\n{verdict(answer.after_correct)}")
        rows.append((prompt_text(answer.prompt), before, after))
    return table(("Prompt", "Before", "After"), rows, sample=True)


def _share(e: Estimate) -> str:
    return f"{e.mean:.1%} [{e.lo:.1%}, {e.hi:.1%}]"


def _points(e: Estimate) -> str:
    return f"{100 * e.mean:+.1f} [{100 * e.lo:+.1f}, {100 * e.hi:+.1f}]"
