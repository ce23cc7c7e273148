"""The benchmark harness: fair turns, right statistics, honest rows.  Nothing here asserts how fast anything
is.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import subprocess
import sys
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastrl import ops
from fastrl.bench import harness, ledger, plots, results_page, run, table, timing
from fastrl.bench.common import BOTH, FORWARD, Bench, Case, Cost, Data, Unavailable, cases, plain
from fastrl.errors import UserError
from fastrl.kernels._backend import COMPILED_ONLY, requested

ROOT = Path(__file__).parents[2]
TINY = harness.Plan(timing.Effort(3, 0.0, 0.0), compile=False)
CEILINGS = timing.Ceilings(copy_gb_s=10.0, gemm_tflop_s=0.1, gemm="8^3 float32")


def bench(providers, *, registry="", truth=None, modes=(FORWARD,)) -> Bench:
    """A benchmark of x + 1."""
    table_ = cases(
        "T", tiny=(4,), quick=(4,), cpu=[(8,), (16,)], cuda=[(8,), (16,)], slice={"T": 2}, modes=modes
    )
    return Bench(
        op="plus_one",
        cases=table_,
        data=lambda c: Data(
            {"x": torch.arange(float(c.shape["T"]))}, wrt=("x",), upstream=(torch.ones(c.shape["T"]),)
        ),
        cost=lambda c: Cost(8 * c.shape["T"]),
        providers=providers,
        truth=truth,
        registry=registry,
    )


def rows_of(b: Bench, plan: harness.Plan = TINY) -> dict[str, ledger.Row]:
    return {r.provider: r for r in harness.run_case(b, b.cases[0], plan)}


def plus_one(x):
    return x + 1


def results(rows=(), **identity) -> ledger.Results:
    who = {
        "kind": "cpu",
        "device": "Some CPU",
        "cpu_capability": "AVX2",
        "threads": 1,
        "commit": "abc",
        "dirty": False,
        "date": "2026-01-02T03:04:05+00:00",
    }
    return ledger.Results(
        who | {"packages": {"torch": "2.13"}} | identity, CEILINGS, {"quick": True}, list(rows)
    )


def row(provider: str, ms: float | None, **changes) -> ledger.Row:
    times = {} if ms is None else {"warm": (ms, ms, ms)}
    base = ledger.Row(
        op="plus_one",
        case="T=4",
        shape={"T": 4},
        dtype="float32",
        mode=FORWARD,
        headline=True,
        provider=provider,
        status="ok",
        ms=times,
    )
    return replace(base, **changes)


# --- timing -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_turns_are_fair(n):
    """Wrong implementations: a fixed order; rotation alone, under which everyone always follows the same
    neighbour; a reversal that keeps some from ever being first.
    """
    names = [str(i) for i in range(n)]
    orders = [timing.turn(names, r) for r in range(2 * n)]
    assert all(sorted(o) == names for o in orders)
    assert set(Counter(o[0] for o in orders).values()) == {2}
    if n > 2:
        before = {(a, b) for o in orders for a, b in itertools.pairwise(o)}
        assert {(b, a) for a, b in before} == before


def test_percentiles_interpolate():
    """Wrong implementations: nearest rank (0.2 gives 1 or 2), unsorted input."""
    assert timing.percentile([4.0, 1.0, 3.0, 2.0], 0.2) == pytest.approx(1.6)
    assert timing.percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert timing.percentile([7.0], 0.8) == 7.0
    assert math.isnan(timing.percentile([], 0.5))


def test_the_floor_takes_the_slower_of_traffic_and_arithmetic():
    """Wrong implementations: seconds for milliseconds, the sum, the smaller of the two."""
    assert CEILINGS.floor_ms(10**9, 0) == pytest.approx(100.0)
    assert CEILINGS.floor_ms(10**9, 10**11) == pytest.approx(1000.0)


def test_peak_memory_counts_what_is_held_at_once():
    """Wrong implementation: the sum of all allocations (three tensors here)."""
    x = torch.zeros(1 << 18)
    peak = timing.peak_bytes(lambda: ((x + 1) + 1) + 1, torch.device("cpu"))
    assert 2 * x.nbytes <= peak < 2 * x.nbytes + 1024  # the ones are tensors too


def test_device_events_divide_by_repeats_and_flush_before_each_cold_call(monkeypatch):
    """Wrong implementations: the time of all repeats as the time of one; a flush inside the timed region."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            self.at = -1

        def record(self):
            log.append("event")
            self.at = log.count("call")

        def elapsed_time(self, end):
            return 2.0 * max(end.at - self.at, 1)

    fake = types.SimpleNamespace(
        Event=Event,
        synchronize=lambda: None,
        _sleep=lambda cycles: None,
        get_device_properties=lambda device: types.SimpleNamespace(L2_cache_size=1 << 10),
    )
    monkeypatch.setattr(timing.torch, "cuda", fake)
    timer = timing.EventTimer(torch.device("cpu"))
    timer.flush = types.SimpleNamespace(zero_=lambda: log.append("flush"))

    def call() -> None:
        log.append("call")

    timer.sample(call, 1, "warm")
    log.clear()
    assert timer.sample(call, 5, "warm") == [2.0]
    log.clear()
    assert timer.sample(call, 2, "cold") == [2.0, 2.0]
    assert log == ["flush", "event", "call", "event"] * 2


