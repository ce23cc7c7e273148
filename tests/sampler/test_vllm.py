"""The vLLM adapter against a protocol written by hand: vLLM itself cannot run here (see
tests/helpers/fake_vllm.py).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import fake_vllm
import pytest
import torch
from runs import decoder, grpo, lines, tokenizer
from support import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

import fastrl.trainer
from fastrl import cli
from fastrl.batch.types import Rollouts
from fastrl.config import Eval
from fastrl.errors import UserError
from fastrl.model.adapter import Adapter
from fastrl.model.decoder import Decoder
from fastrl.sampler import Sampler, SamplingParams, VllmSampler, vllm_engine
from fastrl.sampler import vllm as adapter

PROMPTS = [[3, 4, 5], [6]]
TRANSCRIPT: dict[
    tuple[int, ...], list[tuple[list[int], list[float], str, int | None]]
] = {  # tokens, log-probs, finish and stop reason
    (3, 4, 5): [([7, 1], [-0.5, -2.0], "stop", 1), ([8, 9, 10], [-1.0, -0.25, -3.0], "length", None)],
    (6,): [([9], [-4.0], "stop", 9), ([11, 12, 13], [-0.125, -1.5, -0.75], "length", None)],
}


def played() -> Callable[..., fake_vllm.CompletionOutput]:
    """Answers from the transcript, each prompt's in order; before the token that was drawn stands a likelier
    one.
    """
    told = {prompt: iter(answers) for prompt, answers in TRANSCRIPT.items()}

    def answer(llm: Any, prompt: list[int], params: Any) -> fake_vllm.CompletionOutput:
        tokens, logp, finish, stop = next(told[tuple(prompt)])
        at = [
            {0: fake_vllm.Logprob(-0.1, 1), t: fake_vllm.Logprob(p, 2)}
            for t, p in zip(tokens, logp, strict=True)
        ]
        return fake_vllm.CompletionOutput(0, "", tokens, sum(logp), at, finish, stop)

    return answer


def without_environment(monkeypatch: Any) -> None:
    """What the adapter sets is gone after the test."""
    for name in vllm_engine.ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def engines(monkeypatch) -> list[fake_vllm.LLM]:
    """vLLM as far as the transcript goes, on a CPU; the engines that were started."""
    without_environment(monkeypatch)
    monkeypatch.setitem(adapter.BACKENDS, "cpu", "ipc")
    return fake_vllm.install(monkeypatch, played())


def generate(
    sampler: VllmSampler, prompts: Any = PROMPTS, call: dict[str, Any] | None = None, **options: Any
) -> Rollouts:
    return sampler.generate(
        prompts, SamplingParams(**{"n": 2, "max_new_tokens": 3, "seed": 5} | options), **call or {}
    )


def test_a_transcript_becomes_rollouts(engines):
    """Wrong implementations: the likeliest token's log-prob for the drawn one's; samples of a prompt swapped;
    an entropy of 0.
    """
    counted: list[int] = []
    got = generate(
        VllmSampler(decoder(), tokenizer()), call={"weight_version": 4, "on_tokens": counted.append}
    )
    nan = float("nan")
    assert got.tokens.tolist() == [3, 4, 5, 7, 1, 3, 4, 5, 8, 9, 10, 6, 9, 6, 11, 12, 13]
    assert got.cu_seqlens.tolist() == [0, 5, 11, 13, 17] and got.cu_seqlens.dtype == torch.int32
    assert got.prompt_index.tolist() == [0, 0, 1, 1] and got.prompt_lengths.tolist() == [3, 3, 1, 1]
    assert got.completion_mask.tolist() == [t in (7, 1, 8, 9, 10, 11, 12, 13) for t in got.tokens.tolist()]
    want = [0, 0, 0, -0.5, -2, 0, 0, 0, -1, -0.25, -3, 0, -4, 0, -0.125, -1.5, -0.75]
    assert got.logp.tolist() == want == got.behaviour_logp.tolist() and got.logp.dtype == torch.float32
    entropy = [nan if m else 0.0 for m in got.completion_mask.tolist()]
    assert (
        torch.equal(got.entropy.isnan(), torch.tensor(entropy).isnan())
        and (got.entropy[~got.completion_mask] == 0).all()
    )
    assert got.weight_version.tolist() == [4 if m else -1 for m in got.completion_mask.tolist()]
    assert got.finish_reason == ["stop", "length", "stop", "length"] and sum(counted) == 9
    assert got.text == tokenizer().batch_decode(
        [[7, 1], [8, 9, 10], [9], [11, 12, 13]], skip_special_tokens=True
    )


def test_the_fields_are_those_of_the_own_sampler(engines):
    """Wrong implementations: another dtype or shape than the trainer expects."""
    theirs, ours = generate(VllmSampler(decoder())), Sampler(decoder()).generate(PROMPTS, SamplingParams(n=2))
    assert theirs.text is None
    for name in Rollouts.__slots__:
        a, b = getattr(theirs, name), getattr(ours, name)
        assert type(a) is type(b) and (
            not isinstance(a, torch.Tensor) or (a.dtype, a.ndim, a.device) == (b.dtype, b.ndim, b.device)
        ), name


def test_what_vllm_is_asked_for(engines):
    """Wrong implementations: filters of vLLM's own; a completion that runs over the context; the
    end-of-sequence token not stopped at.
    """
    sampler = VllmSampler(decoder(max_position_embeddings=5), max_tokens_in_flight=1000)
    generate(sampler, temperature=0.7, stop=(9,), max_new_tokens=8)
    (llm,) = engines
    assert [prompt for prompt, _ in llm.requests] == [[3, 4, 5], [3, 4, 5], [6], [6]]
    asked = [params for _, params in llm.requests]
    assert [p.max_tokens for p in asked] == [2, 2, 4, 4]
    same = {
        "n": 1,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "stop_token_ids": [1, 9],
        "ignore_eos": True,
        "logprobs": 0,
    }
    assert all(getattr(p, name) == value for p in asked for name, value in same.items())
    options = {
        k: llm.options[k]
        for k in ("dtype", "max_model_len", "logprobs_mode", "load_format", "enable_prefix_caching")
    }
    assert options == {
        "dtype": "float32",
        "max_model_len": 5,
        "logprobs_mode": "processed_logprobs",
        "load_format": "dummy",
        "enable_prefix_caching": True,
    }
    # k and v, layers, heads, width, bytes
    assert llm.options["kv_cache_memory_bytes"] == 2 * 2 * 2 * 8 * 4 * (1000 + adapter.SPARE)
    assert os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"


def test_a_seed_is_a_function_of_the_runs_seed_and_the_sequence(engines):
    """Wrong implementations: one seed for a prompt; numbers of the call's own; seed + number, the same for
    (5, 1) and (6, 0).
    """
    generate(VllmSampler(decoder()))
    fake_vllm.LLM.answer = staticmethod(played())
    for prompt, offset in ((PROMPTS[1], 2), (PROMPTS[0], 0)):  # each with an engine of its own
        generate(VllmSampler(decoder()), [prompt], {"sequence_offset": offset})
    whole, second, first = ([params.seed for _, params in llm.requests] for llm in engines)
    assert whole == first + second and len(set(whole)) == 4
    many = {adapter.seed_of(seed, i) for seed in range(-5, 5) for i in range(50)}
    assert len(many) == 500 and all(0 <= s < 2**63 for s in many)


# --- weights ----------------------------------------------------------------------------------------
UPDATE = ["start_weight_update", "update_weights", "finish_weight_update", "reset_prefix_cache"]


def squeezed(calls: list[str]) -> list[str]:
    """Calls, the pieces of an update as one."""
    return [c for i, c in enumerate(calls) if c != "update_weights" or calls[i - 1] != c]


def test_weights_are_pushed_once_per_version(engines, monkeypatch):
    """Wrong implementations: a push for every call, or only the first; the weights of the first push sent
    again; a stale prefix cache.
    """
    model = decoder()
    sampler = VllmSampler(model)
    for version, change in ((0, 0.0), (0, 0.0), (3, 1.0), (3, 0.0), (4, 0.5)):
        with torch.no_grad():
            model.layers[0].qkv.weight.add_(change)
        monkeypatch.setattr(fake_vllm.LLM, "answer", staticmethod(played()))
        generate(sampler, call={"weight_version": version})
        assert torch.equal(
            engines[0].weights["model.layers.0.self_attn.k_proj.weight"], model.layers[0].qkv.weight[32:48]
        )
    once, again = [*UPDATE, "generate"], ["generate"]
    assert (
        squeezed(engines[0].calls) == ["init_weight_transfer_engine", *once, *again, *once, *again, *once]
        and len(engines) == 1
    )


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_transformers_can_load_what_is_pushed(engines, family, tied):
    """Wrong implementations: fused matrices sent whole, or cut in the wrong rows; our names; a head that is
    tied sent as a second one.
    """
    model = decoder(family, tie_word_embeddings=tied)
    generate(VllmSampler(model))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(engines[0].config)))
    pushed = dict(engines[0].weights)
    if tied:
        assert "lm_head.weight" not in pushed
        pushed["lm_head.weight"] = pushed["model.embed_tokens.weight"]
    theirs.load_state_dict(pushed, strict=True)
    tokens = torch.arange(3, 20)
    with torch.no_grad():
        assert torch.allclose(theirs(tokens[None]).logits[0], model(tokens) @ model.head_weight.T, atol=1e-4)


def test_a_failed_push_is_tried_again(engines, monkeypatch):
    """Wrong implementations: a version counted as pushed before it is; completions with keys and values of
    older weights.
    """
    sampler = VllmSampler(decoder())
    monkeypatch.setattr(fake_vllm.LLM, "resets", False)
    with pytest.raises(RuntimeError, match="did not reset its prefix cache"):
        generate(sampler)
    monkeypatch.setattr(fake_vllm.LLM, "resets", True)
    generate(sampler)
    assert engines[0].calls.count("start_weight_update") == 2


def test_without_prompts_no_engine_is_started(engines):
    got = generate(VllmSampler(decoder(), tokenizer()), [])
    assert (len(got), got.tokens.numel(), got.cu_seqlens.tolist(), got.text, engines) == (0, 0, [0], [], [])


# --- errors -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "call", "said"),
    [
        ({"top_k": 5}, {}, "top_k: expected 0 with --sampler vllm, got 5"),
        ({"top_p": 0.9}, {}, "top_p: expected 1.0 with --sampler vllm, got 0.9"),
        ({"min_p": 0.1}, {}, "min_p: expected 0.0 with --sampler vllm, got 0.1"),
        ({"temperature": 0.001}, {}, "temperature: expected 0 or at least 0.01"),
        ({}, {"environment": print}, "environment: only fastrl's own engine has this; use --sampler fastrl"),
        (
            {"max_new_tokens": 90},
            {},
            r"max_tokens_in_flight: prompts\[0\] may need 93 tokens of cache, above the budget of 80",
        ),
    ],
)
def test_what_vllm_cannot_give_is_refused(engines, options, call, said):
    """Wrong implementation: log-probs after the filters handed to the trainer as the policy's."""
    with pytest.raises(UserError, match=said):
        generate(VllmSampler(decoder(), max_tokens_in_flight=80), call=call, **options)
    assert engines == []


