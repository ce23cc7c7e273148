"""GRPO on one page, from public parts: read it from top to bottom to see what a step of `fastrl grpo` does.

The game: `a:4K>6|` asks for 6 from a four and a king, and `4,10;10-4=6` is a right answer.  A verifier pays
1 for a right answer and 0 for any other.  A policy learns from that alone once some of its answers are right,
so a small decoder with random weights first imitates demonstrations for a few seconds.

Sequences are packed: they lie end to end in one vector of T tokens, and cu_seqlens holds where each one ends.
`make grpo-loop` runs this page in about half a minute on one core; the reward rises from about a half to two
thirds.  tests/recipes/test_grpo_loop.py shows that on a CPU its steps are those of `fastrl grpo`: the same
weights after every step, bit for bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastrl import ops
from fastrl.batch.prefix import shared
from fastrl.batch.types import Batch, Rollouts
from fastrl.model import Decoder
from fastrl.sampler import Sampler, SamplingParams
from fastrl.tasks import Cards, Example

Reward = Callable[[Example, str], float]  # of an answer to a problem


def run(
    model: Decoder,
    task: Cards,
    reward: Reward,
    *,
    steps: int,
    prompts: int = 32,
    group: int = 8,
    max_new_tokens: int = 16,
    lr: float = 3e-4,
    warmup: int = 5,
    seed: int = 0,
) -> Iterator[dict[str, float]]:
    """Train the model in place; yield each step's metrics once its weights are updated."""
    sampler = Sampler(model, task.tokenizer())
    params = SamplingParams(n=group, max_new_tokens=max_new_tokens, seed=seed)
    optimizer = adamw(model, lr)
    numbers = shuffled(task.size("train"), seed)

    for step in range(steps):
        # 1. Ask: `group` answers to each prompt, from the weights as they are now.  An answer's randomness is
        #    a function of the seed and of the answer's number in the whole run.
        examples = [task.example("train", next(numbers)) for _ in range(prompts)]
        questions = [example.prompt for example in examples]
        rollouts = sampler.generate(questions, params, sequence_offset=step * prompts * group)

        # 2. Score every answer.  The answers to one prompt are neighbours.
        asked = [example for example in examples for _ in range(group)]
        scores = [reward(*pair) for pair in zip(asked, rollouts.text or [], strict=True)]
        rewards = torch.tensor(scores, device=model.device)

        # 3. Compare each answer with all answers to its prompt: (reward - mean) / (std + 1e-4).  The group
        #    does what a critic does in PPO.
        advantage = ops.group_advantage(rewards, group)

        # 4. One optimizer step; none where every group is all right or all wrong, which teaches nothing.
        batch = make_batch(rollouts, advantage)
        rate = learning_rate(step, steps, lr, warmup)
        loss, norm = torch.zeros(()), torch.zeros(())
        if len(batch) > 0:
            loss = policy_loss(model, batch)
            norm = update(model, optimizer, loss, rate)

        # The loss is about 0, since each group's advantages sum to 0; its gradient is not.
        metrics = {"reward": rewards.mean(), "loss": loss.detach(), "grad_norm": norm}
        yield {name: float(value) for name, value in metrics.items()} | {"learning_rate": rate}


def make_batch(rollouts: Rollouts, advantage: Tensor) -> Batch:
    """What the loss needs of the rollouts, one value per token.

    GRPO averages over the tokens of an answer, then over the answers of the step, hence the weight.  Answers
    with zero advantage count as answers; they have no gradient, so they leave the batch afterwards.
    """
    weight = 1 / (rollouts.lengths.to(torch.float32) * len(rollouts))
    repeats = rollouts.cu_seqlens.diff().long()
    batch = Batch(
        tokens=rollouts.tokens,
        cu_seqlens=rollouts.cu_seqlens,
        mask=rollouts.completion_mask,  # True for the policy's own tokens, its <eos> included
        advantage=advantage.repeat_interleave(repeats),
        old_logp=rollouts.logp,  # recorded while sampling
        weight=weight.repeat_interleave(repeats),
    )
    return batch.select(advantage.nonzero().flatten().tolist())


