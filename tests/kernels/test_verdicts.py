"""Kernels that prove themselves, on a simulated CUDA machine (`fake_device`): chosen by default once a real
child process has found them right, and left out, alone and loudly, where it has not.
"""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from fake_device import break_kernels, fake_device, forget, machine
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrl import ops
from fastrl.kernels import _backend
from fastrl.kernels._backend import asked
from fastrl.kernels._verdicts import first_use, variant
from fastrl.kernels._verdicts.first_use import ensure, passing, put
from fastrl.kernels._verdicts.machine import Limits
from fastrl.kernels._verdicts.summary import difference, sentence, table
from fastrl.kernels._verdicts.table import TABLE, Verdict

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU"
)
CPU = torch.device("cpu")
FP32 = (torch.float32,)
GOOD = Verdict(True, cases=3, worst=0.25, date="2026-12-01", variants=frozenset({"forward 14"}))


def triton(op: str, part: str = "forward"):
    return _backend._table[op]["triton"].parts[part]


def chosen(op: str, x: torch.Tensor, part: str = "forward"):
    """The kernel itself, behind its guard if it has one."""
    run = _backend.inexact(op, x, part)
    return run.run if isinstance(run, variant.Guarded) else run


def told(op: str, backend: str = "triton", dtype: torch.dtype = torch.float32, verdict: Verdict = GOOD):
    put((op, backend, dtype, None), verdict)


@pytest.fixture
def simulated(tmp_path):
    """A machine whose children must not be started."""

    def refuse(command, changes):
        raise AssertionError("a check was started")

    with fake_device(tmp_path, start=refuse):
        yield tmp_path


# --- a real check -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """One round of checks with kernels broken in every way, and what was warned of."""
    folder = tmp_path_factory.mktemp("checked")
    faults = {
        "swiglu": "illegal_address",
        "linear_logp": "aborted",
        "gae": "wrong_value",
        "advance": "compile_error",
        "group_advantage": "out_of_bounds",
    }
    names = (*faults, "linear", "token_logp")
    with fake_device(folder, *names), break_kernels(**faults):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ensure(CPU, dtypes=FP32)
        found = dict(TABLE.verdicts)
    return folder, names, found, [str(w.message) for w in caught if w.category is RuntimeWarning]


def test_each_fault_costs_its_own_op_the_verdict(checked):
    """Wrong: a crash that takes the other verdicts with it, a child that is not started again; a wrong value
    within somebody's tolerance.
    """
    _, names, found, _ = checked
    assert {key[0] for key in found} == set(names)
    reasons = {key[0]: verdict.reason for key, verdict in found.items()}
    assert "ended by SIGSEGV" in reasons["swiglu"]
    assert "ended by SIGABRT" in reasons["linear_logp"]
    assert "against float64, allowed" in reasons["gae"]
    assert "no attribute 'to_tensor'" in reasons["advance"]
    assert "writes outside its tensors" in reasons["group_advantage"]
    for op in ("linear", "token_logp"):
        (verdict,) = (v for k, v in found.items() if k[0] == op)
        assert verdict.passed and verdict.cases >= 8 and 0 < verdict.worst <= 1 and verdict.variants


def test_each_failure_is_one_warning_that_names_it(checked):
    *_, warned = checked
    assert len(warned) == 5
    for op in ("swiglu", "linear_logp", "gae", "advance", "group_advantage"):
        (text,) = (t for t in warned if t.startswith(f"{op}: the triton kernel failed its check"))
        assert "forward" in text and f"{op} runs its next implementation instead" in text


def test_passing_kernels_are_the_default_and_run(checked):
    """Wrong: a verdict that is written and not read; a failed kernel that is chosen; a first check again."""
    folder, *_ = checked
    logits, target = torch.randn(3, 7), torch.tensor([1, 6, 0])
    expected = ops.token_logp(logits, target)

    def never(command, changes):
        raise AssertionError("a check was started although everything is known")

    with fake_device(folder, *checked[1], start=never), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ensure(CPU, dtypes=FP32)
        assert ops.backend("cpu")["token_logp"] == "triton"
        assert chosen("token_logp", logits) is triton("token_logp")
        assert chosen("gae", logits[0]) is not triton("gae")
        assert ops.implementations()["token_logp"]["triton"] == "ready"
        assert ops.implementations()["gae"]["triton"] == "compiled only"
        torch.testing.assert_close(ops.token_logp(logits, target).logp, expected.logp, atol=1e-5, rtol=0)
        assert _backend.inexact("linear", logits, "forward") is not triton("linear"), "exact mode's own"
        with ops.exact():
            assert _backend.batch_invariant("linear", logits, "forward").run is triton("linear")
    assert ops.backend("cpu")["token_logp"] == "cpu"


