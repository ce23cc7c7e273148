"""The learner: one optimizer step over a batch, the same however the batch is cut, in float32 whatever the
model is kept in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from runs import METHODS, TEMPERATURE, decoder, drift, gradient, learner, make_batch, on_policy, relative
from torch import Tensor

from fastrl.algorithms import ALGORITHMS
from fastrl.batch.pack import micro_batches
from fastrl.config import Optim
from fastrl.errors import UserError
from fastrl.kernels._chunks import LOGITS_BYTES
from fastrl.model.decoder import Decoder, Layer
from fastrl.parallel.world import World
from fastrl.train.objective import batch_logp
from fastrl.train.optimizer import NotFinite, learning_rate


# --- cutting ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_cutting_changes_neither_loss_nor_gradient_nor_metrics(name, monkeypatch):
    """Micro-batches by tokens, and chunks of logits within them.

    Wrong implementations: denominators of the micro-batch; its loss averaged, not summed; the effective
    sample size averaged; a sequence's ratio from a chunk that cuts it in two.  In float64, where the order of
    a sum is no excuse.
    """
    model = decoder()
    batch = make_batch(name, model)
    model.double()
    drift(model, 1e-3 if "gspo" in name else 0.03)
    whole, g = gradient(learner(model, METHODS[name]), batch)
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 4 * 31 * 5)
    cut, h = gradient(learner(model, METHODS[name], micro_tokens=13), batch)
    assert relative(h, g) < 1e-13
    assert cut == pytest.approx(whole, rel=1e-12, abs=1e-14) and 0 < cut["ess"] <= 1


def test_a_sequence_above_the_budget_names_the_option():
    model = decoder()
    with pytest.raises(
        UserError,
        match="--micro-tokens: a sequence of 13 tokens does not fit into 12; raise it to at least 13",
    ):
        learner(model, ALGORITHMS["grpo"], micro_tokens=12).update(make_batch("grpo", model), 0)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"])
def test_groups_without_advantage_are_left_out_exactly(name, monkeypatch):
    """Wrong implementations: their tokens leave the denominators as well; with a KL or entropy term they are
    left out, too.
    """
    model = decoder()
    less = make_batch(name, model)
    monkeypatch.setattr("fastrl.methods.grpo.shaping.prune", lambda batch: batch)
    full = make_batch(name, model)
    assert (len(less), len(full)) == (8, 12)
    drift(model, 0.01)
    (a, g), (b, h) = (gradient(learner(model, METHODS[name], 20), batch) for batch in (less, full))
    assert relative(g, h) < 1e-6 and a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-7)


def test_with_a_kl_or_entropy_term_every_sample_counts():
    assert [len(make_batch(name, decoder())) for name in ("grpo+kl+entropy", "gspo+kl")] == [12, 12]


def test_a_batch_without_tokens_measures_nothing():
    """Its sequences stay in the batch, as PPO's do and those of a run with a KL: every completion was
    filtered out.

    Wrong implementations: ratios and a KL of 0 in the log; a step on momentum.
    """
    row = replace(ALGORITHMS["grpo"], kl="k3", kl_coef=0.1)
    model = decoder()
    batch = on_policy(model, row).collect(0, 0).batches[0]
    blank = replace(batch, mask=torch.zeros_like(batch.mask))
    trained = learner(model, row, 30)
    trained.update(batch, 0)  # its momentum would move the weights
    before = [p.detach().clone() for p in model.parameters()]
    metrics = trained.update(blank, 0)
    assert metrics == {"loss": 0.0, "num_tokens": 0.0, "grad_norm": 0.0, "learning_rate": Optim().lr}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_batch_of_equal_rewards_moves_nothing():
    """Wrong implementations: a division by no tokens; AdamW steps on the momentum of the steps before."""
    model = decoder()
    trained = learner(model, ALGORITHMS["grpo"], optim=Optim(lr=0.1, weight_decay=0.1))
    trained.update(make_batch("grpo", model), 0)
    before = {k: v.clone() for k, v in (model.state_dict() | trained.state()).items()}
    metrics = trained.update(
        on_policy(model, ALGORITHMS["grpo"], scores=[1.0] * 12).collect(0, 0).batches[0], 1
    )
    assert (metrics["num_tokens"], metrics["loss"], metrics["grad_norm"]) == (0, 0, 0)
    after = model.state_dict() | trained.state()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_gradient_checkpointing_gives_the_same_gradient(monkeypatch):
    """Wrong implementations: an option that does nothing; a recomputation with other inputs."""
    calls, real = [], Layer.forward
    monkeypatch.setattr(Layer, "forward", lambda self, *args: calls.append(1) or real(self, *args))
    model = decoder()
    batch, found = make_batch("sft", model), []
    for model.gradient_checkpointing in (False, True):
        calls.clear()
        found.append((gradient(learner(model, ALGORITHMS["sft"]), batch)[1], len(calls)))
    assert torch.equal(found[0][0], found[1][0]) and [n for _, n in found] == [2, 4]


# --- the step ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("schedule", "floor", "want"),
    [
        ("constant", 0.5, [0.5, 1, 1, 1, 1, 1]),
        ("linear", 0.0, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("linear", 0.2, [0.5, 1, 1, 0.8, 0.6, 0.4]),
        ("cosine", 0.0, [0.5, 1, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
        ("cosine", 0.2, [0.5, 1, 1, 0.2 + 0.8 * (0.5 + 0.5**1.5), 0.6, 0.2 + 0.8 * (0.5 - 0.5**1.5)]),
    ],
)
def test_learning_rates(schedule, floor, want):
    """Wrong implementations: a first step of 0, a peak that is never reached,
    a floor added to the schedule.
    """
    optim = Optim(lr=3.0, warmup=2, schedule=schedule, floor=floor)
    assert [learning_rate(optim, step, 6) / 3 for step in range(6)] == pytest.approx(want)
    assert learning_rate(optim, 100, 6) == pytest.approx(3 * (1 if schedule == "constant" else floor)), (
        "a longer run stays at the end"
    )


def test_the_step_has_the_learning_rate_of_its_number():
    model = decoder()
    trained = learner(model, ALGORITHMS["sft"], optim=Optim(lr=1.0, warmup=4))
    before = model.norm.detach().clone()
    assert trained.update(make_batch("sft", model), 1)["learning_rate"] == 0.5
    moved = (model.norm - before).abs().max().item()
    assert moved == pytest.approx(0.5, rel=1e-3), (
        "AdamW's first step is the learning rate, in the gradient's sign"
    )


def test_weight_decay_is_for_matrices():
    """Wrong implementations: norms and biases decay as well; decay added to the gradient, where AdamW's
    scaling would change it.
    """
    model = decoder("qwen2")
    with torch.no_grad():
        for p in model.parameters():
            p += 1.0
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch = make_batch("sft", model)
    batch.weight.zero_()  # tokens count, and give no gradient
    learner(model, ALGORITHMS["sft"], optim=Optim(lr=0.1, weight_decay=0.5)).update(batch, 0)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[name] * (0.95 if value.ndim == 2 else 1.0)), name


@pytest.mark.parametrize(("clip", "kept"), [(0.0, 1.0), (1e9, 1.0), (0.01, None)])
def test_clipping_scales_the_whole_gradient(clip, kept):
    """Wrong implementations: clipping by tensor; 0 that clips everything; a reported norm after clipping."""
    model = decoder()
    batch = make_batch("sft", model)
    _, g = gradient(learner(model, ALGORITHMS["sft"]), batch)
    trained = learner(model, ALGORITHMS["sft"], optim=Optim(clip=clip))
    assert trained.update(batch, 0)["grad_norm"] == pytest.approx(float(g.norm()), rel=1e-5)
    moments = torch.cat([trained.state()[f"exp_avg.{name}"].flatten() for name in trained.weights.names])
    factor = kept or clip / float(g.norm())
    assert relative(moments / (1 - Optim().beta1), g * factor) < 1e-5


# --- what must not happen ---------------------------------------------------------------------------
def break_loss(model: Decoder, batch):
    batch.advantage[batch.mask.nonzero()[-1]] = math.nan
    return "loss is nan"


def break_gradient(model: Decoder, batch):
    model.norm.register_hook(lambda g: g * math.inf)
    return "grad_norm is (nan|inf)"


@pytest.mark.parametrize("broken", [break_loss, break_gradient])
def test_a_loss_that_is_not_finite_stops_before_any_weight_changes(broken):
    """Wrong implementations: a NaN that reaches the weights or the moments; an error that does not say which
    step and metric.
    """
    model = decoder()
    trained, batch = learner(model, ALGORITHMS["grpo"], micro_tokens=20), make_batch("grpo", model)
    trained.update(batch, 0)
    before = {k: v.clone() for k, v in (model.state_dict() | trained.state()).items()}
    with pytest.raises(
        NotFinite, match=f"^step 8: {broken(model, batch)}; the weights are those before this update$"
    ):
        trained.update(batch, 7)
    after = model.state_dict() | trained.state()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_running_out_of_memory_names_the_option(monkeypatch):
    """Wrong implementations: CUDA's page of advice; a bug of ours called lack of memory; half a gradient left
    behind.
    """
    model = decoder()
    trained, batch, real = (
        learner(model, ALGORITHMS["grpo"], micro_tokens=40),
        make_batch("grpo", model),
        Decoder.forward,
    )
    seen: list[int] = []

    def fails_at_the_second(error: Exception):
        def forward(self, *args, **kwargs):
            seen.append(1)
            if len(seen) % 2 == 0:
                raise error
            return real(self, *args, **kwargs)

        return forward

    cpu = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried ..."
    )
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 20 GiB."),
        cpu,
        MemoryError(),
    ):
        monkeypatch.setattr(Decoder, "forward", fails_at_the_second(error))
        with pytest.raises(
            UserError, match=r"^out of memory at --micro-tokens 40; try --micro-tokens 20 \([^\n]*\)$"
        ):
            trained.update(batch, 0)
        assert all(p.grad is None for p in model.parameters())
    monkeypatch.setattr(Decoder, "forward", fails_at_the_second(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        trained.update(batch, 0)


# --- low precision ----------------------------------------------------------------------------------
def test_bfloat16_gradients_accumulate_in_float32():
    """Wrong implementation: micro-batches added up in the weights' own bfloat16."""
    model = decoder(dtype=torch.bfloat16)
    batch = make_batch("grpo+kl+entropy", model)
    trained = learner(model, METHODS["grpo+kl+entropy"], micro_tokens=13)
    _, got = gradient(trained, batch)
    one_by_one = [gradient(trained, micro)[1] for micro in micro_batches(batch, 13)]
    assert len(one_by_one) > 4
    exact = torch.stack(one_by_one).double().sum(0)
    rounded = sum(g.bfloat16() for g in one_by_one)
    assert got.dtype == torch.float32 and all(p.grad is None for p in model.parameters())
    assert relative(got, exact) < 1e-6 < 1e-4 < relative(rounded, exact)