def policy_loss(model: Decoder, batch: Batch) -> Tensor:
    """sum_t weight_t * -min(r_t A_t, clip(r_t, 0.8, 1.2) A_t), where r_t = exp(logp_t - old_logp_t)."""
    chosen = batch.mask.nonzero().flatten()
    before = chosen - 1  # the hidden state of token t predicts token t + 1
    old_logp, advantage, weight = batch.old_logp[chosen], batch.advantage[chosen], batch.weight[chosen]

    # Answers to one prompt begin alike: forward the prompt once where that saves time, as `fastrl grpo` does.
    # The plain forward in its place would change no more than the rounding.
    once = shared(batch.host)
    if once is None:
        hidden = model(batch.tokens, batch.cu_seqlens)[before]
    else:
        hidden = once.place(before.cpu(), model.device)[0].hidden(model)

    def loss_of(logp: Tensor, entropy: Tensor | None, rows: Tensor) -> Tensor:
        old, a, w = old_logp[rows], advantage[rows], weight[rows]
        return ops.policy_loss(logp, old, a, surrogate=ops.SURROGATES["clip"], token_weight=w)[0]

    # Logits (tokens, vocabulary) exist for one chunk of rows at a time; loss_of gets their log-probs.
    return ops.linear_loss(hidden, model.head_weight, batch.tokens[chosen], loss_of)[0]


def update(model: Decoder, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> Tensor:
    """Backward, clip, step; returns the norm of the gradient before clipping."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return norm


def adamw(model: Decoder, lr: float) -> torch.optim.Optimizer:
    """AdamW without weight decay."""
    return torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear up to the peak, then linear down to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 - (step - warmup) / (steps - warmup))


def shuffled(size: int, seed: int) -> Iterator[int]:
    """0 .. size - 1 in random order, then in another, without end."""
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        yield from torch.randperm(size, generator=generator).tolist()


def imitate(model: Decoder, task: Cards, *, steps: int, batch: int = 64, lr: float = 4e-3) -> None:
    """Supervised fine-tuning on the task's demonstrations: cross-entropy on their tokens, none on prompts."""
    tokenizer, optimizer = task.tokenizer(), adamw(model, lr)
    for step in range(steps):
        tokens, targets, ends = [], [], [0]
        for i in range(step * batch, (step + 1) * batch):
            example = task.example("train", i % task.size("train"))
            prompt = tokenizer.encode(example.prompt)
            answer = [*tokenizer.encode(example.demo), tokenizer.eos_token_id]
            tokens += prompt + answer
            targets += [-100] * (len(prompt) - 1) + answer + [-100]  # -100: no loss here
            ends.append(len(tokens))

        packed, target = torch.tensor([tokens, targets], device=model.device)
        hidden = model(packed, torch.tensor(ends, dtype=torch.int32, device=model.device))
        loss = ops.linear_cross_entropy(hidden, model.head_weight, target)
        update(model, optimizer, loss, learning_rate(step, steps, lr, warmup=steps // 10))


def main(argv: Sequence[str] | None = None) -> None:
    """Imitate, then learn from the verifier; print the mean reward of every ten steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder to start from, without imitation")
    parser.add_argument("--imitate", type=int, default=150, help="supervised steps before GRPO")
    parser.add_argument("--steps", type=int, default=120, help="GRPO steps")
    parser.add_argument("--prompts", type=int, default=32, help="prompts per step")
    parser.add_argument("--group", type=int, default=8, help="answers per prompt")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(argv))
    folder, imitation = options.pop("model"), options.pop("imitate")

    torch.set_num_threads(1)  # a model this small is faster on one core than on several
    task = Cards(k=2, rules="ab")  # two cards; a king counts 10 under rule a, 13 under rule b
    if folder:
        model = Decoder.from_pretrained(folder)
    else:
        config = json.loads(Path(__file__).with_name("cards.config.json").read_text(encoding="utf-8"))
        model = Decoder.from_config(config, seed=options["seed"])
        imitate(model, task, steps=imitation)

    rewards = []
    for metrics in run(model, task, lambda example, text: task.verify(example, text).reward, **options):
        rewards.append(metrics["reward"])
        if len(rewards) % 10 == 0:
            print(f"step {len(rewards):3}  reward {sum(rewards[-10:]) / 10:.3f}", flush=True)


if __name__ == "__main__":
    main()