def test_an_engine_keyword_of_none_is_none(engines):
    assert len(generate(VllmSampler(decoder()), call={"environment": None})) == 4


def test_a_request_that_vllm_gave_up_is_no_completion(engines, monkeypatch):
    """Wrong implementation: whatever came so far, as if the policy had ended it."""
    cut = fake_vllm.CompletionOutput(0, "", [7], -1.0, [{7: fake_vllm.Logprob(-1.0)}], "abort")
    monkeypatch.setattr(fake_vllm.LLM, "answer", staticmethod(lambda *_: cut))
    with pytest.raises(RuntimeError, match="vLLM ended request 0 with 'abort'"):
        generate(VllmSampler(decoder()))


def test_vllm_that_is_not_there_is_an_error_that_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    without_environment(monkeypatch)
    decoder().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "p.txt").write_text("7\n")
    assert (
        cli.main(
            ["generate", "--model", str(tmp_path), "--prompts", str(tmp_path / "p.txt"), "--sampler", "vllm"]
        )
        == 1
    )
    said = capsys.readouterr().err
    assert (
        "vLLM is not installed" in said
        and "pip install vllm" in said
        and "use --sampler fastrl, which needs nothing more" in said
    )


def test_another_vllm_model_or_environment_is_an_error(engines, monkeypatch):
    other = Adapter.from_config(tiny_config("llama"), seed=0)
    with pytest.raises(UserError, match="expected a Llama, Qwen2 or Qwen3, got LlamaForCausalLM"):
        VllmSampler(other)
    monkeypatch.delitem(adapter.BACKENDS, "cpu")
    with pytest.raises(
        UserError, match="expected the model on the first visible GPU, where vLLM starts; got cpu"
    ):
        VllmSampler(decoder())
    monkeypatch.delattr(sys.modules["vllm.distributed.weight_transfer"], "ParamMeta")
    with pytest.raises(
        UserError, match=r"this vLLM has no vllm.distributed.weight_transfer.ParamMeta; expected 0\.33\.0"
    ):
        VllmSampler(decoder())
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "0")
    with pytest.raises(
        UserError,
        match="expected VLLM_ALLOW_INSECURE_SERIALIZATION=1, to hand weights over; got '0'; unset it",
    ):
        VllmSampler(decoder())


