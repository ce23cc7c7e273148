"""Policy and critic in training: batches with values, gradients of both, splits, checkpoints, and that it
learns.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import actor_critic as restated
import pytest
import torch
from actor_critic import (
    algorithm_of,
    batch_of,
    critic_of,
    gradients,
    learner,
    pad,
    policy_of,
    ppo,
    row,
    source,
)
from runs import TEMPERATURE, assert_same_run, decoder, drift, lines, relative, state, straight_and_resumed
from support import tiny_config

import fastrl.trainer
from fastrl.bench.studies import demo
from fastrl.config import Eval, Optim, Ppo, Sft
from fastrl.errors import UserError
from fastrl.methods.ppo.learner import CRITICS
from fastrl.methods.ppo.objective import ActorCriticBatch
from fastrl.model.critic import Critic
from fastrl.model.decoder import Decoder
from fastrl.report.panels import filled_panels
from fastrl.run import checkpoint

KINDS = tuple(CRITICS)
SPLIT = {"minibatches": 2, "epochs": 2}


@pytest.fixture
def no_report(monkeypatch):
    """Drawing the plots takes longer than these runs."""
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)


def hidden_of(model, batch) -> torch.Tensor:
    """(S, L, D) hidden states of each sequence by itself."""
    ends = batch.cu_seqlens.tolist()
    each = [model(batch.tokens[a:b]) for a, b in itertools.pairwise(ends)]
    return torch.nn.utils.rnn.pad_sequence(each, batch_first=True)


def parts(made):
    """The critic's own hidden states and its head."""
    if made.critic is None:
        return policy_of(made), made.head
    return critic_of(made).body, critic_of(made).head


def masters(made) -> list[torch.Tensor]:
    """The policy's and its critic's."""
    return [*made.policy.weights.masters, *made.critic.weights.masters]


