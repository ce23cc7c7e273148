"""The rungs of attention's ladder: which is chosen, and each adapter against a stand-in with its library's
signature.

The libraries themselves need a GPU (tests/gpu/test_model_ops_gpu.py).  What is shown here is what surrounds
them: the arguments, the layout of lse, the deterministic backward, empty batches, strided inputs.
"""

from __future__ import annotations

import importlib.metadata
import types

import pytest
import torch

from fastrl import ops
from fastrl.kernels import _backend
from fastrl.kernels._attention import flash as _attention_flash
from fastrl.kernels._attention import padded as _attention_padded
from fastrl.kernels.attention import reference, reference_backward

LENGTHS = [3, 0, 5, 1, 9, 17]
RUNGS = ("flash_attn_4", "flash_attn_2", "varlen_attn", "sdpa")


def inputs(lengths=LENGTHS, H=4, K=2, E=8, ends=torch.int32):
    """q, k and v as views of one fused projection, and the ends."""
    cu = torch.tensor([0, *lengths]).cumsum(0)
    fused = torch.randn(int(cu[-1]), H + 2 * K, E, requires_grad=True)
    return fused, cu.to(ends)


def run(name, fused, cu, **options):
    with ops.use_backend(name, "attention"):
        y = ops.attention(*fused.split((4, 2, 2), 1), cu, **options)
        return y, torch.autograd.grad(y.square().sum(), fused)[0]


class Library:
    """What the libraries have in common: packed tensors, int32 ends, lse (H, T);
    it checks what it is given.
    """

    def __init__(self) -> None:
        self.longest: list[int] = []

    def forward(self, q, k, v, ends, longest, scale):
        assert all(x.stride(-1) == 1 for x in (q, k, v)) and ends.dtype == torch.int32
        self.longest.append(longest)
        y, lse = reference(q, k, v, ends, scale, 0)
        return y, lse.t().contiguous()

    def backward(self, dy, q, k, v, y, lse, ends, scale):
        assert lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous() and dy.is_contiguous()
        return reference_backward(dy, q, k, v, y, lse.t(), ends, scale, 0)


# Modules with the functions that an adapter calls, which take no arguments but those that it may pass.
def flash4_module(library):
    def four(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, return_lse
    ):
        assert causal and return_lse and cu_seqlens_k is cu_seqlens_q and max_seqlen_q == max_seqlen_k
        return library.forward(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)

    def four_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        *,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        deterministic,
    ):
        assert causal and deterministic
        return library.backward(dout, q, k, v, out, lse, cu_seqlens_q, softmax_scale)

    return types.SimpleNamespace(_flash_attn_fwd=four, _flash_attn_bwd=four_bwd)


def flash2_module(library):
    def two(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, return_attn_probs):
        assert causal and return_attn_probs
        return *library.forward(q, k, v, cu_q, max_q, softmax_scale), None

    def two_bwd(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        cu_q,
        cu_k,
        max_q,
        max_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
    ):
        assert causal
        assert deterministic
        assert dropout_p == softcap == 0
        assert (window_size_left, window_size_right) == (-1, -1)
        grads = library.backward(dout, q, k, v, out, lse, cu_q, softmax_scale)
        for to, x in zip((dq, dk, dv), grads, strict=True):
            to.copy_(x)

    return types.SimpleNamespace(flash_attn_varlen_func=two, _flash_attn_varlen_backward=two_bwd)


def aten_module(library):
    def torchs(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale):
        assert is_causal and not return_debug_mask and dropout_p == 0
        return *library.forward(q, k, v, cu_q, max_q, scale), None, None, None

    def torchs_bwd(
        grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *, scale
    ):
        assert is_causal and torch.are_deterministic_algorithms_enabled()
        return library.backward(grad, q, k, v, out, lse, cu_q, scale)

    return types.SimpleNamespace(_flash_attention_forward=torchs, _flash_attention_backward=torchs_bwd)


MODULES = {"flash_attn_4": flash4_module, "flash_attn_2": flash2_module, "varlen_attn": aten_module}
ADAPTERS = {
    "flash_attn_4": _attention_flash.flash4,
    "flash_attn_2": _attention_flash.flash2,
    "varlen_attn": _attention_flash.varlen,
}


