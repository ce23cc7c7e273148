"""The checks of all ops."""

from __future__ import annotations

from fastrl.kernels._verdicts import model, policy, vocabulary
from fastrl.kernels._verdicts.case import Check

CHECKS: dict[str, Check] = {**vocabulary.CHECKS, **model.CHECKS, **policy.CHECKS}
