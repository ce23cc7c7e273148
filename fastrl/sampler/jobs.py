"""The sequences of one call: which there are, their records, and the groups in which they are queued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from fastrl.batch.transfer import fetch, send
from fastrl.batch.types import Rollouts
from fastrl.errors import UserError
from fastrl.kernels._rows import put_rows
from fastrl.kernels.advance import LENGTH
from fastrl.sampler.engine import Engine
from fastrl.sampler.params import SamplingParams
from fastrl.sampler.queue import Request, RequestGroup
from fastrl.sampler.state import REASONS, UNFINISHED, State


@dataclass(frozen=True, slots=True)
class Job:
    """A sequence to make.

    prompt, index   its prompt, and that prompt's place in the call
    length, drawn   tokens that it has, and how many of them were drawn
    budget          tokens that may be drawn
    number          the key of its randomness
    origin          sequences of one origin and prompt share the prompt's pages
    """

    prompt: list[int]
    index: int
    length: int
    drawn: int
    budget: int
    number: int
    origin: tuple[str, int]


def new_jobs(prompt: list[int], index: int, budget: int, numbers: Sequence[int]) -> list[Job]:
    """The samples of a prompt, one for each of `numbers`."""
    origin = ("new", index)
    return [Job(prompt, index, len(prompt), 0, budget, number, origin) for number in numbers]


def carried_jobs(carried: Rollouts | None, params: SamplingParams) -> list[Job]:
    """Unfinished sequences of earlier calls, to go on as they were left."""
    if carried is None:
        return []
    if carried.sequence is None:
        raise UserError(
            "carried: expected rollouts of this sampler, which number their sequences, "
            "got some without numbers"
        )
    for i, reason in enumerate(carried.finish_reason):
        if reason != REASONS[UNFINISHED]:
            raise UserError(
                f"carried: expected unfinished sequences only; sequence {i} ended with {reason!r}"
            )

    zero = carried.prompt_lengths.new_zeros(1)
    before = torch.cat([zero, carried.completion_mask.cumsum(0)])
    columns = (carried.tokens, carried.cu_seqlens, before, carried.prompt_lengths, carried.prompt_index)
    read = (x.tolist() for x in fetch([*columns, carried.sequence]))
    tokens, ends, drawn_before, prompt_lengths, prompt_index, numbers = read

    jobs = []
    for i, number in enumerate(numbers):
        start, end, index = ends[i], ends[i + 1], prompt_index[i]
        prompt = tokens[start : start + prompt_lengths[i]]
        drawn = drawn_before[end] - drawn_before[start]
        origin = ("carried", index)
        jobs.append(Job(prompt, index, end - start, drawn, params.max_new_tokens, number, origin))
    return jobs


def write_records(state: State, jobs: Sequence[Job], carried: Rollouts | None) -> None:
    """The records of sequences that have not started yet: prompts, and everything the carried ones have."""
    records, S = state.records, len(jobs)
    for column in records:
        column[:S] = 0
    lengths = torch.tensor([job.length for job in jobs])
    keys = torch.tensor([job.number for job in jobs])
    new = jobs[0 if carried is None else len(carried) :]
    host = [lengths, keys, places_of(lengths, state.C), _prompt_tokens(new)]
    on_device, keys, places, tokens = send(host, state.device)

    state.key[:S] = keys
    records.length[:S] = on_device
    if carried is not None:
        tokens = torch.cat([carried.tokens, tokens])
        _write_carried(state, carried, places[: len(carried.tokens)])
    put_rows(records.tokens.view(-1), places, tokens)


def places_of(lengths: Tensor, width: int) -> Tensor:
    """Where the tokens of sequences of these lengths (S,) lie in rows of `width`, sequence by sequence.  Both
    are on the host.
    """
    inside = torch.arange(width) < lengths[:, None]
    return inside.flatten().nonzero().squeeze(1)


def _prompt_tokens(jobs: Sequence[Job]) -> Tensor:
    """The prompts of the jobs, end to end; each is converted once, however many samples it has."""
    prompts = {id(job.prompt): torch.tensor(job.prompt, dtype=torch.int64) for job in jobs}
    if not jobs:
        return torch.empty(0, dtype=torch.int64)
    return torch.cat([prompts[id(job.prompt)] for job in jobs])


def _write_carried(state: State, carried: Rollouts, places: Tensor) -> None:
    """The numbers of the carried sequences' tokens, which come first in the records."""
    records = state.records
    pairs = (
        (records.logp, carried.logp),
        (records.behaviour_logp, carried.behaviour_logp),
        (records.entropy, carried.entropy),
        (records.chosen, carried.completion_mask),
        (records.version, carried.weight_version),
    )
    for record, column in pairs:
        put_rows(record.view(-1), places, column.to(record.dtype))


def queue_jobs(engine: Engine, jobs: Sequence[Job], max_lengths: Sequence[int]) -> None:
    """Queue the jobs, those of one prompt as a group.  A carried one that already has all it may draw or hold
    has ended.
    """
    records = engine.state.records
    over, waiting = [], []
    for i, job in enumerate(jobs):
        if job.drawn >= job.budget or job.length >= max_lengths[i]:
            over.append(i)
        else:
            waiting.append((i, job))
    if over:
        (ended,) = send([torch.tensor(over)], records.finish.device)
        records.finish.index_fill_(0, ended, LENGTH)

    for _, same in groupby(waiting, key=lambda pair: (pair[1].origin, pair[1].prompt)):
        members = list(same)
        first, job = members[0]
        group = RequestGroup(records.tokens[first, : len(job.prompt)])
        engine.add(
            [Request(i, group, job.length, job.drawn, job.budget, max_lengths[i]) for i, job in members]
        )
