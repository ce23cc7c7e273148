"""Which implementation runs: chosen, asked for, refused; and restored whatever happens."""

from __future__ import annotations

import threading

import pytest
import torch

from fastrl import ops
from fastrl.kernels import _backend

X = torch.zeros(2, 5)
Y = torch.tensor([0, 4])


def test_the_automatic_choice_is_ready_and_the_table_says_so():
    chosen, all_ = ops.backend("cpu"), ops.implementations()
    assert set(chosen) == set(all_)
    assert all(all_[op][name] == "ready" for op, name in chosen.items())
    for table in all_.values():
        assert table["reference"] == "ready"


def test_a_backend_asked_for_by_name_that_cannot_run_is_an_error_not_a_fallback():
    with ops.use_backend("cuda", "gae"), pytest.raises(RuntimeError, match=r"gae: backend 'cuda' was asked for, but it has no such"):
        ops.gae(torch.zeros(2), torch.zeros(2), torch.tensor([0, 2]), gamma=1.0, lam=1.0)
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match=r"token_logp: backend 'cuda' was asked for, but .*; available here: "):
        ops.token_logp(X, Y)
    with ops.use_backend("cpu", "token_logp"), pytest.raises(RuntimeError, match=r"does not take torch\.float64"):
        ops.token_logp(X.double(), Y)


def test_the_environment_asks_too(monkeypatch):
    monkeypatch.setenv("FASTRL_BACKEND", "reference")
    assert set(ops.backend("cpu").values()) == {"reference"}
    with ops.use_backend("cpu", "token_logp"):
        assert ops.backend("cpu")["token_logp"] == "cpu", "the innermost wish wins"
    monkeypatch.setenv("FASTRL_BACKEND", "fastest")
    with pytest.raises(ValueError, match="FASTRL_BACKEND: expected one of cuda, triton, cpu, reference; got 'fastest'"):
        ops.token_logp(X, Y)


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
    """Autograd runs a CUDA backward in its own threads: a choice per thread would use another backend there."""
    seen = []
    with ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_backend.requested("token_logp")))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_unknown_names():
    with pytest.raises(ValueError, match="use_backend: expected one of cuda, triton, cpu, reference; got 'gpu'"), ops.use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match=r"use_backend: expected one of .*token_logp.*; got 'logp'"), ops.use_backend("cpu", "logp"):
        pass


def test_a_kernel_that_never_ran_is_not_chosen():
    _backend.register("planted", "cuda", note=_backend.COMPILED_ONLY, forward=lambda: "cuda")
    _backend.register("planted", "reference", forward=lambda: "reference")
    try:
        assert ops.backend("cuda")["planted"] == "reference"
        assert ops.implementations()["planted"]["cuda"] == "compiled only"
    finally:
        del _backend._table["planted"]
