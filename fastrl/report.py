"""report.html and plots/ from the files of a run folder, or of several folders side by side.

Reads metrics.jsonl, samples.jsonl, config.yaml and environment.txt (log.py says what is in them); works while the run goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fastrl.errors import UserError
from fastrl.page import Html, figures, folded, page, section, table, verdict
from fastrl.plots import Picture, Series, lines
from fastrl.reward_report import held_out_rewards

SHOWN_SAMPLES = 5
KINDS = {  # what a run learned -> a metric that only such runs have
    "policy": "reward",
    "preferences": "logps/chosen",
    "scores": "mean_reward",
}
GISTS = {  # what a run learned -> the metrics its first sentence gives: label, metric, format
    "policy": (("Reward", "reward", ".3g"),),
    "preferences": (("Preference loss", "loss", ".3g"), ("Reward margin", "rewards/margins", ".3g")),
    "scores": (("Comparisons won", "accuracy", ".1%"), ("Loss", "loss", ".3g")),
    "text": (("Cross-entropy", "loss", ".3g"), ("Token accuracy", "mean_token_accuracy", ".1%")),
}
EDGE = 10  # steps averaged at each end of a run for "from ... to ..."


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of a report: its title, its unit, and the metrics it shows by label; drawn where a run has any of them.

    of  None for every run; else the runs it is of, by what they learn (`Run.kind`): their losses are not the same quantity
    """

    title: str
    unit: str
    keys: Mapping[str, str]
    percent: bool = False
    of: Literal["text", "policy", "preferences", "scores"] | None = None


