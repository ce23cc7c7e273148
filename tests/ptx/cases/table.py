"""All cases of Triton kernels, by name."""

from __future__ import annotations

import fastrl.ops  # noqa: F401  registers every op
from ptx.cases import model, policy, sampler, vocabulary
from ptx.cases.case import Build

MODULES = (vocabulary, model, policy, sampler)
CASES: dict[str, Build] = {name: build for m in MODULES for name, build in m.CASES.items()}
LONG: dict[str, Build] = {name: build for m in MODULES for name, build in m.LONG.items()}