@pytest.fixture
def here(monkeypatch):
    """Register parts as a rung that runs on CPU, for one test."""

    def put(name, parts):
        impl = _backend.Implementation(parts, None, "", "", ("cpu",), None)
        monkeypatch.setitem(_backend._table["attention"], name, impl)

    return put


# --- the adapters -----------------------------------------------------------------------------------
@pytest.mark.parametrize("ends", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_the_reference_around_its_library(name, ends, here):
    """Wrong: lse handed on as the library lays it out, a backward without determinism, gradients of the heads
    in another order, a longest sequence that is too short.
    """
    library = Library()
    here(name, _attention_flash.parts(ADAPTERS[name](MODULES[name](library))))
    fused, cu = inputs(ends=ends)
    for mine, right in zip(run(name, fused, cu), run("reference", fused, cu), strict=True):
        torch.testing.assert_close(mine, right, atol=1e-6, rtol=1e-6)
    run(name, fused, cu, max_seqlen=17)
    assert library.longest == [35, 17]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_tokens_never_reach_the_library(name, lengths, here):
    here(name, _attention_flash.parts(ADAPTERS[name](types.SimpleNamespace())))
    y, grad = run(name, *inputs(lengths))
    assert y.shape == (0, 4, 8) and grad.shape == (0, 8, 8)


def test_the_deterministic_setting_is_put_back():
    """Wrong: a process that is deterministic ever after, or no longer although its user asked for it; an
    empty tensor filled with NaN.
    """
    for before in (False, True):
        torch.use_deterministic_algorithms(before, warn_only=before)
        try:
            with pytest.raises(KeyError), _attention_flash.deterministic():
                assert torch.are_deterministic_algorithms_enabled()
                assert not torch.is_deterministic_algorithms_warn_only_enabled()
                assert not torch.utils.deterministic.fill_uninitialized_memory
                raise KeyError
            assert torch.are_deterministic_algorithms_enabled() == before
            assert torch.is_deterministic_algorithms_warn_only_enabled() == before
            assert torch.utils.deterministic.fill_uninitialized_memory
        finally:
            torch.use_deterministic_algorithms(False)


def test_sdpa_on_padded_batches(here, monkeypatch):
    """Wrong: shared heads repeated as a block (head h reading key head h % K); lse with the padding to 32
    that the kernel adds; a backward without it.
    """

    def forward(q, k, v, bias, compute_lse, dropout, causal, *, scale):
        assert q.shape[1] == k.shape[1] and bias is None and compute_lse and causal
        y, lse = _attention_padded.cpu_forward(q, k, v, scale)
        return y, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=5.0), None, None

    def backward(dy, q, k, v, bias, y, lse, seed, offset, dropout, mask, causal, *, scale):
        assert lse.shape[-1] % 32 == 0 and causal and mask == (True, True, True, False)
        assert torch.are_deterministic_algorithms_enabled()
        return *_attention_padded.cpu_backward(
            dy, q, k, v, y, lse[..., : q.shape[2]].contiguous(), scale
        ), None

    monkeypatch.setattr(_attention_padded, "_CUDA", "planted")
    monkeypatch.setattr(torch.ops.aten, "planted", forward, raising=False)
    monkeypatch.setattr(torch.ops.aten, "planted_backward", backward, raising=False)
    here("sdpa", _attention_padded._packed(_attention_padded.cuda_forward, _attention_padded.cuda_backward))
    fused, cu = inputs()
    for mine, right in zip(run("sdpa", fused, cu), run("reference", fused, cu), strict=True):
        torch.testing.assert_close(mine, right, atol=5e-6, rtol=1e-5)


# --- the choice -------------------------------------------------------------------------------------
def test_the_order_of_the_ladder():
    assert _backend.order("attention") == (
        "flash_attn_4",
        "flash_attn_2",
        "varlen_attn",
        "cpu",
        "sdpa_cpu",
        "sdpa",
        "reference",
    )
    # which only exact mode picks
    assert set(ops.implementations()["attention"]) == {
        *_backend.order("attention"),
        "exact",
    }


