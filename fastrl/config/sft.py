"""Options of `fastrl sft`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrl.config.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Sft(Run):
    """Supervised fine-tuning on demonstrations: the task's own, or a dataset's completions."""

    turns: Literal["all", "last"] = "all"
    """Which assistant turns of a conversation count in the loss."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread evenly over the vocabulary."""
    z_loss: float = 0.0
    """Weight of the square of each row's log-sum-exp, which keeps logits from drifting."""
    neftune_alpha: float = 0.0
    """Noise on the embeddings in training, uniform within alpha / sqrt(L D) of a sequence of L tokens; 5 to
    15, 0 for none.
    """
    sample_weights: bool = False
    """Weight each line of the dataset by its column `weight`: 2 counts it twice, 0 leaves it out."""
