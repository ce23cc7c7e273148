"""The choices of group_advantage in the order in which kernels number them: csrc/cpu/group_advantage_rows.h
and kernels/_triton/group_advantage.py.
"""

from __future__ import annotations

BASELINES = ("mean", "leave_one_out", "max", "none")
SCALES = ("std", "batch_std", "range", "none")
SHAPES = ("linear", "rank", "softmax")
