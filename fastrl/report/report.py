"""report.html and plots/ from the files of a run folder, or of several folders side by side.

Reads metrics.jsonl, samples.jsonl, config.yaml and environment.txt (log.py says what is in them); works while
the run goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastrl.errors import UserError
from fastrl.report.page import Html, figures, folded, page, section, table, text, verdict
from fastrl.report.panels import GISTS, KINDS, PANELS, Panel
from fastrl.report.plots import Picture, Series, lines
from fastrl.report.rewards import held_out_rewards

SHOWN_SAMPLES = 5
EDGE = 10  # steps averaged at each end of a run for "from ... to ..."


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What a run folder holds, read."""

    folder: Path
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: str
    environment: str

    @property
    def kind(self) -> str:
        """What the run learned: a "policy" from rewards, "preferences", "scores" (a reward model),
        or "text".
        """
        return next((kind for kind, key in KINDS.items() if any(key in r for r in self.rows)), "text")

    def series(self, key: str, name: str = "", *, colour: int = 0, dash: int = 0) -> Series:
        """The finite values of one metric over steps, with its interval where K_lo and K_hi stand beside
        it.
        """
        rows = [r for r in self.rows if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
        bounds = {end: [r.get(f"{key}_{end}") for r in rows] for end in ("lo", "hi")}
        whole = bool(rows) and all(v is not None for values in bounds.values() for v in values)
        ends: dict[str, Any] = bounds if whole else {}
        return Series(
            name=name, x=[r["step"] for r in rows], y=[r[key] for r in rows], colour=colour, dash=dash, **ends
        )


class ReportOptions(Protocol):
    """The options of `fastrl report`."""

    @property
    def folders(self) -> tuple[str, ...]: ...
    @property
    def output(self) -> str | None: ...


def run(config: ReportOptions) -> None:
    """`fastrl report`: one folder gets its own report; several are compared in `output`."""
    folders = [Path(f) for f in config.folders]
    if not folders:
        raise UserError("report: expected a run folder, got none; try `fastrl report runs/latest`")
    if len(folders) == 1:
        print(build(folders[0], Path(config.output) if config.output else None))
        return
    if not config.output:
        raise UserError(f"report: comparing {len(folders)} folders needs --output FOLDER")
    names = {f.name: f for f in folders}
    print(
        compare_runs(
            names if len(names) == len(folders) else {str(f): f for f in folders}, Path(config.output)
        )
    )


def build(folder: str | Path, out: Path | None = None) -> Path:
    """Write the report of a run folder into it (or into `out`) and return the path of report.html.

    Raises:  UserError for a folder without metrics.jsonl, an empty one, or a line in it that is not JSON.
    """
    it, out = read_run(Path(folder)), out or Path(folder)
    pictures = panels({"": it}, out / "plots")
    name = it.folder.resolve().name
    return write_page(
        out,
        f"Run report: {name}",
        lead(it),
        section("Curves", figures(pictures)),
        section("Held-out rewards", *held_out_rewards(it.folder, out / "plots")),
        section("Sample answers", *_samples(it)),
        section("All metrics", _metrics(it)),
        section(
            "Set-up",
            folded("Resolved configuration (config.yaml)", it.config),
            folded("Environment", it.environment),
        ),
    )


def compare_runs(folders: Mapping[str, Path], out: Path) -> Path:
    """Write a report of the curves of several runs, name -> folder, into `out`; returns the path of its
    report.html.
    """
    runs = {name: read_run(folder) for name, folder in folders.items()}
    lead = f"{len(runs)} runs: {', '.join(runs)}."
    return write_page(
        out,
        "Comparison of runs",
        lead,
        section("Curves", figures(panels(runs, out / "plots"))),
        setup_section(runs),
    )


def read_run(folder: Path) -> RunFiles:
    """The files of a run folder.  Raises UserError where it is none."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{folder}: expected a run folder, but it has no metrics.jsonl")
    rows = _json_lines(metrics)
    if not rows:
        raise UserError(f"{metrics}: holds no step yet")
    samples = _json_lines(folder / "samples.jsonl")
    return RunFiles(
        folder, rows, samples, *(_text(folder / name) for name in ("config.yaml", "environment.txt"))
    )


def panels(runs: Mapping[str, RunFiles], folder: Path) -> list[tuple[str, Picture]]:
    """Every panel some run has values for, drawn with one curve per run and metric and saved as
    `folder`/<title>.png.
    """
    drawn = []
    for panel in PANELS:
        found = _curves(panel, runs)
        if found:
            path = folder / (panel.title.lower().replace(" ", "-") + ".png")
            drawn.append(
                (
                    panel.title,
                    lines(found, title=panel.title, unit=panel.unit, path=path, percent=panel.percent),
                )
            )
    return drawn


def setup_section(runs: Mapping[str, RunFiles]) -> Html:
    """The section with every run's configuration and environment."""
    texts = [folded(f"{name}: resolved configuration", it.config) for name, it in runs.items()]
    first = next(iter(runs.values()))
    return section("Set-up", *texts, folded("Environment", first.environment))


def write_page(out: Path, title: str, lead: str, *sections: Html) -> Path:
    """Write the page as `out`/report.html."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    path.write_text(page(title, lead, *sections), encoding="utf-8")
    return path


def prompt_text(prompt: object) -> str:
    """A prompt as a person reads it: text as it is, a list of messages as `role: content` lines."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return "\n".join(
            f"{m.get('role')}: {m.get('content')}" if isinstance(m, dict) else str(m) for m in prompt
        )
    return str(prompt)


