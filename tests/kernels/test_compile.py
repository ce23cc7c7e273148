"""Every Triton kernel compiles for GPUs that need not be here, without spills, and moves 16 bytes at a time
where it can; and the variants that are compiled are those that calls of the ops launch.

The compiles run in processes of their own: this one decorated the kernels for the interpreter.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace

import pytest
from compiled import ROOT, beside, facts

from fastrl import ops
from fastrl.errors import UserError
from fastrl.kernels import _backend
from fastrl.kernels._group_advantage import SHAPES
from fastrl.kernels._perturb import NORM_CODES
from fastrl.kernels.policy_loss import SURROGATES

pytest.importorskip("triton.backends.nvidia", reason="triton is not installed")
from fastrl.bench import compile_table, variants
from fastrl.bench.beside import with_other
from fastrl.bench.calls import Block
from fastrl.kernels._triton import surrogates

OLDEST = "3.6.0"
JIT = {"triton.jit", "gluon.jit"}
ELSEWHERE = {  # kernels that not every architecture launches: tiles by TMA, and the registers of sm_90
    "linear_logp.target": {90, 100},
    "linear_logp.partial": {90, 100},
    "linear_logp_hopper.partial": {90},
}
CODES = {  # constexprs that are no bools -> their values
    "NORM": {str(code) for code in NORM_CODES.values()},
    "SHAPE": {str(i) for i in range(len(SHAPES))},
    "SURROGATE": {row.triton for row in SURROGATES.values() if row.triton},
    "KL": {"None", *(formula.fn.__name__ for formula in surrogates.KLS.values())},
}
CODES_OF = {"policy_loss.token": ("SURROGATE", "KL"), "group_advantage.tile": ("SHAPE",)}
CODES_OF |= {
    "group_advantage.walk": ("SHAPE",),
    "perturb_token.token": ("NORM",),
    "perturb_init.start": ("NORM",),
}
# optional arguments that no launch is specialised by
IMMATERIAL = {
    "eps": "a number",
    "tau": "a number",
    "group": "of processes, which changes what is launched with, not what",
    "ignore_index": "the reference's",
    "logits_bytes": "how many launches",
    "weight_grad": "of the products",
}


# --- compiles ---------------------------------------------------------------------------------------
def table(tmp_path, *arguments, version=""):
    """The summary that the table writes, with another Triton than the installed one if it is named."""
    out, folder = tmp_path / "table.json", beside(version) if version else None
    path = os.pathsep.join([*([str(folder)] if folder else []), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "fastrl.bench.compile_table", "--out", str(out), "--few", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert out.exists(), done.stderr[-4000:]
    ((found, summary),) = json.loads(out.read_text()).items()
    assert not version or found == version
    assert [(f["kernel"], f["variant"], f["faults"]) for f in summary["faults"]] == []
    assert done.returncode == 0
    return summary


def test_every_kernel_compiles_for_hopper(tmp_path):
    summary = table(tmp_path)
    assert summary["kernels"] == len(kernels())
    assert list(summary["variants"]) == ["sm_90"] and summary["variants"]["sm_90"] > summary["kernels"]


def test_what_failed_before_compiles_on_the_oldest_triton(tmp_path):
    """Wrong: a language function that it lacks; a sum whose result the loop and its tail share, without a
    mask.
    """
    if beside(OLDEST) is None:
        pytest.skip(f"Triton {OLDEST} is not installed beside: make .triton/{OLDEST}")
    table(tmp_path, "sample", "perturb_init", "policy_loss", version=OLDEST)


@pytest.mark.slow
def test_every_kernel_compiles_for_ampere_and_blackwell(tmp_path):
    summary = table(tmp_path, "--arch", "80", "100")
    assert list(summary["variants"]) == ["sm_80", "sm_100"]


# --- what is recorded -------------------------------------------------------------------------------
SCRIPT = """
import json, torch
from fastrl.bench.variants import record
torch.set_num_threads(1)
flags, archs = {}, {}
for arch in (80, 90, 100):
    for variant in record(arch):
        launch = variant.launch
        found = {n: launch.traits[n] for n, kind in launch.signature.items() if kind == "constexpr"}
        flags.setdefault(launch.name, []).append(found)
        archs.setdefault(launch.name, []).append(arch)
