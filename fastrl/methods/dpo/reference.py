"""Preferences with their reference model: live, or its log-probs of a dataset, computed once and kept in the
run's folder.

The file holds what they were computed from as a fingerprint: another model, dataset, tokenizer or number of
steps computes them anew.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastrl.algorithms.preference import Preference
from fastrl.batch.transfer import send
from fastrl.batch.types import Batch
from fastrl.config import Dpo
from fastrl.data import dataset
from fastrl.data.pairs import Unit
from fastrl.methods.dpo.batches import Baseline, Items, LogProbs, Preferences, pack_units
from fastrl.methods.dpo.units import UnitEncoder, load_units
from fastrl.methods.method import Context
from fastrl.model.language import LanguageModel
from fastrl.parallel.world import World
from fastrl.train.source import order

PreferenceContext = Context[Dpo, Preference, LanguageModel]
FILE = "reference.safetensors"
CHUNK = 1024  # units tokenised and packed at a time


def preference_source(
    context: PreferenceContext, arithmetic: Callable[[Dpo], AbstractContextManager[None]]
) -> tuple[Preferences, int]:
    """The pairs of a run with their reference, as the loss and `--reference` ask for it, and the longest
    sequence to expect, tokens.

    arithmetic(config) -> what the learner computes under, so that the reference's log-probs are computed
    alike
    """
    config, algorithm = context.config, context.algorithm
    encode = UnitEncoder(config, algorithm.paired, context.tokenizer, context.model.config)
    items, size = load_units(encode, context.task, context.world)
    context.tell(items, size, "pairs" if algorithm.paired else "labelled completions")

    build = partial(
        Preferences,
        items,
        size,
        algorithm,
        count=config.prompts,
        seed=config.seed,
        device=context.device,
        world=context.world,
    )
    if not algorithm.reference:
        return build(), encode.longest

    live = config.reference == "live" or algorithm.mismatched
    frozen = _frozen_logp(context, arithmetic, live)
    if live:
        limit = min(encode.longest, config.micro_tokens)
        baseline = Baseline(lambda batch: context.logp(context.model, batch), frozen, limit)
        return build(reference=lambda indices, batch: frozen(batch), baseline=baseline), encode.longest

    model = identity(config.model, config.seed, context.model.dtype)
    known = precompute(
        Path(config.output_dir),
        items,
        drawn(size, config.seed, config.steps * config.prompts),
        frozen,
        model=f"{model} exact={config.exact}",
        device=context.device,
        world=context.world,
    )
    return build(reference=known), encode.longest


def _frozen_logp(
    context: PreferenceContext, arithmetic: Callable[[Dpo], AbstractContextManager[None]], live: bool
) -> LogProbs:
    """Log-probs under the model that the run began with."""
    config = context.config

    @cache
    def frozen() -> LanguageModel:
        # Before the first step the model itself is the reference.
        return context.model if not live and not config.resume else context.reference_model()

    def logp(batch: Batch) -> Tensor:
        with arithmetic(config):
            return context.logp(frozen(), batch)

    return logp


class Precomputed:
    """Log-probs by item: those of item items[i] are logp[ends[i]:ends[i+1]], one per token that counts in the
    loss, fp32 nats.
    """

    def __init__(self, logp: Tensor, items: Tensor, ends: Tensor) -> None:
        self.logp, self.items, self.ends = logp, items, ends
        self.place = {item: i for i, item in enumerate(items.tolist())}

    def __call__(self, indices: Sequence[int], batch: Batch) -> Tensor:
        """(T,) of the batch made of the items `indices`, in this order; 0 where a token does not count."""
        ends = self.ends.tolist()
        parts = [self.logp[ends[p] : ends[p + 1]] for p in (self.place[i] for i in indices)]
        out = torch.zeros(batch.weight.shape, dtype=batch.weight.dtype)
        out[batch.host.mask] = torch.cat([*parts, self.logp[:0]])
        return send([out], batch.weight.device)[0]


def drawn(size: int, seed: int, count: int) -> list[int]:
    """The items that a run of `count` draws out of `size` will see, sorted."""
    return list(range(size)) if count >= size else sorted(set(order(size, seed, 0, count)))


def precompute(
    folder: Path,
    items: Items,
    indices: Sequence[int],
    logp: Callable[[Batch], Tensor],
    *,
    model: str,
    device: torch.device,
    world: World,
) -> Precomputed:
    """The reference log-probs of `indices`: from the file in `folder` if it fits, else by `logp(batch)` ->
    (T,), and written there.

    model  what identifies the reference model (see `identity`)
    """
    wanted = _fingerprint(items, indices, model)
    path = folder / FILE
    found = _read(path, wanted)
    if world.max(float(found is None))[0] == 0 and found is not None:
        return found
    values, counts = _compute(items, [indices[i] for i in world.share(len(indices))], logp, device)
    values = torch.cat([*world.gather([values]), torch.empty(0)])
    counts = torch.cat(world.gather([counts]))
    made = Precomputed(
        values,
        torch.tensor(list(indices), dtype=torch.int64),
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
    )
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.new")
        save_file(
            {"logp": made.logp, "items": made.items, "ends": made.ends},
            partial,
            metadata={"fingerprint": wanted},
        )
        os.replace(partial, path)
    world.barrier()
    return made


def identity(model: str, seed: int, dtype: torch.dtype) -> str:
    """What tells one reference model from another: its files' names, sizes and times, or a configuration's
    text and the seed.
    """
    path = Path(model)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".json"))
        return f"{dtype} " + " ".join(f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)
    return f"{dtype} {seed} " + (
        path.read_text(encoding="utf-8", errors="replace") if path.is_file() else model
    )


def _chunks(items: Items, indices: Sequence[int]) -> Iterator[list[Unit]]:
    for a in range(0, len(indices), CHUNK):
        yield items(indices[a : a + CHUNK])


def _fingerprint(items: Items, indices: Sequence[int], model: str) -> str:
    if isinstance(items, dataset.Items) and items.table is not None:  # millions of units, never as Python's
        numbers = torch.tensor(indices, dtype=torch.int64).numpy().tobytes()
        parts = (model.encode(), numbers, items.table.digest().encode())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    digest = hashlib.sha256(f"{model}\n{list(indices)}\n".encode())
    for units in _chunks(items, indices):
        digest.update(
            repr([[(one.sample.tokens, one.sample.mask) for one in unit] for unit in units]).encode()
        )
    return digest.hexdigest()


def _compute(
    items: Items, indices: Sequence[int], logp: Callable[[Batch], Tensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The log-probs of the tokens that count, end to end, and how many each item has."""
    values, counts = [torch.empty(0)], [torch.empty(0, dtype=torch.int64)]
    for units in _chunks(items, indices):
        batch = pack_units(units, 1, device)
        values.append(logp(batch).float().cpu()[batch.host.mask])
        counts.append(torch.tensor([sum(sum(one.sample.mask) for one in unit) for unit in units]))
    return torch.cat(values), torch.cat(counts)


def _read(path: Path, fingerprint: str) -> Precomputed | None:
    """The file's log-probs; None where there is no whole file of this fingerprint."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") != fingerprint:
                return None
            return Precomputed(*(file.get_tensor(name) for name in ("logp", "items", "ends")))
    except SafetensorError:
        return None
