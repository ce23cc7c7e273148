"""Runs the benchmarks: `fastrl bench [op ...]`, or `python -m fastrl.bench.run`, which needs no package for
command lines.

--gpu-check is the short run on a GPU machine: every headline case, including kernels that are only known to
compile, in a bounded time and without a network.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastrl.bench.common import Bench, Case
from fastrl.bench.harness import Plan, left_out, run_bench
from fastrl.bench.ledger import LEFT_OUT, Results, Row, identity
from fastrl.bench.results_page import section
from fastrl.bench.table import show, text
from fastrl.bench.timing import Effort, ceilings
from fastrl.errors import UserError, nearest
from fastrl.kernels._verdicts.first_use import ensure
from fastrl.parallel.device import resolve_device, set_threads
from fastrl.run.lock import claimed

HERE = Path(__file__).parent
FIRST = (  # the most important ones, in case time runs out
    *("token_logp", "linear_logp", "linear_loss", "linear_cross_entropy", "policy_loss"),
    *("decode_attention", "rollout", "train"),
)
QUICK_SECONDS, CHECK_SECONDS = 45.0, 300.0
LOST_CONTEXT = 4  # exit status when a kernel broke the CUDA context: a run with --resume measures the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of this module's command line; `fastrl bench` has the first four.

    seconds   after which no further case starts; 0: the default of the kind of run
    resume    keep the rows of the file that this run would write, if they are of the same sources and device
    rehearse  the tiny cases of the tests, to try the run itself
    """

    ops: tuple[str, ...] = ()
    device: str = "auto"
    quick: bool = False
    output: str | None = None
    out: str | None = None
    gpu_check: bool = False
    threads: int = 0
    seconds: float = 0.0
    resume: bool = False
    rehearse: bool = False


def names() -> tuple[str, ...]:
    """The names of all benchmarks, the most important first."""
    present = sorted(p.stem.removeprefix("bench_") for p in HERE.glob("*/bench_*.py"))
    return (*(n for n in FIRST if n in present), *(n for n in present if n not in FIRST))


def load(name: str) -> Bench:
    """The benchmark of an op.  Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(
            f"ops: no benchmark {name!r}{nearest(name, names())}; there are: {', '.join(names())}"
        )
    folder = next(HERE.glob(f"*/bench_{name}.py")).parent.name
    bench = importlib.import_module(f"fastrl.bench.{folder}.bench_{name}").BENCH
    assert isinstance(bench, Bench), name
    return bench


def choose(bench: Bench, device: str, options: Options) -> list[Case]:
    """The cases of a run.

    On CPU --quick takes quick cases and --rehearse tiny ones, on CUDA --quick and --gpu-check take headlines;
    the default is all full cases.
    """
    short = "tiny" if options.rehearse else "quick" if options.quick else "full"
    level = short if device == "cpu" else "full"
    headlines_only = (options.quick or options.gpu_check) and level != "tiny"
    cases = [c for c in bench.cases if c.device == device and c.level == level]
    return [c for c in cases if c.headline or not headlines_only]


def plan_for(device: str, options: Options, started: float) -> Plan:
    """Effort and deadline of a run."""
    if options.gpu_check:
        seconds = options.seconds or CHECK_SECONDS
        return Plan(Effort(10, 5.0, 600.0), compiled_only=True, deadline=started + seconds)
    if options.quick or options.rehearse:
        seconds = options.seconds or QUICK_SECONDS
        return Plan(Effort(5, 2.0, 300.0), compile=False, deadline=started + seconds)
    return Plan(Effort(30, 10.0, 10_000.0) if device == "cuda" else Effort(15, 20.0, 30_000.0))


def run(options: Options) -> Results:
    """Measure, and show the rows of each op when it is done.

    Raises UserError for an unknown op, and for a device that is not present.
    """
    started = time.monotonic()
    device, _ = resolve_device("cuda" if options.gpu_check else options.device, "auto")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        ensure(device)  # else the first call of an op would pay for it
    set_threads(options.threads)
    chosen = [load(name) for name in options.ops or names()]
    settings = {"quick": options.quick, "gpu_check": options.gpu_check}
    results = Results(identity(device), ceilings(device, options.quick or options.rehearse), settings)
    results.rows = _earlier(results, options) if options.resume else []
    _announce(results)
    plan = plan_for(device.type, options, started)
    for i, bench in enumerate(chosen):
        share = started + (i + 1) / len(chosen) * (plan.deadline - started)
        known = {(r.op, r.case, r.mode) for r in results.rows}
        cases = [c for c in choose(bench, device.type, options) if (bench.op, c.label, c.mode) not in known]
        rows = []
        for row in run_bench(bench, cases, plan, share):
            rows.append(row)
            results.rows.append(row)
            path = place(results, options) if options.out and row.status != LEFT_OUT else None
            if path is not None:
                results.save(path)
        show(results, rows)
        if device.type == "cuda" and not _alive(results, rows[-1:], chosen[i + 1 :]):
            break
    return results


def _earlier(results: Results, options: Options) -> list[Row]:
    """The measured rows of the file that this run writes, if they are of these sources on this device."""
    path = place(results, options)
    if path is None:
        raise UserError("--resume: expected --output or --out, the file to continue; got neither")
    if not path.exists():
        return []
    earlier = Results.load(path)
    same = all(earlier.identity[k] == results.identity[k] for k in ("sources", "device"))
    return [r for r in earlier.rows if same and r.status != LEFT_OUT]


def _announce(results: Results) -> None:
    system, limit = results.identity, results.ceilings
    print(
        f"{system['device']}, {system['threads']} CPU threads, torch {system['packages']['torch']}, "
        f"commit {system['commit']}, sources {system['sources']}"
    )
    print(
        f"measured limits: copy {limit.copy_gb_s:,.1f} GB/s, "
        f"matrix product {limit.gemm_tflop_s:,.3g} TFLOP/s ({limit.gemm})"
    )
    print(
        "ms: median of a call, cold L2 on CUDA; error: against float64; *: what runs by default\n", flush=True
    )


def _alive(results: Results, last: Sequence[Row], rest: Sequence[Bench]) -> bool:
    """Free the op's memory; False, with a row for every remaining op, if a kernel broke the CUDA context."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return True
    except RuntimeError as error:
        reason = (
            f"the CUDA context was lost in {last[0].op if last else 'the benchmark before'}: "
            f"{' '.join(str(error).split())[:200]}"
        )
        results.context_lost = True
        for bench in rest:
            results.rows.append(left_out(bench, bench.cases[-1], reason))
        print(reason, file=sys.stderr)
        return False


