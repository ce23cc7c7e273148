"""The kernels of a group of processes: one checks while the other waits, and a kernel that fails on one of
them runs on none.

The two processes run this file once, as a program.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from fake_device import canned, fake_device

from fastrl.kernels._verdicts.case import Widths
from fastrl.kernels._verdicts.first_use import ensure, passing, put
from fastrl.kernels._verdicts.table import TABLE, Verdict
from fastrl.parallel.kernels import settle_kernels
from fastrl.parallel.world import init_world

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def child(folder: Path) -> None:
    world = init_world()
    with fake_device(folder, "gae", "swiglu", "rope", start=canned(folder / "log", seconds=2.0)):
        world.barrier()
        ensure(CPU, Widths(), (torch.float32,))
        alone = sorted(passing(CPU))
        if world.rank == 1:
            put(("gae", "triton", torch.float32, None), Verdict(False, "an illegal address"))
        before = TABLE.generation
        settle_kernels(CPU, Widths(), torch.float32, world)
        found = {
            "alone": alone,
            "together": sorted(passing(CPU)),
            "why": TABLE.verdicts["gae", "triton", torch.float32, None].reason,
            "changed": TABLE.generation != before,
        }
    (folder / f"{world.rank}.json").write_text(json.dumps(found))
    world.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_check_once_and_agree(tmp_path):
    """Wrong: both check at the same time; each keeps its own table; a union in place of the intersection."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": paths}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env={**os.environ, **common, "RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    errors = [p.communicate(timeout=240)[1] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], errors
    assert (tmp_path / "log").read_text().splitlines() == ["started"]

    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2))
    everything = ["gae/triton/float32", "rope/triton/float32", "swiglu/triton/float32"]
    assert first["alone"] == second["alone"] == everything
    assert first["together"] == second["together"] == everything[1:]
    assert first["changed"] and first["why"] == "it did not pass on every process of the run"
    assert second["why"] == "an illegal address"
    assert "gae: the triton kernel failed its check" in errors[0] and "failed" not in errors[1]


if __name__ == "__main__":
    child(Path(sys.argv[1]))
