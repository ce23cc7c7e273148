"""Each provider of a case in a process of its own: time and the memory the operating system saw, with nothing
of the others in it.

    python -m fastrl.bench.fresh linear_loss [--providers fastrl eager products] [--rounds 5] [--out
    FILE.json]

The headline CPU cases, one thread.  `fastrl bench` interleaves its providers in one process, which is fairer
to their times; resident memory is only honest in a fresh process, where no other provider has left pages
behind.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastrl.bench.common import EAGER, OURS, PRODUCTS, Bench, Case
from fastrl.bench.harness import evaluate
from fastrl.bench.ledger import identity
from fastrl.bench.run import Options, choose, load
from fastrl.bench.timing import percentile
from fastrl.errors import UserError


def headline(bench: Bench) -> list[Case]:
    """The headline CPU cases."""
    return [c for c in choose(bench, "cpu", Options()) if c.headline]


def alone(bench: Bench, case: Case, provider: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of a call (median, after one to warm up) and MiB of resident memory that calls add, in
    this process.
    """
    function = bench.providers[provider](case)
    if function is None:
        raise UserError(f"{provider}: not a provider of {case.label} {case.mode}")
    data = bench.data(case)
    data = data.map(lambda x: x.detach().requires_grad_(), data.wrt)
    small = bench.data(case.small())
    # loads what a first call loads
    evaluate(function, small.map(lambda x: x.detach().requires_grad_(), small.wrt), case.mode)
    # pages that making the data has left in the heap would pass for nobody's
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    taken = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        evaluate(function, data, case.mode)
        taken.append((time.perf_counter() - began) * 1e3)
    return {"ms": percentile(taken[1:], 0.5), "mib": _resident("VmHWM") - before}


def _resident(field: str) -> float:
    """MiB of resident memory: VmRSS now, VmHWM at most since the start,
    or since 5 was written to clear_refs.
    """
    lines = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    return float(lines[field].split()[0]) / 1024


def spawn(op: str, index: int, provider: str, rounds: int) -> dict[str, Any]:
    """`alone` in a new process."""
    command = [
        sys.executable,
        "-m",
        "fastrl.bench.fresh",
        op,
        "--worker",
        str(index),
        "--providers",
        provider,
        "--rounds",
        str(rounds),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"{op}, {provider}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op")
    parser.add_argument("--providers", nargs="+", default=[OURS, EAGER, PRODUCTS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for the measurements")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        bench = load(options.op)
        if options.worker is not None:
            print(
                json.dumps(
                    alone(bench, headline(bench)[options.worker], options.providers[0], options.rounds)
                )
            )
            return 0
        found = []
        for i, case in enumerate(headline(bench)):
            print(f"{case.label} {case.dtype} {case.mode}")
            rows = {p: spawn(options.op, i, p, options.rounds) for p in options.providers}
            for provider, row in rows.items():
                ratios = "  ".join(
                    f"{row['ms'] / r['ms']:.2f}x the time, {row['mib'] / r['mib']:.3f}x the memory of {p}"
                    for p, r in rows.items()
                )
                print(f"  {provider:12} {row['ms']:9.1f} ms {row['mib']:9.1f} MiB   {ratios}")
            found.append({"op": options.op, "case": case.label, "mode": case.mode, "providers": rows})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.out:
        options.out.write_text(
            json.dumps({"identity": identity(torch.device("cpu")), "rows": found}, indent=1) + "\n",
            encoding="utf-8",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
