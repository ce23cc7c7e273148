"""A decoder layer in five Triton launches, under the interpreter, against float64 and against the ops one by
one.  Races and bf16 products need more: tests/ptx, and a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from support import tiny_config, within_budget

from fastrl import ops
from fastrl.kernels import decoder_layer
from fastrl.kernels._layer import Scratch
from fastrl.model.decoder import Decoder
from fastrl.sampler import Sampler, SamplingParams
from fastrl.sampler.cache import CachedAttention, PagedCache

kernels = pytest.importorskip(
    "fastrl.kernels._triton.decoder_layer", reason="triton is not installed", exc_type=ImportError
)
_layer_tiles = pytest.importorskip("fastrl.kernels._triton._layer_tiles", exc_type=ImportError)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU"
)
FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def small_splits(monkeypatch):
    """Short sequences and narrow weights in several splits."""
    monkeypatch.setattr(kernels.decode_attention, "SPLIT", 16)
    monkeypatch.setattr(kernels.decode_attention, "BLOCK", 16)
    monkeypatch.setattr(_layer_tiles, "LEAST_SHARE", 16)
    monkeypatch.setattr(kernels, "INTERPRETED_PROCESSORS", 16)


def model_of(family, dtype=torch.float32, **changes):
    """Weights, norms and biases that are all different."""
    model = Decoder.from_config(tiny_config(family, initializer_range=0.3, **changes), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def fused():
    """The layer, and the ops beside it, as where Triton's are chosen."""
    return ops.use_backend("triton", "decoder_layer", *decoder_layer.OPS)


