"""The sampler on CUDA: one wait for the device per window, of a snapshot that is a window old; one copy of
host numbers per admission; no sorts.

Run on the pretended device of helpers/host_waits.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from engines import LONG, PARAMS, same
from host_waits import FakeCuda
from runs import decoder, tokenizer

from fastrl.batch import transfer
from fastrl.sampler import Sampler, SamplingParams, Tail, admit, engine, turns

SNAPSHOT = "fastrl/sampler/engine.py"
PREFILL = 90  # tokens: LONG's prompts take several packs, and the longest is cut


class Counted:
    """The waits of every window, and the copies that each admission sends."""

    def __init__(self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows: list[list[str]] = []
        self.sent: list[int] = []
        window, start, send = engine.Engine.window, admit.start, transfer.send

        def counted(own: engine.Engine) -> bool:
            first = len(cuda.waits)
            going = window(own)
            self.windows.append([str(w) for w in cuda.waits[first:]])
            return going

        def started(*args: Any) -> None:
            self.sent.append(0)
            start(*args)

        def sending(*args: Any) -> Any:
            self.sent[-1] += 1
            return send(*args)

        monkeypatch.setattr(engine.Engine, "window", counted)
        monkeypatch.setattr(engine.admit, "start", started)
        monkeypatch.setattr(admit, "send", sending)


@pytest.fixture
def cuda():
    torch.use_deterministic_algorithms(True, warn_only=True)
    with FakeCuda() as device:
        yield device


@pytest.fixture
def counted(cuda, monkeypatch) -> Counted:
    return Counted(cuda, monkeypatch)


@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.9}])
def test_a_window_waits_once_and_an_admission_copies_once(filters, cuda, counted):
    """Several admissions: three of twelve rows at a time, prompts of several packs, pages shared and copied.

    Wrong implementations: a torch.tensor(list, device=...) per number; the free pages read where the host can
    count them; the number of rows read after a compaction; prompts that the host cuts into slices.
    """
    model = decoder(eos_token_id=[3, 4])
    params = SamplingParams(n=3, max_new_tokens=40, seed=5, **filters)
    want = Sampler(model, max_rows=4, prefill_tokens=PREFILL).generate(LONG, params)
    counted.windows.clear()
    counted.sent.clear()

    cuda.place(model)
    cuda.waits.clear()
    got = Sampler(model, max_rows=4, prefill_tokens=PREFILL).generate(LONG, params)
    assert len(counted.windows) >= 5 and len(counted.sent) >= 3
    assert set(counted.sent) == {1}
    assert counted.windows[0] == []
    assert all(len(w) <= 1 and w[0].startswith(SNAPSHOT) for w in counted.windows[1:] if w)
    of_windows = sum(map(len, counted.windows))
    assert len(cuda.waits) - of_windows == 1, "what was drawn: lengths and reasons"
    assert [str(s) for s in cuda.sorts] == []
    with cuda.kernel():
        same(got, want)


def test_a_call_waits_for_nothing_else(cuda):
    """Text, a tail that is carried over, and the call that goes on with it."""
    model = decoder(eos_token_id=None)
    cuda.place(model)
    sampler = Sampler(model, max_rows=4)
    first = sampler.generate(LONG, PARAMS, tail=Tail(share=0.5, action="carry"))
    left = first.select([i for i, reason in enumerate(first.finish_reason) if reason == "unfinished"])
    sampler.tokenizer = tokenizer()
    cuda.waits.clear()
    sampler.generate([], PARAMS, carried=left)
    kinds = Counter(w.where.split(":")[0] for w in cuda.waits if not w.where.startswith(SNAPSHOT))
    # what is carried over is read, then lengths and reasons, and tokens for their text
    assert kinds == {"fastrl/batch/transfer.py": 2, "fastrl/sampler/sampler.py": 1}
    assert cuda.sorts == []


def test_episodes_read_what_their_environment_is_shown(cuda, counted, monkeypatch):
    """A window reads its counters, and which turns have ended; their tokens only where some have.

    Wrong implementations: a wait for each turn, or for each of a row's numbers.
    """
    model = decoder(eos_token_id=[3, 4])
    cuda.place(model)

    def environment(ended: Any) -> list[list[int] | None]:
        return [[5, 6, 7] if len(turn.tokens) < 30 else None for turn in ended]

    sampler = Sampler(model, max_rows=4)
    got = sampler.generate(LONG, PARAMS, environment=environment)
    assert any(len(pieces) > 2 for pieces in got.turns()), "some episodes have several turns"
    assert max(map(len, counted.windows)) <= 4
    assert cuda.sorts == []
    assert turns.TurnHandler.__call__.__doc__
