"""Reports: self-contained, escaped, described in words, and right about the run they show."""

from __future__ import annotations

import base64
import itertools
import json
import re
import types
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread

from fastrl.errors import UserError
from fastrl.report.page import table, text
from fastrl.report.panels import PANELS, filled_panels
from fastrl.report.plots import COLOURS, Series, lines, smooth
from fastrl.report.report import _curves, build, compare_runs, read_run, run

VOID = {"meta", "img", "br", "hr", "link"}


class Page(HTMLParser):
    """What a browser would see: every tag with its attributes, in order; unbalanced tags are an error."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def folder(path: Path, metrics: list[dict], samples: list[dict] = (), config: str = "steps: 3\n") -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps({"time": 1.0} | m) + "\n" for m in metrics))
    (path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    (path / "config.yaml").write_text(config)
    return path


def grpo(path: Path, steps: int = 6) -> Path:
    metrics = [
        {
            "step": 0,
            "eval/accuracy_greedy": 0.25,
            "eval/accuracy_greedy_lo": 0.2,
            "eval/accuracy_greedy_hi": 0.3,
        }
    ]
    metrics += [
        {
            "step": s,
            "time": 61.0 * s,
            "reward": 0.1 * s,
            "loss": None if s == 2 else 0.01,
            "entropy": 1.0 / s,
            "kl": 0.0,
            "clip_ratio/low_mean": 0.1,
        }
        for s in range(1, steps + 1)
    ]
    samples = [
        {
            "step": s,
            "prompt": [{"role": "user", "content": f"q{s}"}],
            "completion": f"<script>alert({s})</script>\x07",
            "reward": 1.0,
            "correct": s > 1,
        }
        for s in range(1, steps + 1)
    ]
    return folder(path, metrics, samples)


def test_a_report_is_self_contained_and_described_in_words(tmp_path):
    """Wrong implementations: a picture beside the file, a style sheet from elsewhere, an empty alt text, a
    skipped heading level.
    """
    path = build(grpo(tmp_path / "run"))
    page = Page(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "run" / "report.html"
    images = page.all("img")
    assert len(images) == 6
    assert all(
        str(i["src"]).startswith("data:image/svg+xml;base64,") and len(str(i["alt"])) > 40 for i in images
    )
    assert not page.all("link") + page.all("script") + page.all("iframe")
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", path.read_text())
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert page.all("html")[0]["lang"] == "en"
    assert any(m.get("name") == "viewport" for m in page.all("meta"))


def test_a_report_says_what_happened(tmp_path):
    page = Page(build(grpo(tmp_path / "run")).read_text(encoding="utf-8"))
    assert "6 steps in 6 min 6 s." in page.words
    assert "Held-out accuracy, greedy: 25.0% → 25.0% [20.0%, 30.0%]." in page.words
    assert "steps: 3" in page.words
    alts = " ".join(str(i["alt"]) for i in page.all("img"))
    assert (
        "Reward, mean reward of a completion. from 0.1 at step 1 to 0.6 at step 6, lowest 0.1, highest 0.6."
        in alts
    )


def test_what_a_model_writes_is_text_and_not_markup(tmp_path):
    """Wrong implementation: the completion pasted into the page."""
    source = build(grpo(tmp_path / "run")).read_text(encoding="utf-8")
    assert "<script>" not in source
    assert "&lt;script&gt;alert(6)&lt;/script&gt;" in source
    assert "\x07" not in source
    page = Page(source)
    assert "user: q1" in page.words
    assert "<script>alert(1)</script>\ufffd1wrong" in page.words
    assert "<script>alert(6)</script>\ufffd1correct" in page.words
    assert "alert(3)" not in page.words, "only the first and the last step's samples"


def test_a_supervised_run_has_no_reward_and_its_loss_is_a_cross_entropy(tmp_path):
    it = folder(tmp_path / "sft", [{"step": s, "loss": 2.0 / s} for s in range(1, 5)])
    page = Page(build(it).read_text(encoding="utf-8"))
    assert "Cross-entropy" in page.words
    assert "Policy loss" not in page.words
    assert "Sample answers" not in page.words
    assert sorted(p.name for p in (it / "plots").iterdir()) == ["cross-entropy.png"]
    assert "Cross-entropy 1.5 → 0.583 (means of the first and last 2 steps)." in page.words, (
        "ends of a short run that overlap"
    )


def test_a_verdict_is_what_the_run_has_of_one(tmp_path):
    """Wrong implementations: a mark for `correct` alone, which no training run writes; markup of a
    verifier's; an empty column.
    """
    rows = [{"step": 1, "prompt": "p", "completion": "c", "reward": 0.25}]
    said = [
        {"message": "'2<3' is not so"},
        {"message": "right", "oracle": 1.0, "proxy": 0.25},
        {"message": "", "target": 0.0},
        {"oracle": None},
    ]
    for i, (row, shown) in enumerate(
        zip(said, ("'2<3' is not so", "right; oracle 1", "target 0", ""), strict=True)
    ):
        it = folder(tmp_path / str(i), [{"step": 1, "reward": 0.25}], [rows[0] | row])
        words = Page(build(it).read_text(encoding="utf-8")).words
        assert f"pc0.25{shown}" in words and ("Verdict" in words) == bool(shown)


def test_metrics_that_were_not_finite_are_counted(tmp_path):
    page = Page(build(grpo(tmp_path / "run")).read_text(encoding="utf-8"))
    assert "Not finite" in page.words
    assert read_run(tmp_path / "run").series("loss").x == [1, 3, 4, 5, 6]


def test_a_line_being_written_is_left_out_and_a_broken_one_is_named(tmp_path):
    """Wrong implementations: no report while the run goes on; a broken file read as a shorter one."""
    it = grpo(tmp_path / "run")
    with (it / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')
    assert read_run(it).rows[-1]["step"] == 6
    with (it / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 8}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:8: not JSON"):
        read_run(it)
    (it / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r'metrics\.jsonl:1: expected an object with an integer "step"'):
        read_run(it)
    (it / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no step yet"):
        read_run(it)
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        read_run(tmp_path)


def test_a_run_keeps_its_colour_in_every_figure(tmp_path):
    """Wrong implementation: colours given out per figure, so that the second run is blue where the first has
    no such metric.
    """
    sft = folder(tmp_path / "sft", [{"step": s, "loss": 2.0 / s, "learning_rate": 0.1} for s in range(1, 5)])
    path = compare_runs({"GRPO": grpo(tmp_path / "grpo"), "SFT": sft}, tmp_path / "both")
    page = Page(path.read_text(encoding="utf-8"))
    drawn = {
        str(i["alt"]).split(",")[0]: base64.b64decode(str(i["src"]).split(",")[1]).decode()
        for i in page.all("img")
    }
    assert COLOURS[1].lower() in drawn["Learning rate"].lower()
    assert COLOURS[0].lower() not in drawn["Learning rate"].lower()
    assert COLOURS[0].lower() in drawn["Reward"].lower()


def test_metrics_are_named_where_there_are_several(tmp_path):
    """Wrong implementations: a legend of one curve, because other runs have more metrics than this one; two
    curves without names.
    """
    one = {"": read_run(folder(tmp_path / "one", [{"step": s, "grad_norm": 1.0} for s in range(3)]))}
    two = {
        "": read_run(
            folder(
                tmp_path / "two", [{"step": s, "grad_norm": 1.0, "grad_norm/pairs": 0.5} for s in range(3)]
            )
        )
    }
    norms = next(p for p in filled_panels() if p.title == "Gradient norm")
    assert [s.name for s in _curves(norms, one)] == [""]
    assert [(s.name, s.colour, s.dash) for s in _curves(norms, two)] == [("all", 0, 0), ("pairs", 1, 1)]
    both = {"a": one[""], "b": two[""]}
    assert [(s.name, s.colour, s.dash) for s in _curves(norms, both)] == [
        ("a, all", 0, 0),
        ("b, all", 1, 0),
        ("b, pairs", 1, 1),
    ]


def test_no_two_panels_write_one_file():
    """Wrong implementation: a panel that overwrites another's picture of the same title."""
    assert len({p.title.lower() for p in PANELS}) == len(PANELS)


