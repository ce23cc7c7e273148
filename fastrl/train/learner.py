"""Forward, loss, backward, step.  The learner owns the optimizer and the float32 master weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastrl import ops
from fastrl.algorithms.correction import merge_mismatch, mismatch
from fastrl.algorithms.row import PolicyRow
from fastrl.batch.pack import micro_batches, plan
from fastrl.batch.prefix import shared
from fastrl.batch.types import Batch, Tokens
from fastrl.config import Optim
from fastrl.errors import UserError
from fastrl.kernels.policy_loss import METRICS, merge_metrics
from fastrl.parallel.device import memory_limited_by
from fastrl.parallel.world import World

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


OPTIONAL = ("correction", "ref_logp", "sampler_logp", "kind")  # vectors of a batch that may be None


class NotFinite(UserError):
    """A loss or a gradient that is NaN or infinite."""


class Learner:
    """Trains `model` with `algorithm`: one `update` is one optimizer step over a whole batch.

    beside  a module that is trained with the model, by the same optimizer: a head on its hidden states
    """

    def __init__(
        self,
        model: Any,
        algorithm: PolicyRow,
        optim: Optim,
        *,
        steps: int,
        micro_tokens: int,
        temperature: float = 1.0,
        world: World | None = None,
        beside: nn.Module | None = None,
    ) -> None:
        self.algorithm: PolicyRow = algorithm
        self.model, self.optim, self.steps = model, optim, steps
        self.micro_tokens, self.temperature, self.world = micro_tokens, temperature, world or World()
        named = [
            *model.named_parameters(),
            *(beside.named_parameters("beside") if beside is not None else ()),
        ]
        self.names = [n for n, p in named if p.requires_grad]
        self.weights = [p for _, p in named if p.requires_grad]
        self.masters = [p if p.dtype.itemsize >= 4 else p.detach().float() for p in self.weights]
        self._accumulate_in_float32()
        matrices = [p for p in self.masters if p.ndim >= 2]
        vectors = [p for p in self.masters if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": optim.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )

    def update(self, batch: Batch, step: int) -> dict[str, float]:
        """One optimizer step; `step` sets the learning rate.

        Raises NotFinite, before any weight is touched, when the loss or the gradient is not finite, and
        UserError when memory runs out.
        """
        lr = learning_rate(self.optim, step, self.steps)
        try:
            metrics = self._gradients(batch)
            # every sample's advantage is 0: AdamW must not step on its momentum alone
            if metrics["num_tokens"] == 0:
                return metrics | {"grad_norm": 0.0, "learning_rate": lr}
            norm = float(nn.utils.get_total_norm([p.grad for p in self.masters if p.grad is not None]))
            for name, value in (("loss", metrics["loss"]), ("grad_norm", norm)):
                if not math.isfinite(value):
                    raise NotFinite(
                        f"step {step + 1}: {name} is {value}; the weights are those of the step before"
                    )
            if self.optim.clip > 0:
                nn.utils.clip_grads_with_norm_(self.masters, self.optim.clip, torch.tensor(norm))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        finally:
            for p in (*self.masters, *self.weights):
                p.grad = None
        self._publish()
        return metrics | {"grad_norm": norm, "learning_rate": lr}

    def forward(
        self, batch: Batch, algorithm: PolicyRow | None = None
    ) -> tuple[Tensor, ops.TokenStats, Tokens, Tensor]:
        """The batch's share of the loss, the statistics of its tokens (T-1,), the tokens as the algorithm
        sees them, the live rows.

        Position t predicts token t+1, so per-token vectors are shifted by one here and nowhere else.
        """
        algorithm = algorithm or self.algorithm
        rows = batch.mask[1:].nonzero().squeeze(1)
        tokens = token_columns(batch, rows)
        common = shared(batch) if getattr(self.model, "supports_cache", False) else None
        if common is None:
            hidden, target, mask = self.model(batch.tokens, batch.cu_seqlens)[:-1], batch.tokens[1:], rows
        else:
            hidden, target, mask = common.hidden(self.model, rows), batch.tokens[1:][rows], None

        def share(logp: Tensor, entropy: Tensor | None, some: Tensor) -> Tensor:
            return algorithm.loss(tokens[some if common is None else rows[some]].with_(logp, entropy))

        loss, stats = ops.linear_loss(
            hidden,
            self.model.head_weight,
            target,
            share,
            mask=mask,
            bias=self.model.head_bias,
            temperature=self.temperature,
            entropy=True,
            level=algorithm.level,
        )
        loss = self._with_more(loss, hidden, mask, batch, rows)
        if common is not None:
            blank = stats.logp.new_zeros(tokens.weight.shape)
            logp, entropy, lse = (None if x is None else blank.index_copy(0, rows, x) for x in stats)
            assert logp is not None and lse is not None
            stats = ops.TokenStats(logp, entropy, lse)
        return loss, stats, tokens, rows

    def _with_more(
        self, loss: Tensor, hidden: Tensor, at: Tensor | None, batch: Batch, rows: Tensor
    ) -> Tensor:
        """The micro-batch's loss with what a subclass adds: `hidden`, at its rows `at` (None: all), predicts
        the tokens rows + 1.
        """
        return loss

    @torch.no_grad()
    def logp(self, model: Any, batch: Batch) -> Tensor:
        """(T,) log-probs of the batch's loss tokens under `model` (a reference policy), nats; 0 elsewhere."""
        out = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        for samples in plan(batch.cu_seqlens.diff().tolist(), self.micro_tokens):
            micro = batch.select(samples)
            rows = micro.mask[1:].nonzero().squeeze(1)
            common = shared(micro) if getattr(model, "supports_cache", False) else None
            hidden = (
                model(micro.tokens, micro.cu_seqlens)[rows] if common is None else common.hidden(model, rows)
            )
            target = micro.tokens[rows + 1]
            stats = ops.linear_logp(
                hidden, model.head_weight, target, bias=model.head_bias, temperature=self.temperature
            )
            out[batch.rows(samples)[rows + 1]] = stats.logp.float()
        return out

    def others(self) -> dict[str, tuple[Any, Any]]:
        """Models beside the policy, with their tokenizers, by the name of their folder in a checkpoint; one
        that is resumed `read`s it.
        """
        return {}

    def state(self) -> dict[str, Tensor]:
        """Everything but the weights that the next step depends on, by name; with masters when the weights
        are not float32.
        """
        out: dict[str, Tensor] = {}
        for name, weight, master in zip(self.names, self.weights, self.masters, strict=True):
            if master is not weight:
                out[f"master.{name}"] = master
            out |= {f"{key}.{name}": value for key, value in self.optimizer.state.get(master, {}).items()}
        return out

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name, weight, master in zip(self.names, self.weights, self.masters, strict=True):
            exact = state.get(f"master.{name}", weight if master is weight else None)
            if exact is None:
                raise UserError(
                    f"--dtype: the checkpoint was trained in float32 throughout, not {weight.dtype}; "
                    "resume with --dtype float32"
                )
            with torch.no_grad():
                master.copy_(exact)
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in state]
            if keys:
                self.optimizer.state[master] = {k: state[f"{k}.{name}"].to(master.device) for k in keys}
        self._publish()

    def _gradients(self, batch: Batch) -> dict[str, float]:
        """Leave the whole step's gradient, all processes included, in the masters; the step's metrics."""
        rows = self._backward(batch)
        self.world.sum_gradients(self.masters)
        return self._merged(self.world.gather(rows))

    def _backward(self, batch: Batch) -> list[list[float]]:
        """Add this process's gradient to the masters; of each micro-batch its loss and its metrics."""
        rows: list[Tensor] = []
        with memory_limited_by("--micro-tokens", self.micro_tokens):
            for micro in micro_batches(batch, self.micro_tokens):
                loss, stats, tokens, live = self.forward(micro)
                loss.backward()
                with torch.no_grad():
                    seen = tokens[live].with_(
                        stats.logp[live], None if stats.entropy is None else stats.entropy[live]
                    )
                    rows.append(self._measure(loss.detach(), seen))
        return torch.stack(rows).tolist() if rows else []

    def _measure(self, loss: Tensor, seen: Tokens) -> Tensor:
        """A micro-batch's row of numbers, float64, for `_merged`."""
        measured = self.algorithm.metrics(seen)
        sums = torch.stack([loss, *(measured[name] for name in METRICS)])
        return torch.cat([sums.double(), mismatch(self.algorithm.corrected(seen))])

    def _merged(self, rows: list[list[float]]) -> dict[str, float]:
        """The step's metrics from the rows of every micro-batch of every process."""
        return _merge(rows)

    def _accumulate_in_float32(self) -> None:
        """Gradients of low-precision weights move to their float32 master as soon as autograd has made
        them.
        """

        def move(master: Tensor) -> Any:
            def hook(weight: Tensor) -> None:
                if weight.grad is not None:
                    master.grad = (
                        weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                    )
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


