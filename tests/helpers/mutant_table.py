"""The table of planted faults: see tests/mutants.py.  Those of the kernels are in mutant_kernels.py."""

from __future__ import annotations

from mutant import rows_of
from mutant_kernels import KERNELS

SAMPLER = [
    *rows_of(
        "fastrl/sampler/state.py",
        "sampler/test_engine.py sampler/test_engine_edges.py sampler/test_sampler.py",
        ("return (max_length - 2) // page + 1", "return (max_length - 2) // page", "a page too few"),
        ("(~alive).to(torch.int8)", "alive.to(torch.int8)", "compacting moves ended rows to the front"),
        ("[live, free - needed, ", "[live, free, ", "pages that live rows will need are given away"),
        ("self.stops.fill_(-1)", "pass", "stop tokens of the call before stay"),
    ),
    *rows_of(
        "fastrl/sampler/queue.py",
        "sampler/test_engine.py sampler/test_engine_edges.py sampler/test_sampler.py",
        ("return (len(self.prompt) - 1) // page", "return len(self.prompt) // page", "a full page is shared"),
        ("cost += full + 1", "cost += full", "the partly filled page of a prompt is not counted"),
        ("inherits = group.waiting == 1", "inherits = False", "the last sample copies, and a page leaks"),
    ),
    *rows_of(
        "fastrl/sampler/admit.py",
        "sampler/test_engine.py sampler/test_sampler.py sampler/test_engine_edges.py",
        ("end = len(group.prompt) - 1", "end = len(group.prompt) - 2", "the last copied key is left out"),
        (
            "prompt_length - 1, request.length - 1",
            "prompt_length, request.length - 1",
            "a carried key is lost",
        ),
        ("records.tokens[seq, length - 1]", "records.tokens[seq, length - 2]", "the token before the newest"),
        ("inherits[:, None] > 0, 0, tables", "inherits[:, None] > 0, tables, 0", "users of pages swapped"),
    ),
    *rows_of(
        "fastrl/sampler/prefill.py",
        "sampler/test_engine.py sampler/test_sampler.py sampler/test_exact.py",
        ("(position + 1).to(torch.int32)", "position.to(torch.int32)", "a token does not see itself"),
        ("min(start + budget, s.end)", "min(start + budget, s.end - 1)", "a chunk without its last token"),
    ),
    *rows_of(
        "fastrl/sampler/cache.py",
        "sampler/test_engine.py sampler/test_engine_edges.py",
        ("free[top - 1 - torch.arange", "free[top - torch.arange", "a page from past the stack's end"),
        ("torch.where(freed, top + rank - 1,", "torch.where(freed, top + rank,", "a freed page one too high"),
    ),
    *rows_of(
        "fastrl/sampler/jobs.py",
        "sampler/test_sampler.py sampler/test_episodes.py methods/test_partial.py",
        (
            "drawn = drawn_before[end] - drawn_before[start]",
            "drawn = end - start - prompt_lengths[i]",
            "observations of carried sequences count as drawn (part B)",
        ),
        ("if job.drawn >= job.budget or", "if job.drawn > job.budget or", "one token above the budget"),
        ("state.key[:S] = keys", "state.key[:S] = keys[:1]", "one key of the noise for all sequences"),
    ),
    *rows_of(
        "fastrl/sampler/sampler.py",
        "sampler/test_sampler.py sampler/test_episodes.py",
        ("torch.where(chosen, version.long(), -1)", "version.long()", "prompt tokens have a version"),
        ("first = offset + i * params.n", "first = i * params.n", "the same noise in every call"),
        ("len(job.prompt) + job.budget)", "job.budget)", "the prompt counts as completion"),
        ("engine.unfinished() <= tail", "engine.unfinished() < tail", "the tail begins a sequence late"),
        ("packed[start + len(job.prompt) : end]", "packed[start:end]", "the prompt is part of the text"),
    ),
    *rows_of(
        "fastrl/sampler/turns.py",
        "sampler/test_engine.py",
        (
            "return length < self.until and",
            "return length <= self.until and",
            "an answer without room for a turn",
        ),
        (
            "held = [(reply.length - 2) // page",
            "held = [(reply.length - 1) // page",
            "a page is not allocated",
        ),
        ("self.done.add(one.seq)", "pass", "an episode that is over is asked again"),
    ),
]

