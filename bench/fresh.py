"""Each provider of a case in a process of its own: its time, and the memory that the operating system saw.

    python -m fastrl.bench.fresh linear_loss [--providers fastrl eager products] [--rounds 5]
                                             [--out FILE.json]

It runs the headline CPU cases on one thread.  `fastrl bench` interleaves its providers in one process, which
is fairer to their times; resident memory is meaningful only in a fresh process, where no other provider has
left pages behind.
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
    """Milliseconds of a call (median, after one to warm up), and MiB of resident memory that calls add."""
    function = bench.providers[provider](case)
    if function is None:
        raise UserError(f"{provider}: not a provider of {case.label} {case.mode}")
    data = bench.data(case)
    data = data.map(lambda x: x.detach().requires_grad_(), data.wrt)
    small = bench.data(case.small())
    # load what a first call loads
    evaluate(function, small.map(lambda x: x.detach().requires_grad_(), small.wrt), case.mode)

    # free the pages left by making the data: calls would reuse them, and seem to add less
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
    """MiB of resident memory: VmRSS now, VmHWM the most since the start or the last write to clear_refs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return float(value.split()[0]) / 1024
    raise KeyError(field)


def spawn(op: str, index: int, provider: str, rounds: int) -> dict[str, Any]:
    """`alone` in a new process."""
    command = [sys.executable, "-m", "fastrl.bench.fresh", op]
    command += ["--worker", str(index), "--providers", provider, "--rounds", str(rounds)]
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
            case = headline(bench)[options.worker]
            print(json.dumps(alone(bench, case, options.providers[0], options.rounds)))
            return 0

        cases = []
        for i, case in enumerate(headline(bench)):
            print(f"{case.label} {case.dtype} {case.mode}")
            rows = {p: spawn(options.op, i, p, options.rounds) for p in options.providers}
            for provider in rows:
                print(_line(provider, rows))
            cases.append({"op": options.op, "case": case.label, "mode": case.mode, "providers": rows})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    if options.out:
        content = {"identity": identity(torch.device("cpu")), "rows": cases}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _line(provider: str, rows: dict[str, dict[str, Any]]) -> str:
    """The numbers of a provider, and their ratios to those of each."""
    row = rows[provider]
    ratios = []
    for name, other in rows.items():
        time_ratio, memory_ratio = row["ms"] / other["ms"], row["mib"] / other["mib"]
        ratios.append(f"{time_ratio:.2f}x the time, {memory_ratio:.3f}x the memory of {name}")
    return f"  {provider:12} {row['ms']:9.1f} ms {row['mib']:9.1f} MiB   {'  '.join(ratios)}"


if __name__ == "__main__":
    sys.exit(main())