def values(made, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Values before each token (S, L), and after the last (S,)."""
    body, head = parts(made)
    after = hidden_of(body, batch).double() @ head.weight.double() + head.bias.double()
    before = torch.cat([after[:, :1] * 0, after[:, :-1]], 1)
    last = after.gather(1, batch.cu_seqlens.diff().long()[:, None] - 1).squeeze(1)
    return before, last


# --- the batch --------------------------------------------------------------------------------------
@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("critic", KINDS)
def test_the_batch_is_that_of_the_equations(critic, bootstrap):
    """Wrong implementations: a value read after its token; the value of the last token for that of the last
    state; the penalty, or the bootstrap, of completions that ended; a bootstrap in what is reported as
    reward; KL of the trained policy.
    """
    made = learner(decoder(eos_token_id=[3, 4, 5]), row(critic=critic, gamma=0.9, reward_kl_coef=0.1), 20)
    it = source(made, scores=range(12), bootstrap=bootstrap, missing_eos_penalty=0.75)
    step = it.collect(0, 0)
    batch = step.batches[0].tokens
    draw = it.rollouts.groups.sample_round(0, 0, 3, 0)
    cut = torch.tensor([r != "stop" for r in draw.rollouts.finish_reason])
    assert 0 < cut.sum() < 12
    cu, mask = batch.cu_seqlens, pad(batch.mask, batch.cu_seqlens).bool()
    before, last = values(made, batch)
    e = pad(batch.old_logp, cu) - pad(batch.ref_logp, cu)
    reward = torch.where(mask, -0.1 * e, 0)
    score = draw.reward.double() - 0.75 * cut
    final = mask.double().cumsum(1).argmax(1)
    reward[torch.arange(12), final] += score
    told = reward.sum(1).mean().item()
    reward[torch.arange(12), final] += 0.9 * last * cut * bootstrap
    A, R = restated.gae(reward, before, mask, 0.9, 0.95)
    for ours, theirs in (
        (batch.value, torch.where(mask, before, 0)),
        (batch.returns, R),
        (batch.advantage, restated.whitened(A, mask)),
    ):
        torch.testing.assert_close(pad(ours, cu), theirs.detach(), rtol=1e-4, atol=1e-5)
    m = step.metrics
    assert m["objective/scores"] == pytest.approx(score.mean().item()) and m[
        "objective/rlhf_reward"
    ] == pytest.approx(told, rel=1e-4)
    assert m["objective/kl"] == pytest.approx(torch.where(mask, e, 0).sum(1).mean().item(), rel=1e-4)
    returns, gap = R[mask], (R - before)[mask].detach()
    assert m["critic/vf_explained_var"] == pytest.approx(1 - (gap.var() / returns.var()).item(), rel=1e-3)
    assert m["critic/returns/max"] == pytest.approx(returns.max().item(), rel=1e-4)
    assert m["critic/values/min"] == pytest.approx(before[mask].min().item(), rel=1e-4)


def test_a_completion_without_a_reward_leaves_the_loss():
    """Wrong implementations: 0 for it, which the critic would learn; NaN that whitening spreads; its tokens
    in the denominators.
    """
    made = learner(decoder(), row())
    scores = [math.nan if i % 4 == 1 else float(i % 3) for i in range(12)]
    it = batch_of(made, scores=scores)
    batch = it.tokens
    assert (batch.live_ends.diff() > 0).tolist() == [i % 4 != 1 for i in range(12)]
    assert batch.weight[batch.mask].sum().item() == pytest.approx(1) and batch.advantage.isfinite().all()
    assert math.isfinite(made.update(it, 0)["vf_loss"])


def test_samples_without_advantage_teach_the_critic():
    """Wrong implementation: the family's rule, that a sample of zero advantage is left out, looked up at its
    first token.
    """
    batch = batch_of(learner(decoder(), row(whiten=False)), scores=[0.0] * 12)
    assert len(batch.tokens) == 12
    m = learner(decoder(), row(whiten=False)).update(batch, 0)
    assert m["vf_loss"] > 0 and m["critic_grad_norm"] > 0


def test_the_coefficient_moves_after_the_batch_it_was_seen_on():
    """Wrong implementations: the batch's own KL in its own coefficient; a coefficient that the loss never
    sees; lost on resuming.
    """
    made = learner(decoder(), row(kl="k2", kl_coef=0.2))
    it = source(made, kl_target=0.5, kl_horizon=120)
    first = it.collect(0, 0)
    assert first.metrics["objective/kl_coef"] == 0.2 == first.batches[0].kl_coef
    error = min(max(first.metrics["objective/kl"] / 0.5 - 1, -0.2), 0.2)
    again = source(made, kl_target=0.5, kl_horizon=120)
    again.load_state(it.state())
    for one in (it, again):
        step = one.collect(1, 1)
        (batch,) = step.batches
        assert (
            step.metrics["objective/kl_coef"] == batch.kl_coef == pytest.approx(0.2 * (1 + error * 12 / 120))
        )
        moved = learner(decoder(), row(kl="k2", kl_coef=batch.kl_coef))
        same, before = gradients(made, batch), gradients(made, replace(batch, kl_coef=0.2))
        assert torch.equal(same[1], gradients(moved, batch)[1]) and not torch.equal(same[1], before[1])


@pytest.mark.parametrize("minibatches", [1, 2])
def test_completions_carried_over_are_trained_on_when_their_group_ends(minibatches):
    """Some steps end no group: nothing moves, the coefficient too.  The others have the equations' advantages
    under the critic as it is.

    Wrong implementations: a mean of nothing; a critic that steps on its momentum; a group's values from when
    it was begun.
    """
    made = learner(decoder(eos_token_id=[3, 4, 5, 6]), row(reward_kl_coef=0.1), lr=1e-3)
    it = source(made, tail="carry", tail_share=0.8, max_new_tokens=30, minibatches=minibatches, kl_target=0.5)
    sizes = []
    for step in range(5):
        before, coefficient = [p.clone() for p in masters(made)], it.coefficient.value
        data = it.collect(step, step)
        sizes.append(sum(len(batch.tokens) for batch in data.batches))
        for batch in [b.tokens for b in data.batches] if minibatches == 1 and sizes[-1] else ():
            cu, mask = batch.cu_seqlens, pad(batch.mask, batch.cu_seqlens).bool()
            value = values(made, batch)[0].detach()
            torch.testing.assert_close(
                pad(batch.value, cu), torch.where(mask, value, 0), rtol=1e-4, atol=1e-5
            )
            # A = return - value
            A = restated.gae(pad(batch.returns - batch.value, cu), torch.zeros_like(value), mask, 0.0, 0.0)[0]
            torch.testing.assert_close(
                pad(batch.advantage, cu), restated.whitened(A, mask), rtol=1e-4, atol=1e-5
            )
        done = [made.update(batch, step) for batch in data.batches]
        assert all(math.isfinite(x) for m in done for x in m.values())
        same = all(torch.equal(a, b) for a, b in zip(before, masters(made), strict=True))
        assert same == (sizes[-1] == 0) and (sizes[-1] > 0 or it.coefficient.value == coefficient)
    assert 0 in sizes and max(sizes) > 0


# --- gradients --------------------------------------------------------------------------------------
@pytest.mark.parametrize("critic", KINDS)
def test_gradients_are_those_of_the_equations(critic):
    """Policy and critic against padded float64 autograd through whole logits.  Wrong implementations: hidden
    states shifted by one; a head of another temperature; c_v inside a critic of its own; a value loss that
    trains the policy where it should not, or not where it should; ranges around the current value.
    """
    of = row(critic=critic, kl="k2", kl_coef=0.05, entropy_coef=0.01, vf_coef=0.3)
    made = learner(decoder(dtype=torch.float64), of, 20)
    it = batch_of(made)
    batch, model = it.tokens, policy_of(made)
    drift(model, 0.02)
    body, head = parts(made)
    with torch.no_grad():
        head.weight.mul_(1.5)
    cu, mask = batch.cu_seqlens, pad(batch.mask, batch.cu_seqlens).bool()
    hidden = hidden_of(model, batch)
    logps = (hidden @ model.head_weight.T / TEMPERATURE).log_softmax(-1)[:, :-1]
    target = pad(batch.tokens, cu).long()[:, 1:]
    logp, keep = logps.gather(2, target[..., None]).squeeze(2), mask[:, 1:]
    old, A, ref, was, R = (
        pad(x, cu)[:, 1:]
        for x in (batch.old_logp, batch.advantage, batch.ref_logp, batch.value, batch.returns)
    )
    entropy = -(logps.exp() * logps).sum(-1)
    loss = restated.policy(logp, old, A, keep) + restated.mean(
        0.05 * 0.5 * (logp - ref) ** 2 - 0.01 * entropy, keep
    )
    seen = (
        hidden_of(body, batch) if made.critic is not None else hidden.detach() if critic == "head" else hidden
    )
    value = (seen @ head.weight + head.bias)[:, :-1]
    vf = restated.critic(value, was, R, keep, 0.2)
    total = loss + vf if made.critic is not None else loss + 0.3 * vf
    (metrics, policy, own) = gradients(made, it)
    wanted = [
        list(model.parameters()),
        list(critic_of(made).parameters() if made.critic else made.head.parameters()),
    ]
    for got, some in zip((policy, own), wanted, strict=True):
        want = torch.autograd.grad(total, some, retain_graph=True, allow_unused=True, materialize_grads=True)
        assert relative(got, torch.cat([g.flatten() for g in want])) < 1e-6  # the batch's columns are float32
    assert metrics["vf_loss"] == pytest.approx(vf.item(), rel=1e-6) and metrics[
        "policy_loss"
    ] == pytest.approx(loss.item(), rel=1e-5)
    held = torch.maximum(torch.minimum(value, was + 0.2), was - 0.2)
    clipped = ((held - R) ** 2 > (value - R) ** 2)[keep].double().mean().item()
    assert clipped > 0 and metrics["vf_clipfrac"] == pytest.approx(clipped)


@pytest.mark.parametrize("critic", KINDS)
def test_splits_and_order_change_nothing(critic):
    """Wrong implementations: a mean per micro-batch; values of a micro-batch put back at another's places."""
    made = learner(decoder(), row(critic=critic))
    whole = batch_of(made)
    split = learner(decoder(), row(critic=critic), 20)
    torch.testing.assert_close(split.values(whole.tokens).before, whole.tokens.value, rtol=1e-5, atol=1e-6)
    drift(policy_of(made), 0.02)
    drift(policy_of(split), 0.02)
    places = torch.randperm(12, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = ActorCriticBatch(whole.tokens.select(places), whole.kl_coef)
    (m, a, b), *others = gradients(made, whole), gradients(split, whole), gradients(made, shuffled)
    for n, c, d in others:
        assert relative(c, a) < 1e-5 and relative(d, b) < 1e-5
        assert [n[k] for k in ("vf_loss", "vf_clipfrac", "policy_loss", "approx_kl")] == pytest.approx(
            [m[k] for k in ("vf_loss", "vf_clipfrac", "policy_loss", "approx_kl")], rel=1e-4, abs=1e-7
        )


def test_kl_in_the_reward_is_k2_in_the_loss_at_the_first_step():
    """Where no reward flows back (gamma = 0) beta k1 in the reward and beta k2 in the loss have one gradient.
    Wrong implementations: the sign; KL that the whitening or the critic takes out again; the KL in both
    places; k1 in the loss, whose gradient is another.
    """
    found = {}
    for name, changes in {
        "reward": {"reward_kl_coef": 0.3},
        "loss": {"kl": "k2", "kl_coef": 0.3},
        "none": {},
    }.items():
        made = learner(decoder(), row(gamma=0.0, lam=0.0, whiten=False, **changes))
        found[name] = gradients(made, batch_of(made))[1]
    assert relative(found["reward"], found["loss"]) < 1e-5
    assert relative(found["none"], found["loss"]) > 0.01


def test_first_update_is_on_policy():
    """Wrong implementations: dropout, a value head that shifts the policy, whitening per minibatch."""
    made = learner(decoder(), row())
    batches = source(made, **SPLIT).collect(0, 0).batches
    assert len(batches) == 4
    m = gradients(made, batches[0])[0]
    assert (
        m["ratio_max"] == pytest.approx(1, abs=1e-4)
        and m["clip_region"] == 0
        and m["approx_kl"] < 1e-8
        and m["vf_clipfrac"] == 0
    )
    first, second = (batch.tokens for batch in batches[:2])
    live = torch.cat([b.advantage[b.mask] for b in (first, second)]).double()
    assert live.mean().abs() < 1e-6 and live.var().item() == pytest.approx(1, rel=1e-5)
    assert abs(first.advantage[first.mask].mean()) > 1e-3, "one minibatch alone is not white"


# --- two optimizers ---------------------------------------------------------------------------------
def test_a_separate_critic_has_its_own_step():
    """Wrong implementations: weights that are the policy's own; one norm clipped over both, so that a wrong
    critic slows the policy.
    """
    ends = []
    for scale in (1.0, 100.0):
        made = learner(decoder(), row(critic_lr=0.1), lr=1e-3, clip=0.1)
        batch = batch_of(made)
        batch = replace(batch, tokens=replace(batch.tokens, returns=batch.tokens.returns * scale))
        model, body = policy_of(made), critic_of(made).body
        start = [p.clone() for p in body.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
        m = made.update(batch, 0)
        assert m["critic_lr"] == 0.1 and m["learning_rate"] == 1e-3 and m["critic_grad_norm"] > 0
        assert any(not torch.equal(a, b) for a, b in zip(start, body.parameters(), strict=True))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


def test_a_critic_learns_what_is_to_be_expected():
    """Wrong implementations: a gradient of the wrong sign; values of other samples."""
    for critic in KINDS:
        made = learner(decoder(), row(critic=critic, value_clip=math.inf, critic_lr=None), lr=1e-2)
        batch = batch_of(made)
        tokens = replace(batch.tokens, advantage=torch.zeros_like(batch.tokens.advantage))
        batch = replace(batch, tokens=tokens)
        first, *_, last = [made.update(batch, 0)["vf_loss"] for _ in range(8)]
        assert last < 0.65 * first, critic


# --- folders ----------------------------------------------------------------------------------------
def test_a_reward_model_as_critic_has_transformers_values(tmp_path):
    """Wrong implementations: a head dropped or made anew; an lm head asked for; a value at another token."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    config = transformers.Qwen2Config(
        **{k: v for k, v in tiny_config().items() if k not in ("architectures", "model_type")}, num_labels=1
    )
    config.pad_token_id = 0
    theirs = transformers.Qwen2ForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    policy = Decoder.from_config(tiny_config(), seed=0)
    critic = Critic.load(str(tmp_path), policy)
    tokens = torch.tensor([7, 8, 9, 10, 11])
    with torch.no_grad():
        want = [theirs(input_ids=tokens[None, :n]).logits[0, 0] for n in range(1, 6)]
        torch.testing.assert_close(
            critic(tokens, torch.tensor([0, 5], dtype=torch.int32)), torch.stack(want), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(
        UserError, match="--critic-model: expected a vocab_size of at least the policy's 70, got 61"
    ):
        Critic.load(str(tmp_path), Decoder.from_config(tiny_config(vocab_size=70), seed=0))


def test_any_language_model_as_critic(tmp_path):
    """Wrong implementation: an untied language-model head that is loaded, kept and decayed."""
    other = decoder(seed=4, tie_word_embeddings=False)
    other.save_pretrained(tmp_path)
    made = learner(decoder(), row(critic_model=str(tmp_path)))
    body = critic_of(made).body
    assert not hasattr(body, "head") and torch.equal(body.layers[0].down.weight, other.layers[0].down.weight)


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_target": 1.0, "critic_lr": 1e-2, "kl_horizon": 20, **SPLIT},
        {
            "critic": "shared",
            "kl_in": "loss",
            "kl_target": 1.0,
            "kl_horizon": 40,
            "group": 2,
            "dtype": "bfloat16",
        },
        {"dtype": "bfloat16", "kl_coef": 0.0, "bootstrap": True},
    ],
    ids=["separate-adaptive", "shared-bfloat16-loss", "separate-bfloat16"],
)
def test_four_steps_are_two_and_two(changes, tmp_path, monkeypatch, no_report):
    """Wrong implementations: a critic, its moments or its masters that begin again, or are copied from the
    resumed policy; the coefficient; a critic in the policy's folder.
    """
    straight, resumed = straight_and_resumed(monkeypatch, ppo, tmp_path, 2, steps=4, **changes, eval=Eval())
    assert_same_run(straight.output_dir, resumed.output_dir, 4)
    saved = state(Path(resumed.output_dir, "checkpoints/step_4"))
    assert any(k.startswith("trainer.safetensors/critic.") for k in saved)
    folder = Path(resumed.output_dir, "checkpoints/step_4")
    kept = Decoder.from_pretrained(folder)
    assert kept.config.architecture == "Qwen3ForCausalLM"


def test_a_checkpoint_of_another_critic_is_refused():
    """Wrong implementations: an error that names a tensor and no option;
    a head that silently stays at zero.
    """
    separate, shared = (learner(decoder(), row(critic=kind)) for kind in ("separate", "shared"))
    for one, other in ((separate, shared), (shared, separate)):
        with pytest.raises(
            UserError,
            match=f"--critic: expected {algorithm_of(one).critic}'s .* resume with the --critic that the "
            "run began",
        ):
            one.load_state(other.state())


def test_a_run_reports_under_the_usual_names(tmp_path, no_report):
    """Wrong implementations: metrics that the command's table leaves out; a spread of groups of one; panels
    that nothing fills.
    """
    result = fastrl.trainer.train(ppo(tmp_path, steps=2, minibatches=2, eval=Eval()))
    names = {
        "loss/policy_avg",
        "loss/value_avg",
        "val/clipfrac_avg",
        "critic/vf_explained_var",
        "critic/returns/mean",
        "critic/values/max",
        "critic/advantages/min",
        "objective/kl",
        "objective/kl_coef",
        "objective/scores",
        "objective/rlhf_reward",
        "kl",
        "approx_kl",
        "clip_ratio/region_mean",
        "ratio/mean",
        "entropy",
        "critic/grad_norm",
        "critic/lr",
    }
    assert (
        names <= result.metrics.keys() and not {"reward_std", "frac_reward_zero_std"} & result.metrics.keys()
    )
    first = next(x for x in lines(tmp_path / "run") if "loss/value_avg" in x)
    assert first["kl"] == pytest.approx(0, abs=1e-9) and first["objective/kl"] == pytest.approx(0, abs=1e-5)
    panels = {p.title: set(p.keys.values()) for p in filled_panels()}
    for title in (
        "Value loss",
        "Explained variance",
        "Returns and values",
        "KL to the reference",
        "Clip fraction",
    ):
        assert panels[title] <= result.metrics.keys(), title
    assert checkpoint.load(tmp_path / "run/checkpoints/step_2")[1]["command"] == "ppo"


# --- learning ---------------------------------------------------------------------------------------
@pytest.mark.slow
def test_ppo_raises_the_reward_of_the_card_game(tmp_path, no_report):
    """From one SFT start.  Wrong implementations: any sign, shift or mask that leaves a loss going down and
    the policy no better.
    """
    fixed = {"task": "cards", "task_options": ("k=2", "rules=b"), "threads": 1, "eval": Eval()}
    optim = Optim(lr=4e-3, schedule="linear", warmup=10, weight_decay=0.01)
    model = str(demo.RECIPES / "cards.config.json")
    sft = Sft(**fixed, model=model, steps=100, prompts=128, optim=optim, output_dir=str(tmp_path / "sft"))
    start = str(fastrl.trainer.train(sft).checkpoint)
    config = Ppo(
        **fixed,
        model=start,
        steps=50,
        prompts=64,
        group=8,
        minibatches=4,
        max_new_tokens=16,
        kl_coef=0.0,
        lam=1.0,
        critic_lr=1e-3,
        optim=Optim(lr=5e-4, warmup=3),
        output_dir=str(tmp_path / "ppo"),
    )
    fastrl.trainer.train(config)
    rows = lines(tmp_path / "ppo")
    first, last = (sum(r["reward"] for r in some) / 10 for some in (rows[:10], rows[-10:]))
    assert last - first > 0.1, (first, last)  # 0.3 to 0.5; a mean of ten steps deviates by 0.01
    assert sum(r["critic/vf_explained_var"] for r in rows[-10:]) > 0