@torch.no_grad()
def step(model, B, page, one_call):
    """Hidden states after one new token of each row, and the caches, which hold random keys and values of the
    tokens before it; rows have 1 to 40 tokens, and the second is not alive: it is on page 0.
    """
    generator = torch.Generator().manual_seed(3)
    N = -(-40 // page)
    cache = PagedCache(model, N * B, page)
    for slab in (cache.k, cache.v):
        slab.copy_(torch.randn(slab.shape, generator=generator))
    table = torch.randperm(N * B, generator=generator).add(1).int().view(B, N)
    lengths = torch.arange(B) * 7 % 40 + 1
    if B > 1:
        table[1], lengths[1] = 0, 1
    slots = cache.slots(table, torch.arange(B), lengths - 1)
    attend = cache.decode(slots, table, lengths.int())
    if not one_call:
        attend = CachedAttention(cache, slots, attend.attend)
    hidden = model(torch.arange(B) % 50 + 2, None, positions=lengths - 1, attend=attend)
    return hidden, cache, attend


@pytest.fixture
def launches(monkeypatch) -> Iterator[list[str]]:
    """The kernels of each layer, by name."""
    seen: list[str] = []
    for name in ("enter_kernel", "heads_kernel", "gated_kernel", "residual_kernel"):
        monkeypatch.setattr(kernels, name, Watched(getattr(kernels, name), seen))
    return seen


class Watched:
    def __init__(self, kernel, seen):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.seen.append((self.kernel.fn.__name__.removesuffix("_kernel"), options))
            return self.kernel[grid](*args, **options)

        return launch


def check(model, B, page):
    dtype = model.dtype
    with fused():
        mine, cache, attend = step(model, B, page, True)
    theirs, other, _ = step(model, B, page, False)
    truth, best, _ = step(model.double(), B, page, False)
    model.to(dtype)
    # twenty ops in a row: where the one is lucky the other need not be
    within_budget(mine, theirs, truth, factor=3)
    within_budget(cache.k[:, 1:], other.k[:, 1:], best.k[:, 1:], factor=3)
    within_budget(cache.v[:, 1:], other.v[:, 1:], best.v[:, 1:], factor=3)
    assert not attend.scratch.tickets.any()


@pytest.mark.parametrize(
    "family, B, dtype",
    [
        *((family, 5, torch.float32) for family in FAMILIES),
        ("qwen2", 17, torch.float16),
        ("qwen3", 1, torch.float16),
        *(pytest.param(f, 17, torch.float16, marks=pytest.mark.slow) for f in FAMILIES if f != "qwen2"),
        pytest.param("qwen2", 40, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_as_near_to_float64_as_the_ops(family, B, dtype, launches):
    """Wrong: a norm, a bias, a head norm or a residual left out; the sums of squares of the stream before;
    keys or values in another slot; rows past the last tile read or written; a split added twice.
    """
    check(model_of(family, dtype), B, 8)
    names = [name for name, _ in launches]
    assert names == ["enter", *["heads", "residual", "gated", "residual"] * 2]
    assert max(options.get("SPLITS", 1) for _, options in launches) > 1 or B > 16


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "H, K, E, page, more",
    [
        (4, 1, 64, 64, {}),
        (2, 2, 80, 4, {"intermediate_size": 50}),
        (6, 2, 24, 16, {"tie_word_embeddings": False, "hidden_size": 36}),
        (3, 3, 16, 12, {"hidden_size": 24}),
    ],
)
def test_any_heads_widths_and_pages(family, H, K, E, page, more):
    """Wrong: an offset of queries, keys or values that holds for H E = D or for K = H alone; a head whose
    half is no power of two; a width that is no multiple of a block.
    """
    check(model_of(family, num_attention_heads=H, num_key_value_heads=K, head_dim=E, **more), 3, page)


@pytest.mark.parametrize("rows", [16, 32, 64, 256])
def test_the_tiles_of_each_number_of_rows(rows, monkeypatch):
    """Wrong: a tile whose rows or columns are counted by another's."""
    real = kernels.tiles
    monkeypatch.setattr(
        kernels, "tiles", lambda B, half, normed, dtype: real(rows, half, normed, torch.float16)
    )
    check(model_of("qwen2", num_attention_heads=2, num_key_value_heads=1, head_dim=80), 3, 8)


def test_other_layers_between(launches):
    """Wrong: squares that belong to another stream, after a layer that ran as ops; the sum that such a layer
    leaves to its successor forgotten.
    """
    model, seen = model_of("qwen2", num_hidden_layers=4), []
    model.layers[1].down.register_forward_hook(lambda module, inputs, output: seen.append(output))
    check(model, 5, 8)
    assert [name for name, _ in launches].count("enter") == 2 and len(seen) == 3
    assert [name for name, _ in launches].count("heads") == 3


def test_two_runs_give_the_same_bits():
    """Wrong: splits added as they arrive."""
    model = model_of("qwen3")
    with fused():
        first, again = (step(model, 4, 8, True) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1].k, again[1].k)


def test_where_it_steps_aside(launches, monkeypatch):
    """Wrong: exact mode, a gradient, an op asked for by name or a shape that is predicted to be slower run by
    it.
    """
    model, x = model_of("qwen2"), torch.zeros(3, 32)
    with torch.no_grad():
        with fused():
            assert decoder_layer.layer_for(x) is kernels.forward
            with ops.exact():
                assert decoder_layer.layer_for(x) is None
            with ops.use_backend("reference", "swiglu"):
                assert decoder_layer.layer_for(x) is None
            with torch.enable_grad():
                assert decoder_layer.layer_for(x) is None
        with ops.use_backend("reference"):
            assert decoder_layer.layer_for(x) is None
    monkeypatch.setattr(kernels, "requested", lambda op: None)
    with fused():
        step(model, 3, 8, True)  # fp32: a library's products
    assert not launches
    assert kernels.gains(256, 896, torch.bfloat16) and not kernels.gains(256, 4096, torch.bfloat16)
    assert not kernels.gains(1, 8192, torch.bfloat16)


def test_what_it_cannot_read_is_the_ops_to_name(launches):
    """Wrong: a table of int64, weights of another dtype or a slot too few read as if they were right."""
    model = model_of("qwen2")
    cache = PagedCache(model, 8, 8)
    table, lengths = torch.ones(3, 2, dtype=torch.int32), torch.full((3,), 5, dtype=torch.int32)
    slots, tokens = cache.slots(table, torch.arange(3), lengths.long() - 1), torch.arange(3)
    with torch.no_grad(), fused():
        model(tokens, None, positions=lengths.long() - 1, attend=cache.decode(slots, table.long(), lengths))
        with pytest.raises(ValueError, match="slots"):
            model(tokens, None, positions=lengths - 1, attend=cache.decode(slots[:2], table, lengths))
    assert not launches and isinstance(cache.decode(slots, table, lengths).scratch, Scratch)


@pytest.mark.parametrize(
    "family, tied", [pytest.param("qwen2", False, marks=pytest.mark.slow), ("qwen3", True)]
)
def test_greedy_rollouts_are_those_of_the_ops(family, tied):
    """Wrong: any of the above, over sequences that cross pages and splits, end, and are compacted."""
    model = model_of(family, tie_word_embeddings=tied, eos_token_id=None, vocab_size=31)
    prompts = [[3, 4, 5], [6], list(range(7, 22))]
    params = SamplingParams(max_new_tokens=5, temperature=0, max_length=40)
    theirs = Sampler(model, max_rows=2).generate(prompts, params)
    with fused():
        mine = Sampler(model, max_rows=2).generate(prompts, params)
    assert mine.completions() == theirs.completions()
    assert (mine.logp - theirs.logp).abs().max() < 1e-4
