"""What csrc/cuda was compiled for, and what a machine lacks to run it, told from made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastrl.kernels import token_logp
from fastrl.kernels._backend import extension, use_backend
from fastrl.kernels._native import build
from fastrl.kernels._native import token_logp as native
from fastrl.kernels._registry import _table

C = extension()
needs_cuda_build = pytest.mark.skipif(
    not hasattr(C, "cuda_architectures"), reason="fastrl._C was built without CUDA"
)
LOGITS = torch.zeros(1, 4)


@pytest.mark.parametrize(
    "architecture, runs, not_on",
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90", [(9, 0)], [(8, 9), (10, 0), (12, 0)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("90+PTX", [(9, 0), (10, 0), (10, 3), (12, 0)], [(8, 0), (8, 9)]),
        ("100", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
)
def test_which_gpus_run_code_for_an_architecture(architecture, runs, not_on):
    """Wrong: 8.6 code for 8.0, 9.0 code for 10.0, PTX for an earlier GPU, and 90a taken for portable."""
    assert all(build.covers(architecture, capability) for capability in runs)
    assert not any(build.covers(architecture, capability) for capability in not_on)


def test_a_gpu_without_code_is_an_obstacle_that_names_the_build():
    assert build.shortfall((9, 0), 13000, 13000, "80,90+PTX") == ""
    assert build.shortfall((12, 0), 13000, 13000, "80,90+PTX") == ""
    assert build.shortfall((10, 0), 13000, 13000, "80,90a") == (
        "it was built for compute capabilities 80,90a, and this GPU has 100; build with FASTRL_CUDA_ARCH=100"
    )


def test_an_older_driver_is_an_obstacle_and_a_newer_minor_version_is_none():
    """Wrong: comparing minor versions, which are compatible; a driver too old that crashes at the first
    call.
    """
    assert build.shortfall((9, 0), 13000, 13020, "90") == ""
    assert build.shortfall((9, 0), 14000, 13000, "90") == ""
    assert build.shortfall((9, 0), 12080, 13000, "90").startswith(
        "it was built with CUDA 13.0, which needs driver 580 or newer, and this one knows CUDA 12.8; update"
    )
    assert "knows CUDA 0.0" in build.shortfall((9, 0), 0, 13000, "90")


def test_the_obstacle_is_the_registrys_and_asks_the_extension(monkeypatch):
    """Wrong: an implementation that is registered without its obstacle."""
    assert _table["token_logp"]["cuda"].obstacle is build.obstacle
    assert build.obstacle(LOGITS) == ""

    class Old:
        cuda_driver_version = staticmethod(lambda: 12080)
        cuda_runtime_version = staticmethod(lambda: 13000)
        cuda_architectures = staticmethod(lambda: "90")

    monkeypatch.setattr(build, "extension", lambda: Old)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "needs driver 580" in build._obstacle(torch.device("cuda", 63))


def test_a_gpu_without_clusters_takes_two_kernels(monkeypatch):
    """Wrong: launching the fused kernel, which has no code there, because the vocabulary is small enough."""

    class Ampere:
        token_logp_fused_limit = staticmethod(lambda code, device: 0)

    class Row:
        is_cuda, dtype, shape, device = True, torch.float32, (1, 4), torch.device("cuda", 62)

        @staticmethod
        def stride(_):
            return 1

    monkeypatch.setattr(native, "extension", lambda: Ampere)
    assert not native._fits_fused(Row())


@needs_cuda_build
def test_the_extension_says_what_it_was_built_for():
    """Wrong: a list that is not what nvcc was asked for; the default without PTX, which later GPUs need."""
    cubin = pytest.importorskip("fastrl.bench.cubin", reason="triton is not installed", exc_type=ImportError)
    names = C.cuda_architectures().split(",")
    compiled = cubin.cubins_in(Path(C.__file__))
    assert set(compiled) == {f"sm_{name.removesuffix('+PTX')}" for name in names}
    assert C.cuda_runtime_version() >= 11000


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_driver_its_version_is_0():
    assert C.cuda_driver_version() == 0
    with use_backend("cuda", "token_logp"), pytest.raises(RuntimeError, match="does not run on cpu tensors"):
        token_logp.token_logp(LOGITS, torch.tensor([1]))