def test_the_best_rung_that_is_there_is_named_and_used(monkeypatch):
    """Wrong: a table that names the first rung whether or not it is installed; a choice that the table does
    not show.
    """
    table = _backend._table["attention"]
    seen = []
    for name in reversed(RUNGS):  # each installed on top of those below it
        monkeypatch.setitem(
            table, name, _backend.Implementation({"forward": name}, None, "", "", ("cuda",), None)
        )
        seen.append(ops.backend("cuda")["attention"])
    assert seen == [*reversed(RUNGS)]
    assert ops.backend("cpu")["attention"] == ("sdpa_cpu" if table["cpu"].missing else "cpu")


def test_a_rung_with_an_obstacle_gives_way_to_the_next(monkeypatch):
    """Wrong: float32 or an odd width handed to flash attention;
    an obstacle that by name falls back silently.
    """
    table, q = _backend._table["attention"], torch.zeros(2, 4, 7)
    four = _backend.Implementation(
        {"forward": "four"}, None, "", "", ("cpu",), lambda q: "E=7" if q.shape[-1] % 8 else ""
    )
    monkeypatch.setitem(table, "flash_attn_4", four)
    assert _backend.pick("attention", torch.zeros(2, 4, 8), "forward") == "four"
    assert _backend.pick("attention", q, "forward") is not four.parts["forward"]
    with (
        ops.use_backend("flash_attn_4", "attention"),
        pytest.raises(RuntimeError, match="'flash_attn_4' was asked for, but E=7; avail"),
    ):
        _backend.pick("attention", q, "forward")


def test_what_the_flash_kernels_do_not_take(monkeypatch):
    """Wrong: Hopper's flash-attn 4, whose backward adds in any order; Turing; a width of 7 or 264."""
    for major, four, two in ((7, "no", "no"), (8, "no", ""), (9, "no", ""), (10, "", ""), (12, "no", "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        for name, want in (("flash_attn_4", four), ("flash_attn_2", two), ("varlen_attn", two)):
            obstacle = _attention_flash.FLASH[name]["obstacle"]
            assert bool(obstacle(torch.zeros(1, 1, 64))) == bool(want), (name, major)
            assert "multiple of 8" in obstacle(torch.zeros(1, 1, 7))
            assert "got E=264" in obstacle(torch.zeros(1, 1, 264))


@pytest.mark.parametrize("name", RUNGS)
def test_asking_for_what_is_not_installed_is_an_error(name):
    """Wrong: a silent fallback, or an answer that does not say what is missing."""
    state = ops.implementations()["attention"][name]
    if state == "ready":
        pytest.skip(f"{name} is installed")
    fused, cu = inputs()
    with pytest.raises(
        RuntimeError, match=f"attention: backend '{name}' was asked for, but .*available here: .*reference"
    ):
        run(name, fused, cu)
    assert any(word in state for word in ("not installed", "without CUDA", "older", "cannot be imported"))


def test_a_library_that_is_old_or_broken_says_so(monkeypatch):
    """Wrong: a broken installation that ends `import fastrl`, or one that looks ready."""
    installed = _attention_flash.installed
    assert installed("flash-attn", "math")[1] in (
        "flash-attn is not installed",
        "this torch was built without CUDA",
        "",
    )
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.6.3")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert installed("flash-attn", "math") == (None, "this torch was built without CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert installed("flash-attn", "math") == (None, "flash-attn 2.6.3 is older than 2.7")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.8.3.post2")
    _, missing = installed("flash-attn", "no_such_module")
    assert "flash-attn 2.8.3.post2 cannot be imported: No module named" in missing
    module, missing = installed("flash-attn", "math")
    assert module.sqrt(4) == 2 and missing == ""


def test_a_rungs_name_belongs_to_its_op():
    """Wrong: a rung asked of every op; an unknown name whose message hides the rungs."""
    with (
        pytest.raises(ValueError, match="expected one of cuda, triton, cpu, reference; got 'sdpa'"),
        ops.use_backend("sdpa"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"flash_attn_4, .*, sdpa; got 'flash'"),
        ops.use_backend("flash", "attention"),
    ):
        pass
    with pytest.raises(ValueError, match="got 'sdpa'"), ops.use_backend("sdpa", "rms_norm"):
        pass