def place(results: Results, options: Options) -> Path | None:
    """The JSON file of a run: --output, or in it if it is a folder, else in --out; None without either."""
    if options.output and not Path(options.output).is_dir():
        return Path(options.output)
    folder = options.output or options.out
    return Path(folder) / results.file_name() if folder else None


def save(results: Results, options: Options) -> None:
    """Print the short table, and write the JSON file if one is named.

    Plots lie beside it, and with --out a table too.
    """
    path = place(results, options)
    short = section(results)
    if path is None:
        print(f"{short}\n\nnot written anywhere: --output FILE keeps the measurements")
        return
    results.save(path)
    if options.out:
        path.with_suffix(".txt").write_text(f"{short}\n\n{text(results, results.rows)}\n", encoding="utf-8")
    print(f"{short}\n\nwrote {', '.join(map(str, [path, *_plots(results, path)]))}")


def _plots(results: Results, path: Path) -> list[Path]:
    """The plots drawn beside `path`; none, with a message, without matplotlib."""
    try:
        return list(importlib.import_module("fastrl.bench.plots").draw(results, path))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        print("no plots: matplotlib is not installed")
        return []


def main(config: Any) -> Results:
    """`fastrl bench`: `config` holds ops, device, quick and output.

    The exit_code of the results is 1 when one of our kernels failed.
    """
    ops = tuple(config.ops)
    return _main(Options(ops=ops, device=config.device, quick=config.quick, output=config.output))


def _main(options: Options) -> Results:
    written = options.output and not Path(options.output).is_dir()
    with claimed(Path(options.output or ""), "--output") if written else nullcontext():
        results = run(options)
        save(results, options)
    return results


def command(argv: Sequence[str] | None = None) -> int:
    """`python -m fastrl.bench.run`; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fastrl.bench.run",
        description="Time the ops against their peers and the hardware's limit.",
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"default: all of {', '.join(names())}")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="few shapes and repetitions, no torch.compile")
    parser.add_argument(
        "--gpu-check",
        action="store_true",
        help=f"the headline cases on CUDA in about {CHECK_SECONDS:.0f} seconds",
    )
    parser.add_argument("--seconds", type=float, default=0.0, help="after which no further case starts")
    parser.add_argument("--resume", action="store_true", help="keep what the file of this run holds already")
    parser.add_argument("--rehearse", action="store_true", help="tiny cases, to try the run itself")
    parser.add_argument("--output", help="a .json file for the measurements, or a folder for one")
    parser.add_argument("--out", help="a folder for the .json file and the table")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's own choice")
    given = vars(parser.parse_args(argv))
    try:
        results = _main(Options(**{**given, "ops": tuple(given["ops"])}))
        return LOST_CONTEXT if results.context_lost else results.exit_code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(command())