LEARNER = [
    *rows_of(
        "fastrl/train/learner.py",
        "train/test_learner.py",
        ('if metrics["num_tokens"] == 0:', 'if metrics["num_tokens"] < 0:', "a step on momentum alone"),
        ("self.weights.publish()", "pass", "the sampler keeps the old weights"),
        (
            "world.sum_gradients(weights.masters)",
            "pass",
            "gradients of one process",
        ),
    ),
    *rows_of(
        "fastrl/train/optimizer.py",
        "train/test_learner.py",
        ("optim.lr * (step + 1) / optim.warmup", "optim.lr * step / optim.warmup", "warm-up begins at 0"),
        ("/ max(1, steps - optim.warmup)", "/ max(1, steps)", "the decay does not reach its floor"),
        ('"weight_decay": 0.0', '"weight_decay": optim.weight_decay', "vectors decay"),
        ("+ 1e-6)).clamp(max=1.0)", "+ 1e-6))", "small gradients are scaled up"),
        (
            "for p in (*self.masters, *self.weights):",
            "for p in self.weights:",
            "gradients of masters pile up",
        ),
        ("weight.copy_(master)", "master.copy_(weight)", "the update is thrown away"),
        ("known.add_(weight.grad)", "weight.grad.float()", "only the last micro-batch counts"),
        ("master.copy_(exact)", "pass", "a resumed run forgets its masters"),
        ("if not math.isfinite(value):", "if math.isinf(value):", "NaN is stepped on"),
    ),
    *rows_of(
        "fastrl/train/weighting.py",
        "train/test_denominators.py",
        ("float((known > 0).sum())", "float(known.numel())", "empty samples in the denominator (part B)"),
    ),
    *rows_of(
        "fastrl/train/weighting.py",
        "methods/test_sft.py",
        ("before / after if after", "after / before if after", "weights scaled the wrong way"),
    ),
    *rows_of(
        "fastrl/train/weighting.py",
        "methods/test_onpolicy.py algorithms/test_presets.py methods/test_rollouts.py",
        (
            "old_logp=logp, sampler_logp",
            "old_logp=batch.old_logp, sampler_logp",
            "the recorded log-prob stays old",
        ),
    ),
    *rows_of(
        "fastrl/train/objective.py",
        "train/test_denominators.py train/test_learner.py",
        ("micro.tokens[rows + 1]", "micro.tokens[rows]", "each token predicts itself"),
        ("places[rows + 1]", "places[rows]", "log-probs one place early"),
        ("        level=algorithm.level,\n", "", "a sequence's ratio from a part of it"),
        (' + merged["clip_cap"]', "", "clip_region without the cap (part B)"),
        ("mask=live,\n", "", "prompt tokens are trained on"),
    ),
]

