"""The checks that kernels must pass on a user's GPU: the kernels pass them in Triton's interpreter, and each
named wrong implementation fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_device import FAULTS

import fastrl.kernels.advance
import fastrl.kernels.decoder_layer
from fastrl import ops
from fastrl.kernels._registry import registered, unproven
from fastrl.kernels._verdicts.case import ROWS, SMALL, Case, Make, Widths, each_tensor, tensors
from fastrl.kernels._verdicts.checks import CHECKS
from fastrl.kernels._verdicts.judge import judge

assert fastrl.kernels.advance and fastrl.kernels.decoder_layer and ops  # which register the ops

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU"
)
TRITON = [(op, impl) for op, name, impl in unproven() if name == "triton"]
INSIDE = {"decoder_layer": {"forward"}}  # parts that a checked part calls
NARROW = ("token_logp", "rms_norm", "rope", "swiglu", "sample")
Parts = dict[str, Callable[..., Any]]


def make(dtype: torch.dtype = torch.float32, widths: Widths | None = None) -> Make:
    return Make(dtype, torch.device("cpu"), SMALL, widths or Widths())


def cases(op: str, dtype: torch.dtype = torch.float32, widths: Widths | None = None) -> Iterator[Case]:
    return CHECKS[op].cases(make(dtype, widths))


def failures(op: str, parts: Parts, dtype: torch.dtype = torch.float32) -> list[str]:
    """Why cases fail with these parts; the parts it lacks are the reference's."""
    reference = registered(op)["reference"].parts
    found = []
    for case in cases(op, dtype):
        outcome = judge(case, reference | parts, reference, SMALL)
        found += [f"{case.part} {case.name}: {outcome.reason}"] if outcome.reason else []
    return found


# --- every kernel -----------------------------------------------------------------------------------
def test_every_kernel_has_a_check_of_every_part():
    """Wrong: a new kernel, or a new part of one, that nothing checks: it would never be chosen, or be chosen
    unchecked.
    """
    for op, name, impl in unproven():
        assert op in CHECKS, f"{op} has a {name} kernel and no check in kernels/_verdicts"
        checked = {case.part for case in cases(op)} | INSIDE.get(op, set())
        assert set(impl.parts) <= checked, op


@interpreted
@pytest.mark.parametrize("op, impl", TRITON, ids=[op for op, _ in TRITON])
def test_the_kernels_pass_in_fp32(op, impl):
    dtype = torch.float32
    assert failures(op, impl.parts, dtype) == []


@interpreted
@pytest.mark.parametrize("op", [*NARROW, pytest.param("linear_cross_entropy", marks=pytest.mark.slow)])
def test_the_kernels_pass_in_bf16(op):
    assert failures(op, registered(op)["triton"].parts, torch.bfloat16) == []


@pytest.mark.parametrize("op", CHECKS)
def test_the_cases_take_the_widths_of_a_model(op):
    """Wrong: a width of the caller's that no case has."""
    given = Widths(D=24, F=40, H=6, K=2, E=12, page=8, V=321)
    own = {"V": 321, "D": 24, "F": 40, "E": 12, "page": 8}
    seen = " ".join(case.name for case in cases(op, widths=given))
    takes = [n for n in own if f" {n}=" in f" {seen}"]
    assert all(f"{n}={own[n]}" in seen for n in takes), (takes, seen[:200])


@pytest.mark.parametrize("op", [op for op in CHECKS if CHECKS[op].few])
def test_a_first_launch_takes_at_most_four_rows(op):
    """Wrong: a cut that leaves a row argument whole, so that the parts of a call no longer fit together; a
    variant that depends on values.
    """
    reference = registered(op)["reference"].parts
    for case in cases(op):
        few = CHECKS[op].few.get(case.part)
        if few is None:
            continue
        cut = few.cut(case.args)
        assert hash(few.variant(*cut)) is not None
        sizes = [a.numel() <= b.numel() for a, b in zip(tensors(cut), tensors(case.args), strict=True)]
        assert all(sizes) or op in ("rope", "decode_attention")  # whose caches are made anew
        args = each_tensor(cut, torch.clone)
        reference[case.part](*args)
        if op not in ("group_advantage", "decode_attention"):
            assert tensors(cut)[0].shape[0] <= max(ROWS, 1)


# --- wrong implementations --------------------------------------------------------------------------
def parts_of(op: str) -> Parts:
    return registered(op)["reference"].parts


def entropy_sign(logits, target, temperature, entropy):
    logp, h, m, log_s = parts_of("token_logp")["forward"](logits, target, temperature, entropy)
    return logp, -h, m, log_s


