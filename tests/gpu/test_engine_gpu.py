"""The rollout engine on a GPU: captured steps against plain ones, transformers' tokens, weights that change,
nobody waits.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from decoders import decoder
from support import no_waiting
from transformers import AutoModelForCausalLM

from fastrl import ops
from fastrl.batch.types import Rollouts
from fastrl.model.decoder import Decoder
from fastrl.sampler import Sampler, SamplingParams
from fastrl.sampler.step import Graphs

pytestmark = pytest.mark.gpu
KERNELS = ("decode_attention", "rope", "rms_norm", "swiglu", "sample", "advance")
PROMPTS = [[(7 * i + j) % 28 + 2 for j in range(n)] for i, n in enumerate((70, 64, 65, 1, 100, 3))]
PARAMS = SamplingParams(n=3, max_new_tokens=40, seed=5)


@pytest.fixture(params=["default", "triton"], autouse=True)
def backend(request):
    """What runs by default, and every Triton kernel of a step asked for by name."""
    with contextlib.ExitStack() as stack:
        if request.param == "triton":
            stack.enter_context(ops.use_backend("triton", *KERNELS))
        yield request.param


def model(family: str = "qwen3", **changes: object) -> Decoder:
    """A decoder whose heads are as wide as real ones."""
    return decoder(family, head_dim=64, **changes).cuda()


def forward(policy: Decoder, rollouts: Rollouts) -> torch.Tensor:
    with torch.no_grad(), ops.use_backend("reference"):
        hidden = policy(rollouts.tokens, rollouts.cu_seqlens)[:-1]
        logp = ops.linear_logp(hidden, policy.head_weight, rollouts.tokens[1:]).logp
    return torch.cat([logp.new_zeros(1), logp])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_greedy_is_transformers_generate(family, tmp_path):
    """Wrong: a captured step that reads lengths, positions or pages of the time of its capture."""
    policy = model(family, eos_token_id=None, max_position_embeddings=512)
    policy.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).cuda()
    ours = Sampler(policy).generate(PROMPTS, SamplingParams(max_new_tokens=200, temperature=0.0))
    for prompt, done in zip(PROMPTS, ours.completions(), strict=True):
        ids = torch.tensor([prompt], device="cuda")
        want = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False, pad_token_id=0
        )
        assert want[0, len(prompt) :].tolist() == done


def test_one_set_of_graphs_serves_every_call():
    """Wrong: seed, temperature, stops or lengths baked into a graph; graphs captured anew for each call."""
    policy = model(eos_token_id=None)
    sampler = Sampler(policy)
    first = sampler.generate(PROMPTS, PARAMS)
    assert isinstance(sampler._engine.run, Graphs)
    captured = dict(sampler._engine.run.captured)
    assert captured
    other = sampler.generate(
        PROMPTS[::-1], SamplingParams(n=3, max_new_tokens=40, seed=6, temperature=0.7, stop=(4, 5))
    )
    now = sampler._engine.run.captured  # its rows end at different times, which takes smaller steps too
    assert all(now[key] is graph for key, graph in captured.items())
    fresh = Sampler(policy).generate(
        PROMPTS[::-1], SamplingParams(n=3, max_new_tokens=40, seed=6, temperature=0.7, stop=(4, 5))
    )
    assert other.completions() == fresh.completions() and other.finish_reason == fresh.finish_reason
    assert sampler.generate(PROMPTS, PARAMS).completions() == first.completions()


def test_a_replay_sees_the_optimizers_weights():
    """Wrong: a graph over a copy of the weights; a step whose log-probs are those of the weights before."""
    policy = model(eos_token_id=None)
    sampler = Sampler(policy)
    sampler.generate(PROMPTS, PARAMS)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn_like(p))
    after = sampler.generate(PROMPTS, PARAMS)
    live = after.completion_mask
    assert (after.logp - forward(policy, after))[live].abs().max() < 1e-3


@pytest.mark.parametrize("rows, tokens", [(2, 262144), (5, 1024), (16, 512)])
def test_rows_and_pages_change_no_sample(rows, tokens):
    """Wrong: padding rows that draw; a stale look that ends early or admits too many; a page used twice."""
    policy = model(eos_token_id=[3, 4])
    whole = Sampler(policy).generate(PROMPTS, PARAMS)
    part = Sampler(policy, max_rows=rows, max_tokens_in_flight=tokens)
    again = part.generate(PROMPTS, PARAMS)
    assert again.completions() == whole.completions() and again.finish_reason == whole.finish_reason
    assert part._engine.cache.spare() == part._engine.cache.capacity


def test_a_step_waits_for_nobody(backend):
    """Wrong: a look at a value in a step, which a graph could not hold either."""
    sampler = Sampler(model(eos_token_id=None))
    sampler.generate(PROMPTS, PARAMS)
    run = sampler._engine.run
    with torch.no_grad():
        run(8, (0, 1.0, 0.0))  # captures it
        with no_waiting():
            for _ in range(3):
                run(8, (0, 1.0, 0.0))
                run.step(8, (0, 1.0, 0.0))


def test_bfloat16_agrees_with_the_trainer():
    """Wrong: another rounding of the residual stream or of the logits in the sampler than in the trainer."""
    policy = model(eos_token_id=None).to(torch.bfloat16)
    rollouts = Sampler(policy).generate(PROMPTS, PARAMS)
    live = rollouts.completion_mask
    assert (rollouts.logp - forward(policy, rollouts))[live].abs().mean() < 2e-2