ALGORITHMS = [
    *rows_of(
        "fastrl/algorithms/aggregate.py",
        "algorithms/test_algorithms.py algorithms/test_family.py",
        (
            "(length.clamp_min(1) * max(totals.samples, 1))",
            "max(totals.samples, 1)",
            "long samples weigh more",
        ),
        ("1 / (max(totals.samples, 1) * totals.max_length)", "1 / max(totals.tokens, 1)", "a length bias"),
    ),
    *rows_of(
        "fastrl/algorithms/correction.py",
        "algorithms/test_corrections.py algorithms/test_presets.py train/test_learner.py",
        ("& (w <= high), w, 0)", "& (w < high), w, 0)", "the upper bound itself is cut (part B)"),
        ("token.clamp(max=2.0)", "token", "the geometric mask without its cap (part B)"),
        (
            "bounded(trainer - tokens.old_logp)",
            "bounded(tokens.old_logp - trainer)",
            "the weight upside down",
        ),
        ("torch.expm1(bounded(s)) - s", "torch.expm1(-bounded(s)) + s", "the other KL in the log"),
    ),
    *rows_of(
        "fastrl/algorithms/prepare.py",
        "algorithms/test_family.py algorithms/test_algorithms.py algorithms/test_presets.py",
        (
            'math.log1p(-surrogate.params["low"])',
            '-math.log1p(surrogate.params["low"])',
            "another lower bound",
        ),
        ("(rate + k * log_w - rate", "(k * log_w - rate", "VESPO without its constant"),
        ("& (drift > threshold)", "& (drift < threshold)", "fresh sequences are dropped"),
    ),
    *rows_of(
        "fastrl/algorithms/schedule.py",
        "algorithms/test_hybrid.py",
        ("max(steps - warmup, 1)", "max(steps, 1)", "the fall forgets the rise"),
        ("peak * step / warmup", "peak * (step + 1) / warmup", "the rise a step early"),
    ),
    *rows_of(
        "fastrl/algorithms/advantage.py",
        "algorithms/test_algorithms.py algorithms/test_peers.py "
        "algorithms/test_family.py algorithms/test_group_preference.py",
        ("(squares / (n - ddof) + 1e-8).sqrt()", "(squares / (n - ddof)).sqrt() + 1e-8", "epsilon outside"),
        ("place >= k_of - 2", "place > k_of - 2", "the best of the others is never the least place"),
        ("n = (count - 1).clamp(min=1)", "n = count.clamp(min=1)", "the sample is one of the others"),
        ("/ counted.count_nonzero().clamp(min=1)", "/ reward.numel()", "GPG without its factor"),
    ),
    *rows_of(
        "fastrl/algorithms/advantage.py",
        "rewards/test_implicit.py",
        ("(squares / (n - 1).clamp(min=1)).sqrt()", "(squares / n.clamp(min=1)).sqrt()", "biased variance"),
    ),
    *rows_of(
        "fastrl/algorithms/ppo.py",
        "algorithms/test_ppo.py",
        ("torch.maximum(free, held)", "torch.minimum(free, held)", "the value clip helps"),
        ("squares / max(n - 1, 1) + 1e-8", "squares / max(n, 1) + 1e-8", "biased variance"),
        (
            "live_ends[1:][present].long() - 1",
            "live_ends[:-1][present].long()",
            "the score at the first token",
        ),
        ("error * completions / self.horizon", "error / self.horizon", "the KL's weight adapts too slowly"),
        ("-kl_coef * kl.to", "kl_coef * kl.to", "the KL is rewarded"),
    ),
    *rows_of(
        "fastrl/algorithms/preference_rules.py",
        "algorithms/test_preference.py algorithms/test_preference_peers.py",
        (
            "- label_smoothing * F.logsigmoid(-x)",
            "- label_smoothing * F.logsigmoid(x)",
            "flipped labels vanish",
        ),
        ("1 / (2 * beta)).square", "1 / beta).square", "IPO's target twice as far"),
        ("x - (-torch.expm1(x)).log()", "x", "log-probs for odds"),
        (
            "desirable_weight * torch.sigmoid(-x), undesirable_weight * torch.sigmoid(x)",
            "desirable_weight * torch.sigmoid(x), undesirable_weight * torch.sigmoid(-x)",
            "good and bad swapped",
        ),
        ("penalty * F.relu(-c)", "penalty * F.relu(c)", "the penalty of better completions"),
    ),
    *rows_of(
        "fastrl/algorithms/reward.py",
        "algorithms/test_reward_losses.py",
        ("judged.gaps() - judged.margin[", "judged.gaps() + judged.margin[", "the margin is given"),
        ("behind = -judged.gaps()", "behind = judged.gaps()", "the ranking reversed"),
        ("(2 * total / count).square()", "(total / count).square()", "centering of the half"),
        ("target[:, :, None] > target[:, None, :]", "target[:, :, None] >= target[:, None, :]", "ties win"),
    ),
]

METHODS = [
    *rows_of(
        "fastrl/methods/grpo/groups.py",
        "methods/test_onpolicy.py methods/test_rollouts.py",
        (".amax(1) > table", ".amax(1) >= table", "equal rewards are a signal"),
    ),
    *rows_of(
        "fastrl/methods/grpo/shaping.py",
        "train/test_denominators.py train/test_learner.py",
        (
            "algorithm.kl_coef or algorithm.entropy_coef else",
            "algorithm.kl_coef else",
            "the entropy bonus alone (part B)",
        ),
        ("(host.advantage[first] != 0)", "(host.advantage[first] > 0)", "samples below the mean are dropped"),
    ),
    *rows_of(
        "fastrl/methods/grpo/refill.py",
        "methods/test_onpolicy.py methods/test_rollouts.py",
        ("(prompts - kept) * drawn / max(kept, 1)", "prompts - kept", "rounds that ask for too few"),
        ("len(drawn) <= rounds", "len(drawn) < rounds", "a round too few"),
    ),
    *rows_of(
        "fastrl/methods/grpo/rollouts.py",
        "methods/test_onpolicy.py methods/test_rollouts.py methods/test_partial.py",
        ('reason != "length"', 'reason == "length"', "the finished completions are left out"),
        ("self.groups.load_state(state)", "pass", "a resumed run forgets unfinished groups"),
        ("place % count == k", "place // count == k", "minibatches by another rule"),
    ),
    *rows_of(
        "fastrl/methods/grpo/partial.py",
        "methods/test_partial.py methods/test_onpolicy.py",
        ("first += len(pending.unfinished)", "first += self.group", "the wrong sequences are resumed"),
    ),
    *rows_of(
        "fastrl/methods/sft/batches.py",
        "methods/test_sft.py",
        ("step * self.count, self.count", "step, self.count", "demonstrations come again and again"),
    ),
    *rows_of(
        "fastrl/search/choose.py",
        "search/test_choose.py",
        ("math.comb(through, k) - math.comb(below, k)", "math.comb(through, k)", "worse answers count again"),
        ("math.comb(n - right, k) / math.comb(n, k)", "(1 - right / n) ** k", "pass@k with a bias"),
        (
            "return -math.inf if math.isnan(reward)",
            "return 0.0 if math.isnan(reward)",
            "no reward beats a bad one",
        ),
    ),
]