# --- rows -------------------------------------------------------------------------------------------
def test_a_provider_that_errs_becomes_a_row_and_the_others_go_on():
    """Wrong implementations: the run ends; the row disappears; half a measurement is reported."""
    calls = Counter()

    def late(x):
        calls["late"] += 1
        if calls["late"] > 4:
            raise RuntimeError("gave  up")
        return x

    def at_once(x):
        raise KeyError("no such kernel")

    def absent(case):
        raise Unavailable("not installed")

    def broken_import(case):
        raise OSError("libfoo.so is missing")

    found = rows_of(
        bench(
            {
                "eager": plain(plus_one),
                "late": plain(late),
                "at once": plain(at_once),
                "absent": absent,
                "broken": broken_import,
                "skip": lambda case: None,
            }
        )
    )
    assert {n: (r.status, r.reason) for n, r in found.items()} == {
        "eager": ("ok", ""),
        "late": ("failed", "RuntimeError: gave up"),
        "at once": ("failed", "KeyError: 'no such kernel'"),
        "absent": ("unavailable", "not installed"),
        "broken": ("failed", "OSError: libfoo.so is missing"),
    }
    assert found["late"].ms == {} and found["late"].best is None
    assert found["eager"].samples >= timing.MIN_ROUNDS and found["eager"].best > 0
    assert results(found.values()).exit_code == 0
    assert "failed: KeyError" in table.text(results(), list(found.values()))


def test_a_failure_of_ours_is_an_exit_code():
    """Wrong implementation: a broken kernel of ours passes as quietly as a broken peer."""
    assert results([row("fastrl/cpu", None, status="failed")]).exit_code == 1
    others = [row("fastrl/cuda", None, status="unavailable"), row("liger", None, status="failed")]
    assert results(others).exit_code == 0


def test_each_row_of_ours_runs_its_own_implementation():
    """Wrong implementations: every row runs the automatic choice; the choice leaks into the peers."""
    seen: dict[str, set[str | None]] = {"fastrl": set(), "eager": set()}

    def spy(name):
        def function(x):
            seen[name].add(requested("token_logp"))
            return x + 1

        return plain(function)

    found = rows_of(
        bench({"fastrl": spy("fastrl"), "eager": spy("eager")}, registry="token_logp", truth=plain(plus_one))
    )
    ready = {
        b
        for b, state in ops.implementations()["token_logp"].items()
        if state == "ready" and b in ("cpu", "reference")
    }
    assert seen == {"fastrl": ready, "eager": {None}}
    assert [n for n, r in found.items() if r.default] == [f"fastrl/{ops.backend('cpu')['token_logp']}"]