def test_steps_too_small_for_bfloat16_add_up_in_the_masters():
    """Wrong implementation: AdamW steps on the bfloat16 weights, which swallow 1e-5 beside 1."""
    model = decoder(dtype=torch.bfloat16)
    trained = learner(model, ALGORITHMS["sft"], optim=Optim(lr=1e-5))
    norm = dict(zip(trained.weights.names, trained.weights.masters, strict=True))["norm"]
    places, batch = [p.data_ptr() for p in model.parameters()], make_batch("sft", model)
    for step in range(5):
        trained.update(batch, step)
    assert (model.norm == 1).all() and 2e-5 < (norm - 1).abs().max() < 6e-5
    norm += 1 / 64
    trained.update(batch, 5)
    assert torch.equal(model.norm, norm.bfloat16()) and [p.data_ptr() for p in model.parameters()] == places


# --- state ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_all_that_the_next_step_needs(dtype):
    """Wrong implementations: moments or their step count left behind;
    masters rebuilt from rounded weights.
    """
    optim = Optim(lr=1e-2, weight_decay=0.1, warmup=2)
    one, other = decoder(dtype=dtype), decoder(dtype=dtype, seed=1)
    a, batch = learner(one, ALGORITHMS["sft"], optim=optim), make_batch("sft", one)
    for step in range(3):
        a.update(batch, step)
    saved = {k: v.clone() for k, v in a.state().items()}
    other.load_state_dict(one.state_dict())
    b = learner(other, ALGORITHMS["sft"], optim=optim)
    b.load_state(saved)
    for step in range(3, 5):
        assert a.update(batch, step) == b.update(batch, step)
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(v, b.state()[k]) for k, v in a.state().items())