# --- the parts --------------------------------------------------------------------------------------
def _curves(panel: Panel, runs: Mapping[str, RunFiles]) -> list[Series]:
    """A panel's curves of runs by name: a colour per run, a dash per metric; of one run without a name, a
    colour per metric.

    Metrics are named where runs have more than one of them.
    """
    of = {name: (place, it) for place, (name, it) in enumerate(runs.items()) if panel.of in (None, it.kind)}
    there = [label for label, key in panel.keys.items() if any(it.series(key).y for _, it in of.values())]
    curves = []
    for run_name, (place, it) in of.items():
        for i, label in enumerate(there):
            name = ", ".join(n for n in (run_name, label if len(there) > 1 else "") if n)
            curves.append(it.series(panel.keys[label], name, colour=place if run_name else i, dash=i))
    return [s for s in curves if s.y]


def lead(it: RunFiles) -> str:
    """A run in a few sentences: steps, time, reward or loss, held-out accuracy."""
    last = it.rows[-1]
    parts = [f"{last['step']} steps in {_minutes(last.get('time') or 0)}."]
    gist = GISTS[it.kind]
    for label, key, form in gist:
        y = it.series(key).y
        if y:
            edge = max(1, min(EDGE, len(y) // 2))
            head, tail = (sum(part) / edge for part in (y[:edge], y[-edge:]))
            ends = f"means of the first and last {edge} steps" if edge > 1 else "first and last step"
            parts.append(f"{label} {head:{form}} → {tail:{form}} ({ends}).")
    for label, key in (
        (", greedy", "eval/accuracy_greedy"),
        (", sampled", "eval/accuracy_sampled"),
        ("", "eval/accuracy"),
    ):
        s = it.series(key)
        if s.y:
            ends = "" if s.lo is None or s.hi is None else f" [{s.lo[-1]:.1%}, {s.hi[-1]:.1%}]"
            parts.append(f"Held-out accuracy{label}: {s.y[0]:.1%} → {s.y[-1]:.1%}{ends}.")
    return " ".join(parts)


def _samples(it: RunFiles) -> list[Html]:
    """The answers of the first and of the last step that recorded any."""
    steps = sorted({r["step"] for r in it.samples})
    parts = []
    for step in dict.fromkeys((*steps[:1], *steps[-1:])):
        rows = [r for r in it.samples if r["step"] == step][:SHOWN_SAMPLES]
        cells = [
            (prompt_text(r.get("prompt", "")), r.get("completion", ""), _value(r.get("reward")), _verdict(r))
            for r in rows
        ]
        header = ("Prompt", "Answer", "Reward", "Verdict")
        width = 4 if any(cell[3] for cell in cells) else 3
        parts.append(
            table(header[:width], [cell[:width] for cell in cells], caption=f"Step {step}", sample=True)
        )
    return parts


def _verdict(row: Mapping[str, Any]) -> Html:
    """What the verifier said, in its words where it has some; a joint run's oracle, and the label that a
    reward model was to find.
    """
    right = row.get("correct")
    said = [f"{name} {_value(row[name])}" for name in ("oracle", "target") if _value(row.get(name))]
    parts = [
        verdict(None if right is None else bool(right)),
        text("; ".join([str(row.get("message") or ""), *said]).strip("; ")),
    ]
    return Html(" ".join(part for part in parts if part))


def _value(reward: object) -> str:
    return f"{reward:.3g}" if isinstance(reward, int | float) else ""


def _metrics(it: RunFiles) -> Html:
    keys = [
        k
        for k in dict.fromkeys(k for r in it.rows for k in r)
        if k not in ("step", "time") and not k.endswith(("_lo", "_hi"))
    ]
    rows = []
    for key in keys:
        y = it.series(key).y
        nulls = sum(1 for r in it.rows if key in r and r[key] is None)
        values = [_number(v) for v in (y[0], y[-1], min(y), max(y))] if y else ["", "", "", ""]
        rows.append((key, *values, f"{nulls:,}" if nulls else ""))
    header = ("Metric", "First", "Last", "Lowest", "Highest", "Not finite")
    width = 6 if any(row[5] for row in rows) else 5
    return table(header[:width], [row[:width] for row in rows], numbers=True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


# --- the files --------------------------------------------------------------------------------------
def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line without its end is one that is being written, and is
    left out.
    """
    text = _text(path)
    rows = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON: {error.msg}") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f'{path}:{number}: expected an object with an integer "step"')
        rows.append(row)
    return rows


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
