"""The pretended device of helpers/host_waits.py: every kind of wait is seen, and nothing else is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_waits import CUDA, FakeCuda, InFlight
from torch import Tensor, nn

from fastrl.batch.transfer import fetch, send

Made = dict[str, Tensor]


@pytest.fixture
def cuda():
    with FakeCuda() as device:
        yield device


@pytest.fixture
def made(cuda) -> Made:
    """Tensors on the device."""
    return {
        "x": torch.full((4,), 2.0, device="cuda"),
        "n": torch.arange(4, device=CUDA),
        "mask": torch.zeros(4, dtype=torch.bool, device=CUDA),
        "one": torch.ones((), device=CUDA),
    }


WAITS: dict[str, Callable[[Made], Any]] = {
    "item": lambda m: m["one"].item(),
    "float": lambda m: float(m["one"]),
    "int": lambda m: int(m["n"][1]),
    "index": lambda m: [0, 1][m["n"][1]],
    "bool": lambda m: bool(m["one"] > 0),
    "if": lambda m: 1 if m["mask"].any() else 0,
    "in": lambda m: 3 in m["n"],
    "tolist": lambda m: m["n"].tolist(),
    "numpy": lambda m: m["n"].numpy(),
    "format": lambda m: f"{m['one']}",
    "equal": lambda m: torch.equal(m["n"], m["n"]),
    "allclose": lambda m: torch.allclose(m["x"], m["x"]),
    "nonzero": lambda m: m["n"].nonzero(),
    "where": lambda m: torch.where(m["mask"]),
    "argwhere": lambda m: torch.argwhere(m["n"]),
    "masked_select": lambda m: m["x"].masked_select(m["mask"]),
    "a mask as index": lambda m: m["x"][m["mask"]],
    "a mask as index of a write": lambda m: m["x"].__setitem__(m["mask"], m["x"][:0]),
    "unique": lambda m: m["n"].unique(),
    "unique_consecutive": lambda m: m["n"].unique_consecutive(),
    "bincount": lambda m: torch.bincount(m["n"]),
    "repeat_interleave": lambda m: torch.repeat_interleave(m["x"], m["n"]),
    "cpu": lambda m: m["x"].cpu(),
    "to": lambda m: m["x"].to("cpu"),
    "to the device": lambda m: torch.zeros(3).to(CUDA),
    "to the device of another": lambda m: torch.zeros(3).to(m["x"]),
    "cuda": lambda m: torch.zeros(3).cuda(),
    "pageable, though non_blocking": lambda m: torch.zeros(3).to(CUDA, non_blocking=True),
    "pinned, but blocking": lambda m: torch.zeros(3).pin_memory().to(CUDA),
    "copy_ from the host": lambda m: m["x"].copy_(torch.zeros(4)),
    "copy_ to the host": lambda m: torch.zeros(4).copy_(m["x"]),
    "tensor of a list": lambda m: torch.tensor([1, 2], device=m["x"].device),
    "as_tensor of a list": lambda m: torch.as_tensor([1, 2], device="cuda"),
    "new_tensor": lambda m: m["x"].new_tensor([1.0]),
    "a list as index": lambda m: m["x"][[0, 1]],
    "a host tensor as index": lambda m: m["x"][torch.tensor([0, 1])],
    "one number into one element": lambda m: m["x"].__setitem__(0, 1.0),
    "synchronize": lambda m: torch.cuda.synchronize(),
    "an event": lambda m: torch.cuda.Event().synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_every_kind_of_wait_is_seen(name, cuda, made):
    WAITS[name](made)
    assert cuda.waits, name


QUIET: dict[str, Callable[[Made], Any]] = {
    "arithmetic": lambda m: (m["x"] * 2 + m["one"]).sum(),
    "a sum with a number": lambda m: torch.where(m["mask"], m["x"], 0.0),
    "gathers": lambda m: m["x"][m["n"]] + m["x"].index_select(0, m["n"]),
    "a slice": lambda m: m["x"].__setitem__(slice(1, 3), 1.0),
    "a fill by mask": lambda m: m["x"].__setitem__(m["mask"], 0.0),
    "repeat_interleave of a known size": lambda m: torch.repeat_interleave(m["x"], m["n"], output_size=6),
    "factories": lambda m: torch.arange(3, device=CUDA) + torch.zeros_like(m["n"][:3]),
    "pinned and non_blocking": lambda m: torch.zeros(3).pin_memory().to(CUDA, non_blocking=True),
    "to the host, non_blocking": lambda m: m["x"].to("cpu", non_blocking=True),
    "shapes": lambda m: (m["x"].shape, m["x"].numel(), len(m["n"]), m["x"].device),
    "send": lambda m: send([torch.arange(3), torch.ones(2, dtype=torch.bool)], CUDA),
}


@pytest.mark.parametrize("name", QUIET)
def test_what_does_not_wait_is_not_counted(name, cuda, made):
    QUIET[name](made)
    assert [str(w) for w in cuda.waits] == []


def test_a_wait_says_where(cuda, made):
    fetch([made["x"], made["mask"]])
    (wait,) = cuda.waits
    assert re.fullmatch(r"fastrl/batch/transfer\.py:\d+ fetch: \.to\(cpu\)", str(wait))


def test_the_device_follows_what_is_computed(cuda, made):
    """Views, results, gradients and modules; not what is read back."""
    weight = nn.Linear(4, 2)
    cuda.place(weight)
    y = weight(made["x"])[:1].relu()
    assert y.device == CUDA and y.is_cuda and not y.is_cpu and not torch.zeros(2).is_cuda
    y.sum().backward()
    assert weight.weight.grad.device == CUDA
    value, pull = torch.func.vjp(lambda z: (z.device.type == "cuda") * z.sum(), made["x"])
    assert pull(torch.ones_like(value))[0].device == CUDA
    assert cuda.waits == []
    assert made["x"].cpu().device.type == "cpu"
    with pytest.raises(RuntimeError, match="tensors on one device"):
        made["x"] + torch.zeros(4)


def test_a_copy_on_its_way_is_not_touched(cuda, made):
    """Wrong: a pinned buffer that is filled again, or read, before the copy is done."""
    buffer = torch.zeros(3).pin_memory()
    buffer.to(CUDA, non_blocking=True)
    with pytest.raises(InFlight):
        buffer.fill_(1)
    number = made["x"].to("cpu", non_blocking=True)
    with pytest.raises(InFlight):
        number.tolist()
    torch.cuda.Event().synchronize()
    buffer.fill_(1)
    assert number.tolist() == [2.0] * 4


@pytest.mark.parametrize(
    "name", ["index_copy_", "index_add_", "index_put", "scatter", "backward of a gather"]
)
def test_sorts_are_seen_in_deterministic_mode(name, cuda, made):
    x, n = made["x"].requires_grad_(name.startswith("backward")), made["n"]
    does: dict[str, Callable[[], object]] = {
        "index_copy_": lambda: x.index_copy_(0, n, x.clone()),
        "index_add_": lambda: x.index_add_(0, n, x.clone()),
        "index_put": lambda: x.__setitem__(n, x.clone()),
        "scatter": lambda: x.scatter(0, n, x.clone()),
        "backward of a gather": lambda: x[n].sum().backward(),
    }
    does[name]()
    assert cuda.sorts == []
    torch.use_deterministic_algorithms(True, warn_only=True)
    does[name]()
    assert len(cuda.sorts) == 1 and cuda.waits == []


def test_everything_is_as_before_afterwards():
    kept = torch.tensor, torch.zeros, Tensor.tolist, torch.cuda.Event
    with FakeCuda():
        assert torch.tensor is not kept[0]
    assert (torch.tensor, torch.zeros, Tensor.tolist, torch.cuda.Event) == kept
    assert "device" not in vars(Tensor) and torch.zeros(1).device.type == "cpu"
