"""The committed counts are those of the present kernels; goals, occupancy and predictions are arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia", reason="triton is not installed")
from fastrl.bench import sass
from fastrl.bench.cubin import Usage
from fastrl.bench.disassembly import Function, parse
from fastrl.bench.sass_rows import ROWS, Elements, Goal, Main, Problem, Row

ROOT = Path(__file__).parents[2]
COUNTED = ROOT / "bench/results/sass.json"
LOOP = """
	.section	.text.kernel,
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   MUFU.EX2 R4, R4 ;
        /*0030*/                   MUFU.EX2 R5, R5 ;
        /*0040*/                   DFMA R6, R4, R4, R6 ;
        /*0050*/             @!P5 BRA `(.L_x_0) ;
        /*0060*/                   STG.E desc[UR4][R2.64], R8 ;
        /*0070*/                   EXIT ;
"""
ROW = Row(
    "a kernel",
    "file.kernel",
    None,
    Main(has=("LDG",)),
    Elements(size=4),
    goals=(Goal("instructions", most=1),),
)


# --- the committed file -----------------------------------------------------------------------------
def test_the_counts_are_of_the_present_kernels():
    found = json.loads(COUNTED.read_text(encoding="utf-8"))
    assert found["sources"] == sass.digest(), "the kernels or the rows have changed: make sass"
    for rows in found["rows"].values():
        assert [r["label"] for r in rows] == [row.label for row in ROWS]


def test_the_counts_are_of_the_oldest_and_the_newest_triton():
    found = json.loads(COUNTED.read_text(encoding="utf-8"))
    assert "3.6.0" in found["rows"] and len(found["rows"]) > 1


# --- arithmetic -------------------------------------------------------------------------------------
def code(registers=64, threads=256, shared=0, text=LOOP):
    (function,) = parse(text).values()
    return sass.Code(function=function, usage=Usage(registers, 0, 0), threads=threads, shared=shared)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "ctas"),
    [
        (77, 256, 1024, 3),  # 80 registers a thread are allocated
        (255, 256, 147480, 1),
        (60, 128, 36864, 6),  # shared memory, with the 1 KB that each CTA takes besides
        (16, 64, 0, 32),
        (32, 1024, 0, 2),
    ],
)
def test_how_many_ctas_share_a_multiprocessor(registers, threads, shared, ctas):
    assert code(registers, threads, shared).ctas == ctas


def counted(monkeypatch, row, **given):
    monkeypatch.setattr(sass, "code_of", lambda row: code(**given))
    return sass.figures_of(row)


def test_the_figures_of_a_loop(monkeypatch):
    """Wrong: the instructions before and behind the loop; elements of a warp instead of a thread."""
    found = counted(monkeypatch, ROW)
    assert (found.path, found.body, found.elements, found.instructions) == (5, 5, 4, 1.25)
    assert found.fp64 == 0.25 and found.bytes == 4 and found.ctas == 4
    assert found.in_flight == 16 * 256 * 4
    assert found.goals == {"instructions <= 1": "missed by 25%"}
    assert found.predicted_ms == {}


def test_the_buffers_of_copies_are_in_flight(monkeypatch):
    text = LOOP.replace("LDG.E.128 R4", "LDGSTS.E.BYPASS.128 [R4]")
    copied = replace(ROW, main=Main(has=("LDGSTS",)), elements=Elements(size=4, names=("LDGSTS",)))
    assert counted(monkeypatch, copied, shared=40 << 10, text=text).in_flight == 4 * (40 << 10)


def test_predicted_times(monkeypatch):
    """Wrong: exponentials at the rate of all instructions; one pass of two."""
    row = replace(ROW, problem=Problem("n", 1e9, 4e9), passes=2)
    found = counted(monkeypatch, row).predicted_ms
    cycles = 2e9 / (132 * 1.98e9) * 1e3
    assert found["issue"] == pytest.approx(1.25 / 128 * cycles, abs=1e-4)
    assert found["MUFU"] == pytest.approx(0.5 / 16 * cycles, abs=1e-4)
    assert found["fp64"] == pytest.approx(0.25 / 64 * cycles, abs=1e-4)
    assert found["bytes"] == pytest.approx(8e9 / 4.3e12 * 1e3, abs=1e-4)
    assert max(found, key=found.__getitem__) == "bytes"


def test_goals():
    assert Goal("ctas", least=4).by(3) == 0.25 and Goal("ctas", least=4).by(4) == 0
    assert Goal("fp64", most=0).by(16) == 16 and Goal("fp64", most=0).by(0) == 0
    assert (Goal("a", most=9.5, was=15.75).text, Goal("a", least=2).text) == ("<= 9.5, was 15.75", ">= 2")


def test_a_kernel_without_the_loop_says_so():
    with pytest.raises(ValueError, match=r"kernel: expected a loop with \('LDS',\), without \(\); got none"):
        Main(has=("LDS",)).find(code().function)
    assert Main().find(Function("empty")) is None
