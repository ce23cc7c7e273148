"""The rollout engine under load: who comes in, which pages they have,
and that nothing is lost or mixed up.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from engines import LONG, PARAMS, PROMPTS, agree, same
from runs import decoder
from transformers import AutoModelForCausalLM

from fastrl import ops
from fastrl.batch.types import Rollouts
from fastrl.errors import UserError
from fastrl.model.decoder import Decoder
from fastrl.sampler import Sampler, SamplingParams, Tail, Turn, engine
from fastrl.sampler.engine import CallSettings, Engine
from fastrl.sampler.jobs import Job, write_records
from fastrl.sampler.queue import Request, RequestGroup
from fastrl.sampler.state import REASONS, pages_of


# --- a sample does not depend on how it was scheduled -----------------------------------------------
@pytest.mark.parametrize(
    "rows, tokens, prefill", [(2, 262144, 4096), (5, 512, 4096), (256, 262144, 9), (3, 256, 5)]
)
def test_rows_pages_and_chunks_change_no_sample(rows, tokens, prefill):
    """Wrong implementations: a row's leftovers seen by the next; a chunk that does not see those before it;
    pages mixed up.
    """
    model = decoder()
    whole = Sampler(model).generate(LONG, PARAMS)
    sampler = Sampler(model, max_tokens_in_flight=tokens, max_rows=rows, prefill_tokens=prefill)
    same(sampler.generate(LONG, PARAMS), whole)
    assert sampler.peak_pages <= tokens // engine.PAGE
    agree(model, whole)


@pytest.mark.parametrize("rows, tokens", [(256, 262144), (5, 512), (3, 256)])
def test_late_looks_and_padded_steps_change_no_sample(rows, tokens, as_on_cuda):
    """Wrong implementations: a stale look that counts rows twice or ends early; padding rows that draw, or
    write into a page in use.
    """
    model = decoder(eos_token_id=[3, 4])
    sampler = Sampler(model, max_tokens_in_flight=tokens, max_rows=rows)
    late = sampler.generate(LONG, PARAMS)
    agree(model, late)
    assert set(late.finish_reason) == {"stop", "length"}
    with pytest.MonkeyPatch.context() as undo:
        undo.setattr(engine, "PIPELINED", {})
        undo.setattr(engine, "WINDOW", {})
        same(Sampler(model).generate(LONG, PARAMS), late)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_greedy_is_transformers_generate(family, tmp_path):
    """Wrong implementations: any difference in the decoder, its cache or its positions that changes a
    token.
    """
    model = decoder(family, eos_token_id=None, max_position_embeddings=256)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = Sampler(model).generate(LONG, SamplingParams(max_new_tokens=40, temperature=0.0))
    for prompt, done in zip(LONG, ours.completions(), strict=True):
        ids = torch.tensor([prompt])
        want = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0
        )
        assert want[0, len(prompt) :].tolist() == done


def test_lengths_end_each_prompts_completions():
    """Wrong implementation: one length for all, or a length that changes what is drawn before it."""
    model = decoder(eos_token_id=None)
    whole = Sampler(model).generate(PROMPTS, PARAMS)
    short = Sampler(model).generate(PROMPTS, PARAMS, lengths=[1, 12, 5, 2])
    assert short.completions() == [c[: [1, 12, 5, 2][i // 3]] for i, c in enumerate(whole.completions())]
    with pytest.raises(
        UserError, match=r"lengths: expected 4 positive numbers, one for each prompt, got \[1, 2\]"
    ):
        Sampler(model).generate(PROMPTS, PARAMS, lengths=[1, 2])


def test_triton_kernels_make_the_same_samples():
    """Wrong implementation: a kernel of the step that reads its rows, lengths or pages in another way than
    the engine keeps them.
    """
    model, params = decoder(), SamplingParams(max_new_tokens=3, seed=5)
    want = Sampler(model).generate(PROMPTS[:2], params)
    kernels = ("decode_attention", "rope", "rms_norm", "swiglu", "sample", "advance")
    with ops.use_backend("triton", *kernels):
        same(Sampler(model).generate(PROMPTS[:2], params), want)


# --- pages ------------------------------------------------------------------------------------------
def test_a_group_has_its_prompt_once(monkeypatch):
    """Wrong implementations: the prompt's pages, or its forward, once per sample;
    a page that is left behind.
    """
    model, taken, forwarded = decoder(), [], []
    take, forward = engine.PagedCache.take, Decoder.forward
    monkeypatch.setattr(engine.PagedCache, "take", lambda self, n: taken.append(n) or take(self, n))
    monkeypatch.setattr(
        Decoder,
        "forward",
        lambda self, tokens, *a, **k: forwarded.append(len(tokens)) or forward(self, tokens, *a, **k),
    )
    sampler, page = Sampler(model), engine.PAGE
    prompt = [(5 * i) % 28 + 2 for i in range(page + 5)]
    rollouts = sampler.generate([prompt], SamplingParams(n=8, max_new_tokens=6, seed=1))
    assert sum(taken) == 1 + 8, "the full page together, and each the page it writes to"
    assert forwarded[0] == len(prompt) - 1 and max(forwarded[1:]) == 8
    agree(model, rollouts)
    assert sampler._engine.cache.spare() == sampler._engine.cache.capacity


def test_a_group_larger_than_the_budget_comes_in_part_by_part():
    """Wrong implementations: a prompt's pages given back while samples of it wait; waiting for room that
    never comes.
    """
    model, prompt = decoder(), [(5 * i) % 28 + 2 for i in range(100)]
    whole = Sampler(model).generate([prompt], SamplingParams(n=9, max_new_tokens=20, seed=1))
    for pages in (2, 3, 4, 7):
        sampler = Sampler(model, max_tokens_in_flight=64 * pages)
        same(sampler.generate([prompt], SamplingParams(n=9, max_new_tokens=20, seed=1)), whole)
        assert sampler.peak_pages <= pages and sampler._engine.cache.spare() == pages


# --- carried over -----------------------------------------------------------------------------------
def test_a_carried_sequence_goes_on_where_it_was():
    """Wrong implementations: new noise for the rest; versions or log-probs of the first part lost; the first
    part drawn again.
    """
    model = decoder(eos_token_id=[3, 4, 5])
    params = SamplingParams(n=6, max_new_tokens=30, seed=5)
    sampler = Sampler(model)
    whole = sampler.generate(LONG, params)
    part = sampler.generate(LONG, params, weight_version=1, tail=Tail(share=0.4))
    left = [i for i, r in enumerate(part.finish_reason) if r == "unfinished"]
    assert 0 < len(left) <= 0.4 * 30 and all(
        part.finish_reason[i] == whole.finish_reason[i] for i in range(30) if i not in left
    )
    rest = sampler.generate(
        [[9, 9]], params, sequence_offset=900, weight_version=2, carried=part.select(left)
    )
    assert rest.sequence.tolist() == [*left, *range(900, 906)]
    for place, i in enumerate(left):
        assert (
            rest.completions()[place] == whole.completions()[i]
            and rest.finish_reason[place] == whole.finish_reason[i]
        )
        versions = rest.weight_version.split(rest.cu_seqlens.diff().tolist())[place].tolist()
        drawn = len(part.completions()[i])
        assert versions == [-1] * len(LONG[i // 6]) + [1] * drawn + [2] * (
            len(whole.completions()[i]) - drawn
        )
    agree(model, rest)
    cut = sampler.generate(LONG, params, tail=Tail(share=0.4, action="cut"))
    assert cut.completions() == part.completions() and [r == "length" for r in cut.finish_reason] == [
        i in left or r == "length" for i, r in enumerate(part.finish_reason)
    ]


def test_what_cannot_be_carried_is_named():
    sampler = Sampler(decoder())
    done = sampler.generate(PROMPTS, PARAMS)
    with pytest.raises(
        UserError, match="carried: expected unfinished sequences only; sequence 0 ended with 'length'"
    ):
        sampler.generate([], PARAMS, carried=done)
    with pytest.raises(UserError, match=r"tail.share: expected a fraction in \(0, 1\), got 1.5"):
        Tail(share=1.5)


# --- conversations ----------------------------------------------------------------------------------
def heard_and_said(rollouts: Rollouts) -> list[tuple[list[int], list[int]]]:
    """The observations' tokens, and the policy's, of every sequence."""
    found = []
    for pieces in rollouts.turns():
        heard = [token for piece in pieces if not piece.own for token in piece.tokens]
        said = [token for piece in pieces if piece.own for token in piece.tokens]
        found.append((heard, said))
    return found


def echo(turns: list[Turn]) -> list[list[int] | None]:
    """Answers the first two turns of every sequence with as many 29s as it has said things, the second with
    70.
    """
    said = [sum(a and not b for a, b in zip(t.chosen, [*t.chosen[1:], False], strict=True)) for t in turns]
    return [[29] if n == 1 else [28] * 70 if n == 2 else None for n in said]


@pytest.mark.parametrize("budget", [262144, 512])
def test_a_conversation_keeps_its_cache(budget):
    """Wrong implementations: observations that are trained on, or unseen by what follows; the prompt
    forwarded again each turn.
    """
    model = decoder(eos_token_id=[3, 4, 5], max_position_embeddings=400)
    params = SamplingParams(n=4, max_new_tokens=40, max_length=250, seed=5)
    forwarded, real = [], Decoder.forward
    with pytest.MonkeyPatch.context() as spy:
        spy.setattr(
            Decoder,
            "forward",
            lambda self, tokens, *a, **k: forwarded.append(len(tokens)) or real(self, tokens, *a, **k),
        )
        rollouts = Sampler(model, max_tokens_in_flight=budget).generate(LONG[:3], params, environment=echo)
    agree(model, rollouts)
    talked = 0
    stored = sum(len(LONG[i]) - 1 for i in range(3))
    for heard, said in heard_and_said(rollouts):
        assert heard == ([29] + [28] * 70)[: len(heard)] and len(heard) in (0, 1, 71) and len(said) <= 40
        talked += len(heard) == 71
        stored += len(heard) + len(said)
    assert talked >= 4, "most conversations have three turns"
    assert sum(forwarded) < stored * 1.6 or budget == 512, (
        "each token once, beside rows that wait for a window's end"
    )


def test_a_conversation_that_is_cut_was_answered():
    """Wrong implementation: a turn that ended in the last window is not shown to the environment, which gives
    its reward.
    """
    model, shown = decoder(eos_token_id=[3, 4, 5], max_position_embeddings=400), []
    params = SamplingParams(n=6, max_new_tokens=40, max_length=250, seed=5)

    def answer(turns: list[Turn]) -> list[list[int] | None]:
        shown.extend((t.index, len(t.tokens)) for t in turns)
        return echo(turns)

    rollouts = Sampler(model).generate(
        LONG[:3], params, environment=answer, tail=Tail(share=0.5, action="cut")
    )
    for i, (parts, reason) in enumerate(zip(heard_and_said(rollouts), rollouts.finish_reason, strict=True)):
        assert reason in ("stop", "length")
        assert reason == "length" or (i, sum(map(len, parts))) in shown
    assert "length" in rollouts.finish_reason and "stop" in rollouts.finish_reason


def test_an_observation_is_read_by_what_follows():
    """Wrong implementation: positions that restart, or keys of the observation missing: greedy tokens after
    it differ.
    """
    model = decoder(eos_token_id=[3, 4, 5], max_position_embeddings=400)
    params = SamplingParams(max_new_tokens=60, temperature=0.0, stop=tuple(range(2, 12)))
    rollouts = Sampler(model).generate(
        LONG, params, environment=lambda turns: [[29, 28] if len(t.tokens) < 30 else None for t in turns]
    )
    tokens = rollouts.tokens.split(rollouts.cu_seqlens.diff().tolist())
    masks = rollouts.completion_mask.split(rollouts.cu_seqlens.diff().tolist())
    assert sum(int((~m).sum()) for m in masks) > sum(map(len, LONG)), "somebody was answered"
    for row, mask in zip(tokens, masks, strict=True):
        with torch.no_grad():
            best = (model(row) @ model.head_weight.T).argmax(-1)
        assert (best[:-1] == row[1:])[mask[1:]].all()


def test_an_answer_needs_room_for_a_token_after_it():
    """Wrong implementation: an observation up to the very limit, whose next token belongs to another
    sequence's records.
    """
    model, prompt = decoder(eos_token_id=[3, 4, 5], max_position_embeddings=400), LONG[0]
    params = SamplingParams(max_new_tokens=40, seed=5)
    alone = Sampler(model).generate([prompt], params)
    assert alone.finish_reason == ["stop"]
    end = len(alone.tokens)
    for limit, heard in ((end + 3, 0), (end + 4, 3)):
        rollouts = Sampler(model).generate(
            [prompt],
            replace(params, max_length=limit),
            environment=lambda turns: [
                [29, 28, 27] if len(t.tokens) == end - len(prompt) else None for t in turns
            ],
        )
        assert int((~rollouts.completion_mask).sum()) - len(prompt) == heard
        assert (rollouts.finish_reason == ["length"] or heard) and len(rollouts.tokens) <= limit


def test_turns_that_end_at_a_page_s_border_are_answered_once():
    """Wrong implementations: the page after it taken for one that the row has; an episode that is over shown
    to the environment again.
    """
    model, shown = decoder(max_position_embeddings=400), []
    params = SamplingParams(n=4, max_new_tokens=3, stop=tuple(range(2, 31)), seed=5)

    def answer(turns: list[Turn]) -> list[list[int] | None]:
        shown.extend((t.index, len(t.tokens)) for t in turns)
        return [[2 + 3 * t.index] * (5 + t.index) if len(t.tokens) < 9 else None for t in turns]

    rollouts = Sampler(model).generate([LONG[1], LONG[4]], params, environment=answer)
    assert len(LONG[1]) == 64, "with the token of a turn, one more than a page holds"
    agree(model, rollouts)
    assert len(shown) == len(set(shown)) >= 16


def test_an_episode_that_is_over_is_not_asked_again():
    """Wrong implementation: its row, which stays among many live ones, is taken for a new turn."""
    shown: list[tuple[int, int]] = []

    def answer(turns: list[Turn]) -> list[list[int] | None]:
        shown.extend((t.index, len(t.tokens)) for t in turns)
        return [[2] if t.index != 1 and len(t.tokens) < 7 else None for t in turns]

    params = SamplingParams(n=24, max_new_tokens=4, stop=tuple(range(2, 31)), seed=5)
    Sampler(decoder(max_position_embeddings=400)).generate([LONG[4]], params, environment=answer)
    assert len(shown) == len(set(shown)) and [index for index, _ in shown].count(1) == 1


# --- weights and memory -----------------------------------------------------------------------------
def test_weights_that_moved_are_noticed():
    """Wrong implementation: a captured graph goes on reading the old storage."""
    model = decoder()
    sampler = Sampler(model)
    before = sampler.generate(PROMPTS, PARAMS)
    model.layers[1].down.weight = torch.nn.Parameter(model.layers[1].down.weight.detach().clone())
    with pytest.raises(
        UserError,
        match=r"model: layers.1.down.weight has moved since the last rollout; write weights in place",
    ):
        sampler.generate(PROMPTS, PARAMS)
    sampler.release()
    same(sampler.generate(PROMPTS, PARAMS), before)


def test_the_cache_can_be_kept_or_lent():
    """Wrong implementations: buffers made anew at each call (graphs would be too); memory kept that was to be
    given back.
    """
    model = decoder()
    kept, lent = Sampler(model), Sampler(model, keep_cache=False)
    first = kept.generate(PROMPTS, PARAMS)
    place = kept._engine.cache.k.data_ptr(), kept._engine.state.records.tokens.data_ptr()
    same(
        kept.generate(PROMPTS[::-1], SamplingParams(n=2, max_new_tokens=4)),
        lent.generate(PROMPTS[::-1], SamplingParams(n=2, max_new_tokens=4)),
    )
    assert (kept._engine.cache.k.data_ptr(), kept._engine.state.records.tokens.data_ptr()) == place
    assert lent._engine.cache.capacity == 0
    same(lent.generate(PROMPTS, PARAMS), first)
    kept.max_tokens_in_flight = 128
    kept.generate(PROMPTS, PARAMS)
    assert kept._engine.cache.capacity == 2, "a smaller budget is kept to"
    bytes_a_token = engine.PagedCache.token_bytes(model)
    assert Sampler(model, cache_bytes=1000 * bytes_a_token).max_tokens_in_flight == 1000


def test_an_interrupted_call_leaves_nothing_behind():
    """Wrong implementation: pages of a call that was stopped are never free again."""
    model = decoder()
    sampler = Sampler(model, max_tokens_in_flight=512)

    def stop(n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.generate(PROMPTS, PARAMS, on_tokens=stop)
    same(sampler.generate(PROMPTS, PARAMS), Sampler(model).generate(PROMPTS, PARAMS))


# --- stress -----------------------------------------------------------------------------------------
def test_ten_thousand_sequences_come_and_go():
    """Random lengths, arrivals and cancellations under a budget of pages that is far too small for all.

    Wrong implementations: a page leaked, or freed while in use; more pages than the budget; a prompt's pages
    taken once per sample; a sequence lost, ended for another's reason, or mixed up with another.
    """
    S, page, chance = 10_000, 16, random.Random(7)
    model = decoder(num_hidden_layers=1, eos_token_id=[3, 4], max_position_embeddings=128)
    tokens = 40 * page
    load = Engine(model, tokens=tokens, page=page, max_rows=64)
    prompts: list[tuple[int, list[int]]] = []  # of every sequence: its group, and the group's prompt
    while len(prompts) < S:
        prompt = [chance.randrange(5, 31) for _ in range(chance.choice((1, 2, 5, 16, 17, 33, 40)))]
        prompts += [(len(prompts), prompt)] * chance.choice((1, 1, 2, 8))
    jobs = [
        Job(prompt, group, len(prompt), 0, 1000, i, ("new", group))
        for i, (group, prompt) in enumerate(prompts[:S])
    ]
    until = [min(128, len(j.prompt) + chance.choice((1, 3, 20))) for j in jobs]
    settings = CallSettings(seed=11, temperature=1.0, filters=(0, 1.0, 0.0), stops=[3, 4], version=0)
    load.begin(S, 128, tokens // page, settings)
    write_records(load.state, jobs, None)
    arrived, cancelled, taken, take = 0, set(), [0], load.cache.take
    load.cache.take = lambda n: taken.append(n) or take(n)  # type: ignore[method-assign]
    groups: dict[int, RequestGroup] = {}
    while load.window() or arrived < S:
        for _ in range(chance.randrange(0, 90)):
            if arrived < S:
                job = jobs[arrived]
                group = groups.setdefault(
                    job.origin[1], RequestGroup(load.state.records.tokens[arrived, : job.length])
                )
                load.add([Request(arrived, group, job.length, 0, 1000, until[arrived])])
                arrived += 1
        if arrived and chance.random() < 0.3:
            some = {chance.randrange(max(0, arrived - 300), arrived) for _ in range(3)}
            load.cancel(sorted(some))
            cancelled |= some
        assert load.peak_pages <= load.cache.capacity
    load.finish()
    assert (
        load.cache.spare() == load.cache.capacity == tokens // page
        and (load.cache.pages.refs[1:] == -1).all()
    )
    check(model, load, jobs, until, cancelled)
    worst = sum(pages_of(u, page) for u in until)
    assert sum(taken) < 0.8 * worst, "prompts' pages are shared"


def check(model: Decoder, load: Engine, jobs: list[Job], until: list[int], cancelled: set[int]) -> None:
    """Every sequence ended for its own reason, with the tokens that its own prompt, number and positions
    give.
    """
    records, S = load.state.records, len(jobs)
    reasons = [REASONS[code] for code in records.finish[:S].tolist()]
    lengths = records.length[:S].tolist()
    inside = torch.arange(load.state.C) < records.length[:S, None]
    tokens, chosen, logp = records.tokens[:S][inside], records.chosen[:S][inside], records.logp[:S][inside]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad():
        hidden = model(tokens, cu.to(torch.int32))
        sequence = torch.repeat_interleave(torch.arange(S), torch.tensor(lengths))
        first = torch.repeat_interleave(
            cu[:-1] + torch.tensor([j.length for j in jobs]), torch.tensor(lengths)
        )
        position = torch.arange(len(tokens)) - first
        at = chosen.nonzero().squeeze(1)
        draw = ops.sample(
            hidden[at - 1] @ model.head_weight.T, seed=11, sequence=sequence[at], position=position[at]
        )
    assert (draw.logp - logp[at])[draw.token == tokens[at]].abs().max() < 1e-4
    assert (draw.token == tokens[at]).double().mean() > 0.9999, (
        "but for ties, every token is the draw of its own key"
    )
    for i, (job, reason, n) in enumerate(zip(jobs, reasons, lengths, strict=True)):
        mine = tokens[cu[i] : cu[i + 1]].tolist()
        assert mine[: job.length] == job.prompt
        ends = {
            "stop": mine[-1] in (3, 4) and n > job.length,
            "length": n == until[i],
            "cancelled": i in cancelled,
        }
        assert ends[reason], (i, reason)
