"""All cases by name: those of Triton kernels, and those of csrc/cuda."""

from __future__ import annotations

import fastrl.ops  # noqa: F401  registers every op
from ptx.cases import cuda, model, policy, sampler, vocabulary
from ptx.cases.case import Build

MODULES = (vocabulary, model, policy, sampler)
CUDA, LONG_CUDA = cuda.CASES, cuda.LONG
CASES: dict[str, Build] = {name: build for m in MODULES for name, build in m.CASES.items()}
LONG: dict[str, Build] = {name: build for m in MODULES for name, build in m.LONG.items()}
