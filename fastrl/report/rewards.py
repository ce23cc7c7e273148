"""A reward model's part of the report: its calibration, and its rewards of better and worse answers."""

from __future__ import annotations

import json
from pathlib import Path

from fastrl.errors import UserError
from fastrl.report.page import Html, figures, paragraph, table
from fastrl.report.plots import histogram, reliability
from fastrl.report.stats import Bin

FILE = "rewards.json"  # written at every evaluation (fastrl.trainer)


def held_out_rewards(folder: Path, plots: Path) -> list[Html]:
    """Reliability and a histogram of the last evaluation's rewards; nothing for a run without an evaluation.

    Raises UserError for a broken file.
    """
    file = folder / FILE
    if not file.is_file():
        return []
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        step = held["step"]
        ece = float(held["ece"])
        bins = [Bin(*row) for row in held["bins"]]
        rewards = {}
        for name, key in zip(held["names"], ("better", "worse"), strict=True):
            rewards[str(name)] = [float(r) for r in held[key]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: expected what an evaluation writes, got something else ({error})") from None

    curve = reliability(bins, title="Reliability", path=plots / "reliability.png")
    title = "Histogram of rewards"
    bars = histogram(
        rewards,
        title=title,
        unit="reward",
        path=plots / "rewards.png",
    )
    rows = [(f"{b.predicted:.1%}", f"{b.observed:.1%}", f"{b.size:,}") for b in bins]
    means = ", ".join(f"{name} {sum(r) / len(r):.3g}" for name, r in rewards.items() if r)
    result = f"After step {step}: expected calibration error {ece:.3f}; mean reward of the answers: {means}."
    caption = (
        "Probabilities that the model predicts (of a pair: sigmoid of the difference, in both orders), "
        "and how often they came true"
    )
    return [
        paragraph(result),
        figures([("Reliability", curve), (title, bars)]),
        table(
            ("Predicted", "Came true", "Predictions"),
            rows,
            caption=caption,
            numbers=True,
        ),
    ]
