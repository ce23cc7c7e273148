"""Metrics as rows: one row takes a number of the learner to the file, the terminal, panel and page."""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import grpo, lines

import fastrl.run.session
import fastrl.trainer
from fastrl.algorithms.correction import merge_mismatch, mismatch
from fastrl.algorithms.ppo import VALUE_SUMS
from fastrl.algorithms.preference import SUMS
from fastrl.algorithms.reward import MEASURES
from fastrl.batch.types import Tokens
from fastrl.kernels.policy_loss import METRICS, merge_metrics
from fastrl.methods import method_of
from fastrl.report import metrics
from fastrl.report.metric import Gist, Metric, Ratio, gists_of, kind_of, over_batches, progress, ratios
from fastrl.report.panels import PANELS, filled_panels
from fastrl.report.report import _curves, read_run, summary
from fastrl.train.learner import Learner

ROOT = Path(__file__).parents[2]
# what verifiers and reward functions name themselves, and the ends of intervals
OTHERS = re.compile(r"step|time|correct|well_formed|rewards/.+/mean|eval/.+_(lo|hi)")


# --- one row ------------------------------------------------------------------------------------------
def test_one_row_is_enough(tmp_path, monkeypatch, capsys):
    """Wrong implementations: another table that has to know the name too; the number of the step's last batch
    instead of what the row says.
    """
    row = Metric(
        "planted/old_kl",
        key="old_kl_k3",
        parts="mean",
        batches="max",
        panel="Entropy",
        label="planted",
        shown=("planted", ".4f"),
        gists=(Gist("policy", "Planted"),),
    )
    monkeypatch.setitem(metrics.LOGGED, "grpo", (*metrics.LOGGED["grpo"], row))
    method = replace(method_of("grpo"), metrics=metrics.LOGGED["grpo"])
    monkeypatch.setattr(fastrl.run.session, "method_of", lambda command: method)
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)
    seen, update = [], Learner.update

    def spied(self, batch, step):
        seen.append(update(self, batch, step))
        return seen[-1]

    monkeypatch.setattr(Learner, "update", spied)
    fastrl.trainer.train(grpo(tmp_path, steps=2, minibatches=2, epochs=2))

    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert len(steps) == 2 and len(seen) == 8
    for line, batches in zip(steps, (seen[:4], seen[4:]), strict=True):
        values = [b["old_kl_k3"] for b in batches]
        assert line["planted/old_kl"] == max(values) > min(values)
    assert f"planted {steps[0]['planted/old_kl']:.4f}" in capsys.readouterr().out

    run = read_run(tmp_path / "run")
    panel = next(p for p in filled_panels() if p.title == "Entropy")
    curves = {s.name: s.y for s in _curves(panel, {"": run})}
    assert curves.keys() == {"entropy", "planted"}
    assert curves["planted"] == [line["planted/old_kl"] for line in steps]
    assert f"Planted {curves['planted'][0]:.3g} → {curves['planted'][1]:.3g}" in summary(run)

    named = {row.name for row in metrics.all_metrics()}
    logged = {name for line in lines(tmp_path / "run") for name in line}
    assert [n for n in logged - named if not OTHERS.fullmatch(n)] == [], "logged without a row"


def test_over_batches():
    """Wrong implementations: a mean of counts; a batch without the metric counted as 0; what the run has no
    reference for is logged as 0.
    """
    rows = [
        Metric("a", key="x"),
        Metric("b", key="y", batches="sum"),
        Metric("c", key="z", batches="first", needs="reference"),
        Metric("d"),
        Metric("e", key="w", batches="max"),
    ]
    batches = [
        {"x": 1.0, "y": 2.0, "z": 5.0, "d": 9.0},
        {"x": 3.0, "y": 4.0, "z": 7.0},
        {"y": 1.0, "w": -1.0},
    ]
    assert over_batches(rows, batches) == {"a": 2.0, "b": 7.0, "c": 5.0, "e": -1.0}
    assert over_batches(rows, batches, ["reference"]).keys() == {"a", "b", "e"}
    assert over_batches(rows, []) == {}


def test_ratios_of_sums():
    """Wrong implementations: 0 for what nothing was averaged for; NaN where the row says 0."""
    rows = [
        Metric("a", key="x", parts=Ratio("total", "count")),
        Metric("b", parts=Ratio("total", "none")),
        Metric("c", parts=Ratio("total", "none", empty=0.0)),
        Metric("d", parts=Ratio("absent", "count")),
        Metric("e", parts="sum"),
    ]
    assert ratios(rows, {"total": 3.0, "count": 4.0, "none": 0.0}) == {"x": 0.75, "c": 0.0}


def test_what_is_shown_and_said():
    rows = metrics.all_metrics()
    text = progress(rows, {"loss": 0.125, "reward": 0.25, "perf/tokens_per_second": 1000.0, "kl": 1.0})
    assert text == "reward 0.250  KL 1  tok/s 1,000"
    assert [g.label for g, _ in gists_of(rows, "scores")] == ["Comparisons won", "Loss"]
    assert [name for _, name in gists_of(rows, "policy")] == ["reward", "joint/oracle"]
    assert kind_of(rows, {"loss", "logps/chosen"}) == "preferences"
    assert kind_of(rows, {"loss", "pairs/logps/chosen", "reward"}) == "policy"
    assert kind_of(rows, {"loss"}) == "text"


# --- rows say what the code does ----------------------------------------------------------------------
def as_stated(row: Metric, values: list[float], tokens: list[int]) -> float:
    """The number of all parts from those of each, as `row.parts` says."""
    if row.parts == "mean":
        return sum(v * n for v, n in zip(values, tokens, strict=True)) / sum(tokens)
    assert isinstance(row.parts, str)
    return {"max": max, "min": min, "sum": math.fsum}[row.parts](values)


