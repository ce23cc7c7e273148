"""The weights being trained: float32 masters, AdamW, the learning-rate schedule, clipping.

Gradients of low-precision weights accumulate in their float32 master.  After an optimizer step the masters
are written back into the weights' own storage, which the sampler reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastrl.config import Optim
from fastrl.errors import UserError
from fastrl.train.source import Metrics, State

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter
SCHEDULES: dict[str, Callable[[float], float]] = {  # progress in [0, 1] after warm-up -> fraction of the peak
    "constant": lambda x: 1.0,
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


class NotFinite(UserError):
    """A loss or a gradient that is NaN or infinite."""


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The learning rate of `step` (counted from 0) of a run of `steps`."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup

    progress = min(1.0, (step - optim.warmup) / max(1, steps - optim.warmup))
    fraction = SCHEDULES[optim.schedule](progress)
    return optim.lr * (optim.floor + (1 - optim.floor) * fraction)


class MasterWeights:
    """Trainable parameters with their float32 masters and AdamW.

    names, weights  the parameters that are trained, in the model's order
    masters         the weights themselves where they are float32 or wider, else float32 copies
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], optim: Optim, *, steps: int) -> None:
        trained = [(name, p) for name, p in named if p.requires_grad]
        self.optim, self.steps = optim, steps
        self.names = [name for name, _ in trained]
        self.weights: list[Tensor] = [p for _, p in trained]
        self.masters = [p if p.dtype.itemsize >= 4 else p.detach().float() for p in self.weights]
        self._accumulate_in_float32()

        matrices = [p for p in self.masters if p.ndim >= 2]
        vectors = [p for p in self.masters if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": optim.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )

    def norm(self) -> Tensor:
        """(1,) the L2 norm of the gradient in the masters, on their device; 0 without one."""
        gradients = [p.grad for p in self.masters if p.grad is not None]
        if not gradients:
            return torch.zeros(1, device=self.masters[0].device if self.masters else None)
        return nn.utils.get_total_norm(gradients).view(1)

    def step(self, step: int, loss: float, norm: float) -> Metrics:
        """Clip the gradient in the masters, of this norm, and take AdamW's step, at the learning rate of
        training step `step`.

        Raises:  NotFinite, before any weight is touched, when the loss or the gradient is not finite.
        """
        for name, value in (("loss", loss), ("grad_norm", norm)):
            if not math.isfinite(value):
                raise NotFinite(
                    f"step {step + 1}: {name} is {value}; the weights are those before this update"
                )
        self._clip(norm)

        lr = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return {"grad_norm": norm, "learning_rate": lr}

    def _clip(self, norm: float) -> None:
        """As nn.utils.clip_grads_with_norm_, whose factor is a tensor that it would copy to the device."""
        gradients = [p.grad for p in self.masters if p.grad is not None]
        if self.optim.clip > 0 and gradients:
            factor = (self.optim.clip / (torch.tensor(norm) + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, float(factor))

    def learning_rate(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        return learning_rate(self.optim, step, self.steps)

    def clear(self) -> None:
        """Drop every gradient."""
        for p in (*self.masters, *self.weights):
            p.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Write the masters into the weights' own storage, which the sampler reads."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                weight.copy_(master)

    def state(self) -> State:
        """All that the next step depends on but the weights, by name; with masters where weights are
        narrower.
        """
        out: State = {}
        for name, weight, master in zip(self.names, self.weights, self.masters, strict=True):
            if master is not weight:
                out[f"master.{name}"] = master
            moments = self.optimizer.state.get(master, {})
            out |= {f"{key}.{name}": value for key, value in moments.items()}
        return out

    def load_state(self, state: State) -> None:
        """Restore what `state` returned.  Raises UserError for a float32 state in narrower weights."""
        for name, weight, master in zip(self.names, self.weights, self.masters, strict=True):
            exact = state.get(f"master.{name}", weight if master is weight else None)
            if exact is None:
                raise UserError(
                    f"--dtype: the checkpoint was trained in float32 throughout, not {weight.dtype}; "
                    "resume with --dtype float32"
                )
            with torch.no_grad():
                master.copy_(exact)

            keys = [key for key in ADAMW_STATE if f"{key}.{name}" in state]
            if keys:
                self.optimizer.state[master] = {key: state[f"{key}.{name}"].to(master.device) for key in keys}
        self.publish()

    def _accumulate_in_float32(self) -> None:
        """Move gradients of low-precision weights to their float32 master as soon as they are made."""

        def hook_for(master: Tensor) -> Callable[[Tensor], None]:
            def hook(weight: Tensor) -> None:
                if weight.grad is None:
                    return
                known = master.grad
                master.grad = weight.grad.float() if known is None else known.add_(weight.grad)
                weight.grad = None

            return hook

        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                weight.register_post_accumulate_grad_hook(hook_for(master))
