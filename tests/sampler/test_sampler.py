"""The rollout engine: what it records is what the trainer computes, and a sample is a function of seed and
number alone.
"""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from runs import decoder, learner, tokenizer
from torch import Tensor

import fastrl.model.decoder
from fastrl import ops
from fastrl.algorithms import ALGORITHMS
from fastrl.batch.types import Batch, Rollouts
from fastrl.config import Optim
from fastrl.data.encode import encode_prompt
from fastrl.errors import UserError
from fastrl.model.adapter import Adapter
from fastrl.model.decoder import Decoder, Layer
from fastrl.sampler import Sampler, SamplingParams, engine
from fastrl.sampler.cache import PagedCache

ROOT = Path(__file__).parents[2]
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [14, 15]]


def generate(
    model: Decoder, prompts: list = PROMPTS, budget: int = 262144, offset: int = 0, **options: object
) -> Rollouts:
    params = SamplingParams(**{"n": 3, "max_new_tokens": 12, "seed": 5} | options)
    return Sampler(model, max_tokens_in_flight=budget).generate(prompts, params, sequence_offset=offset)


def forward(model: Decoder, rollouts: Rollouts, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """logp and entropy of every token as the learner computes them: packed, no cache."""
    with torch.no_grad():
        hidden = model(rollouts.tokens, rollouts.cu_seqlens)[:-1]
        stats = ops.linear_logp(
            hidden, model.head_weight, rollouts.tokens[1:], temperature=temperature, entropy=True
        )
    pad = torch.zeros(1)
    return torch.cat([pad, stats.logp]), torch.cat([pad, stats.entropy])


# --- what is recorded -------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tokens_are_drawn_from_logits_of_the_dtype_asked_for(dtype, monkeypatch):
    """Wrong: an option that changes nothing; log-probs of other logits than those that are drawn from."""
    sample, seen = ops.sample, []

    def spy(logits, **arguments):
        drawn = sample(logits, **arguments)
        want = logits.float().log_softmax(-1).gather(1, drawn.token[:, None])[:, 0]
        torch.testing.assert_close(drawn.logp, want, atol=1e-5, rtol=0)
        seen.append(logits.dtype)
        return drawn

    monkeypatch.setattr(ops, "sample", spy)
    model = decoder("qwen2").to(torch.bfloat16)
    Sampler(model, logits_dtype=dtype).generate(PROMPTS, SamplingParams(n=3, max_new_tokens=12, seed=5))
    assert seen and set(seen) == {dtype}


def test_narrow_logits_are_refused_where_nothing_else_is_narrow():
    with pytest.raises(UserError, match=r"logits_dtype: expected torch.float32, or .* got torch.bfloat16"):
        Sampler(decoder("qwen2"), logits_dtype=torch.bfloat16)
    sampler = Sampler(decoder("qwen2").to(torch.bfloat16), logits_dtype=torch.bfloat16)
    with ops.exact(), pytest.raises(UserError, match=r"expected torch.float32 in exact mode, got torch.bf"):
        sampler.generate(PROMPTS, SamplingParams())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logp_and_entropy_are_the_trainers(family):
    """Wrong implementations: log-probs at temperature 1, after the filters, or of the token before."""
    model = decoder(family)
    rollouts = generate(model, temperature=0.7, top_k=9, top_p=0.9)
    logp, entropy = forward(model, rollouts, temperature=0.7)
    live = rollouts.completion_mask
    assert (rollouts.logp - logp)[live].abs().max() < 1e-4
    assert (rollouts.entropy - entropy)[live].abs().max() < 1e-4
    assert rollouts.logp[live].std() > 0.5, "a distribution this flat could not tell right from wrong"
    for values in (rollouts.logp, rollouts.behaviour_logp, rollouts.entropy):
        assert values.dtype == torch.float32 and (values[~live] == 0).all()


def test_the_learner_sees_a_ratio_of_one_on_fresh_rollouts():
    """Wrong implementation: the learner's shift by one token, or its temperature,
    differs from the sampler's.
    """
    model = decoder()
    rollouts = generate(model, temperature=1.3)
    ones = torch.ones_like(rollouts.logp)
    batch = Batch(
        tokens=rollouts.tokens,
        cu_seqlens=rollouts.cu_seqlens,
        mask=rollouts.completion_mask,
        advantage=ones,
        old_logp=rollouts.logp,
        weight=ones,
    )
    grpo = learner(model, ALGORITHMS["grpo"], micro_tokens=64, optim=Optim(lr=0.0), temperature=1.3)
    metrics = grpo.update(batch, 0)
    assert abs(metrics["ratio_mean"] - 1) < 1e-4 and abs(metrics["ratio_max"] - 1) < 1e-4
    assert metrics["num_tokens"] == rollouts.completion_mask.sum()


def brute_force(z: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """log-probs of one row after the filters, each renormalising what the one before left; written with sets
    and loops.
    """
    p = z.softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda v: -p[v])
    kept = order[:top_k] if top_k else order
    total, nucleus, held = sum(p[v] for v in kept), [], 0.0
    for v in kept:
        if held < top_p * total:
            nucleus.append(v)
        held += p[v]
    kept = [v for v in nucleus if p[v] >= min_p * p[order[0]]]
    total = sum(p[v] for v in kept)
    return torch.tensor(
        [p[v] / total if v in kept else 0.0 for v in range(len(p))], dtype=torch.float64
    ).log()


@pytest.mark.parametrize(
    "filters", [(0, 1.0, 0.0), (4, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2), (8, 0.8, 0.05)]
)
def test_behaviour_logp_is_renormalised_over_the_survivors(filters):
    """Wrong implementations: top-p of the whole distribution after top-k; behaviour_logp that is logp; a
    token that was filtered out.
    """
    model = decoder()
    rollouts = generate(model, temperature=0.9, top_k=filters[0], top_p=filters[1], min_p=filters[2])
    with torch.no_grad():
        z = (model(rollouts.tokens, rollouts.cu_seqlens) @ model.head_weight.T).double() / 0.9
    for t in rollouts.completion_mask.nonzero().squeeze(1).tolist():
        want = brute_force(z[t - 1], *filters)[rollouts.tokens[t]]
        assert abs(rollouts.behaviour_logp[t] - want) < 1e-4
    same = torch.allclose(rollouts.behaviour_logp, rollouts.logp, atol=1e-5)
    assert same == (filters == (0, 1.0, 0.0))


def test_the_shape_of_rollouts():
    rollouts = Sampler(decoder()).generate(
        PROMPTS, SamplingParams(n=2, max_new_tokens=5, seed=5), weight_version=7
    )
    assert (
        rollouts.prompt_index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        and len(rollouts) == 8
        and rollouts.text is None
    )
    tokens, ends = rollouts.tokens.tolist(), rollouts.cu_seqlens.tolist()
    for i, (a, b) in enumerate(pairwise(ends)):
        prompt = PROMPTS[i // 2]
        assert tokens[a : a + len(prompt)] == prompt
        assert rollouts.completion_mask[a:b].tolist() == [False] * len(prompt) + [True] * (
            b - a - len(prompt)
        )
    assert rollouts.weight_version.tolist() == [7 if m else -1 for m in rollouts.completion_mask.tolist()]
    assert rollouts.completions() == [
        tokens[b - n : b] for b, n in zip(ends[1:], rollouts.lengths.tolist(), strict=True)
    ]


def test_no_prompts_no_rollouts():
    """Wrong implementation: a process whose share of the prompts is empty fails."""
    rollouts = Sampler(decoder(), tokenizer()).generate([], SamplingParams(n=3))
    assert (len(rollouts), rollouts.tokens.numel(), rollouts.cu_seqlens.tolist(), rollouts.text) == (
        0,
        0,
        [0],
        [],
    )


# --- a sample is a function of (seed, sequence number) ----------------------------------------------
def test_a_sample_does_not_depend_on_what_was_sampled_beside_it():
    """Wrong implementations: noise from a global generator, or keyed by the row of the batch, the wave or the
    process's own count.
    """
    model = decoder()
    whole = generate(model)
    alone = [generate(model, [PROMPTS[i]], offset=3 * i) for i in reversed(range(4))][::-1]
    halves = [generate(model, PROMPTS[:2]), generate(model, PROMPTS[2:], offset=6)]
    waves = generate(model, budget=128)
    for parts in (alone, halves, [waves]):
        assert [c for part in parts for c in part.completions()] == whole.completions()
        assert torch.allclose(torch.cat([part.logp for part in parts]), whole.logp, atol=1e-5)
        assert [r for part in parts for r in part.finish_reason] == whole.finish_reason
    assert generate(model, seed=6).completions() != whole.completions()
    assert generate(model, offset=1).completions() != whole.completions()
    assert len({tuple(c) for c in whole.completions()[:3]}) == 3, (
        "the samples of one prompt are different draws"
    )


def test_sequences_wait_for_the_budget(monkeypatch):
    """Wrong implementation: the budget is counted in prompts, or not at all."""
    rows, real = [], ops.decode_attention
    monkeypatch.setattr(
        ops, "decode_attention", lambda q, *args, **more: rows.append(q.shape[0]) or real(q, *args, **more)
    )
    sampler = Sampler(decoder(), max_tokens_in_flight=4 * engine.PAGE)
    rollouts = sampler.generate(PROMPTS, SamplingParams(n=3, max_new_tokens=12, seed=5))
    assert len(rollouts) == 12 and max(rows) == 4 == sampler.peak_pages


def test_rows_that_finish_make_room(monkeypatch):
    """Wrong implementation: finished rows are decoded to the end."""
    rows, model = [], decoder(eos_token_id=[3, 4, 5, 6, 7, 8])
    real = PagedCache.decode  # of every step, whichever kernels run it
    monkeypatch.setattr(
        PagedCache,
        "decode",
        lambda self, slots, table, *args: rows.append(len(table)) or real(self, slots, table, *args),
    )
    rollouts = generate(model, n=8, max_new_tokens=30)
    assert set(rollouts.finish_reason) == {"stop"} and rows[0] > 4 * rows[-1]
    assert len(rows) == int(rollouts.lengths.max()), "decoding ends with the last row"


def test_rows_that_have_ended_change_nothing_while_they_wait(monkeypatch):
    """Wrong implementations: an ended row is said to have stopped when a later draw of it hits a stop; it
    writes into another's cache.
    """
    model, prompts = decoder(eos_token_id=[3, 4, 5]), [[6] * 126, [7] * 127, *PROMPTS]
    found = []
    for share in (0.0, 2.0):  # compact never, and at every look
        monkeypatch.setattr(engine, "COMPACT_BELOW", {"cpu": share})
        found.append(generate(model, prompts, n=6, max_new_tokens=40))
    assert found[0].completions() == found[1].completions() and torch.allclose(
        found[0].logp, found[1].logp, atol=1e-5
    )
    for rollouts in found:
        assert rollouts.finish_reason == [
            "stop" if c[-1] in (3, 4, 5) else "length" for c in rollouts.completions()
        ]


def test_samples_of_a_prompt_share_its_prefill(monkeypatch):
    """Wrong implementation: the prompt is forwarded once per sample."""
    sizes, real = [], Decoder.forward
    monkeypatch.setattr(
        Decoder,
        "forward",
        lambda self, tokens, *a, **k: sizes.append(tokens.numel()) or real(self, tokens, *a, **k),
    )
    generate(decoder(), n=5)
    assert sizes[0] == sum(len(p) - 1 for p in PROMPTS), "a prompt's last token is each sample's first step"
    assert max(sizes[1:]) <= 20


def test_on_tokens_counts_what_was_drawn():
    """Wrong implementation: rows that have ended are counted as well."""
    told: list[int] = []
    model = decoder(eos_token_id=[3, 4, 5])
    rollouts = Sampler(model).generate(
        PROMPTS, SamplingParams(n=4, max_new_tokens=12, seed=5), on_tokens=told.append
    )
    assert sum(told) == rollouts.completion_mask.sum() < len(told) * 16


# --- ends -------------------------------------------------------------------------------------------
def test_greedy_is_argmax_of_a_new_forward():
    """Wrong implementations: a cache slot off by one, positions that restart; greedy log-probs at another
    temperature than 1.
    """
    model = decoder()
    rollouts = generate(model, n=1, temperature=0.0, max_new_tokens=20)
    for prompt, done in zip(PROMPTS, rollouts.completions(), strict=True):
        tokens = list(prompt)
        for _ in done:
            with torch.no_grad():
                tokens.append(int((model(torch.tensor(tokens))[-1] @ model.head_weight.T).argmax()))
        assert tokens[len(prompt) :] == done
    logp, _ = forward(model, rollouts)
    assert (rollouts.logp - logp)[rollouts.completion_mask].abs().max() < 1e-4 and (
        rollouts.behaviour_logp == 0
    ).all()


@pytest.mark.parametrize("how", ["stop", "string", "config", "tokenizer"])
def test_a_stop_token_ends_the_completion_and_is_part_of_it(how):
    """Wrong implementations: the stop token dropped; drawing on after it; a stop that changes what was drawn
    before it.
    """
    words, stop = tokenizer(), 9
    model = decoder(eos_token_id=[stop, 30] if how == "config" else None)
    free = (
        Sampler(decoder(eos_token_id=None))
        .generate(PROMPTS, SamplingParams(n=6, max_new_tokens=12, seed=5))
        .completions()
    )
    if how == "tokenizer":
        words.eos_token = words.convert_ids_to_tokens(stop)
    asked = {"stop": (stop, 30), "string": tuple(words.convert_ids_to_tokens([stop, 30]))}.get(how, ())
    stops = {stop} if how == "tokenizer" else {stop, 30}
    sampler = Sampler(model, words if how in ("string", "tokenizer") else None)
    if how == "string":
        stops.add(words.eos_token_id)
    rollouts = sampler.generate(PROMPTS, SamplingParams(n=6, max_new_tokens=12, seed=5, stop=asked))
    want = [c[: next((i + 1 for i, t in enumerate(c) if t in stops), len(c))] for c in free]
    assert rollouts.completions() == want
    assert rollouts.finish_reason == ["stop" if c[-1] in stops else "length" for c in want]
    assert set(rollouts.finish_reason) == {"stop", "length"}


def test_the_context_ends_a_completion():
    """Wrong implementations: positions beyond the context; one token too few; a stop token in the last place
    called "length".
    """
    model = decoder(max_position_embeddings=16, eos_token_id=None)
    prompts = [[3] * n for n in (1, 10, 15)]
    rollouts = generate(model, prompts, n=1, max_new_tokens=100)
    assert rollouts.lengths.tolist() == [15, 6, 1] and rollouts.finish_reason == ["length"] * 3
    last = rollouts.completions()[2][0]
    assert generate(model, prompts, n=1, max_new_tokens=100, stop=(last,)).finish_reason[2] == "stop"
    one = generate(model, prompts, n=1, max_new_tokens=1)
    assert one.lengths.tolist() == [1, 1, 1] and one.completions() == [c[:1] for c in rollouts.completions()]


# --- prompts and text -------------------------------------------------------------------------------
def test_prompts_as_text_and_as_messages():
    """Wrong implementation: the sampler's prompt tokens differ from those that training puts before a
    completion.
    """
    words = tokenizer()
    words.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}|{% endif %}"
    )
    talk = [{"role": "user", "content": "a:7K>3"}]
    rollouts = Sampler(decoder(), words).generate(["a:7K>3|", talk], SamplingParams(max_new_tokens=6, seed=5))
    prompts = [
        c[:n]
        for c, n in zip(
            rollouts.tokens.split(rollouts.cu_seqlens.diff().tolist()), rollouts.prompt_lengths, strict=True
        )
    ]
    assert (
        [p.tolist() for p in prompts]
        == [encode_prompt("a:7K>3|", words), encode_prompt(talk, words)]
        == [words.encode("a:7K>3|")] * 2
    )
    assert rollouts.text == [words.decode(c, skip_special_tokens=True) for c in rollouts.completions()]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[3], []], {}, r"prompts\[1\]: expected at least one token, got none"),
        ([[3], [4, 31]], {}, r"prompts\[1\]: expected token ids in \[0, 31\), got 31"),
        ([[-1]], {}, r"prompts\[0\]: expected token ids in \[0, 31\), got -1"),
        (
            [[3], [4] * 128],
            {},
            r"prompts\[1\]: a prompt of 128 tokens leaves no room for a completion in the model's "
            r"context of 128",
        ),
        (
            ["7K"],
            {},
            r"prompts\[0\]: expected a list of token ids, because the sampler has no tokenizer; got str",
        ),
        ("7K", {}, r"prompts: expected a list of prompts, got the text '7K' alone"),
        (
            [[3]],
            {"stop": ("|",)},
            r"stop: expected token ids, because the sampler has no tokenizer; got '\|'",
        ),
        ([[3]], {"stop": "|"}, r"stop: expected a list of stops, got the text '\|' alone"),
        ([[3]], {"n": 0}, "n: expected at least 1, got 0"),
        ([[3]], {"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ([[3]], {"temperature": -0.1}, "temperature: expected 0 or more, got -0.1"),
        ([[3]], {"temperature": float("nan")}, "temperature: expected 0 or more, got nan"),
        ([[3]], {"top_k": -1}, "top_k: expected 0 or more, got -1"),
        ([[3]], {"top_p": 0.0}, r"top_p: expected in \(0, 1\], got 0.0"),
        ([[3]], {"min_p": 1.0}, r"min_p: expected in \[0, 1\), got 1.0"),
        ([[3]], {"seed": 2**63}, "seed: expected a 64-bit number"),
    ],
)
def test_what_cannot_be_sampled_is_named(prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(decoder(), prompts, **options)


def test_errors_of_a_tokenizer_and_of_the_budget():
    sampler = Sampler(decoder(), tokenizer())
    with pytest.raises(UserError, match=r"prompts\[1\]: the tokenizer has no tokens for part of 'hello'"):
        sampler.generate(["7", "hello"], SamplingParams())
    with pytest.raises(UserError, match="stop: expected texts of one token; '7K' is 2 of this tokenizer"):
        sampler.generate(["7"], SamplingParams(stop=("7K",)))
    with pytest.raises(
        UserError,
        match="max_tokens_in_flight: sequence 0 alone may need 64 tokens of cache, above the budget of 63",
    ):
        generate(decoder(), budget=63)


# --- one model --------------------------------------------------------------------------------------
def test_the_next_call_sees_an_optimizer_step():
    """Wrong implementation: the sampler keeps a copy of the weights."""
    model = decoder()
    sampler, places = Sampler(model), [p.data_ptr() for p in model.parameters()]
    params = SamplingParams(n=3, max_new_tokens=12, seed=5)
    before = sampler.generate(PROMPTS, params)
    ones = torch.ones_like(before.logp)
    batch = Batch(
        tokens=before.tokens,
        cu_seqlens=before.cu_seqlens,
        mask=before.completion_mask,
        advantage=ones,
        old_logp=before.logp,
        weight=ones / 100,
    )
    learner(model, ALGORITHMS["rloo"], micro_tokens=256, optim=Optim(lr=0.05), temperature=1.0).update(
        batch, 0
    )
    after = sampler.generate(PROMPTS, params)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert after.completions() != before.completions()
    assert (after.logp - forward(model, after)[0])[after.completion_mask].abs().max() < 1e-4


def test_a_model_without_a_cache_gives_the_same_samples(tmp_path):
    """Wrong implementation: the path for transformers' models draws with other noise, or stops elsewhere."""
    model = decoder("qwen2", eos_token_id=[3, 4])
    model.save_pretrained(tmp_path)
    cached, plain = generate(model), generate(Adapter.from_pretrained(tmp_path))
    assert cached.completions() == plain.completions() and cached.finish_reason == plain.finish_reason
    assert set(cached.finish_reason) == {"stop", "length"}
    for name in ("logp", "behaviour_logp", "entropy"):
        assert torch.allclose(getattr(cached, name), getattr(plain, name), atol=1e-4)


def test_trainer_and_sampler_run_the_same_layers(monkeypatch):
    """Wrong implementation: a second definition of the decoder layer for generation."""
    calls, real = [], Layer.forward
    monkeypatch.setattr(Layer, "forward", lambda self, *args: calls.append(self) or real(self, *args))
    model = decoder()
    rollouts = generate(model, max_new_tokens=4)
    sampled = len(calls)
    assert sampled == 2 * 5 and set(calls) == set(model.layers), (
        "prefill and four decode steps through both layers"
    )
    model(rollouts.tokens, rollouts.cu_seqlens)
    assert len(calls) == sampled + 2 and set(calls) == set(model.layers)


def test_the_sampler_computes_no_layer_of_its_own():
    """Wrong implementation: norms, rotations or projections beside those of fastrl.model.decoder."""
    parts = {"rms_norm", "rope", "swiglu", "Linear", "linear", "silu", "softmax", "rotary"}
    for path in sorted((ROOT / "fastrl").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
            n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
        }
        if path.parent.name == "sampler":
            assert not used & parts, path
        if "swiglu" in used:
            assert path == Path(fastrl.model.decoder.__file__)