def no_temperature(logits, target, temperature, entropy):
    return parts_of("token_logp")["forward"](logits, target, torch.ones_like(temperature), entropy)


def minus_lse(logits, target, temperature, entropy):
    """z - logsumexp z, which loses digits under an offset."""
    logp, h, m, log_s = parts_of("token_logp")["forward"](logits, target, temperature, entropy)
    z = logits.float() / temperature[:, None]
    at = z.gather(1, target.clamp(min=0)[:, None]).squeeze(1) - z.logsumexp(-1)
    return torch.where(logp.isnan(), logp, at), h, m, log_s


def no_entropy_gradient(dlogp, dentropy, *rest):
    return parts_of("token_logp")["backward"](dlogp, torch.zeros_like(dentropy), *rest)


def target_outside_counts(logits, target, temperature, entropy):
    return parts_of("token_logp")["forward"](logits, target.clamp(min=0), temperature, entropy)


def not_in_place(out, dlogp, dentropy, logits, *rest):
    """Right, unless `out` lies over the logits, which it then has overwritten with zeros."""
    out.zero_()
    return parts_of("token_logp")["backward_into"](out, dlogp, dentropy, logits, *rest)


def no_bias(hidden, weight, bias, *rest):
    return parts_of("linear_logp")["forward_chunks"](hidden, weight, bias[:0], *rest)


def no_softcap(logits, target, smoothing, softcap, z_loss):
    return parts_of("linear_cross_entropy")["forward"](logits, target, smoothing, 0.0, z_loss)


def no_z_loss(logits, target, smoothing, softcap, z_loss):
    return parts_of("linear_cross_entropy")["forward"](logits, target, smoothing, softcap, 0.0)


def position_ignored(logits, seed, sequence, position, *rest):
    return parts_of("sample")["forward"](logits, seed, sequence, position * 0, *rest)


def no_top_p(logits, seed, sequence, position, temperature, top_k, top_p, min_p):
    return parts_of("sample")["forward"](logits, seed, sequence, position, temperature, top_k, 1.0, min_p)


def eps_ignored(x, weight, eps):
    return parts_of("rms_norm")["forward"](x, weight, 0.01)


def residual_not_added(x, residual, weight, eps):
    return parts_of("rms_norm")["add"](x, residual * 0, weight, eps)


def weight_gradient_of_one_row(dy, x, weight, r):
    dx, _ = parts_of("rms_norm")["backward"](dy, x, weight, r)
    return dx, parts_of("rms_norm")["backward"](dy[:1], x[:1], weight, r[:1])[1]


def turned_back(q, k, positions, cos, sin, *rest):
    return parts_of("rope")["forward"](q, k, positions, cos, -sin, *rest)


def keys_not_normed(q, k, positions, cos, sin, q_norm, k_norm, eps):
    return parts_of("rope")["forward"](q, k, positions, cos, sin, q_norm, k_norm[:0], eps)


def stored_elsewhere(*args):
    return parts_of("rope")["store"](*args[:-1], (args[-1] + 1) % args[9].shape[0])


def gate_and_up_swapped(gate_up):
    return parts_of("swiglu")["forward"](torch.cat(gate_up.chunk(2, -1)[::-1], -1))


def sigmoid_alone(dy, gate_up):
    gate, up = gate_up.chunk(2, -1)
    return torch.cat([dy * up * gate.sigmoid(), dy * torch.nn.functional.silu(gate)], -1)


def bias_left_out(x, weight, bias):
    return parts_of("linear")["forward"](x, weight, bias[:0])


def rounded_operands(out, x, weight, bias):
    return parts_of("linear")["into"](out, x.bfloat16().to(x.dtype), weight, bias)


def one_key_more(q, k, v, table, lengths, *rest):
    longer = (lengths + 1).clamp(max=table.shape[1] * k.shape[1])
    return parts_of("decode_attention")["forward"](q, k.nan_to_num(), v.nan_to_num(), table, longer, *rest)


def no_scale(*args):
    return parts_of("decode_attention")["forward"](*args[:-1], 1.0)


def layer_without_residual(x, stream, *rest):
    return parts_of("decoder_layer")["summed"](x, torch.zeros_like(stream), *rest)


def mask_ignored(reward, value, cu_seqlens, mask, gamma, lam):
    return parts_of("gae")["forward"](
        reward.nan_to_num(), value.nan_to_num(), cu_seqlens, mask[:0], gamma, lam
    )


def ends_ignored(reward, value, cu_seqlens, mask, gamma, lam):
    whole = torch.stack([cu_seqlens[0], cu_seqlens[-1]])
    return parts_of("gae")["forward"](reward, value, whole, mask, gamma, lam)


