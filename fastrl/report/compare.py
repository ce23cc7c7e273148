"""Start, control and method side by side on unseen prompts: the numbers of a demonstration as a page and as
plain text.
"""

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
    """One seed: its arms, and the paired difference in sampled accuracy of each later arm to the first, by
    arm name.
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
    """Everything a demonstration shows.

    prompts   unseen prompts each arm answered
    gains     arm name -> difference to the first arm, paired by prompt, all seeds pooled; None takes the mean
              of the seeds' own differences with Student's interval over seeds, which also counts how much
              seeds differ
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
        return {name: mean_interval([s.gains[name].mean for s in self.seeds]) for name in self.seeds[0].gains}


def build_comparison(it: Comparison, out: str | Path) -> Path:
    """Write report.html and plots/ of a comparison into `out`; returns the path of report.html."""
    out = Path(out)
    runs = {name: read_run(Path(folder)) for name, folder in it.runs.items()}
    title = f"Accuracy on {it.prompts:,} unseen prompts"
    picture = intervals(
        _rows(it), title=title, unit="answers correct, 95% interval", path=out / "plots" / "accuracy.png"
    )
    return write_page(
        out,
        it.title,
        headline(it),
        section(
            "Result", figures([(title, picture)], wide=True), _arms(it), _seeds(it), *map(paragraph, it.notes)
        ),
        section("Curves", figures(panels(runs, out / "plots"))),
        section("Answers before and after", _answers(it)),
        setup_section(runs) if runs else Html(""),
    )


def headline(it: Comparison) -> str:
    """What came out, in sentences: each arm's sampled accuracy against the first arm's."""
    first = it.seeds[0].arms[0].name
    seeds = f"mean of {len(it.seeds)} seeds" if len(it.seeds) > 1 else f"seed {it.seeds[0].seed}"
    accuracy = {name: pooled["sampled"].mean for name, pooled in _pooled_arms(it).items()}
    said = [
        f"{first}: {accuracy[first]:.1%} of sampled answers to {it.prompts:,} unseen prompts are "
        f"correct ({seeds})."
    ]
    said += [
        f"{name}: {accuracy[name]:.1%} ({100 * g.mean:+.1f} points; "
        f"95% interval {100 * g.lo:+.1f} to {100 * g.hi:+.1f})."
        for name, g in it.pooled().items()
    ]
    return " ".join(said)


def as_text(it: Comparison) -> str:
    """The comparison for a terminal: every seed, every arm, and the paired differences in percentage
    points.
    """
    width = max(len(a.name) for s in it.seeds for a in s.arms)
    lines = [
        it.title,
        headline(it),
        "",
        f"{'seed':>5}  {'':<{width}}  {'greedy':>22}  {'sampled':>22}  well-formed  difference, sampled",
    ]
    for s in it.seeds:
        for arm in s.arms:
            gain = _points(s.gains[arm.name]) if arm.name in s.gains else ""
            formed = "" if arm.well_formed is None else f"{arm.well_formed:.1%}"
            row = (
                f"{s.seed:>5}  {arm.name:<{width}}  {_share(arm.greedy):>22}  {_share(arm.sampled):>22}  "
                f"{formed:>11}  {gain}"
            )
            lines.append(row.rstrip())
    if len(it.seeds) > 1:
        lines += [f"  all  {name:<{width}}  {_points(gain)} points" for name, gain in it.pooled().items()]
    return "\n".join([*lines, *it.notes])


# --- the parts --------------------------------------------------------------------------------------
def _by_arm(it: Comparison) -> dict[str, list[Arm]]:
    """Each arm's results, one per seed."""
    names = [a.name for a in it.seeds[0].arms]
    return {name: [a for s in it.seeds for a in s.arms if a.name == name] for name in names}


def _pooled_arms(it: Comparison) -> dict[str, dict[str, Estimate]]:
    """Accuracy by arm and kind: a single seed's own interval, or the mean over seeds with the interval over
    seeds.
    """
    pooled = {}
    for name, arms in _by_arm(it).items():
        kinds = {"greedy": [a.greedy for a in arms], "sampled": [a.sampled for a in arms]}
        pooled[name] = {
            k: e[0] if len(e) == 1 else mean_interval([x.mean for x in e]) for k, e in kinds.items()
        }
    return pooled


def _rows(it: Comparison) -> list[IntervalRow]:
    arms = _by_arm(it)
    several = len(it.seeds) > 1
    return [
        IntervalRow(
            label=name,
            estimates=estimates,
            singles={
                "greedy": [a.greedy.mean for a in arms[name]],
                "sampled": [a.sampled.mean for a in arms[name]],
            }
            if several
            else {},
        )
        for name, estimates in _pooled_arms(it).items()
    ]


def _arms(it: Comparison) -> Html:
    pooled, gains = _pooled_arms(it), it.pooled()
    rows = []
    for name, arms in _by_arm(it).items():
        formed = [a.well_formed for a in arms if a.well_formed is not None]
        seconds = [a.seconds for a in arms if a.seconds is not None]
        rows.append(
            (
                name,
                _share(pooled[name]["greedy"]),
                _share(pooled[name]["sampled"]),
                _points(gains[name]) if name in gains else "",
                f"{sum(formed) / len(formed):.1%}" if formed else "",
                f"{sum(seconds) / len(seconds):.0f} s" if seconds else "",
            )
        )
    several = len(it.seeds) > 1
    over = (
        f"Mean of {len(it.seeds)} seeds with its 95% interval over seeds"
        if several
        else f"Seed {it.seeds[0].seed}, 95% intervals"
    )
    how = "over seeds" if several and it.gains is None else "paired by prompt"
    caption = f"{over}. Difference: points of sampled accuracy to the first row, 95% interval {how}."
    return table(
        ("Model", "Greedy", "Sampled", "Difference", "Well-formed", "Training time"),
        rows,
        caption=caption,
        numbers=True,
    )


def _seeds(it: Comparison) -> Html:
    if len(it.seeds) < 2:
        return Html("")
    names = [a.name for a in it.seeds[0].arms]
    rows = []
    for s in it.seeds:
        by_name = {a.name: a for a in s.arms}
        accuracy = [f"{by_name[n].sampled.mean:.1%}" for n in names]
        rows.append((f"seed {s.seed}", *accuracy, *(_points(s.gains[n]) for n in names[1:])))
    header = ("Seed", *names, *(f"{n}: difference" for n in names[1:]))
    return table(
        header,
        rows,
        caption="Sampled accuracy by seed; differences in percentage points with 95% intervals.",
        numbers=True,
    )


def _answers(it: Comparison) -> Html:
    rows = [
        (
            prompt_text(a.prompt),
            Html(f"{text(a.before)}\n{verdict(a.before_correct)}"),
            Html(f"{text(a.after)}\n{verdict(a.after_correct)}"),
        )
        for a in it.answers
    ]
    return table(("Prompt", "Before", "After"), rows, sample=True)


def _share(e: Estimate) -> str:
    return f"{e.mean:.1%} [{e.lo:.1%}, {e.hi:.1%}]"


def _points(e: Estimate) -> str:
    return f"{100 * e.mean:+.1f} [{100 * e.lo:+.1f}, {100 * e.hi:+.1f}]"