print(json.dumps([flags, archs]))
"""


@pytest.fixture(scope="module")
def recorded():
    """Kernel -> the constexprs of its variants, and the architectures that launch it."""
    flags, archs = facts(SCRIPT)
    return flags, {kernel: set(some) for kernel, some in archs.items()}


def kernels():
    """file.kernel of every kernel in the sources."""
    found = set()
    for path in (ROOT / "kernels/_triton").glob("*.py"):
        functions = [x for x in ast.parse(path.read_text()).body if isinstance(x, ast.FunctionDef)]
        jitted = [f for f in functions if any(JIT & set(ast.unparse(d).split("(")) for d in f.decorator_list)]
        found |= {
            f"{path.stem}.{f.name.removesuffix('_kernel')}" for f in jitted if f.name.endswith("_kernel")
        }
    return found


def test_every_kernel_is_launched(recorded):
    """Wrong: a kernel that no call of the table reaches."""
    _, archs = recorded
    assert archs == {kernel: ELSEWHERE.get(kernel, {80, 90, 100}) for kernel in kernels()}


def test_every_flag_has_both_values(recorded):
    """Wrong: policy_loss compiled with masks only; a flag of the GPU that is the same on all."""
    for kernel, found in recorded[0].items():
        values = defaultdict(set)
        for flags in found:
            for name, value in flags.items():
                values[name].add(value)
        one_sided = {n for n, seen in values.items() if seen < {"True", "False"}}
        assert not one_sided, f"{kernel}: no call launches it with another {', '.join(sorted(one_sided))}"


def test_every_code_is_compiled(recorded):
    """Wrong: a surrogate, a KL, a norm or a shape that is added and never compiled."""
    for kernel, names in CODES_OF.items():
        for name in names:
            assert {flags[name] for flags in recorded[0][kernel]} == CODES[name], (kernel, name)


def test_every_combination_of_the_inputs_of_policy_loss(recorded):
    inputs = ("MASK", "CORRECTION", "ENTROPY", "SEQUENCE", "REF")
    found = {tuple(f[n] == "True" for n in inputs) for f in recorded[0]["policy_loss.token"]}
    assert found == set(itertools.product((True, False), repeat=5))


def test_every_kernel_says_how_wide_its_accesses_are():
    assert set(variants.MOVES) | set(variants.NARROW) == kernels()
    assert not set(variants.MOVES) & set(variants.NARROW)


# --- the calls --------------------------------------------------------------------------------------
def unvaried(function, blocks):
    """The optional arguments of `function` that have fewer than two values in its calls."""
    values = defaultdict(list)
    for block in blocks:
        if block.function is function:
            for name, some in block.axes.items():
                values[name] += [x for x in some if all(x is not y for y in values[name])]
    given = inspect.signature(function).parameters.values()
    optional = [p.name for p in given if p.default is not p.empty and p.name not in IMMATERIAL]
    return [name for name in optional if len(values[name]) < 2]


@pytest.mark.parametrize("name", sorted(set(variants.OPS) - {"advance", "decoder_layer", "rope"}))
def test_every_optional_input_is_there_and_not(name):
    assert unvaried(getattr(ops, name), variants.OPS[name]()) == []


def test_rope_is_called_with_every_optional_input():
    """Its store is given to a function that takes no gradients."""
    blocks = [replace(b, function=ops.rope) for b in variants.OPS["rope"]()]
    assert unvaried(ops.rope, blocks) == []


def test_a_new_optional_input_is_found():
    def op(x, *, mask=None, eps=1e-6, level=None): ...

    blocks = [
        Block(function=op, axes={"x": (1,), "mask": (None, 2)}),
        Block(function=op, axes={"level": (None,)}),
    ]
    assert unvaried(op, blocks) == ["level"]


def test_every_op_with_a_triton_implementation_is_called():
    have = {op for op, table in _backend._table.items() if "triton" in table}
    assert set(variants.OPS) - {"linear_loss"} == have


# --- the checker is checked -------------------------------------------------------------------------
GOOD = compile_table.Figures(
    kernel="a.b", variant="bf16", arch=90, registers=32, load=16, store=4, wide=("load",)
)


def test_a_spill_a_narrow_access_and_a_failure_are_faults(monkeypatch):
    assert GOOD.faults == []
    assert replace(GOOD, spill=8).faults == ["8 bytes spilled"]
    assert replace(GOOD, wide=("load", "store")).faults == ["store of 4 bytes"]
    assert replace(GOOD, failure="AttributeError: to_tensor").faults == ["AttributeError: to_tensor"]
    monkeypatch.setitem(compile_table.SPILLS, "a.b", (8, True, "why"))
    odd = replace(GOOD, wide=())
    assert replace(odd, spill=8).faults == []
    assert replace(odd, spill=16).faults == ["16 bytes spilled"]
    assert replace(GOOD, spill=8).faults == ["8 bytes spilled"]  # wrong: an excuse for sizes that models have


def test_the_summary_names_what_is_wrong(monkeypatch):
    monkeypatch.setitem(compile_table.SPILLS, "c.d", (8, False, "one register too many"))
    rows = [GOOD, replace(GOOD, arch=80, failure="no"), replace(GOOD, kernel="c.d", spill=8)]
    found = compile_table.summary(rows)
    assert found["variants"] == {"sm_80": 1, "sm_90": 2} and found["kernels"] == 2
    assert [(f["kernel"], f["faults"]) for f in found["faults"]] == [("a.b", ["no"])]
    assert [(f["kernel"], f["why"]) for f in found["spills"]] == [("c.d", "one register too many")]


def test_a_triton_that_is_not_installed():
    with pytest.raises(UserError, match=r"--beside 0\.0\.0: expected a Triton in .*make \.triton/0\.0\.0"):
        with_other("0.0.0", "fastrl.bench.compile_table", [])


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
    copy = "cp.async.{} [ %r1 + 0 ], [ %rd1 + 0 ], {}, %r3;"
    assert compile_table.widest(copy.format("cg.shared.global", "0x10"), "load") == 16
    assert compile_table.widest(copy.format("ca.shared.global", "0x8"), "load") == 8
    assert compile_table.widest("", "load") == 0


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="TRITON_INTERPRET: expected it unset"):
        compile_table.main([])
