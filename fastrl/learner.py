"""Forward, loss, backward, step.  The learner owns the optimizer and the float32 master weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastrl import ops
from fastrl.algorithms import Algorithm
from fastrl.config import Optim
from fastrl.dist import World
from fastrl.errors import UserError
from fastrl.pack import micro_batches, plan
from fastrl.types import Batch, Tokens

SHAPES = {  # fraction of the peak learning rate, for progress in [0, 1] after warm-up
    "constant": lambda x: 1.0,
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The learning rate of `step` (counted from 0) of a run of `steps`."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    progress = min(1.0, (step - optim.warmup) / max(1, steps - optim.warmup))
    return optim.lr * (optim.floor + (1 - optim.floor) * SHAPES[optim.schedule](progress))


@dataclass(slots=True)
class Sums:
    """Metrics of the micro-batches of a step: token-weighted means, maxima, and plain sums."""

    tokens: float = 0.0
    means: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    loss: float = 0.0

    def add(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """`metrics` holds `tokens`, means over them, and maxima (names ending in _max)."""
        names = [n for n in metrics if n != "tokens"]
        tokens, value, *values = torch.stack([metrics["tokens"], loss.detach(), *(metrics[n] for n in names)]).double().tolist()
        self.tokens += tokens
        self.loss += value
        for name, v in zip(names, values, strict=True):
            if name.endswith("_max"):
                self.maxima[name] = max(self.maxima.get(name, -math.inf), v)
            else:
                self.means[name] = self.means.get(name, 0.0) + v * tokens

    def over(self, world: World) -> dict[str, float]:
        """The step's metrics over all processes."""
        names, peaks = sorted(self.means), sorted(self.maxima)
        tokens, loss, *means = world.sum(self.tokens, self.loss, *(self.means[n] for n in names))
        out = {"loss": loss, "num_tokens": tokens}
        out |= {n: v / max(tokens, 1.0) for n, v in zip(names, means, strict=True)}
        return out | dict(zip(peaks, world.max(*(self.maxima[n] for n in peaks)), strict=True))


