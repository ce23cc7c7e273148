"""One GRPO step, rollout and update: G completions of exactly M tokens for each of P prompts of N, one
optimizer step on all of them.

The peer is TRL's GRPOTrainer in the same process, with the same weights, loss (clipped, averaged per
sequence), advantages, AdamW, clipping and dtype, generation by transformers, and a reward of no cost.  Its
steps are those of its own `train`, which runs in a thread and waits before each; its memory is not measured.
"""

from __future__ import annotations

import atexit
import logging
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl.algorithms import ALGORITHMS
from fastrl.bench import decoders
from fastrl.bench.common import Bench, Case, Cost, Data, Function, cases, peer
from fastrl.bench.decoders import LETTERS
from fastrl.config import Grpo, Optim
from fastrl.methods.grpo.prompts import Prompts
from fastrl.methods.grpo.rollouts import ExtraLogProbs, RolloutSource
from fastrl.methods.grpo.sampling import GroupSampler
from fastrl.methods.grpo.shaping import policy_shaping
from fastrl.parallel.world import World
from fastrl.rewards.functions import Scored
from fastrl.sampler import Sampler
from fastrl.train.learner import Learner
from fastrl.train.objective import PolicyObjective
from fastrl.train.optimizer import MasterWeights

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .,;:!?+-*/=()[]<>"
SPECIAL = 3  # tokens of char_tokenizer that are not characters
PROMPTS = 64  # that the steps cycle through

CASES = cases(
    f"P G N M {LETTERS}",
    tiny=(2, 2, 4, 3, 1, 16, 24, 2, 1, 8, 31),
    quick=(4, 4, 12, 8, 2, 64, 128, 4, 2, 16, 31),
    cpu=[(16, 8, 10, 28, 4, 128, 512, 4, 2, 32, 31)],
    cuda=[(32, 8, 16, 64, 8, 512, 2048, 8, 2, 64, 31)],
    slice={},
    modes=("step",),
    cuda_dtype="float32",
)
OPTIM = Optim(lr=1e-4, beta2=0.999, clip=1.0, weight_decay=0.0, warmup=0, schedule="constant")


def data(case: Case) -> Data:
    return Data({})


def cost(case: Case) -> Cost:
    """The weights of M decode steps and of an update.

    The products of every token drawn, and three times those of every token trained on.
    """
    P, G, N, M = case.sizes("P G N M")
    layers, head = decoders.parameters(case)
    drawn, learned = P * G * M, P * G * (N + M)
    flops = 2 * (layers * (P * N + drawn) + head * drawn) + 6 * (layers * learned + head * drawn)
    return Cost((M + 3) * (layers + head) * case.itemsize, flops, tokens=drawn)


def prompts(case: Case) -> list[str]:
    """Prompts of N characters."""
    drawn = torch.randint(
        case.shape["V"] - SPECIAL, (PROMPTS, case.shape["N"]), generator=torch.Generator().manual_seed(0)
    )
    return ["".join(ALPHABET[i] for i in row) for row in drawn.tolist()]


def score(tokens: list[int]) -> float:
    """The reward: large tokens late.

    It hardly ever equals the mean of a group: our step would leave out a sample without advantage.
    """
    return sum(i * t for i, t in enumerate(tokens)) / len(tokens) ** 2


def tokenizer(case: Case) -> Any:
    """One token per character.  Loaded only here: it needs transformers."""
    return peer("fastrl.tasks.tokens", "char_tokenizer")(ALPHABET[: case.shape["V"] - SPECIAL])


