"""A pytest plugin: writes the outcome of each test when it is known, leaves out what has passed, and ends a
worker whose CUDA context is lost.

    pytest -p fastrl.bench.gpu_check.pytest_progress        with FASTRL_CHECK_PROGRESS=<progress.jsonl>

Under pytest-xdist the outcomes are written by the controller, which gets the reports of all workers.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastrl.bench.gpu_check.progress import FAILED, PASSED, SKIPPED, append, outcomes, read

FILE = "FASTRL_CHECK_PROGRESS"
MESSAGE = 1500  # characters of a failure that are kept
# no call works in this process any more
LOST = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "device-side assert",
    "launch failure",
)
_lost: list[str] = []  # the test that lost the context of this worker


def _worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has passed or was skipped; what failed comes first.

    Every worker reads the list that the controller's parent froze, so that all collect the same.
    """
    known = outcomes(list(read(Path(os.environ[FILE]).with_suffix(".start"))))
    done = {test for test, event in known.items() if event["outcome"] in (PASSED, SKIPPED)}
    left = [item for item in items if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = sorted(left, key=lambda item: item.nodeid not in known)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    report = yield
    if call.excinfo is not None and any(sign in str(call.excinfo.value) for sign in LOST):
        _lost.append(item.nodeid)
    return report


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not _worker() and (report.when == "call" or report.outcome != PASSED):
        append(Path(os.environ[FILE]), _event(report))
    if _worker() and report.when == "teardown" and _lost:
        os._exit(3)  # xdist starts another worker


def _event(report: pytest.TestReport) -> dict[str, object]:
    event: dict[str, object] = {"kind": "test", "test": report.nodeid, "seconds": round(report.duration, 3)}
    if report.outcome == FAILED:
        return event | {"outcome": FAILED, "message": str(report.longrepr)[-MESSAGE:]}
    if report.outcome == SKIPPED:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return event | {"outcome": SKIPPED, "message": str(reason)}
    return event | {"outcome": PASSED}
