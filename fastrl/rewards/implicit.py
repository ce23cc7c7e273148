"""The reward that a policy trained on preferences has in it: how much more likely than its reference it finds
a completion.

    r(x, y) = beta (log pi(y | x) - log pi_ref(y | x)),     summed over the completion's tokens, nats

DPO's policy is the optimum of this reward under a KL to the reference, up to a number of the prompt alone,
which a group's baseline takes away.  Source: 2305.18290, equation 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl import ops
from fastrl.batch.pack import plan
from fastrl.data.encode import Sample, encode_all
from fastrl.data.rows import Row
from fastrl.errors import UserError
from fastrl.model.adapter import load_model
from fastrl.model.tokenizer import load_tokenizer

BETA = 0.1
MAX_TOKENS = 16384  # of one forward pass


def implicit_reward(
    names: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Callable[[Sequence[Any], Sequence[Any]], list[float]]:
    """The reward function of `POLICY,REFERENCE` or `POLICY,REFERENCE,BETA`: two folders, and beta (0.1).

    It reads text with the policy's own tokenizer and chat template, the end-of-sequence token included, as
    training on preferences did; what goes beyond the policies' context does not count.
    Memory:  both models, and MAX_TOKENS tokens of one forward pass.
    Raises:  UserError for another form, folders that are not there, no tokenizer, and vocabularies that
             differ.
    """
    folders, beta = _parts(names)
    policy, reference = (
        load_model(folder, dtype=dtype, device=device).requires_grad_(False) for folder in folders
    )
    sizes = [model.config.vocab_size for model in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise UserError(
            "--reward: expected a policy and its reference, with one vocabulary, "
            f"got {sizes[0]} and {sizes[1]} in {names}"
        )
    tokenizer = load_tokenizer(None, folders[0])
    limit = min(model.config.max_position_embeddings for model in (policy, reference))

    def implicit_reward(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        fields = [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]
        samples = encode_all(
            [Row(f"completion {i}", "prompt-completion", f) for i, f in enumerate(fields)], tokenizer
        )
        cut = [Sample(s.tokens[:limit], s.mask[:limit]) for s in samples]
        ahead = sequence_logp(policy, cut) - sequence_logp(reference, cut)
        return (beta * ahead).tolist()

    return implicit_reward


def _parts(names: str) -> tuple[list[str], float]:
    parts = [part.strip() for part in names.split(",")]
    form = "implicit:POLICY,REFERENCE or implicit:POLICY,REFERENCE,BETA, two folders and a positive number"
    try:
        beta = float(parts[2]) if len(parts) == 3 else BETA
    except ValueError:
        beta = math.nan
    if not (2 <= len(parts) <= 3 and 0 < beta < math.inf):
        raise UserError(f"--reward: expected {form}, got implicit:{names}")
    for folder in parts[:2]:
        if not folder or not Path(folder).is_dir():
            raise UserError(f"--reward: expected {form}; {folder or 'the empty name'} is no folder")
    return parts[:2], beta


@torch.no_grad()
def sequence_logp(model: Any, samples: Sequence[Sample], max_tokens: int = MAX_TOKENS) -> Tensor:
    """(S,) float64 on the host: summed log-probs of each sample's tokens that count, nats."""
    lengths = [len(s.tokens) for s in samples]
    out = torch.zeros(len(samples), dtype=torch.float64)
    for some in plan(lengths, max(max_tokens, *lengths, 1)):
        tokens = torch.tensor([t for i in some for t in samples[i].tokens], device=model.device)
        mask = torch.tensor([m for i in some for m in samples[i].mask], device=model.device)
        ends = torch.tensor(
            [0, *accumulate(lengths[i] for i in some)], dtype=torch.int32, device=model.device
        )
        rows = mask[1:].nonzero().squeeze(1)
        hidden = model(tokens, ends)[rows]
        stats = ops.linear_logp(hidden, model.head_weight, tokens[rows + 1], bias=model.head_bias)
        each = torch.zeros(len(tokens), dtype=torch.float64, device=model.device)
        each[rows + 1] = stats.logp.double()
        out[some] = torch.segment_reduce(each, "sum", offsets=ends.long()).cpu()
    return out
