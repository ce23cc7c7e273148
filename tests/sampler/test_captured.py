"""What may stand in a captured decode step: nothing that the host looks at, and no number that was true only
of the capture.

There is no CUDA here.  A stand-in for its graphs records the step's tensor operations, at their addresses,
and does them again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import LONG, PARAMS, agree, same
from runs import decoder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fastrl import ops
from fastrl.kernels import _backend
from fastrl.sampler import Sampler, SamplingParams, engine, step
from fastrl.sampler.cache import PagedCache
from fastrl.sampler.state import State
from fastrl.sampler.step import DecodeStep, Graphs

FILTERS = [(0, 1.0, 0.0), (5, 0.9, 0.05)]


def places(tree: Any) -> list[Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)]


class Graph(TorchDispatchMode):
    """Operations, and the tensors they read and wrote: a replay runs them again and puts each result where
    the first one went.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            given = {x.untyped_storage().data_ptr() for x in places((args, kwargs))}
            for place, x in zip(places(out), places(func(*args, **kwargs)), strict=True):
                if place.untyped_storage().data_ptr() not in given:  # neither a view nor in place
                    place.copy_(x)


@pytest.fixture
def graphs(as_on_cuda, monkeypatch):
    """Engines as on CUDA, their steps captured and replayed."""

    class Stream:
        def wait_stream(self, other: Stream) -> None: ...

    @contextlib.contextmanager
    def capture(graph: Graph, pool: object, stream: object) -> Iterator[None]:
        assert isinstance(stream, Stream), "or torch takes the one stream of the process"
        with graph:
            yield

    cuda = {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda s: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": capture,
    }
    for name, stand_in in (cuda | {"graph_pool_handle": object}).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(engine, "runner", lambda step, device: Graphs(step))
    with ops.use_backend("reference", "advance"):  # what CUDA runs; the compiled one is no tensor operation
        yield


# --- no looks ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_step_looks_at_no_value(family, filters, monkeypatch):
    """Wrong: .item(), bool() or a shape made of values, in a step or in the definition of one of its ops:
    `meta` tensors have no values.
    """
    model = decoder(family).to("meta")
    monkeypatch.setattr(
        _backend,
        "_obstacle",
        lambda impl, name, *rest, **more: "" if name == "reference" else "it is another",
    )
    cache = PagedCache(model, 8, 64)
    state = State(cache, 4, 4, 100, torch.device("meta"))
    with torch.no_grad():
        DecodeStep(model, state)(4, filters)
        state.look(4)
        state.compact(4)
        cache.release(state.rows.table)


# --- no numbers of the capture ----------------------------------------------------------------------
def test_one_set_of_graphs_serves_every_call(graphs):
    """Wrong: seed, temperature, stops, version, lengths or pages baked into a graph; graphs captured anew for
    each call.
    """
    model = decoder(eos_token_id=None)
    sampler = Sampler(model, max_rows=8)
    first = sampler.generate(LONG, PARAMS, lengths=[12, 3, 9, 5, 40])
    agree(model, first)
    captured = dict(sampler._engine.run.captured)
    assert len(captured) >= 2 and {b for b, *_ in captured} <= {1, 2, 4, 8}
    other = SamplingParams(n=3, max_new_tokens=9, seed=6, temperature=0.7, stop=(4, 5, 6))
    again = sampler.generate(LONG[::-1], other, weight_version=3)
    assert set(again.finish_reason) == {"stop", "length"} and set(again.weight_version.tolist()) == {-1, 3}
    assert all(sampler._engine.run.captured[key] is graph for key, graph in captured.items())
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(engine, "runner", step.runner)
        same(again, Sampler(model).generate(LONG[::-1], other))
        same(first, Sampler(model).generate(LONG, PARAMS, lengths=[12, 3, 9, 5, 40]))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    agree(model, sampler.generate(LONG, PARAMS))


def test_exact_mode_and_backends_have_graphs_of_their_own(graphs):
    """Wrong: a graph captured with the kernels of another mode is replayed: log-probs of exact mode that are
    not the trainer's.
    """
    sampler = Sampler(decoder(eos_token_id=None), max_rows=4)
    sampler.generate(LONG[:2], PARAMS)
    run = sampler._engine.run
    plain = set(run.captured)
    with ops.exact():
        sampler.generate(LONG[:2], PARAMS)
    exact = set(run.captured) - plain
    assert {key[:2] for key in exact} == {key[:2] for key in plain}
    with ops.use_backend("reference", "sample"):
        sampler.generate(LONG[:2], PARAMS)
    assert len(run.captured) == 3 * len(plain)
    sampler.generate(LONG[:2], PARAMS)
    assert len(run.captured) == 3 * len(plain)


def test_released_graphs_are_gone(graphs):
    """Wrong: graphs over a cache that was given back are kept, and replayed over the next one."""
    model = decoder(eos_token_id=None)
    sampler = Sampler(model, max_rows=4)
    before = sampler.generate(LONG, PARAMS)
    old = sampler._engine.run
    sampler.release()
    assert not sampler._engine.run.captured
    same(sampler.generate(LONG, PARAMS), before)
    assert sampler._engine.run is not old


@pytest.mark.parametrize("when", ["warming up", "capturing"])
def test_a_capture_that_fails_leaves_the_rows_as_they_were(when, graphs, monkeypatch):
    """Wrong: rows that are not alive any more, after memory ran out in a capture: nothing is drawn, and no
    window ends.
    """
    model = decoder(eos_token_id=None)
    sampler = Sampler(model, max_rows=4)
    want = sampler.generate(LONG[:2], PARAMS)
    run = sampler._engine.run
    alive, table = run.step.state.rows.alive, run.step.state.rows.table
    before = torch.tensor([True, False, True, True])
    alive.copy_(before)
    kept, graphs_before = table.clone(), dict(run.captured)

    def out_of_memory(*args: Any) -> None:
        assert not alive.any(), "nothing is drawn"
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as broken:
        if when == "capturing":
            broken.setattr(torch.cuda, "graph", out_of_memory_on_entry(out_of_memory))
        else:
            broken.setattr(DecodeStep, "__call__", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
            run(3, (7, 1.0, 0.0))
    assert torch.equal(alive, before) and torch.equal(table, kept) and run.captured == graphs_before
    same(sampler.generate(LONG[:2], PARAMS), want)


def out_of_memory_on_entry(fail: Any) -> Any:
    @contextlib.contextmanager
    def capture(graph: Graph, pool: object, stream: object) -> Iterator[None]:
        fail()
        yield

    return capture


def test_each_set_of_filters_has_graphs_of_its_own(graphs):
    """Wrong: a graph of other filters replayed; a set captured again for its next call."""
    sampler = Sampler(decoder(eos_token_id=None), max_rows=4)
    filtered = SamplingParams(n=3, max_new_tokens=12, seed=5, top_k=2)
    plain, few = (sampler.generate(LONG[:2], params) for params in (PARAMS, filtered))
    captured = dict(sampler._engine.run.captured)
    assert {key[1] for key in captured} == {(0, 1.0, 0.0), (2, 1.0, 0.0)}
    same(sampler.generate(LONG[:2], PARAMS), plain)
    same(sampler.generate(LONG[:2], filtered), few)
    assert sampler._engine.run.captured == captured
