"""The implicit reward of a policy trained on preferences: how much more likely a completion is under it than
under its reference.

    r(x, y) = beta (log pi(y | x) - log pi_ref(y | x)),     summed over the completion's tokens, nats

DPO's policy is the optimum of this reward under a KL to the reference, up to a term that depends on the
prompt alone and cancels in a group's baseline.  Source: 2305.18290, equation 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fastrl import ops
from fastrl.batch.pack import plan
from fastrl.data.encode import Sample, encode_all
from fastrl.data.messages import as_read, columns_of_rows
from fastrl.data.rows import Row
from fastrl.errors import UserError
from fastrl.files import hub_advice
from fastrl.model.adapter import load_model
from fastrl.model.folder import model_folder
from fastrl.model.language import LanguageModel
from fastrl.model.tokenizer import load_tokenizer

BETA = 0.1
MAX_TOKENS = 16384  # of one forward pass


def implicit_reward(
    names: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust: bool = False,
) -> Callable[..., list[float]]:
    """The reward function of `POLICY,REFERENCE` or `POLICY,REFERENCE,BETA`: two folders, and beta (0.1).

    It reads text as training on preferences did: with the policy's own tokenizer and chat template, and an
    end-of-sequence token.  Tokens beyond the policies' context do not count.
    Memory:  both models, and MAX_TOKENS tokens of one forward pass.
    Raises:  UserError for another form, missing folders, no tokenizer, and vocabularies that differ.
    """
    folders, beta = _parts(names)
    policy, reference = (
        load_model(folder, dtype=dtype, device=device, trust=trust).requires_grad_(False)
        for folder in folders
    )
    sizes = [model.config.vocab_size for model in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise UserError(
            "--reward: expected a policy and its reference, with one vocabulary, "
            f"got {sizes[0]} and {sizes[1]} in {names}"
        )
    tokenizer = load_tokenizer(None, folders[0], trust=trust)
    limit = min(model.config.max_position_embeddings for model in (policy, reference))

    def implicit_reward(
        prompts: Sequence[object],
        completions: Sequence[object],
        tools: Sequence[object] | None = None,
        chat_template_kwargs: Sequence[object] | None = None,
    ) -> list[float]:
        extras = columns_of_rows(len(prompts), tools=tools, chat_template_kwargs=chat_template_kwargs)
        rows = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            fields = {**extras[i], "prompt": prompt, "completion": as_read(prompt, completion)}
            rows.append(Row(f"completion {i}", "prompt-completion", fields))
        samples = [Sample(s.tokens[:limit], s.mask[:limit]) for s in encode_all(rows, tokenizer)]
        margin = sequence_logp(policy, samples) - sequence_logp(reference, samples)
        rewards: list[float] = (beta * margin).tolist()
        return rewards

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
    folders = [model_folder(part, "--reward") for part in parts[:2]]
    for part, folder in zip(parts, folders, strict=False):
        if not part or not folder.is_dir():
            advice = hub_advice(part, "--reward implicit:") if part else ""
            raise UserError(f"--reward: expected {form}; {part or 'the empty name'} is no folder{advice}")
    return [str(folder) for folder in folders], beta


@torch.no_grad()
def sequence_logp(model: LanguageModel, samples: Sequence[Sample], max_tokens: int = MAX_TOKENS) -> Tensor:
    """(S,) float64 on the host: summed log-probs of each sample's tokens that count, nats."""
    lengths = [len(s.tokens) for s in samples]
    sums = torch.zeros(len(samples), dtype=torch.float64)
    for members in plan(lengths, max(max_tokens, *lengths, 1)):
        sums[members] = _sums(model, [samples[i] for i in members]).cpu()
    return sums


def _sums(model: LanguageModel, samples: Sequence[Sample]) -> Tensor:
    """`sequence_logp` of samples that are forwarded together, on the device."""
    device = model.device
    tokens = torch.tensor([t for s in samples for t in s.tokens], device=device)
    mask = torch.tensor([m for s in samples for m in s.mask], device=device)
    ends = [0, *accumulate(len(s.tokens) for s in samples)]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)

    # row t predicts token t + 1
    rows = mask[1:].nonzero().squeeze(1)
    hidden = model(tokens, cu_seqlens)[rows]
    stats = ops.linear_logp(hidden, model.head_weight, tokens[rows + 1], bias=model.head_bias)
    logp = torch.zeros(len(tokens), dtype=torch.float64, device=device)
    logp[rows + 1] = stats.logp.double()
    return torch.segment_reduce(logp, "sum", offsets=cu_seqlens.long())
