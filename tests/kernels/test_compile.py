"""Every Triton kernel compiles for GPUs that need not be here, without spills, and moves 16 bytes at a time
where it can.

The compiles run in a process of their own: this one decorated the kernels for the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastrl.bench import compile_table
from fastrl.errors import UserError
from fastrl.kernels._launch import Spec

pytest.importorskip("triton.backends.nvidia", reason="triton is not installed")
ROOT = Path(__file__).parents[2]
# their rows start anywhere, so no access to them can be wide
EXEMPT = {50257, 7}  # odd vocabularies and groups
ANYWHERE = {"gae.gae", "group_advantage.walk", "advance.forward"}  # packed sequences, sorted samples, records


def table(tmp_path, *arguments):
    out = tmp_path / "table.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fastrl.bench.compile_table", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    assert done.returncode == 0, [
        (r["kernel"], r["case"], r["arch"], r["faults"]) for r in rows if r["faults"]
    ] or done.stderr[-4000:]
    return rows


def check(rows):
    assert not [(r["kernel"], r["case"], r["arch"], r["faults"]) for r in rows if r["faults"]]
    for r in rows:
        assert 0 < r["registers"] <= 255 and r["spill"] == 0
        assert (
            r["wide"]
            or any(f"={V} " in r["case"] + " " for V in EXEMPT)
            or "unaligned" in r["case"]
            or "combine" in r["kernel"]
            or r["kernel"] in ANYWHERE
        ), r
        assert all(r[move] >= 16 for move in r["wide"])


def test_hopper(tmp_path):
    rows = table(tmp_path)
    assert {r["arch"] for r in rows} == {90}
    shared = {
        "_heads",
        "_perturb_call",
        "_philox",
        "_policy_block",
        "_tiles",
        "_vocabulary",
        "surrogates",
    }  # device functions
    files = {p.stem for p in (ROOT / "kernels/_triton").glob("*.py")} - shared
    assert {r["kernel"].split(".")[0] for r in rows} == files, "a kernel file without variants"
    check(rows)


@pytest.mark.slow
def test_ampere_hopper_and_blackwell(tmp_path):
    rows = table(tmp_path, "--all")
    assert {r["arch"] for r in rows} == {80, 90, 100}
    check(rows)


# --- the checker is checked -------------------------------------------------------------------------
def test_a_spill_and_a_narrow_access_are_faults():
    good = compile_table.Figures(
        kernel="a.b", case="V=16", arch=90, registers=32, shared=0, spill=0, load=16, store=4, wide=("load",)
    )
    assert good.faults == []
    assert replace(good, spill=8).faults == ["8 bytes spilled"]
    assert replace(good, wide=("load", "store")).faults == ["store of 4 bytes"]


def test_what_ptx_says_of_its_accesses():
    """Wrong: counting a shared-memory load, or the first access instead of the widest."""
    ptx = """
    @%p1 ld.global.b64 { %rd1 }, [ %rd2 + 0 ];
    @%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd2 + 0 ];
    ld.shared.v8.b32 { %r1 }, [ %r2 ];
    @%p1 st.global.v2.b16 [ %rd1 + 0 ], { %rs1, %rs2 };
    """
    assert compile_table.widest(ptx, "load") == 16
    assert compile_table.widest(ptx, "store") == 4
    assert (
        compile_table.widest("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r3;", "load") == 16
    )
    assert compile_table.widest("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x8, %r3;", "load") == 8
    assert compile_table.widest("", "load") == 0


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="TRITON_INTERPRET: expected it unset"):
        list(compile_table.specs())


def test_a_variant_names_every_argument():
    """Wrong: hints on arguments that a launch cannot promise, or an argument without a type."""

    class Kernel:
        arg_names = ("x", "V", "tau", "BLOCK")

    spec = Spec(
        kernel=Kernel,
        case="",
        types={"x": "*bf16", "V": "i32", "tau": "fp32"},
        constants={"BLOCK": 128},
        divisible=False,
    )
    assert spec.signature == {"x": "*bf16", "V": "i32", "tau": "fp32", "BLOCK": "constexpr"}
    assert spec.hints == ("x",)