def test_a_hang_ends_in_time_and_costs_one_verdict(tmp_path):
    """Wrong: a limit for all cases together only, which one hang uses up."""
    limits = Limits(start=240, case=10, total=600)
    with fake_device(tmp_path, "gae", "linear_logp", limits=limits), break_kernels(gae="hang"):
        with pytest.warns(RuntimeWarning, match="gae: .*no answer within 10 s"):
            ensure(CPU, dtypes=FP32)
        assert passing(CPU) == {"linear_logp/triton/float32"}


def test_children_that_cannot_start_leave_everything_unknown(tmp_path, capfd):
    """Wrong: an EXCLUSIVE_PROCESS GPU, on which every kernel would be called wrong, and kept as that."""
    with fake_device(tmp_path, "gae", modules=("no_such_module",)):
        ensure(CPU, dtypes=FP32)
        assert TABLE.verdicts == {} and ops.backend("cpu")["gae"] == "cpu"
        assert not (tmp_path / "fastrl" / "verdicts.json").exists()
    assert "could not be checked are not used: ModuleNotFoundError" in capfd.readouterr().err


# --- the choice -------------------------------------------------------------------------------------
def test_unknown_and_failed_kernels_are_not_chosen(simulated, monkeypatch):
    monkeypatch.setenv("FASTRL_CHECK", "0")
    x = torch.randn(2, 14)
    assert chosen("swiglu", x) is not triton("swiglu")
    told("swiglu")
    assert chosen("swiglu", x) is triton("swiglu")
    assert chosen("swiglu", x.bfloat16()) is not triton("swiglu"), "a verdict is of one dtype"
    told("swiglu", verdict=Verdict(False, "error 1 against float64, allowed 0.1", date="2026-12-01"))
    assert chosen("swiglu", x) is not triton("swiglu")
    with ops.use_backend("triton", "swiglu"):
        assert _backend.pick("swiglu", x, "forward") is triton("swiglu"), "by name it runs all the same"


def test_fake_cuda_tensors_choose_by_their_own_device(monkeypatch):
    """Wrong: a verdict of one GPU that is taken for another's; without the simulation, on tensors that say
    cuda.
    """
    monkeypatch.setenv("FASTRL_CHECK", "0")
    with FakeTensorMode():
        first, second = (torch.empty(2, 14, device=f"cuda:{i}") for i in (0, 1))
    try:
        put(("swiglu", "triton", torch.float32, 1), GOOD)
        assert chosen("swiglu", first) is not triton("swiglu")
        assert chosen("swiglu", second) is triton("swiglu")
        with ops.exact():
            assert _backend.pick("swiglu", second, "forward").run is triton("swiglu")
            with pytest.raises(RuntimeError, match=r"exact mode has no .* it is not checked on this device"):
                _backend.pick("swiglu", first, "forward")
    finally:
        forget()


def test_a_preferred_backend_runs_unless_it_failed(simulated, monkeypatch):
    monkeypatch.setenv("FASTRL_CHECK", "0")
    monkeypatch.setenv("FASTRL_BACKEND", "triton")
    x = torch.randn(2, 14)
    assert chosen("swiglu", x) is triton("swiglu")
    told("swiglu", verdict=Verdict(False, "crash"))
    assert chosen("swiglu", x) is not triton("swiglu")


def test_a_change_of_verdicts_changes_the_keys_of_graphs(simulated):
    before = asked()
    told("swiglu")
    assert asked() != before


@pytest.mark.parametrize("mode, error", [("0", None), ("1", None), ("strict", RuntimeError)])
def test_the_switch(mode, error, tmp_path, monkeypatch):
    """Wrong: FASTRL_CHECK=0 that checks, or a strict one that falls back."""
    monkeypatch.setenv("FASTRL_CHECK", mode)
    started = []

    def start(command, changes):
        started.append(command)
        return machine(modules=("no_such_module",)).start(["-c", "raise SystemExit('no GPU')"], changes)

    with fake_device(tmp_path, "swiglu", start=start):
        if error:
            with pytest.raises(error, match="swiglu: the triton kernel may not run: it is not checked"):
                ops.swiglu(torch.randn(2, 14))
        else:
            ops.swiglu(torch.randn(2, 14))
            ops.swiglu(torch.randn(2, 14))
        assert len(started) == (mode != "0"), "once a process, and never with 0"


def test_an_unknown_switch(monkeypatch):
    monkeypatch.setenv("FASTRL_CHECK", "maybe")
    with pytest.raises(ValueError, match="FASTRL_CHECK: expected one of 1, 0, strict; got 'maybe'"):
        first_use.mode()