def test_a_kernel_that_only_compiles_runs_when_asked_for_and_only_then(monkeypatch):
    """Wrong implementation: an untried kernel takes part in every run."""
    monkeypatch.setattr(
        ops, "implementations", lambda: {"token_logp": {"cpu": COMPILED_ONLY, "reference": "ready"}}
    )
    b = bench({"fastrl": plain(plus_one)}, registry="token_logp")
    assert rows_of(b)["fastrl/cpu"].status == "unavailable"
    assert rows_of(b, replace(TINY, compiled_only=True))["fastrl/cpu"].status == "ok"


def test_errors_are_measured_against_float64():
    """Wrong implementations: an absolute error for gradients; a NaN that passes;
    a truth computed in float32.
    """
    off = rows_of(bench({"off": plain(lambda x: x + 1.25)}, truth=plain(plus_one)))["off"]
    assert (off.error, off.relative_error) == (0.25, 0.125)  # the slice is x = 0, 1
    nan = rows_of(bench({"nan": plain(lambda x: x / 0 * 0)}, truth=plain(plus_one)))["nan"]
    assert nan.error == nan.relative_error == 1e300
    twice = rows_of(
        bench({"twice": plain(lambda x: x * 1e-3)}, truth=plain(lambda x: x * 0.5e-3), modes=(BOTH,))
    )["twice"]
    assert twice.error == pytest.approx(0.5e-3) and twice.relative_error == pytest.approx(1.0, rel=1e-6)
    dtypes = []
    rows_of(bench({"eager": plain(plus_one)}, truth=plain(lambda x: dtypes.append(x.dtype) or x + 1)))
    assert dtypes == [torch.float64]


def test_a_provider_that_writes_to_its_arguments_is_alone_with_them():
    """Wrong implementation: one tensor for all, so that every other provider is measured on what it left."""
    seen = set()

    def grow(x):
        return x.add_(1)

    def look(x):
        seen.add(float(x[0]))
        return x.clone()

    b = replace(
        bench({"grow": plain(grow), "look": plain(look)}, truth=plain(plus_one)), mutates={"grow": ("x",)}
    )
    assert {r.status for r in rows_of(b).values()} == {"ok"}
    assert seen == {0.0}


def test_past_the_deadline_a_case_is_a_row_that_says_so():
    """Wrong implementation: cases that never ran are silently missing."""
    b = bench({"eager": plain(plus_one)})
    (late,) = harness.run_bench(b, [b.cases[0]], replace(TINY, deadline=0.0), share=0.0)
    assert (late.status, late.reason, late.case) == ("left out", "the run's time is over", "T=4")
    (over,) = harness.run_case(
        bench({"torch.compile": plain(plus_one)}), b.cases[0], replace(TINY, compile=True), share_over=True
    )
    assert over.status == "left out" and over.ms == {}


def test_a_case_without_inputs_is_a_failed_row():
    """Wrong implementation: out of memory for one case loses the rows of all others."""

    def too_much(case):
        raise torch.OutOfMemoryError("out of memory")

    b = replace(bench({"eager": plain(plus_one)}), data=too_much)
    (gone,) = harness.run_bench(b, [b.cases[0]], TINY, share=math.inf)
    assert (gone.status, gone.reason) == ("failed", "OutOfMemoryError: out of memory")
    assert results([gone]).exit_code == 1


