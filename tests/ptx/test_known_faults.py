"""Faults that these kernels had, by name: the gate sees each of them, and the kernels have them no more."""

from __future__ import annotations

import pytest

from ptx.races import READ_AFTER_WRITE, WRITE_AFTER_READ
from ptx.server import VERSIONS


def raced(complaints: list[str], kernel: str) -> bool:
    return any(kernel in c and (READ_AFTER_WRITE in c or WRITE_AFTER_READ in c) for c in complaints)


@pytest.mark.parametrize("rows", [40, 64])
def test_copies_of_rows_in_the_page_allocator(ask, rows):
    """advance ran four warps over blocks of 64 rows: two of them read rows that the others had moved on, and
    a page could go to two sequences.  As many lanes as rows, at most, have no copies.
    """
    assert raced(ask(f"advance of {rows} with 4 warps")["complaints"], "advance.forward")
    assert ask("advance of 40" if rows == 40 else "advance of 64")["complaints"] == []


def test_bits_of_another_warp_in_a_sum_of_probes(ask):
    """combine_probes loaded what another warp replaces; a barrier stands between now."""
    found = ask("mutants of perturb l1 sequence inside perturb_l1.combine_probes")
    assert found["complaints"] == []
    assert any(raced([m["found"] or ""], "combine_probes") for m in found["mutants"])


@pytest.mark.parametrize("case", ["sample fp32 of 7", "perturb linf token"])
def test_philox_compiles_on_the_oldest_triton(ask, case):
    """tl.to_tensor came with Triton 3.7."""
    assert ask(case)["complaints"] == []


def test_policy_loss_without_a_mask_compiles(ask):
    """Sums of a bare load, used twice after a loop, made a pass of Triton 3.6 to 3.8 abort."""
    assert ask("policy_loss nll")["complaints"] == []  # without a mask


def test_the_versions_are_what_they_are_called(children):
    for version, path in VERSIONS.items():
        if path is not None and path.exists():
            assert children[version].ask("version")["triton"].startswith(version)
    assert children["newest"].ask("version")["triton"] >= "3.7"
