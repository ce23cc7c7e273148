"""The plots of a report, in their order; each draws the metrics whose rows name it (see metrics.py)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from fastrl.report.metric import Kind, Metric
from fastrl.report.metrics import all_metrics


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of a report: its title and its unit; drawn where a run has any of its metrics.

    of    None for every run; else what the runs it is for have learned (`Run.kind`): their losses are not the
          same quantity
    keys  label of a curve -> its metric; filled in by `filled_panels`
    """

    title: str
    unit: str
    percent: bool = False
    of: Kind | None = None
    keys: dict[str, str] = field(default_factory=dict)


PANELS = (
    Panel("Reward", "mean reward of a completion"),
    Panel("Held-out accuracy", "answers correct", percent=True),
    Panel("Cross-entropy", "nats per token", of="text"),
    Panel("Policy loss", "loss", of="policy"),
    Panel("Preference loss", "loss", of="preferences"),
    Panel("Implicit rewards", "beta times the score"),
    Panel("Pairs ranked right", "pairs", percent=True),
    Panel("Likelihood", "nats per completion"),
    # reward models, alone and beside a policy
    Panel("Reward loss", "loss of a group", of="scores"),
    Panel("Comparisons won", "comparisons or verdicts", percent=True, of="scores"),
    Panel("Reward margin", "log-odds of the truth", of="scores"),
    Panel("Rewards of a step", "reward", of="scores"),
    Panel("Calibration error", "probability (ECE), held out", of="scores"),
    Panel("Proxy and oracle", "mean reward of a completion"),
    Panel("Proxy against oracle", "correlation within a step"),
    Panel("Fresh comparisons won", "pairs, before they are learned", percent=True),
    Panel("Groups without comparison", "groups that are all ties", percent=True),
    Panel("Loss of the reward model", "loss of a group"),
    Panel("Scale of the proxy", "reward model's units"),
    # policies
    Panel("Entropy", "nats per token"),
    Panel("Response length", "tokens, mean"),
    Panel("Clip fraction", "tokens clipped", percent=True),
    Panel("KL to the reference", "nats per token"),
    Panel("Value loss", "squared error, half"),
    Panel("Explained variance", "share of the returns' variance"),
    Panel("Returns and values", "reward's unit, mean of a token"),
    Panel("Sampler against trainer", "nats, mean size of the difference"),
    Panel("Groups without signal", "groups of equal rewards", percent=True),
    Panel("Cut-off completions", "completions at the limit", percent=True),
    # demonstrations, pairs and lists beside rewards
    Panel("What teaches a prompt", "prompts", percent=True),
    Panel("Weights of the terms", "weight in the loss"),
    Panel("Demonstrations", "nats per token"),
    Panel("Loss of pairs", "nats per pair"),
    Panel("Weight of the pairs", "weight of their loss"),
    Panel("Implicit rewards of pairs", "beta times the score"),
    Panel("Likelihood of pairs", "nats per completion"),
    Panel("Distance from the targets", "nats per group (KL)"),
    # every run
    Panel("Gradient norm", "L2 norm before clipping"),
    Panel("Gradient norm of the critic", "L2 norm before clipping"),
    Panel("Gradient norm of the reward model", "L2 norm before clipping"),
    Panel("Learning rate", "learning rate"),
    Panel("Throughput", "tokens per second"),
)


def filled_panels(rows: Iterable[Metric] | None = None) -> list[Panel]:
    """The panels with the metrics that they draw, out of `rows`, which are those of all commands by default.

    Raises KeyError for a row that names a panel that is not in PANELS.
    """
    curves: dict[str, dict[str, str]] = {panel.title: {} for panel in PANELS}
    if rows is None:
        rows = all_metrics()
    for row in rows:
        for title in row.panels:
            curves[title][row.label] = row.name

    filled = []
    for panel in PANELS:
        keys = curves[panel.title]
        filled.append(replace(panel, keys=keys))
    return filled