REWARDS = [
    *rows_of(
        "fastrl/rewards/functions.py",
        "rewards/test_functions.py",
        (" if not math.isnan(v)]", "]", "a function that abstains silences the others"),
        ("for f, v in zip(factors, values", "for f, v in zip(factors[::-1], values", "weights in reverse"),
        (
            "[row.get(name) for row in rows or ()]",
            "[row.get(name) for row in (rows or ())[:1]]",
            "one row for all",
        ),
    ),
    *rows_of(
        "fastrl/rewards/implicit.py",
        "rewards/test_implicit.py",
        (
            "sequence_logp(policy, samples) - sequence_logp(reference, samples)",
            "sequence_logp(reference, samples) - sequence_logp(policy, samples)",
            "sides swapped",
        ),
        ("(beta * margin)", "(margin)", "beta is ignored"),
    ),
]

DATA = [
    *rows_of(
        "fastrl/data/encode.py",
        "data/test_rows.py data/test_pairs.py methods/test_sft.py",
        ("    mask[0] = False\n", "", "the first token counts, which nothing predicts"),
        ("[True] * end + [False] * (len(ids) - end)", "[True] * len(ids)", "what follows the end is trained"),
        ("i >= max(first, 1)", "i >= first", "an opening message is trained"),
        ('if row.kind == "text" and tokens[-1] != eos:', 'if row.kind == "text":', "two end tokens"),
    ),
    *rows_of(
        "fastrl/batch/pack.py",
        "batch/test_pack.py train/test_learner.py",
        ("room[spot] -= length", "room[spot] -= length - 1", "micro-batches above the budget"),
        ("for k in range(unit)]", "for k in range(1)]", "the second of a pair is lost"),
    ),
    *rows_of(
        "fastrl/batch/prefix.py",
        "batch/test_prefix.py",
        (
            "prefix = counted == at_start[sequence]",
            "prefix = counted <= at_start[sequence] + 1",
            "a loss token is shared",
        ),
        (
            "torch.where(prefix, number[in_leader], number)",
            "number",
            "prefixes of followers are other tokens",
        ),
    ),
]

CHECKPOINT = [
    *rows_of(
        "fastrl/run/checkpoint.py",
        "run/test_checkpoint.py",
        ("kept[:-keep] if keep", "kept[: -keep - 1] if keep", "one checkpoint too many is kept"),
        ("if actual != size:", "if actual < size:", "a file that grew is taken"),
        ("if path != newest and _is_temporary(path)]", "if _is_temporary(path)]", "the newest is removed"),
        ("v.detach().contiguous().cpu()", "v.detach().half().cpu()", "the state is rounded"),
        (
            "            remove_partial(run)\n        raise",
            "            pass\n        raise",
            "rubbish on a full disk",
        ),
    ),
    *rows_of(
        "fastrl/model/folder.py",
        "run/test_checkpoint.py",
        ("found.append((int(match[1]), path))", "found.append((match[1], path))", "step 9 after step 10"),
    ),
]

CONFIG = [
    *rows_of(
        "fastrl/config/parse.py",
        "config/test_parse.py config/test_algorithm.py",
        ("if value is not None}", "if value}", "a row's option of 0 is ignored"),
        ('value = arg.partition("=")[2]', "value = arg", "--algorithm=NAME is not understood"),
        ("values |= contents.values", "values = contents.values | values", "the first file wins"),
    ),
    *rows_of(
        "fastrl/config/values.py",
        "config/test_parse.py config/test_algorithm.py",
        (
            "isinstance(value, int | str) and not isinstance(value, bool)",
            "isinstance(value, int | str)",
            "true is 1.0",
        ),
        (
            "if origin is None and type(value) is kind:",
            "if origin is None and isinstance(value, kind):",
            "true is 1",
        ),
    ),
    *rows_of(
        "fastrl/config/algorithm.py",
        "config/test_algorithm.py config/test_parse.py",
        (
            "and not declared.range.ok(value):",
            "and declared.range.ok(value) is None:",
            "ranges are not checked",
        ),
    ),
]

MUTANTS = (
    *SAMPLER,
    *LEARNER,
    *ALGORITHMS,
    *METHODS,
    *REWARDS,
    *DATA,
    *CHECKPOINT,
    *CONFIG,
    *KERNELS,
)