def biased_std(*args):
    return parts_of("group_advantage")["forward"](*args[:7], False, args[8])


def unscored_as_zero(reward, *rest):
    return parts_of("group_advantage")["forward"](reward.nan_to_num(), *rest)


def no_correction(c, o):
    return parts_of("policy_loss")["forward"](c._replace(correction=c.correction[:0]), o)


def no_mask(c, o):
    clean = c._make([x.nan_to_num() if x.is_floating_point() else x for x in c])
    return parts_of("policy_loss")["forward"](clean._replace(mask=c.mask[:0]), o)


def not_projected(delta, grad, ends, mask, step, radius, *rest):
    return parts_of("perturb_step")["forward"](delta, grad, ends, mask, step, radius * 10, *rest)


def another_seed(*args):
    return parts_of("perturb_init")["forward"](*args[:-1], args[-1] + 1)


def stops_ignored(draw, rows, records, pages, stops, *rest):
    return parts_of("advance")["forward"](draw, rows, records, pages, stops - 1000, *rest)


def page_too_late(draw, rows, records, pages, stops, version, total, page):
    return parts_of("advance")["forward"](draw, rows, records, pages, stops, version, total, page + 1)


WRONG: dict[str, dict[str, tuple[Callable[..., Any], ...]]] = {  # op -> part -> wrong implementations of it
    "token_logp": {
        "forward": (entropy_sign, no_temperature, minus_lse, target_outside_counts),
        "backward": (no_entropy_gradient,),
        "backward_into": (not_in_place,),
    },
    "linear_logp": {"forward_chunks": (no_bias,)},
    "linear_cross_entropy": {"forward": (no_softcap, no_z_loss)},
    "sample": {"forward": (position_ignored, no_top_p)},
    "rms_norm": {
        "forward": (eps_ignored,),
        "add": (residual_not_added,),
        "backward": (weight_gradient_of_one_row,),
    },
    "rope": {"forward": (turned_back, keys_not_normed), "store": (stored_elsewhere,)},
    "swiglu": {"forward": (gate_and_up_swapped,), "backward": (sigmoid_alone,)},
    "linear": {"forward": (bias_left_out,), "into": (rounded_operands,)},
    "decode_attention": {"forward": (one_key_more, no_scale)},
    "decoder_layer": {"summed": (layer_without_residual,)},
    "gae": {"forward": (mask_ignored, ends_ignored)},
    "group_advantage": {"forward": (biased_std, unscored_as_zero)},
    "policy_loss": {"forward": (no_correction, no_mask)},
    "perturb_step": {"forward": (not_projected,)},
    "perturb_init": {"forward": (another_seed,)},
    "advance": {"forward": (stops_ignored, page_too_late)},
}
PLANTED = [(op, part, f) for op, parts in WRONG.items() for part, wrong in parts.items() for f in wrong]


@pytest.mark.parametrize("op, part, wrong", PLANTED, ids=[f"{op}-{f.__name__}" for op, _, f in PLANTED])
def test_a_wrong_implementation_fails(op, part, wrong):
    assert any(line.startswith(f"{part} ") for line in failures(op, {part: wrong}))


@pytest.mark.parametrize("op", CHECKS)
def test_the_reference_passes_its_own_check(op):
    """Wrong: a budget, or a red zone, that nothing can keep; and a wrong implementation for every op."""
    assert failures(op, {}) == []
    assert op in WRONG


@pytest.mark.parametrize(
    "fault, said",
    [
        ("wrong_value", "against float64"),
        ("out_of_bounds", "writes outside its tensors"),
        ("uneven", "gives other bits"),
    ],
)
def test_a_fault_is_named(fault, said):
    """Wrong: memory that ends where an output does, a repetition that is not compared."""

    def run(x):
        y = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype)  # as a launcher allocates
        return y.copy_(parts_of("swiglu")["forward"](x))

    broken = {"forward": FAULTS[fault](run)}
    assert any(said in line for line in failures("swiglu", broken))


def test_a_changed_input_is_named():
    def spoils(x):
        y = parts_of("swiglu")["forward"](x)
        x.view(-1)[0] = 1
        return y

    assert any("changes an input" in line for line in failures("swiglu", {"forward": spoils}))


def test_what_is_not_written_is_seen():
    """Wrong: outputs that happen to hold what an earlier call left there."""

    def lazy(x):
        y = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype)
        y[:, 1:] = parts_of("swiglu")["forward"](x)[:, 1:]
        return y

    assert any("NaN" in line for line in failures("swiglu", {"forward": lazy}))