def test_state_of_another_dtype():
    """Wrong implementations: a KeyError; float32 training continued from weights rounded to bfloat16."""
    exact = learner(decoder(dtype=torch.bfloat16), ALGORITHMS["sft"])
    with torch.no_grad():
        exact.weights.masters[0] += 1e-6
    wide = learner(decoder(), ALGORITHMS["sft"])
    wide.load_state(exact.state())
    assert torch.equal(wide.weights.masters[0], exact.weights.masters[0])
    assert wide.weights.masters[0] is wide.weights.weights[0]
    with pytest.raises(
        UserError, match=r"--dtype: .* in float32 throughout, not torch.bfloat16; resume with --dtype float32"
    ):
        exact.load_state(wide.state())


def test_reference_log_probs():
    """Wrong implementation: log-probs of a token's neighbour, at temperature 1, or in the order of the
    micro-batches.
    """
    model, other = decoder(), decoder(seed=1)
    batch = make_batch("grpo+kl+entropy", model)
    assert TEMPERATURE != 1
    own = batch_logp(model, batch, micro_tokens=17, temperature=TEMPERATURE)
    assert torch.allclose(own, batch.old_logp, atol=1e-4)
    theirs = batch_logp(other, batch, micro_tokens=10**6, temperature=TEMPERATURE)
    assert (theirs - own)[batch.mask].abs().max() > 0.1
    empty = batch.select([])
    assert batch_logp(other, empty, micro_tokens=10**6, temperature=TEMPERATURE).numel() == 0


def test_the_gradients_of_all_processes_are_summed():
    """Wrong implementation: each process steps on its own."""

    class Two(World):
        def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
            for p in parameters:
                p.grad = 2 * p.grad

    norms = []
    for world in (World(), Two()):
        model = decoder()
        trained = learner(model, ALGORITHMS["grpo"], world=world)
        norms.append(trained.update(make_batch("grpo", model), 0)["grad_norm"])
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-6) and norms[0] > 0
