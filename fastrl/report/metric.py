"""What a metric declares, and what follows from it: merging, and the text beside a progress bar."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["policy", "preferences", "scores", "text"]  # what a run learned
Need = Literal["reference", "correction"]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A mean: the sum called `of` over the sum called `per`, both over all micro-batches and processes.

    empty  its value where there is nothing to average; None leaves the metric out
    """

    of: str
    per: str
    empty: float | None = None


@dataclass(frozen=True, slots=True)
class Gist:
    """A metric in a report's first sentence, for runs of one kind; those of a higher rank come later."""

    kind: Kind
    label: str
    format: str = ".3g"
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    name      as it is logged
    key       what the learner's update calls it; None for numbers of the data source, an evaluation or the
              clock, which come under their own names and once a step
    parts     how the numbers of micro-batches and processes become one: a "sum", "max" or "min"; the "mean"
              over the tokens, or units, of all of them; a `Ratio` of sums; or "once", for what is computed
              after they are merged
    batches   how those of a step's optimizer steps become one
    needs     left out by a run without it, where the number would be no measurement
    panel     title of the panel that draws it, or titles where that depends on what the run learned
    label     of its curve in the panel
    shown     label and format beside the progress bar
    unless    a metric that is shown in its place, where the run logs that
    gists     in the first sentence of a report
    accuracy  where the first sentence gives it as held-out accuracy: what is added to these words
    marks     only runs of this kind have it
    """

    name: str
    key: str | None = None
    parts: Ratio | Literal["sum", "mean", "max", "min", "once"] = "once"
    batches: Literal["mean", "sum", "max", "first"] = "mean"
    needs: Need | None = None
    panel: str | tuple[str, ...] = ()
    label: str = ""
    shown: tuple[str, str] | None = None
    unless: str | None = None
    gists: tuple[Gist, ...] = ()
    accuracy: str | None = None
    marks: Kind | None = None

    @property
    def panels(self) -> tuple[str, ...]:
        """Titles of the panels that draw it."""
        if isinstance(self.panel, str):
            return (self.panel,)
        return self.panel


def ratios(rows: Sequence[Metric], sums: Mapping[str, float]) -> dict[str, float]:
    """The rows that are a `Ratio` of these sums, by the learner's key (or their name, without one)."""
    out = {}
    for row in rows:
        ratio = row.parts
        if not isinstance(ratio, Ratio) or ratio.of not in sums:
            continue
        value = sums[ratio.of] / sums[ratio.per] if sums[ratio.per] else ratio.empty
        if value is not None:
            out[row.key or row.name] = value
    return out


def over_batches(
    rows: Iterable[Metric], batches: Sequence[Mapping[str, float]], lacking: Collection[Need] = ()
) -> dict[str, float]:
    """The learner's metrics of a step's batches as one, under the names they are logged by.

    lacking  what the run does without: metrics that need it are left out
    """
    out = {}
    for row in rows:
        if row.key is None or row.needs in lacking:
            continue
        values = [batch[row.key] for batch in batches if row.key in batch]
        if values:
            out[row.name] = _merged(row, values)
    return out


def _merged(row: Metric, values: Sequence[float]) -> float:
    if row.batches == "first":
        return values[0]
    if row.batches == "max":
        return max(values)
    total = sum(values)
    return total if row.batches == "sum" else total / len(values)


def progress(rows: Iterable[Metric], metrics: Mapping[str, float]) -> str:
    """The metrics that are shown beside a progress bar, of those that the run has."""
    parts = []
    for row in rows:
        if row.shown is not None and row.name in metrics and row.unless not in metrics:
            label, form = row.shown
            parts.append(f"{label} {metrics[row.name]:{form}}")
    return "  ".join(parts)


def gists_of(rows: Iterable[Metric], kind: Kind) -> list[tuple[Gist, str]]:
    """What a report on this kind of run gives in its first sentence, in order, with the metrics' names."""
    found = []
    for row in rows:
        for gist in row.gists:
            if gist.kind == kind:
                found.append((gist, row.name))
    return sorted(found, key=lambda pair: pair[0].rank)


def kind_of(rows: Iterable[Metric], logged: Collection[str]) -> Kind:
    """What a run that logged these names learned; text where no metric marks anything else."""
    for row in rows:
        if row.marks is not None and row.name in logged:
            return row.marks
    return "text"