def test_policies_metrics_are_merged_as_their_rows_say():
    """Wrong implementation: a row that says mean of what the kernels take the largest of."""
    noise = torch.Generator().manual_seed(0)
    tokens = [3, 5, 2]
    parts = [dict(zip(METRICS, torch.rand(len(METRICS), generator=noise), strict=True)) for _ in tokens]
    for part, n in zip(parts, tokens, strict=True):
        part["tokens"] = torch.tensor(float(n))
    merged = merge_metrics(parts)
    by_key = {row.key: row for row in metrics.POLICY_METRICS if row.parts != "once"}
    checked = by_key.keys() & set(METRICS)
    for key in checked:
        expected = as_stated(by_key[key], [float(part[key]) for part in parts], tokens)
        assert float(merged[key]) == pytest.approx(expected), key
    assert {"ratio_mean", "ratio_max", "ref_kl_k3", "clip_low"} <= checked

    x = [torch.randn(n, generator=noise) for n in tokens]
    sampled = [Tokens(old_logp=v * 0, advantage=v, weight=v, correction=v.exp()).with_(v, None) for v in x]
    rows = [mismatch(part) for part in sampled]
    alone, merged = [merge_mismatch(r[None]) for r in rows], merge_mismatch(torch.stack(rows))
    for key in by_key.keys() & merged.keys():
        assert merged[key] == pytest.approx(as_stated(by_key[key], [a[key] for a in alone], tokens)), key
    assert len(by_key.keys() & merged.keys()) == 6


def test_every_sum_and_key_that_a_row_names_is_there():
    """Wrong implementation: a misspelt sum, with which the metric silently disappears."""
    known = [
        (metrics.PREFERENCE_METRICS, SUMS),
        (metrics.SCORE_METRICS, MEASURES),
        (metrics.CRITIC_METRICS, VALUE_SUMS),
    ]
    for rows, sums in known:
        named = [row.parts for row in rows if isinstance(row.parts, Ratio)]
        assert named and {name for r in named for name in (r.of, r.per)} <= set(sums)
    whole = torch.ones(2, dtype=torch.float64)
    tokens = Tokens(old_logp=whole, advantage=whole, weight=whole).with_(whole, None)
    measured = {*METRICS, *merge_mismatch(mismatch(tokens)[None]), "clip_region"}
    assert {row.key for row in metrics.POLICY_METRICS} <= measured


def test_commands_agree_on_a_metric():
    """Wrong implementation: `entropy` of one command drawn in another panel than that of the next."""
    first = {row.name: row for row in metrics.all_metrics()}
    for command, rows in metrics.LOGGED.items():
        names = Counter(row.name for row in rows)
        assert max(names.values()) == 1, command
        for row in rows:
            same = replace(
                first[row.name], key=row.key, parts=row.parts, batches=row.batches, needs=row.needs
            )
            assert row == same, (command, row.name)


def test_panels_have_their_curves():
    """Wrong implementations: a row whose panel is misspelt, or whose label hides another's curve; a panel
    that nothing draws in.
    """
    rows = metrics.all_metrics()
    curves = Counter((title, row.label) for row in rows for title in row.panels)
    assert max(curves.values()) == 1 and all(label for _, label in curves)
    assert all(panel.keys for panel in filled_panels())
    assert [p.title for p in filled_panels([])] == [p.title for p in PANELS]
    with pytest.raises(KeyError, match="Nowhere"):
        filled_panels([Metric("a", panel="Nowhere")])


# --- no second table ----------------------------------------------------------------------------------
def tables(text: str) -> set[str]:
    """The strings in the tables of a module or a class: dictionaries, tuples, lists and sets with a name."""
    tree = ast.parse(text)
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    found: set[str] = set()
    for statement in (s for body in bodies for s in body):
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            nodes = list(ast.walk(statement.value))
            if any(isinstance(n, ast.Dict | ast.Tuple | ast.List | ast.Set) for n in nodes):
                found |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return found


def test_no_other_table_names_a_metric():
    """Words that mean other things too, as loss and accuracy do, are not looked for."""
    rows = metrics.all_metrics()
    names = {row.name for row in rows if re.search("[/_]", row.name)}
    names -= {"learning_rate"}  # also TRL's spelling of an option
    second = {}
    for path in (ROOT / "fastrl").rglob("*.py"):
        parts = path.relative_to(ROOT / "fastrl").parts
        if parts[0] in ("kernels", "bench") or path.name == "metrics.py":
            continue
        if both := tables(path.read_text(encoding="utf-8")) & names:
            second["/".join(parts)] = both
    assert second == {}
    planted = 'X = 1\nTABLE = {"kl": ("ratio/mean", 1)}\nclass A:\n    B: tuple = ("ess", "a")\n'
    assert tables(planted) == {"kl", "ratio/mean", "ess", "a"}


def test_on_policy_the_line_has_what_moves_and_not_the_loss():
    """Wrong implementation: `loss -6.7e-09` beside every GRPO step."""
    shown = progress(
        metrics.all_metrics(),
        {
            "loss": -6.7e-9,
            "reward": 0.5,
            "completions/mean_length": 41.25,
            "completions/clipped_ratio": 0.25,
            "entropy": 2.0,
            "kl": 0.01,
        },
    )
    assert shown == "reward 0.500  entropy 2  length 41.2  cut off 25%  KL 0.01"
    assert progress(metrics.all_metrics(), {"loss": 0.5, "grad_norm": 1.0}) == "loss 0.5"
