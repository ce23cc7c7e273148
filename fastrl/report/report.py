"""report.html and plots/ from the files of a run folder, or of several folders side by side.

Reads metrics.jsonl, samples.jsonl, config.yaml and environment.txt (described in run/log.py); works while the
run is under way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastrl.errors import UserError
from fastrl.report.metric import Kind, gists_of, kind_of
from fastrl.report.metrics import all_metrics
from fastrl.report.page import Html, figures, folded, page, section, table, text, verdict
from fastrl.report.panels import Panel, filled_panels
from fastrl.report.plots import Picture, Series, lines
from fastrl.report.rewards import held_out_rewards

SHOWN_SAMPLES = 5
EDGE = 10  # steps averaged at each end of a run for "from ... to ..."

JsonRow = dict[str, Any]  # the object of one line


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The contents of a run folder."""

    folder: Path
    rows: list[JsonRow]
    samples: list[JsonRow]
    config: str
    environment: str

    @property
    def kind(self) -> Kind:
        """What the run learned: a "policy" from rewards, "preferences", "scores" (a reward model),
        or "text".
        """
        logged = {name for row in self.rows for name in row}
        return kind_of(all_metrics(), logged)

    def series(
        self,
        key: str,
        name: str = "",
        *,
        colour: int = 0,
        dash: int = 0,
    ) -> Series:
        """The finite values of one metric over steps, with its interval if every row has K_lo and K_hi."""
        rows = [r for r in self.rows if _is_finite(r.get(key))]
        lo, hi = (self._ends(rows, f"{key}_{end}") for end in ("lo", "hi"))
        bounded = lo is not None and hi is not None
        return Series(
            name=name,
            x=[r["step"] for r in rows],
            y=[r[key] for r in rows],
            lo=lo if bounded else None,
            hi=hi if bounded else None,
            colour=colour,
            dash=dash,
        )

    def _ends(self, rows: Sequence[JsonRow], key: str) -> list[float] | None:
        ends = [r.get(key) for r in rows]
        present = [end for end in ends if end is not None]
        return present if ends and len(present) == len(ends) else None


class ReportOptions(Protocol):
    """The options of `fastrl report`."""

    @property
    def folders(self) -> tuple[str, ...]: ...
    @property
    def output(self) -> str | None: ...


def run(config: ReportOptions) -> None:
    """The command `fastrl report`: one folder gets its own report; several are compared in `output`."""
    folders = [Path(f) for f in config.folders]
    if not folders:
        raise UserError("report: expected a run folder, got none; try `fastrl report runs/latest`")
    if len(folders) == 1:
        print(build(folders[0], Path(config.output) if config.output else None))
        return
    if not config.output:
        raise UserError(f"report: comparing {len(folders)} folders needs --output FOLDER")

    named = {f.name: f for f in folders}
    if len(named) < len(folders):  # two folders of one name
        named = {str(f): f for f in folders}
    print(compare_runs(named, Path(config.output)))


def build(folder: str | Path, out: Path | None = None) -> Path:
    """Write the report of a run folder into it (or into `out`) and return the path of report.html.

    Raises:  UserError for a folder without metrics.jsonl, an empty one, or a line in it that is not JSON.
    """
    files = read_run(Path(folder))
    out = out or Path(folder)
    plots = out / "plots"
    sections = [
        section("Curves", figures(panels({"": files}, plots))),
        section("Held-out rewards", *held_out_rewards(files.folder, plots)),
        section("Sample answers", *_samples(files)),
        section("All metrics", _metrics(files)),
    ]
    config = folded("Resolved configuration (config.yaml)", files.config)
    environment = folded("Environment", files.environment)
    sections.append(section("Set-up", config, environment))
    title = f"Run report: {files.folder.resolve().name}"
    return write_page(out, title, summary(files), *sections)


def compare_runs(folders: Mapping[str, Path], out: Path) -> Path:
    """Write a report of several runs' curves, name -> folder, into `out`; returns the path of report.html."""
    runs = {name: read_run(folder) for name, folder in folders.items()}
    lead = f"{len(runs)} runs: {', '.join(runs)}."
    curves = section("Curves", figures(panels(runs, out / "plots")))
    return write_page(
        out,
        "Comparison of runs",
        lead,
        curves,
        setup_section(runs),
    )


def panels(runs: Mapping[str, RunFiles], folder: Path) -> list[tuple[str, Picture]]:
    """Every panel with values, drawn with a curve per run and metric and saved as `folder`/<title>.png."""
    drawn = []
    for panel in filled_panels():
        curves = _curves(panel, runs)
        if curves:
            title = panel.title
            path = folder / f"{title.lower().replace(' ', '-')}.png"
            picture = lines(
                curves,
                title=title,
                unit=panel.unit,
                path=path,
                percent=panel.percent,
            )
            drawn.append((title, picture))
    return drawn


def setup_section(runs: Mapping[str, RunFiles]) -> Html:
    """The section with every run's configuration and the first run's environment."""
    texts = [folded(f"{name}: resolved configuration", files.config) for name, files in runs.items()]
    first = next(iter(runs.values()))
    return section("Set-up", *texts, folded("Environment", first.environment))


def write_page(out: Path, title: str, lead: str, *sections: Html) -> Path:
    """Write the page as `out`/report.html."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    path.write_text(page(title, lead, *sections), encoding="utf-8")
    return path


def prompt_text(prompt: object) -> str:
    """A prompt or a conversation for a reader: text as it is, a list of messages as `role: content` lines."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        return str(prompt)
    turns = []
    for message in prompt:
        turn = f"{message.get('role')}: {message.get('content')}" if isinstance(message, dict) else message
        turns.append(str(turn))
    return "\n".join(turns)


