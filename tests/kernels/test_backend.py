"""Which implementation runs: chosen, asked for, refused; and restored whatever happens."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fastrl import ops
from fastrl.kernels import _backend, decode_attention, rms_norm

X = torch.zeros(2, 5)
Y = torch.tensor([0, 4])


def test_the_automatic_choice_is_ready_and_the_table_says_so():
    chosen, all_ = ops.backend("cpu"), ops.implementations()
    assert set(chosen) == set(all_)
    assert all(all_[op][name] == "ready" for op, name in chosen.items())
    for table in all_.values():
        assert table["reference"] == "ready"


def test_a_backend_asked_for_by_name_that_cannot_run_is_an_error_not_a_fallback():
    with (
        ops.use_backend("cuda", "gae"),
        pytest.raises(RuntimeError, match=r"gae: backend 'cuda' was asked for, but it has no such"),
    ):
        ops.gae(torch.zeros(2), torch.zeros(2), torch.tensor([0, 2]), gamma=1.0, lam=1.0)
    with (
        ops.use_backend("cuda"),
        pytest.raises(
            RuntimeError, match=r"token_logp: backend 'cuda' was asked for, but .*; available here: "
        ),
    ):
        ops.token_logp(X, Y)
    with (
        ops.use_backend("cpu", "token_logp"),
        pytest.raises(RuntimeError, match=r"does not take torch\.float64"),
    ):
        ops.token_logp(X.double(), Y)


def test_the_environment_asks_too(monkeypatch):
    monkeypatch.setenv("FASTRL_BACKEND", "reference")
    assert set(ops.backend("cpu").values()) == {"reference"}
    with ops.use_backend("cpu", "token_logp"):
        assert ops.backend("cpu")["token_logp"] == "cpu", "the innermost wish wins"
    monkeypatch.setenv("FASTRL_BACKEND", "fastest")
    with pytest.raises(
        ValueError, match="FASTRL_BACKEND: expected one of auto, cuda, triton, cpu, reference; got 'fastest'"
    ):
        ops.token_logp(X, Y)


def test_the_environment_states_a_preference(monkeypatch):
    """Wrong: a backend that lacks an op, or a dtype of it, makes the op fail: attention, need and rms_norm in
    float64 have no Triton kernel.
    """
    x, w = torch.randn(3, 8), torch.ones(8)
    expected = ops.rms_norm(x, w)
    monkeypatch.setenv("FASTRL_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # Triton takes no CPU tensors then
    usual = {op: name for op, name in ops.backend("cpu").items() if name == "triton"}
    assert usual == {}
    assert torch.equal(ops.rms_norm(x, w), expected)
    assert ops.rms_norm(x.double(), w.double()).dtype == torch.float64
    assert _backend.pick("need", torch.ones(2, dtype=torch.bool), "forward")
    monkeypatch.setenv("FASTRL_BACKEND", "auto")
    assert _backend.preferred() is None and not _backend.overruled()


def test_a_preferred_linear_stays_the_fast_product(monkeypatch):
    """Wrong: the batch-invariant product for every layer, because it is the one that Triton has."""
    monkeypatch.setenv("FASTRL_BACKEND", "triton")
    x, w = torch.randn(3, 8), torch.randn(5, 8)
    picked = _backend.inexact("linear", x, "forward")
    assert picked is not _backend._table["linear"]["triton"].parts["forward"]
    assert torch.equal(ops.linear(x, w), torch.nn.functional.linear(x, w))


def test_nesting_and_exceptions_restore():
    """Known wrong elsewhere: after a nested exit the mode says it is on while nothing is routed."""
    before = ops.backend("cpu")
    with pytest.raises(KeyError), ops.use_backend("reference"), ops.use_backend("cpu", "token_logp"):
        raise KeyError
    assert ops.backend("cpu") == before
    with ops.use_backend("reference"):
        with ops.use_backend("cpu", "token_logp"):
            pass
        assert _backend.requested("token_logp") == "reference"
    assert _backend.requested("token_logp") is None


def test_other_threads_see_it():
    """Autograd runs a CUDA backward in its own threads: a choice per thread would use another backend
    there.
    """
    seen = []
    with ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_backend.requested("token_logp")))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_unknown_names():
    with (
        pytest.raises(
            ValueError, match="use_backend: expected one of cuda, triton, cpu, reference; got 'gpu'"
        ),
        ops.use_backend("gpu"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"use_backend: expected one of .*token_logp.*; got 'logp'"),
        ops.use_backend("cpu", "logp"),
    ):
        pass


def test_a_kernel_that_never_ran_is_not_chosen():
    _backend.register("planted", "cuda", note=_backend.COMPILED_ONLY, forward=lambda: "cuda")
    _backend.register("planted", "reference", forward=lambda: "reference")
    try:
        assert ops.backend("cuda")["planted"] == "reference"
        assert ops.implementations()["planted"]["cuda"] == "compiled only"
    finally:
        del _backend._table["planted"]


# --- the registered op, or the implementation itself ------------------------------------------------
class Tagged(torch.Tensor):
    """A subclass: its own __torch_function__ and __torch_dispatch__ are to see the op."""


def under(context):
    def run(f, x):
        with context():
            f(x)

    return run


def traced(f, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still there
        torch.jit.trace(lambda x: f(x) or x + 1, x, check_trace=False)


def dual(f, x):
    with forward_ad.dual_level():
        f(forward_ad.make_dual(x, torch.ones_like(x)))


SEEN_BY = {
    "autograd": lambda f, x: f(x.requires_grad_()),
    "FakeTensorMode": under(FakeTensorMode),
    "a fake tensor": lambda f, x: f(FakeTensorMode().from_tensor(x)),
    "a counter of FLOPs": under(lambda: FlopCounterMode(display=False)),
    "a function mode": under(lambda: torch.device("meta")),
    "autocast": under(lambda: torch.autocast("cpu", torch.bfloat16)),
    "a profiler": under(torch.autograd.profiler.profile),
    "make_fx": lambda f, x: make_fx(lambda x: f(x) or x + 1)(x),
    "torch.jit.trace": traced,
    "vmap": lambda f, x: torch.func.vmap(lambda x: f(x) or x)(x),
    "vjp": lambda f, x: torch.func.vjp(lambda x: f(x) or x, x),
    "forward mode": dual,
    "a subclass": lambda f, x: f(x.as_subclass(Tagged)),
    "a lazy negation": lambda f, x: f(torch.complex(x, x).conj().imag),
}


@pytest.mark.parametrize("who", SEEN_BY)
def test_the_registered_op_runs_where_somebody_would_see_it(who):
    """Wrong: a shortcut that hides the op from a transform, a mode or a profiler, or hands a kernel memory
    that is not what it says.
    """
    seen = []
    SEEN_BY[who](lambda x: seen.append(_backend.direct(x)), torch.ones(2, 3))
    assert seen
    assert not any(seen)


def test_without_a_witness_the_implementation_is_called_itself(monkeypatch):
    """Wrong: 20 us of torch.library for every norm of a decode step; or a gradient, or a backend asked for,
    lost by going past it.
    """
    x, w = torch.randn(4, 8), torch.nn.Parameter(torch.randn(8))
    expected = ops.rms_norm(x, w).detach()
    monkeypatch.setattr(rms_norm, "differentiable", None)
    with torch.no_grad():
        assert torch.equal(ops.rms_norm(x, w), expected)
        with (
            ops.use_backend("cuda", "rms_norm"),
            pytest.raises(RuntimeError, match="rms_norm: backend 'cuda' was asked for"),
        ):
            ops.rms_norm(x, w)
    with torch.inference_mode():
        assert torch.equal(ops.rms_norm(x, w), expected)
    with pytest.raises(TypeError, match="NoneType"):
        ops.rms_norm(x, w)


def test_a_compiled_graph_holds_the_registered_ops():
    """Wrong: tracing into the shortcut, which breaks the graph at a data_ptr,
    or bakes one backend into it.
    """
    called = []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def f(x, w, y):
        return ops.swiglu(ops.rms_norm(x, w)), ops.rms_norm(x, w, residual=y)

    x, w, y = torch.randn(4, 8), torch.randn(8), torch.randn(4, 8)
    with torch.no_grad():
        got, expected = torch.compile(f, backend=backend, fullgraph=True)(x, w, y), f(x, w, y)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1][1], expected[1][1])
    for op in ("fastrl.rms_norm", "fastrl.add_rms_norm", "fastrl.swiglu"):
        assert any(op in name for name in called), called


def test_a_gradient_is_refused():
    """Wrong: decode attention past torch.library, whose result would be a constant to autograd."""
    q, cache = torch.randn(1, 2, 4, requires_grad=True), torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match="q: expected no gradient, decode_attention has none"):
        decode_attention.decode_attention(
            q, cache, cache, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
        )


# --- devices by name --------------------------------------------------------------------------------
def test_a_device_has_many_names():
    """Wrong: a comparison of strings, to which "cuda:0" and a torch.device are strange."""
    here, gpu = ops.backend("cpu"), ops.backend("cuda")
    assert ops.backend("cpu:0") == ops.backend(torch.device("cpu")) == here
    assert (
        ops.backend("cuda:0")
        == ops.backend(torch.device("cuda", 0))
        == ops.backend(torch.device("cuda"))
        == gpu
    )
    assert gpu["gae"] == "reference" and here["gae"] == "cpu"


class Verdicts:
    """A table that knows no kernel, and notes the devices that it is asked about."""

    def __init__(self, asked: list[int]) -> None:
        self.asked = asked

    def has_passed(self, op: str, name: str, index: int) -> bool:
        self.asked.append(index)
        return False


def test_a_gpu_by_its_index(monkeypatch):
    """Wrong: the verdicts of the current device for every other."""
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(_backend, "TABLE", Verdicts(asked))
    ops.backend("cuda:1")
    assert set(asked) == {1}
    with pytest.raises(ValueError, match=r"device: expected one of the 2 CUDA devices here, got 'cuda:2'"):
        ops.backend("cuda:2")


@pytest.mark.parametrize("name", ["mps", "meta", "xpu", "nonsense", "", "cuda:x", "cuda:-1", "CUDA", "cpu:1"])
def test_no_such_device(name):
    with pytest.raises(ValueError, match=f"device: expected cpu, cuda or cuda:N, got '{name}'"):
        ops.backend(name)


def test_what_is_no_device_at_all():
    with pytest.raises(
        ValueError, match=r"got 'gae'; ops.backend\(\)\[\"gae\"\] is the implementation of an op"
    ):
        ops.backend("gae")
    for wrong in (0, 3.5, ["cpu"]):
        with pytest.raises(TypeError, match=r"device: expected cpu, cuda, cuda:N or a torch\.device"):
            ops.backend(wrong)


def test_the_innermost_block_that_covers_an_op_wins():
    """Wrong: the outermost."""
    with ops.use_backend("reference"), ops.use_backend("cpu", "token_logp"):
        chosen = ops.backend("cpu")
    assert (chosen["token_logp"], chosen["gae"]) == ("cpu", "reference")
    with ops.use_backend("cpu", "token_logp"), ops.use_backend("reference"):
        assert ops.backend("cpu")["token_logp"] == "reference"