# --- the benchmarks ---------------------------------------------------------------------------------
def test_every_op_has_a_benchmark_with_cases_for_every_run():
    """Wrong implementation: an op that --quick or --gpu-check passes over."""
    kernels = {p.stem for p in (ROOT / "kernels").glob("*.py") if not p.stem.startswith("_")} - {"surrogates"}
    assert set(run.names()) == kernels | {"train", "rollout", "grpo"}
    for name in run.names():
        b = run.load(name)
        assert b.op == name and (not b.registry or b.registry in ops.implementations())
        assert {"fastrl"} <= b.providers.keys() and ("eager" in b.providers or not b.registry)
        for device, options in (
            ("cpu", run.Options(quick=True)),
            ("cpu", run.Options()),
            ("cuda", run.Options(gpu_check=True)),
        ):
            assert run.choose(b, device, options), (name, options)


@pytest.mark.parametrize("name", run.names())
def test_a_tiny_case_of_every_benchmark_runs(name):
    """Every provider that can run here does, and ours is right: an argument in the wrong place, a peer that
    computes something else.
    """
    b = run.load(name)
    for case in (c for c in b.cases if c.level == "tiny"):
        for r in harness.run_case(b, case, TINY):
            assert r.status in ("ok", "unavailable", "left out"), (r.provider, r.reason)
            assert r.relative_error is None or r.relative_error < 1e-4, (r.provider, r.relative_error)
            assert r.bytes > 0
            if r.own and r.status == "ok" and b.truth:
                assert r.error is not None


def test_runs_choose_their_cases():
    """Wrong implementations: --quick on CPU takes full sizes; --gpu-check takes more than the headlines."""
    b = bench({"eager": plain(plus_one)}, modes=(FORWARD, BOTH))

    def labels(device: str, **options: bool) -> list[str]:
        return [c.label for c in run.choose(b, device, run.Options(**options))]

    assert labels("cpu") == ["T=8", "T=8", "T=16", "T=16"]
    assert labels("cpu", quick=True) == ["T=4", "T=4"]
    assert labels("cuda", quick=True) == labels("cuda", gpu_check=True) == ["T=8", "T=8"]
    assert Case.small(b.cases[-1]).shape == {"T": 2} and b.cases[-1].dtype == "bfloat16"


# --- files ------------------------------------------------------------------------------------------
def test_results_survive_their_json_file(tmp_path):
    """Wrong implementations: tuples that come back as lists, a file that names the machine it was made on."""
    rows = [row("eager", 2.0), row("x", None, status="failed")]
    made = ledger.Results(ledger.identity(torch.device("cpu")), CEILINGS, {"quick": True}, rows)
    path = tmp_path / "deep" / made.file_name()
    made.save(path)
    assert ledger.Results.load(path) == made
    text = path.read_text()
    assert json.loads(text)["schema"] == ledger.SCHEMA
    assert platform.node() not in made.identity.values()
    assert str(ROOT) not in text and str(Path.home()) not in text
    with pytest.raises(ValueError):  # not NaN, which is no JSON
        results([row("eager", math.nan)]).save(tmp_path / "nan.json")


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 99}', "[1]"])
def test_another_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(UserError, match=r"other\.json"):
        ledger.Results.load(tmp_path / "other.json")


# --- docs/results.md ---------------------------------------------------------------------------------
ROWS = [
    row("fastrl/cpu", 2.0, default=True),
    row("fastrl/reference", 8.0),
    row("eager", 6.0),
    row("liger", 3.0),
    row("trl", 9.0),
]


def test_the_block_of_the_page_is_replaced_in_place_and_only_once():
    """Wrong implementations: a second run adds a second table; text around the block is lost."""
    page = f"# title\n\n{results_page.BEGIN}\nold\n{results_page.END}\n\nthe rest\n"
    once = results_page.replace_block(page, results_page.block([results(ROWS)]))
    assert once.startswith("# title\n\n") and once.endswith("\n\nthe rest\n") and "old" not in once
    assert results_page.replace_block(once, results_page.block([results(ROWS)])) == once
    for bad in ("no markers", results_page.END + results_page.BEGIN, page + page):
        with pytest.raises(UserError, match="results page"):
            results_page.replace_block(bad, "x")


