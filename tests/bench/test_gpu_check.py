"""`make gpu-check`: what is done is kept, nothing outlasts its time, and a stage that breaks ends alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fastrl.bench import run
from fastrl.bench.gpu_check import __main__ as check
from fastrl.bench.gpu_check import stages, summary
from fastrl.bench.gpu_check.progress import FILE, Progress, append, read
from fastrl.bench.gpu_check.pytest_progress import FILE as VARIABLE
from fastrl.bench.gpu_check.stages import Stage
from fastrl.bench.ledger import LEFT_OUT, Results
from fastrl.errors import UserError

ROOT = Path(__file__).parents[2]
HEADER = {"kind": "check", "sources": "abc", "device": "Some GPU"}


def script(name: str, code: str, *, until: float = 1.0, **changes: bool) -> Stage:
    """A stage that runs a Python program."""
    return Stage(
        name=name, until=until, command=lambda _: [sys.executable, "-c", textwrap.dedent(code)], **changes
    )


@pytest.fixture
def run_check(tmp_path, monkeypatch):
    """Run stages under a budget of some seconds; the exit status and the folder."""
    monkeypatch.setattr(check, "LEAST_SECONDS", 0.2)
    monkeypatch.setattr(check, "GRACE_SECONDS", 0.5)

    def call(*table: Stage, budget: float = 30.0) -> tuple[int, Path]:
        arguments = ["--rehearse", "--out", str(tmp_path / "out"), "--budget", str(budget)]
        return check.main(arguments, table), tmp_path / "out"

    return call


def stage_events(out: Path) -> dict[str, str]:
    return {e["name"]: e["status"] for e in read(out / FILE) if e["kind"] == "stage"}


# --- stages -----------------------------------------------------------------------------------------
def test_a_stage_is_stopped_at_its_time_with_all_that_it_started(run_check, tmp_path):
    """Wrong: a hanging kernel that takes the benchmarks' time; a child of a stopped stage that runs on."""
    alive = tmp_path / "alive"
    child = f"import time\nfor i in range(999): open({str(alive)!r}, 'w').write(str(i)); time.sleep(0.05)"
    hang = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    code, out = run_check(script("hang", hang, until=0.3), script("after", "print('measured')"), budget=8)

    assert code == 1
    assert stage_events(out) == {"hang": "out of time", "after": "done"}
    assert "measured" in (out / "log.txt").read_text()
    before = alive.read_text()
    time.sleep(0.3)
    assert alive.read_text() == before


def test_a_failed_build_ends_the_check_and_another_stage_does_not(run_check):
    code, out = run_check(script("warm", "raise SystemExit(1)"), script("tests", ""))
    assert code == 1
    assert stage_events(out) == {"warm": "failed", "tests": "done"}


def test_nothing_runs_on_what_was_not_built(run_check):
    code, out = run_check(script("build", "raise SystemExit(1)", needed=True), script("tests", ""))
    assert code == 1
    assert stage_events(out) == {"build": "failed"}


def test_a_second_run_repeats_only_what_resumes(run_check, tmp_path):
    """Wrong: a build of two minutes in each of two runs."""
    once, each = (f"open({str(tmp_path / name)!r}, 'a').write('x')" for name in ("once", "each"))
    table = (script("build", once), script("tests", each, resumes=True))
    assert [run_check(*table)[0] for _ in range(2)] == [0, 0]
    assert ((tmp_path / "once").read_text(), (tmp_path / "each").read_text()) == ("x", "xx")


def test_benchmarks_go_on_in_a_new_process_when_a_kernel_broke_the_context(run_check, tmp_path):
    """Wrong: one illegal address that ends the measurements of every other op."""
    mark = str(tmp_path / "mark")
    code = f"""
    import os
    again = os.path.exists({mark!r})
    open({mark!r}, "w")
    raise SystemExit(0 if again else {run.LOST_CONTEXT})
    """
    status, out = run_check(script("bench", code, resumes=True))
    assert status == 0
    assert stage_events(out) == {"bench": "done"}


def test_the_table_of_stages_is_in_order_and_within_the_budget():
    shares = [stage.until for stage in stages.STAGES]
    assert shares == sorted(shares) and shares[-1] < 1
    assert [s.name for s in stages.STAGES] == ["build", "warm", "verdicts", "tests", "bench"]
    assert [s.name for s in stages.STAGES if s.needed] == ["build"]


def test_the_most_valuable_tests_come_first():
    files = stages.gpu_tests(ROOT)
    assert files[:2] == ["tests/gpu/test_vocabulary_gpu.py", "tests/gpu/test_decode_gpu.py"]
    assert {f"test_{name}_gpu" for name in stages.ORDER} <= {Path(f).stem for f in files}, (
        "ORDER names no file"
    )


def test_a_machine_without_a_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"a GPU that nvidia-smi lists, got FileNotFoundError.*--rehearse"):
        check.main(["--out", str(tmp_path)], ())


# --- progress ---------------------------------------------------------------------------------------
def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    progress = Progress.open(tmp_path, HEADER)
    progress.add(kind="test", test="a", outcome="passed")
    with (tmp_path / FILE).open("a") as file:
        file.write('{"kind": "test", "te')
    again = Progress.open(tmp_path, HEADER)
    assert list(again.tests) == ["a"]
    again.add(kind="test", test="b", outcome="failed")
    assert list(Progress.open(tmp_path, HEADER).tests) == ["a", "b"]