# --- where nothing is checked -----------------------------------------------------------------------

WITNESSES = {
    "torch.compile": lambda f, x: torch.compile(lambda y: f(y), backend="eager")(x),
    "vmap": lambda f, x: torch.func.vmap(lambda y: f(y) or y)(x),
    "vjp": lambda f, x: torch.func.vjp(lambda y: f(y) or y, x),
    "fake tensors": lambda f, x: f(FakeTensorMode().from_tensor(x)),
}


@pytest.mark.parametrize("who", WITNESSES)
def test_nothing_is_checked_or_remembered_under(who, simulated):
    """Wrong: a child process started, or a verdict kept, from inside a trace."""
    seen = []
    WITNESSES[who](lambda x: seen.append(variant.eager(x)), torch.randn(2, 14))
    assert seen and not any(seen)


def test_nothing_is_checked_inside_a_capture(simulated, monkeypatch):
    """A captured stream, as CUDA reports it: unknown kernels and unknown variants run the reference there."""
    x = torch.randn(2, 14)
    monkeypatch.setattr(variant, "eager", lambda x: False)
    monkeypatch.setattr(first_use, "eager", lambda x: False)
    assert chosen("swiglu", x) is not triton("swiglu")
    assert TABLE.asked == set() and TABLE.verdicts == {}
    told("swiglu")
    before = asked()
    run = _backend.inexact("swiglu", torch.randn(2, 22), "forward")
    run(torch.randn(2, 22))
    assert not run.known and not run.bad and asked() == before
    with ops.exact(), pytest.raises(RuntimeError, match="swiglu: exact mode needs the triton kernel"):
        run(torch.randn(2, 22))


# --- first launches of a variant --------------------------------------------------------------------
def test_a_known_variant_runs_and_an_unknown_one_is_tried(simulated):
    """Wrong: a width no case had that runs unproven; one that is tried at every call."""
    told("swiglu")
    run = _backend.inexact("swiglu", torch.randn(2, 14), "forward")
    before = asked()
    run(torch.randn(2, 14))
    assert asked() == before, "the child had this width"
    x = torch.randn(9, 22)
    assert torch.allclose(run(x), ops.swiglu(x), atol=1e-6)
    assert (
        asked() != before and "forward 22" in TABLE.verdicts["swiglu", "triton", torch.float32, None].variants
    )
    after = asked()
    run(torch.randn(1, 22))
    assert asked() == after


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_variant_that_fails_is_said_once_and_runs_the_reference(fault, simulated):
    def wrong(x):
        return triton("swiglu")(x) + 1

    def raises(x):
        raise RuntimeError("out of resource: shared memory")

    told("swiglu")
    run = _backend.inexact("swiglu", torch.randn(2, 14), "forward")
    run.run = {"wrong": wrong, "raises": raises}[fault]
    x = torch.randn(5, 22)
    impl = _backend._table["swiglu"]["triton"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(impl.parts, "forward", run.run)
        with pytest.warns(RuntimeWarning, match="swiglu: the triton kernel failed .*forward 22"):
            first = run(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(run(x), first)
    assert torch.allclose(first, ops.swiglu(x), atol=1e-6)
    assert _backend.inexact("swiglu", x, "forward") is run, "other widths run the kernel all the same"


# --- what is said -----------------------------------------------------------------------------------
def test_what_is_known_as_text(simulated):
    told("swiglu")
    told(
        "gae",
        verdict=Verdict(False, "forward T=3: error 1.0 against float64, allowed 0.1", date="2026-12-01"),
    )
    lines = table(CPU, ops.backend("cpu")).splitlines()
    row = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert row["swiglu"].startswith("triton checked 2026-12-01, NVIDIA H200, driver 580.159, triton ")
    assert row["swiglu"].endswith(": 3 cases, worst 0.25 of budget")
    assert row["gae"] == (
        "cpu triton FAILED 2026-12-01 (float32): forward T=3: error 1.0 against float64, allowed 0.1"
    )
    assert row["rope"] == "triton not checked: about a minute at first use, or now: fastrl check"
    said = sentence(CPU, ops.backend("cpu"))
    assert said.startswith("kernels: 2 checked on NVIDIA H200 (triton ")
    assert "): swiglu triton; others: " in said and "reference: linear_cross_entropy" in said
    assert sentence(torch.device("meta"), {}) == ""


def test_two_tables_differ_by_name():
    was, now = {"rope": "triton", "gae": "cpu"}, {"rope": "reference", "gae": "cpu", "need": "cpu"}
    assert difference(was, was) == ""
    assert difference(was, now) == "rope reference, which was triton, need cpu, which was none"