def test_cpu_figures_are_ratios_and_every_figure_names_its_device():
    """Wrong implementations: ratios upside down; a CPU's milliseconds in public; the reference taken for
    ours; a ratio that holds on one make of CPU without its name.
    """
    cpu = results_page.block([results(ROWS)])
    assert "3.00x" in cpu and "1.50x (liger)" in cpu and "| ms |" not in cpu
    assert "**Some CPU (AVX2), 1 thread**" in cpu
    gpu = results_page.block([results(ROWS, kind="cuda", device="NVIDIA H200")])
    assert "**NVIDIA H200**" in gpu and "| ms |" in gpu and "| 2 |" in gpu


def test_the_page_command_takes_the_newest_results_of_each_device(tmp_path):
    """Wrong implementations: the newest file alone; a quick run's toy sizes in public."""
    assert results().file_name() == "some-cpu-quick-2026-01-02.json"
    for name in ("a-gpu-2026-01-02", "a-gpu-2025-12-30", "b-cpu-2026-01-01", "b-cpu-quick-2026-01-03"):
        results(ROWS).save(tmp_path / f"{name}.json")
    assert [p.stem for p in results_page.newest(tmp_path)] == ["a-gpu-2026-01-02", "b-cpu-2026-01-01"]
    page = tmp_path / "results.md"
    page.write_text(f"{results_page.BEGIN}\n{results_page.END}\n")
    assert results_page.main([str(tmp_path / "b-cpu-2026-01-01.json"), "--page", str(page)]) == 0
    assert "`plus_one`" in page.read_text()
    assert results_page.main([str(tmp_path / "gone.json"), "--page", str(page)]) == 1


def test_the_plot_shows_ratios_and_the_limit(tmp_path):
    """Wrong: bars of milliseconds, so that the slowest is the longest; a failed provider drawn as 0."""
    drawn = {r.provider: x for r, x in plots._bars(ROWS)}
    assert drawn["fastrl/cpu"] == pytest.approx(3.0)
    assert "eager" not in drawn
    assert all(x > 0 for x in drawn.values())
    png, svg = plots.draw(results(ROWS), tmp_path / "some-cpu")
    assert png.read_bytes().startswith(b"\x89PNG") and "limit" in svg.read_text()
    assert plots.draw(results([]), tmp_path / "nothing") == []


# --- the commands -----------------------------------------------------------------------------------
def test_both_entry_points_write_what_they_measured(tmp_path, capsys):
    """Wrong implementation: `fastrl bench` ignores its device or output."""
    one, folder = tmp_path / "one.json", tmp_path / "folder"
    done = run.main(
        types.SimpleNamespace(ops=("group_advantage",), device="cpu", quick=True, output=str(one))
    )
    assert done.exit_code == 0 and {r.op for r in ledger.Results.load(one).rows} == {"group_advantage"}
    assert run.command(["gae", "--quick", "--device", "cpu", "--out", str(folder)]) == 0
    assert {p.suffix for p in folder.iterdir()} == {".json", ".txt", ".png", ".svg"}
    out = capsys.readouterr().out
    assert "fastrl/reference" in out and "measured limits" in out


def test_an_unknown_op_is_one_line(capsys):
    assert run.command(["token_lopg"]) == 1
    assert "did you mean 'token_logp'?" in capsys.readouterr().err


def test_it_needs_no_package_of_the_command_line():
    """The GPU machine has torch, triton, transformers (which brings PyYAML), safetensors and numpy: any other
    import fails there.
    """
    absent = ("tyro", "rich", "tensorboard", "matplotlib", "pyarrow", "trl", "liger_kernel")
    block = f"import sys\nfor n in {absent}: sys.modules[n] = None\n"
    code = block + "from fastrl.bench import results_page, run\nprint([run.load(n).op for n in run.names()])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "token_logp" in done.stdout