@pytest.mark.parametrize("change", [{"sources": "def"}, {"device": "Another GPU"}])
def test_other_sources_or_another_device_start_anew(tmp_path, change):
    """Wrong: a test that passed before the kernel was changed counts as passed."""
    Progress.open(tmp_path, HEADER).add(kind="test", test="a", outcome="passed")
    assert not Progress.open(tmp_path, HEADER | change).tests


def test_an_earlier_folder_is_continued_in_a_new_one(tmp_path):
    Progress.open(tmp_path / "first", HEADER).add(kind="test", test="a", outcome="passed")
    Progress.open(tmp_path / "second", HEADER, tmp_path / "first")
    assert list(Progress.open(tmp_path / "second", HEADER).tests) == ["a"]


# --- tests ------------------------------------------------------------------------------------------
TESTS = """
import os, pathlib, pytest

def note(name):
    with open(os.environ["NOTES"], "a") as file:
        file.write(name + " ")

def test_good(): note("good")
def test_bad():
    note("bad")
    assert pathlib.Path(os.environ["NOTES"] + ".mended").exists()
def test_lost():
    note("lost")
    if os.environ.get("LOSE"): raise RuntimeError("CUDA error: an illegal memory access was encountered")
@pytest.mark.parametrize("i", range(4))
def test_later(i): note("later")
def test_skipped(): pytest.skip("not here")
"""


@pytest.fixture
def run_tests(tmp_path):
    """Run the tests above under the plugin; the outcomes so far, and the names of those that ran."""
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    progress = Progress.open(tmp_path, HEADER)

    def call(*options: str, **variables: str) -> tuple[dict[str, str], list[str]]:
        notes = tmp_path / "notes"
        notes.write_text("")
        (tmp_path / FILE).with_suffix(".start").write_text((tmp_path / FILE).read_text())
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            VARIABLE: str(tmp_path / FILE),
            "NOTES": str(notes),
        }
        environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")} | variables
        plugin = ["-p", "fastrl.bench.gpu_check.pytest_progress", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-q", *plugin, *options, "test_some.py"]
        subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True)
        progress.reload()
        found = {t.partition("::")[2]: e["outcome"] for t, e in progress.tests.items()}
        return found, notes.read_text().split()

    return call


def test_a_second_run_leaves_out_what_passed_and_begins_with_what_failed(run_tests, tmp_path):
    outcomes, ran = run_tests("--maxfail=1")
    assert outcomes == {"test_good": "passed", "test_bad": "failed"}
    (tmp_path / "notes.mended").touch()
    outcomes, ran = run_tests()
    assert ran == ["bad", "lost", *["later"] * 4]
    assert set(outcomes.values()) == {"passed", "skipped"} and len(outcomes) == 8


def test_a_lost_context_ends_the_worker_and_not_the_run(run_tests):
    """Wrong: every test after an illegal address fails, in a process where no CUDA call works any more."""
    pytest.importorskip("xdist")
    outcomes, ran = run_tests("-n", "1", "--dist", "load", "--maxschedchunk", "1", LOSE="1")
    assert outcomes["test_lost"] == "failed"
    assert ran.count("later") == 4 and all(outcomes[f"test_later[{i}]"] == "passed" for i in range(4))


# --- benchmarks -------------------------------------------------------------------------------------
def bench_run(out: Path, *arguments: str) -> list[str]:
    """The cases that a run shows as measured now."""
    assert (
        run.command(["group_advantage", "--device", "cpu", "--rehearse", "--out", str(out), *arguments]) == 0
    )
    (path,) = out.glob("*.json")
    return [r.provider for r in Results.load(path).rows if r.status != LEFT_OUT]


def test_measured_rows_are_kept_and_measured_anew_for_other_sources(tmp_path, monkeypatch):
    """Wrong: a second command that measures the first ops again; rows of a kernel that has changed since."""
    first = bench_run(tmp_path)
    measured = []
    monkeypatch.setattr(run, "run_bench", lambda bench, cases, *_: measured.extend(cases) or iter(()))
    assert bench_run(tmp_path, "--resume") == first and not measured

    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    content["identity"]["sources"] = "another"
    path.write_text(json.dumps(content))
    assert bench_run(tmp_path, "--resume") == [] and measured


def test_rows_are_written_before_the_run_ends(tmp_path, monkeypatch):
    """Wrong: a command that is killed at its limit brings nothing back."""
    seen = []
    place = run.place

    def spy(results, options):
        seen.append(len(results.rows))
        return place(results, options)

    monkeypatch.setattr(run, "place", spy)
    bench_run(tmp_path)
    assert len(seen) > 2 and seen == sorted(seen)


# --- summary ----------------------------------------------------------------------------------------
def test_the_summary_names_failures_and_rows(tmp_path, monkeypatch):
    bench_run(tmp_path)
    progress = Progress.open(tmp_path, HEADER)
    progress.add(kind="stage", name="tests", status="failed", seconds=12.0)
    message = "some lines\nE   assert 1 == 2"
    progress.add(
        kind="test", test="tests/gpu/test_a.py::test_b", outcome="failed", seconds=1.0, message=message
    )
    append(tmp_path / FILE, {"kind": "test", "test": "tests/gpu/test_a.py::test_c", "outcome": "passed"})
    progress.reload()

    text = summary.table(progress, tmp_path)
    assert "GPU check of sources abc on Some GPU" in text
    assert "FAILED tests/gpu/test_a.py::test_b\n    E   assert 1 == 2" in text
    assert [line.split()[-3:] for line in text.splitlines() if "test_a.py  " in line] == [["1", "1", "0"]]
    assert "fastrl/cpu" in text and "eager" in text
    assert summary.exit_code(progress, tmp_path, ()) == 1
