"""A decoder layer of one new token per row in one compiled call, against the same ops called one by one."""

from __future__ import annotations

import pytest
import torch
from support import tiny_config

from fastrl import ops
from fastrl.kernels._backend import extension
from fastrl.kernels._native import decoder_layer as _decoder_layer
from fastrl.model.decoder import Decoder
from fastrl.sampler.cache import CachedAttention, PagedCache

needs_c = pytest.mark.skipif(
    extension() is None,
    reason="fastrl._C is not built: pip install -e . (or python setup.py build_ext --inplace)",
)
B, PAGE = 11, 4


def model_of(family="qwen3", **changes):
    """Weights, norms and biases that are all different."""
    model = Decoder.from_config(tiny_config(family, initializer_range=0.3, **changes), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def step(model, in_one):
    """Hidden states after one new token of each row, and the caches, which hold random keys and values of the
    tokens before it.
    """
    torch.manual_seed(3)
    cache = PagedCache(model, 3 * B, PAGE)
    cache.k.normal_()
    cache.v.normal_()
    table = torch.randperm(3 * B).add(1).int().view(B, 3)
    lengths = torch.arange(B) + 1
    slots = cache.slots(table, torch.arange(B), lengths - 1)
    attend = cache.decode(slots, table, lengths.int())
    if not in_one:
        attend = CachedAttention(cache, slots, attend.attend)
    return model(torch.arange(B) + 2, None, positions=lengths - 1, attend=attend), cache


def counted(monkeypatch):
    calls, real = [], extension().decoder_layer_cpu
    monkeypatch.setattr(extension(), "decoder_layer_cpu", lambda *args: calls.append(1) or real(*args))
    return calls


@needs_c
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_it_is_the_ops_one_by_one(isa, family, exact, monkeypatch):
    """Wrong: a norm, a bias or a sum left out; the residual of the layer before; keys written to another
    slot; other arithmetic.
    """
    model, calls = model_of(family), counted(monkeypatch)
    if exact:
        with ops.exact():
            (ours, cache), (want, other) = step(model, True), step(model, False)
    else:
        (ours, cache), (want, other) = step(model, True), step(model, False)
    assert len(calls) == len(model.layers)
    assert torch.equal(ours, want) and torch.equal(cache.k, other.k) and torch.equal(cache.v, other.v)


SCALED = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@needs_c
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "H, K, E, more",
    [
        (4, 1, 64, {}),
        (2, 2, 80, {"rope_scaling": SCALED}),
        (6, 2, 96, {"tie_word_embeddings": False}),
        (5, 1, 128, {"hidden_size": 24}),
    ],
)
def test_any_heads_widths_and_angles(family, H, K, E, more, monkeypatch):
    """Wrong: an offset of queries, keys or values that holds for H E = D or for K = H alone; angles that are
    not the model's.
    """
    model, calls = (
        model_of(family, num_attention_heads=H, num_key_value_heads=K, head_dim=E, **more),
        counted(monkeypatch),
    )
    (ours, cache), (want, other) = step(model, True), step(model, False)
    assert len(calls) == len(model.layers)
    assert torch.equal(ours, want) and torch.equal(cache.k, other.k) and torch.equal(cache.v, other.v)


@needs_c
def test_pages_of_another_kind_are_the_ops_to_name(monkeypatch):
    """Wrong: a table of int64, a cache of bf16 or too short a table read as if they were what the compiled
    code wants.
    """
    model, calls = model_of(), counted(monkeypatch)
    cache = PagedCache(model, 3 * B, PAGE)
    table, lengths = torch.ones(B, 3, dtype=torch.int32), torch.full((B,), 5, dtype=torch.int32)
    slots, tokens, narrow = (
        cache.slots(table, torch.arange(B), lengths.long() - 1),
        torch.arange(B),
        PagedCache(model_of().bfloat16(), 3 * B, PAGE),
    )
    positions, name = lengths.long() - 1, r"k_cache|lengths|block_table|slots"
    with torch.no_grad():
        model(tokens, None, positions=positions, attend=cache.decode(slots, table.long(), lengths))
        model(
            tokens,
            None,
            positions=positions,
            attend=cache.decode(slots, table.T.contiguous().T, lengths.long()),
        )
        for attend in (
            narrow.decode(slots, table, lengths),
            cache.decode(slots, table[:4], lengths),
            cache.decode(slots, table, lengths[:4]),
            cache.decode(slots[:4], table, lengths),
        ):
            with pytest.raises((ValueError, TypeError), match=name):
                model(tokens, None, positions=positions, attend=attend)
        assert not calls
        model(tokens, None, positions=positions, attend=cache.decode(slots, table, lengths))
    assert len(calls) == len(model.layers)


@needs_c
def test_it_steps_aside_where_the_layer_is_not_its_own(monkeypatch):
    """Wrong: an adapter on a projection, a hook or an asked-for backend that the one call passes by; weights
    that are not fp32.
    """
    calls = counted(monkeypatch)
    model, seen = model_of(), []
    handle = model.layers[0].down.register_forward_hook(lambda module, inputs, output: seen.append(output))
    step(model, True)
    assert len(seen) == 1 and len(calls) == 1, "the other layer alone"
    handle.remove()
    model.layers[1].out = torch.nn.Linear(
        model.layers[1].out.in_features, model.config.hidden_size, bias=False
    )
    step(model, True)
    assert len(calls) == 2
    with ops.use_backend("reference", "swiglu"):
        step(model, True)
    step(model_of().double(), True)
    step(model_of().bfloat16(), True)
    monkeypatch.setattr(_decoder_layer, "LEAST_ROWS", B + 1)
    step(model, True)
    assert len(calls) == 2


@needs_c
def test_what_lies_outside_the_cache_is_refused():
    """Wrong: a token written or read through an address that nobody looked at."""
    model = model_of()
    cache = PagedCache(model, 3 * B, PAGE)
    table, lengths = torch.ones(B, 3, dtype=torch.int32), torch.full((B,), 5)
    slots = cache.slots(table, torch.arange(B), lengths - 1)
    tokens = torch.arange(B)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"store.slots: expected values in \[0, 136\)"):
            model(tokens, None, positions=lengths - 1, attend=cache.decode(slots + 500, table, lengths.int()))
        with pytest.raises(ValueError, match=r"block_table: expected pages in \[0, 34\)"):
            model(tokens, None, positions=lengths - 1, attend=cache.decode(slots, table * 99, lengths.int()))
        with pytest.raises(ValueError, match=r"positions: expected values in \[0, "):
            model(tokens, None, positions=lengths + 10**6, attend=cache.decode(slots, table, lengths.int()))