def test_the_command(tmp_path, capsys):
    one, two = grpo(tmp_path / "a" / "run"), grpo(tmp_path / "b" / "run")
    options = types.SimpleNamespace(folders=(str(one),), output=None)
    run(options)
    assert capsys.readouterr().out == f"{one / 'report.html'}\n"
    with pytest.raises(UserError, match="--output"):
        run(types.SimpleNamespace(folders=(str(one), str(two)), output=None))
    with pytest.raises(UserError, match="expected a run folder, got none"):
        run(types.SimpleNamespace(folders=(), output=None))
    run(types.SimpleNamespace(folders=(str(one), str(two)), output=str(tmp_path / "both")))
    words = Page((tmp_path / "both" / "report.html").read_text(encoding="utf-8")).words
    assert str(one) in words and str(two) in words, "two folders of one name are told apart by their paths"


def test_smoothing_is_centred_and_keeps_a_constant():
    """Wrong implementation: a trailing mean, which shifts every curve to the right; a mean that divides by
    the window at the ends.
    """
    assert smooth([1.0] * 7, 3) == [1.0] * 7
    assert smooth([0.0, 0.0, 3.0, 0.0, 0.0], 3) == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_a_figure_is_drawn_and_says_when_it_is_smoothed(tmp_path):
    noisy = [(-1.0) ** s for s in range(100)]
    steps = list(range(100))
    path = tmp_path / "plots" / "a.png"
    assert (
        "bold: mean over 5 steps"
        in lines([Series(name="", x=steps, y=noisy)], title="A", unit="u", path=path).note
    )
    assert lines([Series(name="", x=steps, y=steps)], title="A", unit="u", path=path).note == ""
    assert (
        lines([Series(name="", x=[1], y=[2.0], lo=[1.0], hi=[3.0])], title="A", unit="u", path=path).note
        == "bars: 95% interval"
    )
    pixels = imread(path)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 500
    blue = [int(COLOURS[0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    assert (abs(pixels[:, :, :3] - blue).max(axis=2) < 0.02).sum() > 20


def test_text_and_tables():
    assert text("a<b>&\ud800\x00\r\n\u00a0") == "a&lt;b&gt;&amp;\ufffd\ufffd\n\u00a0"
    assert text(text("<")) == "&lt;"
    assert table(("a", "b"), []) == ""
    with pytest.raises(ValueError):
        table(("a", "b"), [("1", "2", "3")])