PANELS = (
    Panel("Reward", "mean reward of a completion", {"reward": "reward"}),
    Panel("Held-out accuracy", "answers correct", {"greedy": "eval/accuracy_greedy", "sampled": "eval/accuracy_sampled"}, percent=True),
    Panel("Cross-entropy", "nats per token", {"loss": "loss"}, of="text"),
    Panel("Policy loss", "loss", {"loss": "loss"}, of="policy"),
    Panel("Preference loss", "loss", {"loss": "loss"}, of="preferences"),
    Panel("Implicit rewards", "beta times the score", {"chosen": "rewards/chosen", "rejected": "rewards/rejected"}),
    Panel("Pairs ranked right", "pairs", {"accuracy": "rewards/accuracies"}, percent=True),
    Panel("Likelihood", "nats per completion", {"chosen": "logps/chosen", "rejected": "logps/rejected"}),
    Panel("Reward loss", "loss of a group", {"loss": "loss"}, of="scores"),
    Panel("Comparisons won", "comparisons or verdicts", {"training": "accuracy", "held out": "eval/accuracy"}, percent=True, of="scores"),
    Panel("Reward margin", "log-odds of the truth", {"training": "margin", "held out": "eval/margin"}, of="scores"),
    Panel("Rewards of a step", "reward", {"mean": "mean_reward", "lowest": "min_reward", "highest": "max_reward"}, of="scores"),
    Panel("Calibration error", "probability (ECE), held out", {"ECE": "eval/ece"}, of="scores"),
    Panel("Entropy", "nats per token", {"entropy": "entropy"}),
    Panel("Response length", "tokens, mean", {"length": "completions/mean_length"}),
    Panel(
        "Clip fraction",
        "tokens clipped",
        {"all": "clip_ratio/region_mean", "below": "clip_ratio/low_mean", "above": "clip_ratio/high_mean"},
        percent=True,
    ),
    Panel("KL to the reference", "nats per token", {"KL": "kl"}),
    Panel("Value loss", "squared error, half", {"loss": "loss/value_avg"}),
    Panel("Explained variance", "share of the returns' variance", {"critic": "critic/vf_explained_var"}),
    Panel("Returns and values", "reward's unit, mean of a token", {"returns": "critic/returns/mean", "values": "critic/values/mean"}),
    Panel("Sampler against trainer", "nats, mean size of the difference", {"log-prob": "sampling/sampling_logp_difference/mean"}),
    Panel("Gradient norm", "L2 norm before clipping", {"norm": "grad_norm", "rewards": "grad_norm/rl", "pairs": "grad_norm/pairs"}),
    Panel("Throughput", "tokens per second", {"tokens/s": "perf/tokens_per_second"}),
    Panel("Token accuracy", "next tokens predicted", {"accuracy": "mean_token_accuracy"}, percent=True),
    Panel("Groups without signal", "groups of equal rewards", {"groups": "frac_reward_zero_std"}, percent=True),
    Panel("What teaches a prompt", "prompts", {"demonstration": "hybrid/sft_prompts", "rewards": "hybrid/rl_prompts"}, percent=True),
    Panel("Demonstrations", "nats per token", {"supervised": "sft_loss", "in the group": "member_nll"}),
    Panel("Loss of pairs", "nats per pair", {"loss": "pairs/loss", "weight": "hybrid/pair_coef"}),
    Panel("Pairs beside rewards", "pairs ranked right", {"accuracy": "pairs/rewards/accuracies"}, percent=True),
    Panel("Cut-off completions", "completions at the limit", {"cut off": "completions/clipped_ratio"}, percent=True),
    Panel("Learning rate", "learning rate", {"learning rate": "learning_rate"}),
)


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder holds, read."""

    folder: Path
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: str
    environment: str

    @property
    def kind(self) -> str:
        """What the run learned: a "policy" from rewards, "preferences", "scores" (a reward model), or "text"."""
        return next((kind for kind, key in KINDS.items() if any(key in r for r in self.rows)), "text")

    def series(self, key: str, name: str = "", *, colour: int = 0, dash: int = 0) -> Series:
        """The finite values of one metric over steps, with its interval where K_lo and K_hi stand beside it."""
        rows = [r for r in self.rows if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
        bounds = {end: [r.get(f"{key}_{end}") for r in rows] for end in ("lo", "hi")}
        whole = bool(rows) and all(v is not None for values in bounds.values() for v in values)
        ends: dict[str, Any] = bounds if whole else {}
        return Series(name=name, x=[r["step"] for r in rows], y=[r[key] for r in rows], colour=colour, dash=dash, **ends)


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
    print(compare(names if len(names) == len(folders) else {str(f): f for f in folders}, Path(config.output)))


def build(folder: str | Path, out: Path | None = None) -> Path:
    """Write the report of a run folder into it (or into `out`) and return the path of report.html.

    Raises:  UserError for a folder without metrics.jsonl, an empty one, or a line in it that is not JSON.
    """
    it, out = read(Path(folder)), out or Path(folder)
    pictures = panels({"": it}, out / "plots")
    name = it.folder.resolve().name
    return write(
        out,
        f"Run report: {name}",
        lead(it),
        section("Curves", figures(pictures)),
        section("Held-out rewards", *held_out_rewards(it.folder, out / "plots")),
        section("Sample answers", *_samples(it)),
        section("All metrics", _metrics(it)),
        section("Set-up", folded("Resolved configuration (config.yaml)", it.config), folded("Environment", it.environment)),
    )


def compare(folders: Mapping[str, Path], out: Path) -> Path:
    """Write a report of the curves of several runs, name -> folder, into `out`; returns the path of its report.html."""
    runs = {name: read(folder) for name, folder in folders.items()}
    lead = f"{len(runs)} runs: {', '.join(runs)}."
    return write(out, "Comparison of runs", lead, section("Curves", figures(panels(runs, out / "plots"))), set_up(runs))


def read(folder: Path) -> Run:
    """The files of a run folder.  Raises UserError where it is none."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{folder}: expected a run folder, but it has no metrics.jsonl")
    rows = _json_lines(metrics)
    if not rows:
        raise UserError(f"{metrics}: holds no step yet")
    samples = _json_lines(folder / "samples.jsonl")
    return Run(folder, rows, samples, *(_text(folder / name) for name in ("config.yaml", "environment.txt")))


