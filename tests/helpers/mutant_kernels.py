"""Faults of the kernels: see tests/mutants.py."""

from __future__ import annotations

from mutant import rows_of

KERNELS = [
    *rows_of(
        "kernels/_chunks.py",
        "kernels/test_edges.py kernels/test_chunks.py",
        ("return budget // (", "return 1 + budget // (", "one row above logits_bytes (part B)"),
        ("min(most, max(most // 2, useful))", "min(most, useful)", "chunks of the least size"),
        ("sizes[-1] -= tiles * tile - N", "sizes[0] -= tiles * tile - N", "a ragged chunk comes first"),
    ),
    *rows_of(
        "kernels/surrogates.py",
        "kernels/test_surrogates.py kernels/test_edges.py",
        (
            "worse, better = advantage < 0, advantage > 0",
            "worse, better = advantage <= 0, advantage > 0",
            "the gate of A = 0 (part B)",
        ),
        ("torch.expm1(-bounded(e))", "torch.expm1(bounded(e))", "k3 upside down"),
        (
            "advantage * gamma * p / (p + gamma).square()",
            "advantage * p / (p + gamma).square()",
            "LUFFY's slope",
        ),
        ("r * (1 + e)", "r * e", "the slope of k1 in the ratio"),
        ("4 * s * (1 - s) * r * advantage", "4 * s * (1 - s) * advantage", "SAPO's slope without the ratio"),
        (
            "torch.where(advantage > 0, torch.full_like(r, pos), neg)",
            "torch.where(advantage >= 0, torch.full_like(r, pos), neg)",
            "the temperature at A = 0",
            "value and slope are multiplied by A, which is 0 there",
        ),
    ),
    *rows_of(
        "kernels/gae.py",
        "kernels/test_gae.py",
        ("torch.full_like(b, gamma * lam)", "torch.full_like(b, gamma)", "lambda is 1"),
        ("reward + gamma * next_value - value", "reward + next_value - value", "the next value undiscounted"),
        ("torch.where(t + 1 < end, a, 0)", "a", "advantages run over a sequence's end"),
    ),
    *rows_of(
        "kernels/_triton/gae.py",
        "kernels/test_gae_triton.py",
        ("inside & (t + 1 < end)", "inside & (t + 1 <= end)", "the next sequence's first token follows"),
        ("1 - lam,\n", "lam,\n", "the mix of rest and value"),
    ),
    *rows_of(
        "kernels/group_advantage.py",
        "kernels/test_group_advantage.py",
        (
            "(g.count - o.ddof)).sqrt() + o.eps",
            "(g.count - o.ddof) + o.eps).sqrt()",
            "epsilon inside the root",
        ),
        (
            "(g.reward - g.mean) / (g.count - 1)",
            "(g.reward - g.mean) / g.count",
            "the sample is one of the others",
        ),
        (" & (scored[1:] == scored[:-1])", "", "a reward of 0 ties with one that is missing"),
        (
            "return 2 * placed / (g.count - 1) - 1",
            "return 2 * placed / g.count - 1",
            "ranks that do not reach 1",
        ),
        ("((g.reward - g.high) / o.tau)", "(g.reward - g.high)", "the softmax without its temperature"),
    ),
    *rows_of(
        "kernels/sample.py",
        "kernels/test_edges.py kernels/test_sample.py",
        ("(before < limit)", "(before <= limit)", "the boundary of top-p (part B)"),
        ("keep = d >= _floor", "keep = d > _floor", "the least token that is kept is dropped"),
        ("torch.where(greedy, 0, at - kept.log())", "at - kept.log()", "greedy is certain"),
        ("math.log(min_p) if min_p", "min_p if min_p", "min-p without its logarithm"),
        (
            "if 0 < top_k < V:",
            "if 0 < top_k <= V:",
            "top-k of the whole vocabulary",
            "the floor is then the smallest logit, which keeps every token",
        ),
    ),
    *rows_of(
        "kernels/_triton/_race.py",
        "kernels/test_sample_triton.py",
        (
            "other = e_other * p < e * p_other",
            "other = e_other * p <= e * p_other",
            "the last of equals wins",
        ),
        ("cost == least, token, 2147483647), 0)", "cost == least, token, 0), 0)", "token 0 always wins"),
    ),
    *rows_of(
        "kernels/token_logp.py",
        "kernels/test_token_logp.py",
        ("log_s - (e * torch.where(e > 0, d, 0)).sum(-1) / s", "log_s - (e * d).sum(-1) / s", "0 times -inf"),
        (
            "log_p, 0) + entropy[:, None])",
            "log_p, 0) - entropy[:, None])",
            "the entropy's gradient has the wrong sign",
        ),
        ("(g / temperature[:, None]).to", "g.to", "the gradient without its temperature"),
        (
            "logp = torch.where(inside, at - log_s, torch.nan)",
            "logp = at - log_s",
            "a target outside is token 0",
        ),
    ),
    *rows_of(
        "kernels/_triton/token_logp.py",
        "kernels/test_token_logp_triton.py",
        ("ln - tl.fma(scaled, tau, -high) / tau", "ln", "log s relative to an m that is not stored"),
        ("share = tl.exp2((top - high) * k)", "share = tl.exp2(top - high)", "lanes add up in another base"),
        ("gh * (ln - h) - g)", "gh * (ln + h) - g)", "the entropy's gradient"),
        ("a + (top - high) * s), 0)", "a), 0)", "the entropy relative to each lane's own top"),
    ),
    *rows_of(
        "kernels/linear_logp.py",
        "kernels/test_linear_logp.py",
        ("(entropy[part], dentropy[part])", "(entropy[part], dlogp[part])", "the entropy's derivative"),
        (
            "dlogp[part], dh, logits, target[part], temperature[part]",
            "dlogp[part], dh, logits, target[part], temperature[:1].expand(len(x))",
            "one temperature for all",
        ),
        (
            "TokenStats(logp, h if entropy else None, m + log_s)",
            "TokenStats(logp, h if entropy else None, m)",
            "lse without the sum",
        ),
    ),
    *rows_of(
        "kernels/linear_cross_entropy.py",
        "kernels/test_linear_cross_entropy.py",
        ("count = live.numel() if", "count = hidden.shape[0] if", "ignored tokens in the mean"),
        ("loss + z_loss * (m + log_s) ** 2", "loss + z_loss * log_s ** 2", "the z-loss of a part of lse"),
        ("(1 + 2 * z_loss * (m + log_s))", "(1 + z_loss * (m + log_s))", "half the z-loss's gradient"),
        ("g -= smoothing / z.shape[1]", "g -= smoothing", "smoothing not shared by the vocabulary"),
        ("slope = tanh.square().neg_().add_(1)", "slope = tanh.neg().add_(1)", "the softcap's slope"),
    ),
    *rows_of(
        "kernels/linear_loss.py",
        "kernels/test_linear_loss.py kernels/test_linear_logp.py",
        (
            "at = live + at.start if isinstance(at, slice)",
            "at = live if isinstance(at, slice)",
            "rows of the first chunk",
        ),
        ("put_rows(self.lse, at, m + log_s)", "put_rows(self.lse, at, m)", "lse without the sum"),
        ("self.keep_all or (self.keep_last and", "True or (self.keep_last and", "logits above the budget"),
    ),
    *rows_of(
        "kernels/_head.py",
        "kernels/test_linear_loss.py kernels/test_linear_logp.py",
        ("self.bias += dlogits", "self.bias = dlogits", "the bias of the last chunk"),
        (
            "movers.split(_MOVED), strict=True",
            "movers.split(_MOVED)[::-1], strict=True",
            "rows that are moved are mixed up",
        ),
    ),
    *rows_of(
        "kernels/policy_loss.py",
        "kernels/test_policy_loss.py",
        ("slope + o.kl_coef * kl_slope", "slope + kl_slope", "the KL's gradient without its weight"),
        ("loss - o.entropy_coef * c.entropy", "loss + o.entropy_coef * c.entropy", "the entropy is punished"),
        ("(total / count.clamp(min=1))", "(total / count.max())", "means over the longest sequence"),
    ),
    *rows_of(
        "kernels/_contexts.py",
        "kernels/test_contexts.py",
        ("return inputs if functional() else ()", "return ()", "torch.func cannot differentiate the losses"),
        (
            "x.to(dtype) if _castable(x) else x for x in tensors)\n\n\ndef widened",
            "x for x in tensors)\n\n\ndef widened",
            "autocast is not followed",
        ),
        (" and x.dtype != torch.float64", "", "autocast lowers float64"),
        (
            "with torch.enable_grad(), _no_hooks():",
            "with torch.enable_grad():",
            "a checkpoint sees what an op saves",
        ),
    ),
    *rows_of(
        "kernels/_backend.py",
        "kernels/test_backend.py",
        (" or c._is_any_autocast_enabled()", "", "the shortcut under autocast"),
        ("if place.index >= max(present, 1):", "if place.index > max(present, 1):", "one GPU too many"),
        ("for name, ops in reversed(_asked):", "for name, ops in _asked:", "the outermost wish wins"),
    ),
    *rows_of(
        "kernels/rms_norm.py",
        "kernels/test_rms_norm.py",
        (
            ".mean(-1, keepdim=True).add_(eps).rsqrt_()",
            ".mean(-1, keepdim=True).rsqrt_().add_(eps)",
            "epsilon outside",
        ),
        ("return dx.add_(dh).to(h.dtype)", "return dx.to(h.dtype)", "the residual's gradient"),
        ("value=-1).mul_(r), dw", "value=1).mul_(r), dw", "the projection is added"),
    ),
    *rows_of(
        "kernels/swiglu.py",
        "kernels/test_swiglu.py",
        ("torch.add(s, dup - dup * s, out=dgate)", "torch.add(s, dup * s, out=dgate)", "the gate's slope"),
    ),
    *rows_of(
        "kernels/rope.py",
        "kernels/test_rope.py",
        ("addcmul_(b, sin, value=-sign)", "addcmul_(b, sin, value=sign)", "not a rotation"),
        (
            "norm_backward(dn.reshape(rows.shape), rows, weight, r)",
            "norm_backward(dn.reshape(rows.shape), rows, weight, r * r)",
            "the norm's gradient",
        ),
    ),
    *rows_of(
        "kernels/attention.py",
        "kernels/test_attention.py",
        (".triu_(first + 1)", ".triu_(first + 2)", "a query sees the next key"),
        ("_over_rows(ds, query, H // K).mul_(scale)", "_over_rows(ds, query, H // K)", "the scale of dk"),
        ("total.log_().add_(m)", "total.log_()", "lse without its maximum"),
    ),
    *rows_of(
        "kernels/decode_attention.py",
        "kernels/test_decode_attention.py",
        ("device=q.device) >= lengths[:, None]", "device=q.device) > lengths[:, None]", "a key past the end"),
        ("v.masked_fill_(beyond[:, :, None, None], 0)", "pass", "0 times NaN"),
    ),
    *rows_of(
        "kernels/advance.py",
        "kernels/test_advance.py",
        ("(rows.drawn >= rows.budget)", "(rows.drawn > rows.budget)", "a token above the budget"),
        (
            "needy = rows.alive & (newest % page == 0)",
            "needy = newest % page == 0",
            "rows that have ended take pages",
        ),
        (
            "torch.where(stopped, STOP, LENGTH)",
            "torch.where(stopped, LENGTH, STOP)",
            "stop and length swapped",
        ),
    ),
    *rows_of(
        "kernels/perturb.py",
        "kernels/test_perturb.py",
        ("(live & g.isfinite().all(1))", "(live)", "a gradient of NaN moves its token"),
        ("torch.where(length > radius, radius / length, 1)", "(radius / length)", "inside the ball, too"),
        (
            "torch.where((total > radius)[:, None], shrunk, delta)",
            "shrunk",
            "l1 inside the ball",
            "the threshold stays 0 there, so that shrunk is delta",
        ),
    ),
    *rows_of(
        "kernels/_verdicts/cache.py",
        "kernels/test_verdict_cache.py",
        ('"triton": version("triton"), ', "", "the key lacks Triton's version"),
        ("digest.update(file.read_bytes())", "pass", "the key lacks the sources"),
    ),
    *rows_of(
        "csrc/cpu/sample_rows.h",
        "kernels/test_edges.py",
        ("kMargin = 1 + 1e-5", "kMargin = 1 - 1e-3", "tokens that may win are left out of the race (part B)"),
    ),
    *rows_of(
        "csrc/cpu/token_logp_rows.h",
        "kernels/test_edges.py",
        ("(kExpLow > d ? F{} : e) * (slope", "e * (slope", "a gradient where exp underflows (part B)"),
    ),
]
