"""Whether the CUDA kernels of fastrl._C run on a GPU: it needs code for the GPU, and a driver for its CUDA.

Machine code runs on GPUs of its major capability, from its minor one on; PTX runs on any later GPU, compiled
by the driver on first use.  Code for an exact GPU ("90a") runs there alone.  The CUDA runtime in fastrl._C
needs a driver of its major version.
Source: CUDA C++ Programming Guide, "Application compatibility"; CUDA Compatibility, "Minor version
compatibility".
"""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from fastrl.kernels._backend import extension

DRIVERS = {11: "450", 12: "525", 13: "580"}  # the first driver of a major version of CUDA
ARCHITECTURE = re.compile(r"(\d+)(a?)(\+PTX)?")
Capability = tuple[int, int]


def obstacle(x: Tensor) -> str:
    """Why csrc/cuda cannot run on the device of `x`; empty where it can."""
    return _obstacle(x.device) if x.is_cuda else ""


@functools.cache
def _obstacle(device: torch.device) -> str:
    built = extension()
    return shortfall(
        torch.cuda.get_device_capability(device),
        built.cuda_driver_version(),
        built.cuda_runtime_version(),
        built.cuda_architectures(),
    )


def shortfall(capability: Capability, driver: int, runtime: int, architectures: str) -> str:
    """What the machine lacks, and what to do; versions are CUDA's, 13000 for 13.0."""
    major = runtime // 1000
    if driver // 1000 < major:
        needed = DRIVERS.get(major, f"of CUDA {major}")
        return (
            f"it was built with CUDA {_version(runtime)}, which needs driver {needed} or newer, and "
            f"this one knows CUDA {_version(driver)}; update the driver, or build with an older CUDA"
        )
    if not any(covers(arch, capability) for arch in architectures.split(",")):
        mine = f"{capability[0]}{capability[1]}"
        return (
            f"it was built for compute capabilities {architectures}, and this GPU has {mine}; build with "
            f"FASTRL_CUDA_ARCH={mine}"
        )
    return ""


def covers(architecture: str, capability: Capability) -> bool:
    """Whether code for an architecture, such as 90, 90a or 90+PTX, runs on a GPU."""
    found = ARCHITECTURE.fullmatch(architecture)
    assert found, architecture  # setup.py has checked it
    number, exact, ptx = found.groups()
    built = divmod(int(number), 10)
    if exact:
        return built == capability
    return built <= capability and (built[0] == capability[0] or bool(ptx))


def _version(cuda: int) -> str:
    return f"{cuda // 1000}.{cuda % 1000 // 10}"