# --- runs -------------------------------------------------------------------------------------------
def own(llm: fake_vllm.LLM, prompt: list[int], params: Any) -> fake_vllm.CompletionOutput:
    """An answer of the model that the engine was sent, drawn by our own sampler with the request's seed."""
    model = Decoder.from_config(json.loads(llm.config), seed=99)
    with torch.no_grad():
        for name, tensor in vllm_engine.tensors(model):
            tensor.copy_(llm.weights[name])
    wanted = {
        "max_new_tokens": params.max_tokens,
        "temperature": params.temperature,
        "seed": params.seed,
        "stop": params.stop_token_ids,
    }
    drawn = Sampler(model).generate([prompt], SamplingParams(**wanted))
    tokens, logp = drawn.completions()[0], drawn.logp[drawn.completion_mask].tolist()
    at = [{t: fake_vllm.Logprob(p)} for t, p in zip(tokens, logp, strict=True)]
    return fake_vllm.CompletionOutput(0, "", tokens, sum(logp), at, drawn.finish_reason[0])


def test_a_run_trains_on_vllms_rollouts(engines, monkeypatch, tmp_path):
    """Wrong implementations: rollouts or evaluations of weights older than the trainer's; an entropy of 0
    logged as if measured.
    """
    monkeypatch.setattr(fake_vllm.LLM, "answer", staticmethod(own))
    seen = []
    monkeypatch.setattr(
        adapter.VllmSampler,
        "_push",
        lambda self, push=VllmSampler._push: (seen.append(len(engines)), push(self)),
    )
    config = grpo(tmp_path, sampler="vllm", steps=3, prompts=2, group=4, eval=Eval(prompts=1, every=1))
    fastrl.trainer.train(config)
    rows = [row for row in lines(config.output_dir) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(
        abs(row["ratio/mean"] - 1) < 1e-4 and abs(row["ratio/max"] - 1) < 1e-4
        for row in rows
        if row["num_tokens"]
    )
    assert any(row["num_tokens"] and row["grad_norm"] > 0 for row in rows)
    assert all(row["entropy"] is None for row in rows)
    assert len(engines) == 1 and len(seen) == 4, (
        "one push for each of the versions 0 to 3, by the evaluation after the step"
    )


def test_generate_writes_vllms_completions(engines, monkeypatch, tmp_path):
    """Wrong implementations: --sampler that changes nothing; NaN in JSON.  The greedy ones are those of
    fastrl's own engine.
    """
    monkeypatch.setattr(fake_vllm.LLM, "answer", staticmethod(own))
    decoder().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "p.txt").write_text("7+\nK\n")
    args = [
        "--model",
        str(tmp_path),
        "--prompts",
        str(tmp_path / "p.txt"),
        "--max-new-tokens",
        "6",
        "--sampling.temperature",
        "0",
    ]
    for name in ("vllm", "fastrl"):
        assert (
            cli.main(["generate", *args, "--sampler", name, "--output", str(tmp_path / f"{name}.jsonl")]) == 0
        )
    theirs, ours = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("vllm", "fastrl")
    )
    for a, b in zip(theirs, ours, strict=True):
        assert a["completion"] == b["completion"] and a["logp"] == pytest.approx(b["logp"], abs=1e-4)
    assert len(engines) == 1 and len(engines[0].requests) == 2