class Learner:
    """Trains `model` with `algorithm`: one `update` is one optimizer step over a whole batch."""

    def __init__(
        self, model: nn.Module, algorithm: Algorithm, optim: Optim, *, steps: int, micro_tokens: int, temperature: float = 1.0, world: World | None = None
    ) -> None:
        self.model, self.algorithm, self.optim, self.steps = model, algorithm, optim, steps
        self.micro_tokens, self.temperature, self.world = micro_tokens, temperature, world or World()
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.weights]
        self._accumulate_in_float32()
        matrices = [p for p in self.masters if p.ndim >= 2]
        vectors = [p for p in self.masters if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)

    def update(self, batch: Batch, step: int) -> dict[str, float]:
        """One optimizer step; `step` sets the learning rate.  Raises UserError when the loss or the gradient is not finite,
        before any weight is touched, and when memory runs out."""
        sums = Sums()
        try:
            for micro in micro_batches(batch, self.micro_tokens):
                self._accumulate(micro, sums)
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of memory at --micro-tokens {self.micro_tokens}; try --micro-tokens {self.micro_tokens // 2} ({error})") from None
        self.world.sum_gradients(self.masters)
        metrics = sums.over(self.world)
        if metrics["num_tokens"] == 0:  # every sample's advantage is 0: AdamW must not step on its momentum alone
            return metrics | {"grad_norm": 0.0, "learning_rate": learning_rate(self.optim, step, self.steps)}
        grads = [p.grad for p in self.masters if p.grad is not None]
        norm = float(nn.utils.get_total_norm(grads)) if grads else 0.0
        for name, value in (("loss", metrics["loss"]), ("grad_norm", norm)):
            if not math.isfinite(value):
                raise UserError(f"step {step + 1}: {name} is {value}; the weights are those of the step before")
        if self.optim.clip > 0:
            nn.utils.clip_grads_with_norm_(self.masters, self.optim.clip, torch.tensor(norm))
        lr = learning_rate(self.optim, step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._publish()
        return metrics | {"grad_norm": norm, "learning_rate": lr}

    def forward(self, batch: Batch, algorithm: Algorithm | None = None) -> tuple[Tensor, ops.TokenStats, Tokens, Tensor]:
        """The batch's share of the loss, the statistics of its tokens (T-1,), the tokens as the algorithm sees them, the live rows.

        Position t predicts token t+1, so per-token vectors are shifted by one here and nowhere else.
        """
        algorithm = algorithm or self.algorithm
        rows = batch.mask[1:].nonzero().squeeze(1)
        tokens = _tokens(batch, rows)
        hidden = self.model(batch.tokens, batch.cu_seqlens)
        loss, stats = ops.linear_loss(
            hidden[:-1], self.model.head_weight, batch.tokens[1:],
            lambda logp, entropy, rows: algorithm.loss(tokens[rows].with_(logp, entropy)),
            mask=rows, bias=self.model.head_bias, temperature=self.temperature, entropy=True,
            level="sequence" if algorithm.ratio == "sequence" else "token",
        )  # fmt: skip
        return loss, stats, tokens, rows

    @torch.no_grad()
    def logp(self, model: nn.Module, batch: Batch) -> Tensor:
        """(T,) log-probs of the batch's loss tokens under `model` (a reference policy), nats; 0 elsewhere."""
        out = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        for samples in plan(batch.cu_seqlens.diff().tolist(), self.micro_tokens):
            micro = batch.select(samples)
            rows = micro.mask[1:].nonzero().squeeze(1)
            hidden = model(micro.tokens, micro.cu_seqlens)[rows]
            target = micro.tokens[rows + 1]
            stats = ops.linear_logp(hidden, model.head_weight, target, bias=model.head_bias, temperature=self.temperature)
            out[batch.rows(samples)[rows + 1]] = stats.logp.float()
        return out

    def state(self) -> dict[str, Tensor]:
        """Everything but the weights that the next step depends on, by name; with masters when the weights are not float32."""
        out: dict[str, Tensor] = {}
        for name, weight, master in zip(self.names, self.weights, self.masters, strict=True):
            if master is not weight:
                out[f"master.{name}"] = master
            out |= {f"{key}.{name}": value for key, value in self.optimizer.state.get(master, {}).items()}
        return out

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name, weight, master in zip(self.names, self.weights, self.masters, strict=True):
            if master is not weight:
                master.copy_(state[f"master.{name}"])
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in state]
            if keys:
                self.optimizer.state[master] = {k: state[f"{k}.{name}"].to(master.device) for k in keys}
        self._publish()

    def _accumulate(self, micro: Batch, sums: Sums) -> None:
        loss, stats, tokens, rows = self.forward(micro)
        loss.backward()
        with torch.no_grad():
            live = tokens[rows].with_(stats.logp[rows], None if stats.entropy is None else stats.entropy[rows])
            sums.add(loss, self.algorithm.metrics(live))

    def _accumulate_in_float32(self) -> None:
        """Gradients of low-precision weights move to their float32 master as soon as autograd has made them."""

        def move(master: Tensor) -> Any:
            def hook(weight: Tensor) -> None:
                if weight.grad is not None:
                    master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                    weight.grad = None

            return hook

        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                weight.register_post_accumulate_grad_hook(move(master))

    @torch.no_grad()
    def _publish(self) -> None:
        """Write the masters into the weights' own storage, which the sampler reads."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                weight.copy_(master)


def _tokens(batch: Batch, rows: Tensor) -> Tokens:
    """The batch's tokens 1..T-1 as an algorithm sees them; `rows` are the live ones."""
    cu = batch.mask.long().cumsum(0)
    live_ends = torch.cat([cu.new_zeros(1), cu])[batch.cu_seqlens.long()].to(torch.int32)
    optional = {n: None if getattr(batch, n) is None else getattr(batch, n)[1:] for n in ("correction", "ref_logp")}
    return Tokens(
        old_logp=batch.old_logp[1:], advantage=batch.advantage[1:], weight=batch.weight[1:], cu_seqlens=live_ends, live=rows.numel(), **optional
    )