def summary(files: RunFiles) -> str:
    """A run in a few sentences: steps, time, reward or loss, held-out accuracy."""
    last = files.rows[-1]
    parts = [f"{last['step']} steps in {_duration(last.get('time') or 0)}."]
    for gist, key in gists_of(all_metrics(), files.kind):
        label, form, y = gist.label, gist.format, files.series(key).y
        if y:
            edge = max(1, min(EDGE, len(y) // 2))
            head = sum(y[:edge]) / edge
            tail = sum(y[-edge:]) / edge
            ends = f"means of the first and last {edge} steps" if edge > 1 else "first and last step"
            parts.append(f"{label} {head:{form}} → {tail:{form}} ({ends}).")

    for metric in all_metrics():
        if metric.accuracy is None:
            continue
        label, s = metric.accuracy, files.series(metric.name)
        if s.y:
            interval = ""
            if s.lo is not None and s.hi is not None:
                interval = f" [{s.lo[-1]:.1%}, {s.hi[-1]:.1%}]"
            parts.append(f"Held-out accuracy{label}: {s.y[0]:.1%} → {s.y[-1]:.1%}{interval}.")
    return " ".join(parts)


# --- the parts --------------------------------------------------------------------------------------
def _curves(panel: Panel, runs: Mapping[str, RunFiles]) -> list[Series]:
    """A panel's curves by run and metric.

    Runs differ by colour and metrics by dash; a single run without a name has a colour per metric.  Metrics
    are named if there is more than one.
    """
    shown = []
    for colour, (run_name, files) in enumerate(runs.items()):
        if panel.of in (None, files.kind):
            shown.append((colour, run_name, files))
    labels = []
    for label, key in panel.keys.items():
        if any(files.series(key).y for _, _, files in shown):
            labels.append(label)

    curves = []
    for colour, run_name, files in shown:
        for i, label in enumerate(labels):
            metric = label if len(labels) > 1 else ""
            name = ", ".join(part for part in (run_name, metric) if part)
            series = files.series(
                panel.keys[label],
                name,
                colour=colour if run_name else i,
                dash=i,
            )
            if series.y:
                curves.append(series)
    return curves


def _samples(files: RunFiles) -> list[Html]:
    """The answers of the first and the last step that recorded any."""
    steps = sorted({row["step"] for row in files.samples})
    header = ("Prompt", "Answer", "Reward", "Verdict")
    tables = []
    for step in dict.fromkeys((*steps[:1], *steps[-1:])):
        rows = [row for row in files.samples if row["step"] == step][:SHOWN_SAMPLES]
        cells = []
        for row in rows:
            prompt = prompt_text(row.get("prompt", ""))
            answer = prompt_text(row.get("messages") or row.get("completion", ""))
            cells.append((prompt, answer, _value(row.get("reward")), _verdict(row)))
        width = 4 if any(cell[3] for cell in cells) else 3
        caption = f"Step {step}"
        tables.append(
            table(
                header[:width],
                [cell[:width] for cell in cells],
                caption=caption,
                sample=True,
            )
        )
    return tables


def _verdict(row: JsonRow) -> Html:
    """The verifier's verdict and message; also a joint run's oracle, and a reward model's target."""
    correct = row.get("correct")
    notes = [str(row.get("message") or "")]
    for name in ("oracle", "target"):
        value = _value(row.get(name))
        if value:
            notes.append(f"{name} {value}")
    message = text("; ".join(notes).strip("; "))
    parts = [verdict(None if correct is None else bool(correct)), message]
    return Html(" ".join(part for part in parts if part))


def _value(reward: object) -> str:
    return f"{reward:.3g}" if isinstance(reward, int | float) else ""


def _metrics(files: RunFiles) -> Html:
    """A table of every metric's first, last, lowest and highest value."""
    keys = dict.fromkeys(key for row in files.rows for key in row)
    rows = []
    for key in keys:
        if key in ("step", "time") or key.endswith(("_lo", "_hi")):
            continue
        y = files.series(key).y
        values = [_number(v) for v in (y[0], y[-1], min(y), max(y))] if y else [""] * 4
        nulls = sum(1 for row in files.rows if key in row and row[key] is None)
        rows.append((key, *values, f"{nulls:,}" if nulls else ""))
    header = ("Metric", "First", "Last", "Lowest", "Highest", "Not finite")
    width = 6 if any(row[5] for row in rows) else 5
    return table(header[:width], [row[:width] for row in rows], numbers=True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    if minutes:
        return f"{minutes} min {rest} s"
    return f"{rest} s"


# --- the files --------------------------------------------------------------------------------------
def read_run(folder: Path) -> RunFiles:
    """The files of a run folder.  Raises UserError for a folder that is not one."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{folder}: expected a run folder, but it has no metrics.jsonl")
    rows = _json_lines(metrics)
    if not rows:
        raise UserError(f"{metrics}: holds no step yet")
    samples = _json_lines(folder / "samples.jsonl")
    return RunFiles(
        folder,
        rows,
        samples,
        _text(folder / "config.yaml"),
        _text(folder / "environment.txt"),
    )


def _json_lines(path: Path) -> list[JsonRow]:
    """The objects of a file of JSON lines; a last line without its newline is still being written, and left
    out.
    """
    text = _text(path)
    complete = text[: text.rfind("\n") + 1]
    rows = []
    for number, line in enumerate(complete.split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON: {error.msg}") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f'{path}:{number}: expected an object with an integer "step"')
        rows.append(row)
    return rows


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
