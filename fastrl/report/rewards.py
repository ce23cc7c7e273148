"""A reward model's part of the report: is it calibrated, and how far apart are its rewards of better and
worse answers.
"""

from __future__ import annotations

import json
from pathlib import Path

from fastrl.errors import UserError
from fastrl.report.page import Html, figures, paragraph, table
from fastrl.report.plots import histogram, reliability
from fastrl.report.stats import Bin

FILE = "rewards.json"  # written at every evaluation (fastrl.trainer)


def held_out_rewards(folder: Path, plots: Path) -> list[Html]:
    """Reliability and a histogram of the last evaluation's rewards; nothing for a run without any.  Raises
    UserError for a broken file.
    """
    if not (folder / FILE).is_file():
        return []
    try:
        held = json.loads((folder / FILE).read_text(encoding="utf-8"))
        step, ece, names = held["step"], float(held["ece"]), [str(name) for name in held["names"]]
        bins = [Bin(*row) for row in held["bins"]]
        rewards = {
            name: [float(r) for r in held[key]] for name, key in zip(names, ("better", "worse"), strict=True)
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / FILE}: expected what an evaluation writes, got something else ({error})"
        ) from None
    pictures = [
        ("Reliability", reliability(bins, title="Reliability", path=plots / "reliability.png")),
        (
            "Histogram of rewards",
            histogram(rewards, title="Histogram of rewards", unit="reward", path=plots / "rewards.png"),
        ),
    ]
    rows = [(f"{b.predicted:.1%}", f"{b.observed:.1%}", f"{b.size:,}") for b in bins]
    means = ", ".join(f"{name} {sum(r) / len(r):.3g}" for name, r in rewards.items() if r)
    said = f"After step {step}: expected calibration error {ece:.3f}; mean reward of the answers: {means}."
    caption = (
        "Probabilities that the model gives (of a pair: sigmoid of the difference, both ways round), "
        "and how often they came true"
    )
    return [
        paragraph(said),
        figures(pictures),
        table(("Predicted", "Came true", "Predictions"), rows, caption=caption, numbers=True),
    ]