# --- ours -------------------------------------------------------------------------------------------
class Ours:
    """The trainer's own parts; a call is one step."""

    def __init__(self, case: Case) -> None:
        P, G, M = case.sizes("P G M")
        self.model, algorithm, world = decoders.ours(case), ALGORITHMS["grpo"], World()
        weights = MasterWeights(self.model.named_parameters(), OPTIM, steps=1 << 20)
        objective = PolicyObjective(self.model, algorithm)
        self.learner = Learner(objective, weights, world, micro_tokens=1 << 30)

        config = Grpo(model="", prompts=P, group=G, max_new_tokens=M, seed=0)
        texts, codec = prompts(case), tokenizer(case)
        codec.eos_token = None  # every completion has M tokens
        drawn = Prompts(
            item=lambda i: (texts[i], {}),
            size=PROMPTS,
            score=lambda prompts, text, tokens, columns: Scored([score(t) for t in tokens]),
        )
        groups = GroupSampler(config, Sampler(self.model, codec), drawn, world)
        shaping = policy_shaping(config, algorithm, world)
        self.source = RolloutSource(config, groups, ExtraLogProbs(), shaping, world)
        self.step = 0
        self.seconds = {"rollout": 0.0, "update": 0.0}

    def __call__(self) -> Tensor:
        began = time.perf_counter()
        (batch,) = self.source.collect(self.step, self.step).batches
        drawn = time.perf_counter()
        with torch.enable_grad():
            # reading the loss waits for the device
            loss = torch.tensor(self.learner.update(batch, self.step)["loss"])
        self.seconds = {"rollout": drawn - began, "update": time.perf_counter() - drawn}
        self.step += 1
        return loss


# --- TRL --------------------------------------------------------------------------------------------
class Stepwise:
    """A Trainer with its `train` in a thread: a call lets it make one step, and waits until that is done.

    The first step, which initialises it, is made here.
    """

    works_elsewhere = True

    def __init__(self, trainer: Any) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.trainer, self.stopping = trainer, False
        trainer.add_callback(_callback(self))
        trainer.remove_callback(peer("transformers", "PrinterCallback"))
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()
        self()
        atexit.register(self.close)

    def _train(self) -> None:
        try:
            with torch.enable_grad():
                self.trainer.train()
        except BaseException as error:  # raised again in the caller's thread
            self.error = error
        self.done.release()

    def __call__(self) -> Tensor:
        self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error
        return torch.zeros(())

    def close(self) -> None:
        """Let the thread end after one more step."""
        self.stopping = True
        self.go.release()
        self.thread.join(60.0)


def _callback(steps: Stepwise) -> Any:
    base = peer("transformers", "TrainerCallback")

    class Gate(base):  # type: ignore[misc, valid-type]
        """Waits before every step, and signals its end."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            steps.go.acquire()

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            control.should_training_stop = steps.stopping
            steps.done.release()

    return Gate()


def trl(case: Case) -> Function:
    P, G, M = case.sizes("P G M")
    config, trainer = peer("trl", "GRPOConfig"), peer("trl", "GRPOTrainer")
    dataset = peer("datasets", "Dataset")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    args = config(
        output_dir=str(Path(folder.name) / "out"),
        max_steps=1 << 20,
        per_device_train_batch_size=P * G,
        num_generations=G,
        max_completion_length=M,
        generation_kwargs={"min_new_tokens": M},
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        loss_type="grpo",
        scale_rewards="group",
        num_iterations=1,
        learning_rate=OPTIM.lr,
        adam_beta2=OPTIM.beta2,
        max_grad_norm=OPTIM.clip,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=case.device == "cpu",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    return Stepwise(
        trainer(
            decoders.theirs(case),
            args=args,
            train_dataset=dataset.from_list([{"prompt": p} for p in prompts(case)]),
            reward_funcs=lambda completion_ids, **columns: [score(t) for t in completion_ids],
            processing_class=tokenizer(case),
        )
    )


def details(case: Case, function: Function, ms: float) -> dict[str, float]:
    """The time of the last step by phase."""
    if not isinstance(function, Ours):
        return {}
    return {f"{name} ms": seconds * 1e3 for name, seconds in function.seconds.items()}


BENCH = Bench(
    op="grpo",
    cases=CASES,
    data=data,
    cost=cost,
    providers={"fastrl": Ours, "trl": trl},
    wall=True,
    details=details,
)
PROVIDERS = BENCH.providers
