"""Columns: one declaration carries a column through selecting, joining, micro-batches, partial rollouts and a
checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import pytest
import torch
from torch import Tensor

from fastrl.batch import columns
from fastrl.batch.columns import Ragged, column
from fastrl.batch.pack import micro_batches
from fastrl.batch.types import Batch, Rollouts, Tokens, token_columns
from fastrl.methods.grpo import partial
from fastrl.methods.grpo.partial import PartialRollouts

LENGTHS = (3, 1, 4, 2)
PATCHES = (2, 0, 1, 3)  # rows of the ragged column


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted(Rollouts):
    """Rollouts with one more column of each kind."""

    noise: Tensor = field(metadata=column("T"))
    prize: Tensor = field(metadata=column("S"))
    images: Ragged = field(metadata=column("ragged"))
    title: list[str] | None = field(default=None, metadata=column("S"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantedBatch(Batch):
    noise: Tensor = field(metadata=column("T"))
    prize: Tensor = field(metadata=column("S"))
    images: Ragged | None = field(default=None, metadata=column("ragged"))


def ends(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def of_tokens(numbers: list[int]) -> Tensor:
    """(T,) 10 * the sequence's number + the token's place in it."""
    return torch.tensor([10 * i + t for i in numbers for t in range(LENGTHS[i])], dtype=torch.int64)


def images_of(numbers: list[int]) -> Ragged:
    """Rows (N, 2) of the sequence's number and the row's place."""
    rows = [[float(i), float(k)] for i in numbers for k in range(PATCHES[i])]
    return Ragged(torch.tensor(rows).view(-1, 2), ends(tuple(PATCHES[i] for i in numbers)))


def planted(numbers: list[int], reason: str = "stop") -> Planted:
    """The sequences of these numbers; every column tells whose it is."""
    tokens = of_tokens(numbers)
    number = torch.tensor(numbers, dtype=torch.int64)
    return Planted(
        tokens=tokens,
        cu_seqlens=ends(tuple(LENGTHS[i] for i in numbers)).to(torch.int32),
        completion_mask=tokens % 10 > 0,
        prompt_index=torch.zeros_like(number),
        prompt_lengths=torch.ones_like(number),
        logp=-tokens.float(),
        behaviour_logp=-tokens.float() - 0.5,
        entropy=tokens.float() + 0.25,
        weight_version=tokens * 2,
        finish_reason=[reason] * len(numbers),
        text=[f"text {i}" for i in numbers],
        sequence=number + 100,
        noise=tokens.double() + 0.125,
        prize=number.float() + 0.5,
        title=[f"title {i}" for i in numbers],
        images=images_of(numbers),
    )


def planted_batch(numbers: list[int]) -> PlantedBatch:
    source = planted(numbers)
    vectors = {name: source.tokens.float() for name in ("advantage", "old_logp", "weight")}
    return PlantedBatch(
        tokens=source.tokens,
        cu_seqlens=source.cu_seqlens,
        mask=source.completion_mask,
        noise=source.noise,
        prize=source.prize,
        images=source.images,
        **vectors,
    )


def differing(a: object, b: object, leave: tuple[str, ...] = ()) -> list[str]:
    """Names of the fields that are not equal, dtypes included."""
    assert type(a) is type(b)
    found = []
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        pairs = [(x.values, y.values), (x.ends, y.ends)] if isinstance(x, Ragged) else [(x, y)]
        for one, other in pairs:
            if isinstance(one, Tensor) and isinstance(other, Tensor):
                same = one.dtype == other.dtype and torch.equal(one, other)
            else:
                same = one == other
            if not same and f.name not in leave:
                found.append(f.name)
    return found


@pytest.mark.parametrize("samples", [[2, 0], [1], [3, 3, 1], [], [0, 1, 2, 3]])
def test_every_column_follows_its_sequences(samples):
    """Wrong implementations: a per-sequence column indexed by tokens; a ragged one cut by the tokens' ends; a
    list left whole; the order of the batch instead of the order asked for.
    """
    assert differing(planted([0, 1, 2, 3]).select(samples), planted(samples)) == []
    assert differing(planted_batch([0, 1, 2, 3]).select(samples), planted_batch(samples)) == []


def test_what_is_joined_is_what_was_cut():
    """Wrong implementations: ragged ends that start again at 0 in the second part; a part without any rows
    that shifts the next; prompt numbers of two calls that coincide.
    """
    parts = [planted([1]), planted([0, 3]), planted([]), planted([2])]
    joined = Rollouts.join(parts)
    assert differing(joined, planted([1, 0, 3, 2]), leave=("prompt_index",)) == []
    assert joined.prompt_index.tolist() == [0, 1, 1, 2], "each call counts its own prompts"
    assert columns.join(parts[:1]) is parts[0]
    assert (
        differing(columns.join([planted_batch([2]), planted_batch([0, 1])]), planted_batch([2, 0, 1])) == []
    )


def test_a_column_that_a_part_lacks():
    """Wrong implementations: images of half the sequences, which then stand beside the other half's; a crash
    where one part has no decoded text.
    """
    whole, without = planted_batch([0]), replace(planted_batch([1]), images=None)
    with pytest.raises(
        ValueError, match="images: expected a column of every part or of none, got it in 1 of 2"
    ):
        columns.join([without, whole])
    assert columns.join([without, without]).images is None
    assert Rollouts.join([planted([0]), replace(planted([1]), text=None)]).text is None


@pytest.mark.parametrize("budget", [4, 6])
def test_micro_batches_carry_every_column(budget):
    parts = list(micro_batches(planted_batch([0, 1, 2, 3]), budget))
    assert len(parts) > 1 and all(isinstance(p, PlantedBatch) for p in parts)
    seen = []
    for part in parts:
        numbers = (part.prize - 0.5).long().tolist()
        assert differing(part, planted_batch(numbers)) == []
        seen += numbers
    assert sorted(seen) == [0, 1, 2, 3]


def test_partial_rollouts_and_their_checkpoint_carry_every_column(monkeypatch):
    """Wrong implementations: a list of names beside the declarations, which the new column is not in; ragged
    rows of a resumed sequence taken from the step before.
    """
    monkeypatch.setattr(partial, "Rollouts", Planted)
    kept = PartialRollouts(2)
    first = replace(planted([0, 1, 2, 3]), finish_reason=["stop", "unfinished", "stop", "stop"])
    items, done = kept.take_finished(first, [7, 8])
    assert items == [8] and differing(done, planted([2, 3]), leave=("prompt_index",)) == []

    state = kept.state()
    assert {"noise", "prize", "images", "images.ends"} <= state.keys()
    assert not {"prompt_index", "text"} & state.keys(), "both are made anew"
    resumed = PartialRollouts(2)
    resumed.load_state(state, None, torch.device("cpu"))
    (before,), (after,) = kept.pending, resumed.pending
    assert before.number == after.number == 7 and after.unfinished == [1]
    # a list is encoded by whoever keeps it, as finish_reason is
    assert differing(after.rollouts, before.rollouts, leave=("text", "title")) == []

    part = resumed.unfinished()
    assert (
        isinstance(part, Planted)
        and differing(part, replace(planted([1]), text=None, title=None), leave=("finish_reason",)) == []
    )
    items, done = resumed.take_finished(replace(part, finish_reason=["length"], noise=part.noise + 1), [])
    assert items == [7] and done.finish_reason == ["stop", "length"]
    expected = planted([0, 1])
    assert done.noise.tolist() == [*expected.noise[:3].tolist(), *(expected.noise[3:] + 1).tolist()]
    assert torch.equal(done.images.values, expected.images.values)


def test_a_checkpoint_returns_every_tensor():
    """Wrong implementations: the ends of ragged rows lost, or on another device; an absent optional column
    that fails.
    """
    whole = planted([3, 0, 1])
    others = {"prompt_index": whole.prompt_index, "finish_reason": whole.finish_reason}
    others |= {"text": whole.text, "title": whole.title}
    back = columns.from_tensors(Planted, columns.as_tensors(whole), torch.device("cpu"), **others)
    assert differing(back, whole) == []

    batch = replace(planted_batch([3, 0]), images=None)
    back = columns.from_tensors(PlantedBatch, columns.as_tensors(batch), torch.device("cpu"))
    assert differing(back, batch) == []


def test_a_field_without_an_axis_is_refused():
    """Wrong implementation: it stays as it is while its sequences move."""

    @dataclass(frozen=True, kw_only=True)
    class Forgotten:
        cu_seqlens: Tensor
        tokens: Tensor = field(metadata=column("T"))
        score: Tensor

    it = Forgotten(cu_seqlens=torch.tensor([0, 2]), tokens=torch.arange(2), score=torch.zeros(1))
    with pytest.raises(TypeError, match=r"Forgotten\.score: expected a declared axis, got a plain field"):
        columns.select(it, [0])
    assert columns.packed_columns(Rollouts) and columns.packed_columns(Batch)


def test_ends_of_ragged_rows_stay_on_the_host():
    with pytest.raises(ValueError, match="ends: expected a tensor on the host, got meta"):
        Ragged(torch.zeros(2), torch.tensor([0, 2], device="meta"))


def test_an_algorithm_sees_the_columns_of_its_tokens():
    """Wrong implementations: a column of the batch that the view of the tokens leaves out, or does not shift
    with the others.
    """
    assert columns.columns(Tokens).keys() <= columns.columns(Batch).keys()
    batch = planted_batch([0, 2])
    names = [name for name, value in columns.columns(Tokens).items() if value.axis == "T"]
    batch = replace(batch, **{name: batch.tokens.float() + i for i, name in enumerate(names)})
    rows = batch.mask[1:].nonzero().squeeze(1)
    seen = token_columns(batch, rows)
    for name in names:
        assert torch.equal(getattr(seen, name), getattr(batch, name)[1:]), name
        assert torch.equal(getattr(seen[rows], name), getattr(batch, name)[1:][rows]), name
