"""What every test runs under: no GPU test without a GPU, Triton's interpreter there, and the same seed
whatever ran before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, by the first cuBLAS handle
# a process per core: two threads each would wait for each other's cores
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
# else, on some processors, the bits of a product depend on its operands' alignment
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
import torch

if not torch.cuda.is_available():
    # read when a kernel is decorated, which is when an op is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["engines"]  # fixtures
NEEDED = {"gpu": 1, "multigpu": 2}  # devices a marker asks for


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, visibly, what this machine has too few devices for."""
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        for marker, need in NEEDED.items():
            if need > have and item.get_closest_marker(marker):
                item.add_marker(
                    pytest.mark.skip(
                        reason=f"needs {need} CUDA device{'s' * (need > 1)}, this machine has {have}"
                    )
                )


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test starts from seed 0 and torch's own settings, whatever ran before: a training run asks for
    deterministic algorithms.
    """
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU kernels on each instruction set of this processor; "best", asked for by parametrization, is the
    fastest of them.
    """
    from fastrl.kernels._backend import extension  # after the environment above is set

    built = extension()
    if built is None:
        pytest.skip("fastrl._C is not built: pip install -e . (or python setup.py build_ext --inplace)")
    name = built.cpu_isas()[-1] if request.param == "best" else request.param
    if name not in built.cpu_isas():
        pytest.skip(f"this processor has no {name}: compiled, not run")
    monkeypatch.setenv("FASTRL_CPU_ISA", name)
    assert built.cpu_isa() == name
    return name


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
