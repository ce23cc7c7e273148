"""What every test runs under: no GPU test without a GPU, Triton's interpreter there, and the same seed whatever ran before."""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, by the first cuBLAS handle
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # else, on some processors, the bits of a product depend on its operands' alignment

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, which is when an op is imported

NEEDED = {"gpu": 1, "multigpu": 2}  # devices a marker asks for


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, visibly, what this machine has too few devices for."""
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        for marker, need in NEEDED.items():
            if need > have and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"needs {need} CUDA device{'s' * (need > 1)}, this machine has {have}"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from seed 0, whatever ran before."""
    torch.manual_seed(0)