def panels(runs: Mapping[str, Run], folder: Path) -> list[tuple[str, Picture]]:
    """Every panel some run has values for, drawn with one curve per run and metric and saved as `folder`/<title>.png."""
    drawn = []
    for panel in PANELS:
        found = [s for place, (name, it) in enumerate(runs.items()) for s in _curves(panel, it, name, place) if s.y]
        if found:
            path = folder / (panel.title.lower().replace(" ", "-") + ".png")
            drawn.append((panel.title, lines(found, title=panel.title, unit=panel.unit, path=path, percent=panel.percent)))
    return drawn


def set_up(runs: Mapping[str, Run]) -> Html:
    """The section with every run's configuration and environment."""
    texts = [folded(f"{name}: resolved configuration", it.config) for name, it in runs.items()]
    first = next(iter(runs.values()))
    return section("Set-up", *texts, folded("Environment", first.environment))


def write(out: Path, title: str, lead: str, *sections: Html) -> Path:
    """Write the page as `out`/report.html."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    path.write_text(page(title, lead, *sections), encoding="utf-8")
    return path


def prompt_text(prompt: object) -> str:
    """A prompt as a person reads it: text as it is, a list of messages as `role: content` lines."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return "\n".join(f"{m.get('role')}: {m.get('content')}" if isinstance(m, dict) else str(m) for m in prompt)
    return str(prompt)


# --- the parts --------------------------------------------------------------------------------------
def _curves(panel: Panel, it: Run, run_name: str, place: int) -> list[Series]:
    """A panel's curves of one run, the `place`-th of those compared: a colour per run, a dash per metric; alone, a colour per metric."""
    if panel.of not in (None, it.kind):
        return []
    curves = []
    for i, (label, key) in enumerate(panel.keys.items()):
        name = ", ".join(n for n in (run_name, label if len(panel.keys) > 1 else "") if n)
        curves.append(it.series(key, name, colour=place if run_name else i, dash=i))
    return curves


def lead(it: Run) -> str:
    """A run in a few sentences: steps, time, reward or loss, held-out accuracy."""
    last = it.rows[-1]
    parts = [f"{last['step']} steps in {_minutes(last.get('time') or 0)}."]
    gist = GISTS[it.kind]
    for label, key, form in gist:
        y = it.series(key).y
        if y:
            head, tail = (sum(part) / len(part) for part in (y[:EDGE], y[-EDGE:]))
            parts.append(f"{label} {head:{form}} → {tail:{form}} (means of the first and last {min(EDGE, len(y))} steps).")
    for label, key in ((", greedy", "eval/accuracy_greedy"), (", sampled", "eval/accuracy_sampled"), ("", "eval/accuracy")):
        s = it.series(key)
        if s.y:
            ends = "" if s.lo is None or s.hi is None else f" [{s.lo[-1]:.1%}, {s.hi[-1]:.1%}]"
            parts.append(f"Held-out accuracy{label}: {s.y[0]:.1%} → {s.y[-1]:.1%}{ends}.")
    return " ".join(parts)


def _samples(it: Run) -> list[Html]:
    """The answers of the first and of the last step that recorded any."""
    steps = sorted({r["step"] for r in it.samples})
    parts = []
    for step in dict.fromkeys((*steps[:1], *steps[-1:])):
        rows = [r for r in it.samples if r["step"] == step][:SHOWN_SAMPLES]
        cells = [(prompt_text(r.get("prompt", "")), r.get("completion", ""), _reward(r)) for r in rows]
        parts.append(table(("Prompt", "Answer", "Reward"), cells, caption=f"Step {step}", sample=True))
    return parts


def _reward(row: Mapping[str, Any]) -> Html:
    reward = row.get("reward")
    number = f"{reward:.3g} " if isinstance(reward, int | float) else ""
    return Html(number + (verdict(bool(row["correct"])) if "correct" in row else ""))


def _metrics(it: Run) -> Html:
    keys = [k for k in dict.fromkeys(k for r in it.rows for k in r) if k not in ("step", "time") and not k.endswith(("_lo", "_hi"))]
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
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s" if minutes else f"{rest} s"


# --- the files --------------------------------------------------------------------------------------
def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line without its end is one that is being written, and is left out."""
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
