"""advance: the end of a decode step, against a loop over rows; in PyTorch, and in Triton under the
interpreter.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrl.kernels._backend import use_backend
from fastrl.kernels.advance import Pages, Records, Rows, advance, need, newest
from fastrl.kernels.sample import Sample

PAGE, STOPS = 4, torch.tensor([7, 3, -1])
BACKENDS = ["reference", "cpu", "triton"]


def state(B: int, S: int = 40, C: int = 32, seed: int = 0) -> tuple[Rows, Records, Pages, Sample]:
    """Rows at random lengths, most alive, each on its own pages; some one token before their budget or their
    longest length.
    """
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(2, C - 1, (B,), generator=g)
    drawn = torch.minimum(torch.randint(0, 9, (B,), generator=g), length - 1)
    budget = drawn + torch.randint(1, 4, (B,), generator=g)
    until = torch.minimum(length + torch.randint(1, 9, (B,), generator=g), torch.tensor(C))
    alive = torch.rand(B, generator=g) < 0.8
    N = -(-C // PAGE)
    table = torch.zeros(B, N, dtype=torch.int32)
    own = torch.arange(N) < ((length - 1) // PAGE + 1)[:, None]
    table[own] = torch.arange(1, int(own.sum()) + 1, dtype=torch.int32)
    rows = Rows(
        torch.randperm(S, generator=g)[:B],
        length,
        drawn,
        budget,
        until,
        torch.randint(0, 9, (B,), generator=g),
        alive,
        table,
    )
    floats = [torch.zeros(S + 1, C) for _ in range(3)]
    tokens, lengths = torch.zeros(S + 1, C, dtype=torch.int64), torch.zeros(S + 1, dtype=torch.int64)
    records = Records(tokens, *floats, tokens.bool(), tokens.int(), lengths, lengths.to(torch.int8))
    P = int(own.sum()) + B + 5
    refs = torch.full((P + 1,), -1, dtype=torch.int32)
    refs[: int(own.sum()) + 1] = 1
    pages = Pages(torch.arange(P + 1, dtype=torch.int32).flip(0), torch.tensor([P - int(own.sum())]), refs)
    draw = Sample(torch.randint(0, 9, (B,), generator=g), *(torch.randn(B, generator=g) for _ in range(3)))
    return rows, records, pages, draw


def by_hand(rows: Rows, records: Records, pages: Pages, draw: Sample, version: int) -> int:
    """The same row by row; tokens drawn."""
    total = 0
    for b in range(len(rows.seq)):
        if not rows.alive[b]:
            continue
        s, c, token = int(rows.seq[b]), int(rows.length[b]), int(draw.token[b])
        for record, value in zip(
            records[:6],
            (token, draw.logp[b], draw.behaviour_logp[b], draw.entropy[b], True, version),
            strict=True,
        ):
            record[s, c] = value
        rows.length[b], rows.last[b], records.length[s] = c + 1, token, c + 1
        rows.drawn[b] += 1
        total += 1
        if token in (7, 3):
            records.finish[s] = 1
        elif rows.drawn[b] >= rows.budget[b] or c + 1 >= rows.until[b]:
            records.finish[s] = 2
        rows.alive[b] = records.finish[s] == 0
        if rows.alive[b] and c % PAGE == 0:
            pages.top[0] -= 1
            page = int(pages.free[pages.top[0]])
            rows.table[b, c // PAGE], pages.refs[page] = page, 1
    return total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B", [1, 5, 33])
def test_a_step_is_what_a_loop_over_the_rows_does(B, backend):
    """Wrong implementations: a dead row draws; a stop called length; a page too early, too late, twice, or
    for a row that has ended.
    """
    for seed in range(6):
        rows, records, pages, draw = state(B, seed=seed)
        want = copy.deepcopy((rows, records, pages))
        total, version = torch.tensor([100]), torch.tensor([17])
        with use_backend(backend, "advance"):
            advance(draw, rows, records, pages, stops=STOPS, version=version, total=total, page=PAGE)
        assert total.item() == 100 + by_hand(*want, draw, 17)
        assert all(torch.equal(x, y) for x, y in zip(rows, want[0], strict=True))
        assert all(torch.equal(x[:-1], y[:-1]) for x, y in zip(records, want[1], strict=True))
        assert all(torch.equal(x, y) for x, y in zip(pages, want[2], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_steps_hand_out_every_page_once(backend, monkeypatch):
    """Wrong implementations: blocks of rows that each start at the top of the stack; a page given to two
    rows.
    """
    if backend == "triton":
        from fastrl.kernels._triton import advance as _advance_triton

        monkeypatch.setattr(_advance_triton, "LARGEST_BLOCK", 8)
    rows, records, pages, draw = state(20, C=64, seed=3)
    rows.budget.fill_(1000)
    rows.until.fill_(64)
    nothing = torch.tensor([-1])
    with use_backend(backend, "advance"):
        for _ in range(6):
            advance(
                draw,
                rows,
                records,
                pages,
                stops=nothing,
                version=nothing,
                total=torch.zeros(1, dtype=torch.int64),
                page=PAGE,
            )
    held = rows.table[rows.table > 0]
    assert len(held.unique()) == len(held) and (pages.refs[held.long()] == 1).all()
    free = pages.free[: int(pages.top)]
    assert not set(free.tolist()) & set(held.tolist())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_need_is_what_a_loop_counts(backend):
    """Wrong: pages counted that a row has, or for a last token, which has no key; dead rows."""
    for seed in range(6):
        rows, _, _, _ = state(33, seed=seed)
        with use_backend(backend, "need"):
            alive, pages = need(rows.alive, rows.length, rows.until, PAGE)
        live = [
            (n, u)
            for n, u, on in zip(rows.length.tolist(), rows.until.tolist(), rows.alive.tolist(), strict=True)
            if on
        ]
        missing = [{p // PAGE for p in range(u - 1)} - {p // PAGE for p in range(n)} for n, u in live]
        assert int(alive) == len(live) and int(pages) == sum(len(m) for m in missing)


def test_nothing_is_read_on_the_host():
    """Wrong implementation: a look at a value, which would wait for the device."""
    rows, records, pages, draw = state(9)
    with FakeTensorMode() as fake, use_backend("reference", "advance"):
        rows, records, pages, draw = (
            type(group)(*map(fake.from_tensor, group)) for group in (rows, records, pages, draw)
        )
        numbers = {
            n: fake.from_tensor(torch.tensor(x))
            for n, x in (("stops", [7]), ("version", [1]), ("total", [0]))
        }
        advance(draw, rows, records, pages, page=PAGE, **numbers)


def test_what_does_not_fit_is_named():
    rows, records, pages, draw = state(4)
    rest = {"stops": STOPS, "version": torch.tensor([1]), "total": torch.tensor([0])}
    with pytest.raises(ValueError, match=r"draw.token: expected shape \(B=4\), got \(3,\)"):
        advance(Sample(*(x[:3] for x in draw)), rows, records, pages, page=PAGE, **rest)
    with pytest.raises(ValueError, match="page: expected a positive number of tokens, got 0"):
        advance(draw, rows, records, pages, page=0, **rest)
    with pytest.raises(TypeError, match=r"rows\.table: expected dtype int32, got int64"):
        advance(draw, rows._replace(table=rows.table.long()), records, pages, page=PAGE, **rest)


FIELDS = [
    (g, f)
    for g, of in (("rows", Rows), ("records", Records), ("pages", Pages), ("draw", Sample))
    for f in of._fields
]


@pytest.mark.parametrize("group, field", FIELDS)
def test_every_field_is_checked_before_an_address_is_taken(group, field):
    """Wrong: an int32 or a short array that compiled code reads as if it were an int64 or a whole one."""
    rows, records, pages, draw = state(4)
    given = {"rows": rows, "records": records, "pages": pages, "draw": draw}
    rest = {"stops": STOPS, "version": torch.tensor([1]), "total": torch.tensor([0]), "page": PAGE}
    x = getattr(given[group], field)
    for bad, error in ((x.to(torch.int16), TypeError), (x[..., None], ValueError), (x[:0], ValueError)):
        if field in ("table", "tokens", "refs") and len(bad) == 0:
            continue  # B, S and P are its own
        with pytest.raises(error, match="expected"):
            advance(**(given | {group: given[group]._replace(**{field: bad})}), **rest)
    for name in ("version", "total"):
        with pytest.raises(ValueError, match=rf"{name}: expected shape \(one=1\)"):
            advance(**given, **(rest | {name: torch.zeros(2, dtype=torch.int64)}))


def test_what_does_not_fit_changes_nothing():
    """Wrong: rows moved on before it is found that there is no page for the last of them, or that a page is
    none.
    """
    rest = {"stops": STOPS, "version": torch.tensor([1]), "total": torch.tensor([0]), "page": PAGE}
    for wrong, message in (
        ({"top": torch.tensor([1])}, "pages.top: expected a free page for each of [0-9]+ rows, got 1"),
        ({"top": torch.tensor([10**9])}, "pages.top: expected a free page"),
        ({"free": torch.full((200,), 10**6, dtype=torch.int32)}, r"pages.free: expected in \[0, "),
        ({"seq": torch.full((33,), 41)}, r"rows.seq: expected in \[0, 41\), a row of the records, got 41"),
        (
            {"length": torch.full((33,), 32)},
            r"rows.length: expected in \[0, 32\), a column of the records, got 32",
        ),
        ({"table": torch.zeros(33, 1, dtype=torch.int32)}, "rows.table: expected [0-9]+ columns, got 1"),
    ):
        rows, records, pages, draw = state(33)
        rows = rows._replace(**{k: v for k, v in wrong.items() if k in Rows._fields})
        pages = pages._replace(**{k: v[: len(pages.free)] for k, v in wrong.items() if k in Pages._fields})
        before = copy.deepcopy((rows, records, pages))
        with use_backend("cpu", "advance"), pytest.raises(ValueError, match=message):
            advance(draw, rows, records, pages, **rest)
        for now, then in zip((rows, records, pages), before, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(now, then, strict=True))


def test_need_names_what_does_not_fit():
    """Wrong: a division by a page of no tokens, which ends the process."""
    rows, *_ = state(4)
    with pytest.raises(ValueError, match="page: expected a positive number of tokens, got 0"):
        need(rows.alive, rows.length, rows.until, 0)
    with pytest.raises(TypeError, match="until: expected dtype int64, got int32"):
        need(rows.alive, rows.length, rows.until.int(), PAGE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B", [0, 1, 7, 130])
def test_where_the_newest_tokens_go(backend, B):
    """Wrong: the page after the newest token's, or that of another row; a key taken by row, not by sequence;
    rows past a block of the kernel.
    """
    rows, records, _, _ = state(B, S=140)
    key = torch.randint(2**62, (records.tokens.shape[0],))
    with use_backend(backend, "advance"):
        got = newest(rows, records, key, PAGE)
    assert got.length.dtype == torch.int32 and got.slot.dtype == torch.int64
    for b in range(B):
        at = int(rows.length[b]) - 1
        assert int(got.position[b]) == at and int(got.length[b]) == at + 1
        assert int(got.slot[b]) == int(rows.table[b, at // PAGE]) * PAGE + at % PAGE
        assert int(got.key[b]) == int(key[rows.seq[b]])


def test_newest_names_the_argument():
    rows, records, _, _ = state(3)
    key = torch.zeros(len(records.length), dtype=torch.int64)
    with pytest.raises(TypeError, match="key: expected dtype int64"):
        newest(rows, records, key.float(), PAGE)
    with pytest.raises(ValueError, match=r"rows.seq: expected shape \(B=3\)"):
        newest(rows._replace(seq=rows.seq[:2]), records, key, PAGE)
    with pytest.raises(ValueError, match="page: expected a positive number of tokens, got 0"):
        newest(rows, records, key, 0)
