"""linear_logp and linear_loss on a vocabulary split over two processes (gloo) are those of the whole
vocabulary.

The two processes run this file once, as a program, and leave what they found for the tests.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastrl import ops
from fastrl.kernels._shard import Shard

ROOT = Path(__file__).parents[2]
T, D, V, FIRST = 29, 6, 17, 9  # the first process holds 9 tokens of the vocabulary, the second 8
ROW = V * 8
SMALL = 3 * ROW  # of logits: 5 rows of the first shard, 6 of the second, where each to count for itself
LOSSES = {
    "token": {"level": "token", "logits_bytes": SMALL},
    "token, one chunk": {"level": "token"},
    "sequence, kept": {"level": "sequence"},
    "sequence, recomputed": {"level": "sequence", "logits_bytes": SMALL},
}


def given(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, dtype=torch.float64).to(dtype) for s in ((T, D), (V, D), (V,)))
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "target": torch.randint(V, (T,)),
        "temperature": torch.rand(T, dtype=torch.float64) + 0.5,
        "mask": torch.rand(T) > 0.4,
        "up": torch.randn(2, T, dtype=torch.float64),
    }


def loss(logp: torch.Tensor, entropy: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    gate = (rows % 3 != 0).to(logp.dtype)  # a third of the rows has no derivative
    return (
        gate * torch.linspace(0.5, 2.0, T, dtype=logp.dtype)[rows] * (logp.exp() + 0.3 * entropy**2)
    ).sum()


def findings(mine: slice, group: Any) -> dict[str, Any]:
    """Values and gradients with the rows `mine` of the head: of all rows without a group."""
    g, found = given(), {}

    def leaves(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        g = given(dtype)
        return [x.clone().requires_grad_() for x in (g["hidden"], g["weight"][mine], g["bias"][mine])]

    for entropy in (False, True):
        x = leaves()
        out = ops.linear_logp(
            x[0],
            x[1],
            g["target"],
            bias=x[2],
            temperature=g["temperature"],
            entropy=entropy,
            logits_bytes=SMALL,
            group=group,
        )
        (out.logp @ g["up"][0] + (out.entropy @ g["up"][1] if entropy else 0)).backward()
        found[f"logp {entropy}"] = ([v.detach() for v in out if v is not None], [v.grad for v in x])
    for name, options in LOSSES.items():
        x = leaves()
        call = {k: g[k] for k in ("target", "temperature", "mask")} | options
        value, stats = ops.linear_loss(x[0], x[1], loss=loss, bias=x[2], entropy=True, group=group, **call)
        (2 * value).backward()
        found[name] = ([value.detach(), *stats], [v.grad for v in x])
    x = leaves()
    buffer = torch.ones_like(x[1])
    ops.linear_loss(x[0], x[1], g["target"], loss, entropy=True, weight_grad=buffer, group=group)[
        0
    ].backward()
    found["buffer"] = ([], [x[0].grad, buffer, torch.zeros_like(x[2])])
    outside = torch.where(
        torch.arange(T) % 2 == 0,
        g["target"],
        torch.tensor([-1, V, -100, V + 1, 1 << 40, -9])[torch.arange(T) % 6],
    )
    found["outside"] = ([ops.linear_logp(x[0], x[1], outside, entropy=True, group=group).logp.detach()], [])
    for tail, at in {"empty shard": slice(FIRST, V), "empty first": slice(0, FIRST)}.items():
        bias = g["bias"].index_fill(0, torch.arange(V)[at], -torch.inf)[mine]
        x = leaves()
        out = ops.linear_logp(
            x[0], x[1], g["target"] % FIRST + (0 if at.start else 8), bias=bias, entropy=True, group=group
        )
        torch.where(out.logp > -torch.inf, out.logp + out.entropy, 0).sum().backward()
        found[tail] = ([v.detach() for v in out], [x[0].grad, x[1].grad, torch.zeros_like(x[2])])
    for dtype in (torch.float32, torch.bfloat16):
        x = leaves(dtype)
        value, stats = ops.linear_loss(
            x[0] * 3, x[1], g["target"], loss, bias=x[2], entropy=True, temperature=0.7, group=group
        )
        value.backward()
        found[str(dtype)] = ([value.detach(), *stats], [v.grad for v in x])
    return found


def child(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    found = findings(slice(0, FIRST) if rank == 0 else slice(FIRST, V), group)
    alone = dist.new_group([0])
    g = given()
    if rank == 0:
        found["alone"] = ops.linear_logp(g["hidden"], g["weight"], g["target"], group=alone).logp
    else:
        with pytest.raises((TypeError, ValueError), match="group: "):
            ops.linear_logp(g["hidden"], g["weight"], g["target"], group=alone)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    call = [sys.executable, __file__, str(folder)]
    both = [
        subprocess.Popen(call, env=shared | {"RANK": str(r)}, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    try:
        told = [p.communicate(timeout=120)[1] for p in both]
    finally:
        for p in both:
            p.kill()
    assert [p.returncode for p in both] == [0, 0], "\n".join(told)
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(2)]


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return findings(slice(0, V), None)


EXACT = ["logp False", "logp True", *LOSSES, "buffer", "outside", "empty shard", "empty first"]


@pytest.mark.parametrize("name", EXACT)
def test_two_shards_are_the_whole(name, one, two):
    """Wrong implementations: maxima of the shards mixed; entropy without the entropy of the choice of shard;
    a target of another shard taken for one out of range; chunks counted by each process for itself (9 and 8
    tokens wide: other chunks); dx of one shard; the masked or skipped rows of one process; a shard without
    probability (its sum is 0, its maximum -inf) turned into NaN.
    """
    values, grads = one[name]
    for found in two:
        for ours, whole in zip(found[name][0], values, strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-10, rtol=1e-10, equal_nan=name == "outside")
    if grads:
        first, second = (found[name][1] for found in two)
        sharded = [first[0], *(torch.cat(pair) for pair in zip(first[1:], second[1:], strict=True))]
        for ours, whole in zip(sharded, grads, strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-10, rtol=1e-10)
        assert torch.equal(first[0], second[0]), "hidden is the same everywhere, and so is its gradient"


def test_a_target_in_no_shard_is_nan_and_only_that(two):
    """Wrong implementation: 0 from every shard, summed to the log-prob of a token that does not exist."""
    for found in two:
        assert found["outside"][0][0].isnan().tolist() == [i % 2 == 1 for i in range(T)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_float32_and_bfloat16(dtype, one, two):
    """Wrong implementation: the shares of dx rounded to bfloat16 before they are summed."""
    values, (dhidden, *_) = one[str(dtype)]
    for found in two:
        for ours, whole in zip(found[str(dtype)][0], values, strict=True):
            torch.testing.assert_close(ours, whole, atol=3e-6, rtol=3e-6)
    sharded = two[0][str(dtype)][1][0]
    assert sharded.dtype == dtype
    torch.testing.assert_close(
        sharded, dhidden, atol=1e-6, rtol={torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    )


def test_a_group_of_one_is_the_op_itself(two):
    g = given()
    torch.testing.assert_close(
        two[0]["alone"], ops.linear_logp(g["hidden"], g["weight"], g["target"]).logp, atol=1e-12, rtol=0
    )


def test_what_is_not_a_group_is_refused():
    with pytest.raises(TypeError, match=r"group: expected a torch\.distributed\.ProcessGroup, got str"):
        Shard.of(torch.zeros(2, 2), "world")


if __name__ == "__main__":
    torch.set_num_threads(1)
    child(Path(sys.argv[1]))
