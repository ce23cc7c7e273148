"""The rollout engine at its edges: memory that is given back, sequences that are carried with nothing left to
draw, borders of pages, chunks and buckets, and two samplers at once.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from engines import agree, same
from runs import decoder

from fastrl.batch.types import Rollouts
from fastrl.errors import UserError
from fastrl.model.decoder import Decoder
from fastrl.sampler import Sampler, SamplingParams, Tail, engine

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [14, 15]]
BORDERS = [
    [(7 * i + j) % 28 + 2 for j in range(n)] for i, n in enumerate((1, 2, 63, 64, 65, 127, 128, 129, 192))
]
PARAMS = SamplingParams(n=3, max_new_tokens=12, seed=5)


def long_decoder() -> Decoder:
    return decoder(eos_token_id=[3, 4, 5], max_position_embeddings=512)


def unfinished(rollouts: Rollouts) -> list[int]:
    return [i for i, reason in enumerate(rollouts.finish_reason) if reason == "unfinished"]


# --- memory -----------------------------------------------------------------------------------------
def buffers(sampler: Sampler) -> list[weakref.ref[torch.UntypedStorage]]:
    state = sampler._engine.state
    return [
        weakref.ref(x.untyped_storage()) for x in (state.cache.k, state.cache.v, *state.records, *state.rows)
    ]


@pytest.mark.parametrize("how", ["release", "lent", "interrupted", "grown"])
def test_released_memory_is_free_at_once(how, monkeypatch):
    """Wrong implementations: a step, a graph, a queue or a cycle of references that keeps the old cache until
    the collector runs; a call that fails and keeps what was to be lent; a larger cache made while the smaller
    one is still there.
    """
    model = decoder()
    sampler = Sampler(model, keep_cache=how in ("release", "grown"))
    want = Sampler(model).generate(PROMPTS, PARAMS)
    held: list[weakref.ref[torch.UntypedStorage]] = []

    def look(n: int) -> None:
        held.extend([] if held else buffers(sampler))
        if how == "interrupted":
            raise KeyboardInterrupt

    if how == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            sampler.generate(PROMPTS, PARAMS, on_tokens=look)
    else:
        same(sampler.generate(PROMPTS, PARAMS, on_tokens=look), want)
    if how == "release":
        assert all(x() is not None for x in held)
        sampler.release()
    if how == "grown":
        alive, build = [], engine.PagedCache.__init__

        def watched(self, model, pages, page):
            alive.append((pages, sum(x() is not None for x in held)))
            build(self, model, pages, page)

        monkeypatch.setattr(engine.PagedCache, "__init__", watched)
        sampler.generate([[3] * 60], SamplingParams(n=30, max_new_tokens=60, seed=5))
        assert alive[-1][0] > alive[0][0] == 0 and alive[-1][1] == 0, (
            "nothing of the old is there when the new is made"
        )
    assert len(held) == 18 and not any(x() is not None for x in held)
    same(sampler.generate(PROMPTS, PARAMS), want)


# --- carried over -----------------------------------------------------------------------------------
def test_what_was_carried_with_nothing_left_to_draw_ends_as_it_is():
    """Wrong implementations: a token beyond max_new_tokens or max_length; records too narrow for what comes
    in; a prompt that is prefilled for nobody; a sequence that stays unfinished for ever.
    """
    model = decoder(eos_token_id=None)
    sampler = Sampler(model)
    part = sampler.generate(
        PROMPTS[:2], SamplingParams(n=4, max_new_tokens=20, seed=1), lengths=[5, 20], tail=Tail(share=0.5)
    )
    left = part.select(unfinished(part))
    assert left.lengths.tolist() == [6] * 4
    for params in (
        SamplingParams(max_new_tokens=3),
        SamplingParams(max_new_tokens=6),
        SamplingParams(max_new_tokens=20, max_length=4),
    ):
        done = sampler.generate([[7]], params, carried=left, sequence_offset=100, weight_version=4)
        assert done.finish_reason == ["length"] * 5
        went_on = done.select(range(4))
        for name in ("tokens", "logp", "behaviour_logp", "entropy", "weight_version", "completion_mask"):
            assert torch.equal(getattr(went_on, name), getattr(left, name))
        assert sampler.generate([], params, carried=left).completions() == left.completions()
    assert sampler.generate([], SamplingParams(max_new_tokens=7), carried=left).lengths.tolist() == [7] * 4


@pytest.mark.parametrize("late", [False, True])
def test_carried_again_and_again_under_a_small_budget(late, request):
    """Wrong implementations: a carried sequence that ends in its first window, or waits for pages, is lost or
    drawn again; pages counted of the prompt alone.
    """
    if late:
        request.getfixturevalue("as_on_cuda")
    model, params = long_decoder(), SamplingParams(n=6, max_new_tokens=30, seed=5)
    whole = Sampler(model).generate(BORDERS, params)
    part = Sampler(model).generate(BORDERS, params, tail=Tail(share=0.9))
    number, rounds = unfinished(part), 0
    while number:
        sampler = Sampler(model, max_tokens_in_flight=64 * (4, 100)[rounds % 2], prefill_tokens=64)
        more = sampler.generate(
            [], params, carried=part.select(unfinished(part)), tail=Tail(share=0.8), weight_version=rounds + 1
        )
        for i, done in zip(number, more.completions(), strict=True):
            assert done == whole.completions()[i][: len(done)]
        for i, reason in zip(number, more.finish_reason, strict=True):
            assert reason in ("unfinished", whole.finish_reason[i])
        assert sampler._engine.cache.spare() == sampler._engine.cache.capacity
        part, number, rounds = more, [number[i] for i in unfinished(more)], rounds + 1
    assert rounds >= 2, "under the small budget and the large one"


# --- borders ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [1, 32, 63, 64, 65, 128])
def test_prompts_and_chunks_that_end_with_a_page(chunk):
    """Wrong implementations: a page too many or too few where a prompt or a chunk ends exactly with one; an
    empty span forwarded.
    """
    model = decoder(eos_token_id=None, max_position_embeddings=512)
    params = SamplingParams(n=2, max_new_tokens=4, seed=1)
    whole = Sampler(model).generate(BORDERS, params)
    same(Sampler(model, prefill_tokens=chunk).generate(BORDERS, params), whole)
    agree(model, whole)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 25])
def test_rows_at_the_borders_of_buckets(n, as_on_cuda):
    """Wrong implementations: compaction to a bucket that leaves a live row out; equal prompts taken for
    samples of one, with one noise.
    """
    model, params = long_decoder(), SamplingParams(max_new_tokens=9, seed=3)
    together = Sampler(model).generate([[6, 7, 8]] * n, params)
    alone = [
        Sampler(model).generate([[6, 7, 8]], params, sequence_offset=i).completions()[0] for i in range(n)
    ]
    assert together.completions() == alone
    assert together.prompt_index.tolist() == list(range(n))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("prompt", BORDERS[2:6], ids=len)
def test_one_token_is_drawn(prompt, late, request):
    """Wrong implementations: a page for a token that never has a key; a stop as the first token that is
    dropped, or called "length".
    """
    if late:
        request.getfixturevalue("as_on_cuda")
    model = decoder(eos_token_id=None, max_position_embeddings=512)
    sampler = Sampler(model)
    one = sampler.generate([prompt] * 2, SamplingParams(n=3, max_new_tokens=1, seed=2))
    assert one.lengths.tolist() == [1] * 6 and one.finish_reason == ["length"] * 6
    first = one.completions()[0][0]
    for budget in (1, 9):
        stopped = sampler.generate([prompt], SamplingParams(max_new_tokens=budget, seed=2, stop=(first,)))
        assert stopped.completions() == [[first]] and stopped.finish_reason == ["stop"]
    assert sampler.peak_pages == -(-len(prompt) // 64)


# --- callers ----------------------------------------------------------------------------------------
def test_two_samplers_of_one_model_at_once():
    """Wrong implementation: something of a call kept in the model, or in the module."""
    model = decoder(eos_token_id=[3, 4])
    outer, inner = Sampler(model), Sampler(model, max_rows=2)
    want, between = Sampler(model).generate(PROMPTS, PARAMS), []
    same(
        outer.generate(PROMPTS, PARAMS, on_tokens=lambda n: between.append(inner.generate(PROMPTS, PARAMS))),
        want,
    )
    assert len(between) > 3
    for rollouts in between:
        same(rollouts, want)


def test_prompts_that_no_cache_or_context_holds():
    """Wrong implementations: a wait for pages that never come; one message for both."""
    model = decoder(max_position_embeddings=1024)
    sampler = Sampler(model, max_tokens_in_flight=256)
    with pytest.raises(
        UserError,
        match="max_tokens_in_flight: sequence 1 alone may need 512 tokens of cache, above the budget of 256",
    ):
        sampler.generate([[3], [3] * 500], SamplingParams(max_new_tokens=10))
    with pytest.raises(
        UserError,
        match=r"prompts\[0\]: a prompt of 1024 tokens leaves no room for a completion in the model's context",
    ):
        sampler.generate([[3] * 1024], SamplingParams(max_new_tokens=10))
    assert sampler.generate([[3] * 247], SamplingParams(max_new_tokens=10)).lengths.tolist() == [10]
