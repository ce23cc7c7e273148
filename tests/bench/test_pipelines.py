"""The benchmarks of whole pipelines: what they promise to measure, and the bounds they measure it against."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from fastrl.bench import decoders, harness, ledger, table, timing
from fastrl.bench.common import Bench, Cost, Data, cases, plain
from fastrl.bench.systems import bench_grpo, bench_rollout, bench_train

H200 = timing.Ceilings(copy_gb_s=4300.0, gemm_tflop_s=780.0, gemm="")
TINY = harness.Plan(timing.Effort(3, 0.0, 0.0), compile=False)


def tiny(bench: Bench):
    return next(c for c in bench.cases if c.level == "tiny")


# --- rows -------------------------------------------------------------------------------------------
def test_a_benchmark_s_own_numbers_reach_the_file_and_the_table(tmp_path):
    """Wrong implementations: details of another provider; asked for before anything is measured; lost in the
    JSON file.
    """
    asked = []

    def details(case, function, ms):
        asked.append(ms)
        return {"twice ms": 2 * ms, "who": float(function(x=torch.zeros(1))[0])}

    b = Bench(
        op="x",
        cases=cases("T", tiny=(4,), quick=(4,), cpu=[(8,)], cuda=[(8,)], slice={}, modes=("all",)),
        cost=lambda c: Cost(8),
        data=lambda c: Data({"x": torch.zeros(c.shape["T"])}),
        wall=True,
        details=details,
        providers={"fastrl": plain(lambda x: x + 1), "eager": plain(lambda x: x + 2)},
    )
    rows = harness.run_case(b, b.cases[0], TINY)
    assert [r.details["who"] for r in rows] == [1, 2]
    assert [r.details["twice ms"] for r in rows] == [2 * r.best for r in rows] == [2 * ms for ms in asked]
    results = ledger.Results({"kind": "cpu"}, H200, {"quick": True}, rows)
    results.save(tmp_path / "x.json")
    loaded = ledger.Results.load(tmp_path / "x.json")
    assert loaded == results
    text = table.text(loaded, loaded.rows).splitlines()
    assert [line.split()[0] for line in text[2:]] == ["fastrl", "twice", "eager", "twice"]


def test_results_of_before_have_no_details(tmp_path):
    """Wrong implementation: a new field without a default makes every published file unreadable."""
    row = ledger.Row(
        op="x", case="", shape={}, dtype="float32", mode="all", headline=True, provider="fastrl", status="ok"
    )
    ledger.Results({}, H200, {}, [row]).save(tmp_path / "x.json")
    old = (tmp_path / "x.json").read_text().replace(', "details": {}', "")
    (tmp_path / "x.json").write_text(old)
    assert "details" not in old and ledger.Results.load(tmp_path / "x.json").rows == [row]


# --- the workload and its bound ---------------------------------------------------------------------
def test_the_workload_is_nano_vllm_s():
    """142,827 prompt and 133,966 output tokens, and 121.07 million keys read: wrong if a number is drawn in
    another order.
    """
    case = next(c for c in bench_rollout.CASES if c.mode == bench_rollout.RANDOM)
    prompts, outputs = bench_rollout.lengths(case)
    assert (len(prompts), sum(prompts), sum(outputs), max(outputs)) == (256, 142_827, 133_966, 1024)
    assert sum(n * p + n * (n + 1) // 2 for p, n in zip(prompts, outputs, strict=True)) == 121_071_997
    assert (min(prompts), max(prompts), min(outputs)) >= (100, 1000, 100)
    assert random.Random(0).randint(100, 1024) == prompts[0]


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [(decoders.QWEN25_05B, 183e3), (decoders.QWEN25_15B, 64e3), (decoders.QWEN3_06B, 36e3)],
)
def test_the_bound_on_an_h200(shape, tokens):
    """The additive bound as it was worked out elsewhere: wrong with traffic and arithmetic of all steps in
    one maximum, with the cache of a layer, or with weights read once a sequence.
    """
    case = next(
        c
        for c in bench_rollout.CASES
        if c.mode == bench_rollout.RANDOM and c.sizes(decoders.LETTERS) == shape
    )
    prompts, outputs = bench_rollout.lengths(case)
    assert sum(outputs) / decoders.bound(case, prompts, outputs, limit=H200).ms * 1e3 == pytest.approx(
        tokens, rel=0.01
    )


def test_samples_of_a_prompt_are_prefilled_once_and_decoded_each():
    case = next(c for c in bench_rollout.CASES if c.mode == bench_rollout.RANDOM)
    one, four = (decoders.bound(case, [700] * 32, [300] * 32, n, limit=H200) for n in (1, 4))
    assert four.prefill_ms == one.prefill_ms
    assert four.cache_ms == pytest.approx(4 * one.cache_ms)
    assert one.decode_ms <= four.decode_ms < 1.01 * one.decode_ms, (
        "32 or 128 rows: the weights' traffic, on this device"
    )


def test_parameters_are_the_models():
    """Wrong: a head width that is always D / H."""
    for bench in (bench_rollout.BENCH, bench_train.BENCH):
        for case in (tiny(bench), replace(tiny(bench), shape=tiny(bench).shape | {"E": 6})):
            matrices = [
                p.numel()
                for name, p in decoders.ours(case).named_parameters()
                if p.ndim == 2 and "norm" not in name
            ]
            assert sum(decoders.parameters(case)) == sum(matrices)


def test_model_flops():
    """(6 N T + 6 L H E sum s^2) of the issue, at Qwen3-0.6B's shape and 16 sequences of 1024 tokens."""
    case = next(c for c in bench_train.CASES if c.device == "cuda" and c.headline)
    assert case.sizes(decoders.LETTERS) == decoders.QWEN3_06B and case.sizes("S N") == (16, 1024)
    expected = 6 * 595_984_384 * 16 * 1024 + 6 * 28 * 16 * 128 * 16 * 1024**2
    assert bench_train.cost(case).flops == expected


# --- one step against TRL ---------------------------------------------------------------------------
def test_a_step_draws_and_learns_what_it_says():
    """Wrong: completions that end early; samples left out; a step that learns nothing, or the same tokens
    again.
    """
    case = next(c for c in bench_grpo.CASES if c.level == "quick")
    P, G, N, M = case.sizes("P G N M")
    step = bench_grpo.Ours(case)
    batch, again = (step.source.collect(i, i).batches[0] for i in range(2))
    assert int(batch.mask.sum()) == P * G * M and batch.tokens.numel() == P * G * (N + M)
    assert not torch.equal(batch.tokens, again.tokens)
    before = step.model.embed.weight.detach().clone()
    with torch.no_grad():
        step()
    assert not torch.equal(step.model.embed.weight, before)
    assert min(step.seconds.values()) > 0


def test_trl_s_trainer_makes_one_step_a_call():
    """Wrong: steps that run ahead of the clock; an error in its thread that leaves the benchmark waiting."""
    pytest.importorskip("trl")
    case = tiny(bench_grpo.BENCH)
    steps = bench_grpo.trl(case)
    state = steps.trainer.state
    assert state.global_step == 1
    steps()
    assert state.global_step == 2
    P, G, M = case.sizes("P G M")
    assert steps.trainer._metrics["train"]["completions/mean_length"][-1] == M
    assert steps.trainer.args.per_device_train_batch_size == P * G
    steps.trainer.training_step = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        steps()