def token_columns(batch: Batch, rows: Tensor) -> Tokens:
    """The batch's tokens 1..T-1 as an algorithm sees them; `rows` are the live ones."""
    optional: dict[str, Any] = {
        n: None if getattr(batch, n) is None else getattr(batch, n)[1:] for n in OPTIONAL
    }
    return Tokens(
        old_logp=batch.old_logp[1:],
        advantage=batch.advantage[1:],
        weight=batch.weight[1:],
        cu_seqlens=batch.live_ends,
        live=rows.numel(),
        **optional,
    )


def _merge(rows: list[list[float]]) -> dict[str, float]:
    """The step's metrics from the loss and the metrics of every micro-batch of every process; of no token,
    the loss alone.
    """
    tokens = 1 + METRICS.index("tokens")
    if not any(row[tokens] for row in rows):  # a ratio of 0 would look like a result
        return {"loss": math.fsum(row[0] for row in rows), "num_tokens": 0.0}
    table = torch.tensor(rows, dtype=torch.float64)
    each = [dict(zip(METRICS, row.unbind(), strict=True)) for row in table[:, 1 : 1 + len(METRICS)]]
    merged = {k: float(v) for k, v in merge_metrics(each).items()} | merge_mismatch(
        table[:, 1 + len(METRICS) :]
    )
    clipped = merged["clip_low"] + merged["clip_high"] + merged["clip_cap"]
    return merged | {"loss": float(table[:, 0].sum()), "num_tokens": merged["tokens"], "clip_region": clipped}
