"""What the gate's tests share: the children that run the cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ptx.races import UNFENCED
from ptx.server import NEWEST, OLDEST, VERSIONS, Server, servers

OLD = "3.6.0"
# Version -> kernel -> what its compiler leaves out.  Triton 3.6 sets no fence.proxy.async between cp.async
# into shared memory and the wgmma that reads it, which NVIDIA's manual asks for.  3.9 sets it: it is checked.
EXCUSED = {OLD: {"linear.forward": f"{UNFENCED} [shared memory of rank 0, against copies of"}}


@pytest.fixture(scope="session")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    pytest.importorskip("triton.backends.nvidia", reason="triton is not installed")
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if shared.name.startswith("popen-") else shared  # the workers of xdist share it
    with servers(shared / "ptx-cache") as found:
        yield found


# the oldest Triton is that of GPU machines; the newest one's code is the long part of the gate
@pytest.fixture(params=[OLD, pytest.param(NEWEST, marks=pytest.mark.ptx)])
def ask(request: pytest.FixtureRequest, children: dict[str, Server]) -> Callable[[str], dict[str, Any]]:
    """Judge a case on a version of Triton."""
    where: Path | None = VERSIONS[request.param]
    if where is not None and not where.exists():
        pytest.skip(f"Triton {request.param} is not at {OLDEST}: make .triton/{request.param}")

    def judge(name: str) -> dict[str, Any]:
        found = children[request.param].ask(name)
        for kernel, what in EXCUSED.get(request.param, {}).items():
            kept = [c for c in found["complaints"] if not (f" {kernel}: " in c and what in c)]
            found["complaints"] = kept
        return found

    return judge
