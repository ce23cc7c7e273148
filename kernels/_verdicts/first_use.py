"""When the checks run, and what becomes of their verdicts in this process.

`ensure(device, widths)` is called where a run is set up: it reads the verdicts from disk, has a child process
find those that are missing (about a minute, once a machine), and warns of every failure.  A program that only
calls ops gets there with its first eager call on CUDA (`verdict_of`).  Inside a graph capture, under
torch.compile, a transform or fake tensors nothing is checked and nothing remembered.

FASTRL_CHECK=0 checks nothing: unknown kernels are not chosen.  FASTRL_CHECK=strict makes a kernel that
failed, or could not be checked, an error.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastrl.kernels._registry import registered, unproven
from fastrl.kernels._verdicts import cache, runner
from fastrl.kernels._verdicts.case import Widths
from fastrl.kernels._verdicts.checks import CHECKS
from fastrl.kernels._verdicts.judge import Outcome
from fastrl.kernels._verdicts.machine import machine
from fastrl.kernels._verdicts.table import TABLE, Key, Run, Verdict
from fastrl.kernels._verdicts.variant import eager, guarded

ASKED_BY = "FASTRL_CHECK"
MODES = ("1", "0", "strict")
USUAL = (torch.float32, torch.bfloat16)  # what is checked beside the dtype of the call

_lock = threading.RLock()  # autograd runs backwards in threads of their own
_warned: set[tuple[Key, str]] = set()


def mode() -> str:
    """FASTRL_CHECK: "1" (the default), "0" or "strict".  Raises ValueError for anything else."""
    asked = os.environ.get(ASKED_BY) or "1"
    if asked not in MODES:
        raise ValueError(f"{ASKED_BY}: expected one of {', '.join(MODES)}; got {asked!r}")
    return asked


# --- at set-up --------------------------------------------------------------------------------------
def ensure(device: torch.device, widths: Widths | None = None, dtypes: Iterable[torch.dtype] = USUAL) -> None:
    """Have a verdict for every kernel that may run on `device`, for these widths and dtypes.

    Does nothing for a device without kernels to check.  Raises RuntimeError under FASTRL_CHECK=strict where a
    kernel fails or cannot be checked.
    """
    index = number_of(device)
    if index is None or mode() == "0":
        return
    wanted = widths or Widths()
    with _lock:
        jobs = missing(index, wanted, dtypes)
        if jobs:
            found, trouble = _settle(index, jobs, wanted)
            _report(index, found, trouble)
        TABLE.asked.update((table_index(index), job.dtype) for job in jobs)
        if mode() == "strict":
            _refuse(index, dtypes)


def number_of(device: torch.device) -> int | None:
    """Which of the machine's GPUs this is; None where it is none of them."""
    here = machine()
    if not here.devices():
        return None
    if here.stands_in == device.type:
        return 0
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def table_index(index: int) -> int | None:
    """The index that tensors of this GPU carry."""
    return None if machine().stands_in == "cpu" else index


def job_list(dtypes: Iterable[torch.dtype]) -> list[runner.Job]:
    """All that can be checked on the machine in force."""
    found = []
    for op, backend, impl in unproven():
        if backend not in machine().backends or op not in CHECKS:
            continue
        for dtype in dict.fromkeys(dtypes):
            if impl.dtypes is None or dtype in impl.dtypes:
                found.append(runner.Job(op, backend, dtype))
    return found


def key_of(job: runner.Job, index: int) -> Key:
    return job.op, job.backend, job.dtype, table_index(index)


def missing(index: int, widths: Widths, dtypes: Iterable[torch.dtype]) -> list[runner.Job]:
    """The jobs without a verdict in this process; one that failed is not tried again."""
    jobs = []
    for job in job_list(dtypes):
        known = TABLE.verdicts.get(key_of(job, index))
        if known is None or (known.passed and widths.text() not in known.widths):
            jobs.append(job)
    return jobs


def _settle(
    index: int, jobs: Sequence[runner.Job], widths: Widths, *, anew: bool = False
) -> tuple[dict[runner.Job, Verdict], str]:
    """The verdicts of the jobs, from disk or from children, written down; and why some have none."""
    here = machine()
    gpu = here.identity(index)
    with cache.store(cache.identity(gpu)) as store:
        entries = store.read()
        known = {} if anew else _known(entries, jobs, widths)
        left = [job for job in jobs if job not in known]
        trouble = ""
        if left:
            ops = len({job.op for job in left})
            cache.say(f"checking the kernels of {ops} ops on {gpu['gpu']}: about a minute, once")
            answers = runner.check(here, index, left, widths)
            trouble = answers.trouble
            fresh = {job: _with_older(job, v, entries, anew) for job, v in answers.done.items()}
            known |= fresh
            if fresh:
                store.write(entries | {entry_name(job): v for job, v in fresh.items()})
    for job, verdict in known.items():
        put(key_of(job, index), verdict)
    return known, trouble


def _known(entries: cache.Entries, jobs: Sequence[runner.Job], widths: Widths) -> dict[runner.Job, Verdict]:
    found = {}
    for job in jobs:
        verdict = entries.get(entry_name(job))
        if verdict is not None and (not verdict.passed or widths.text() in verdict.widths):
            found[job] = verdict
    return found


def _with_older(job: runner.Job, verdict: Verdict, entries: cache.Entries, anew: bool) -> Verdict:
    """The verdict with the variants and widths that passed before."""
    older = entries.get(entry_name(job))
    if older is None or anew or not older.passed or not verdict.passed:
        return verdict
    return replace(verdict, variants=verdict.variants | older.variants, widths=verdict.widths | older.widths)


def entry_name(job: runner.Job) -> str:
    return "/".join(job.request().values())


def put(key: Key, verdict: Verdict) -> None:
    """Record a verdict in this process."""
    impl = registered(key[0])[key[1]]
    parts: Mapping[str, Run] = guarded(key, impl, found_variant) if verdict.passed else {}
    TABLE.put(key, verdict, parts)


def recheck(device: torch.device, widths: Widths, dtypes: Iterable[torch.dtype]) -> str:
    """Check everything now, whatever is known: `fastrl check`.  Returns why some were not reached, or ""."""
    index = number_of(device)
    if index is None:
        raise RuntimeError(f"{device}: expected a GPU with kernels to check")
    with _lock:
        return _settle(index, job_list(dtypes), widths, anew=True)[1]


def passing(device: torch.device) -> frozenset[str]:
    """The names of all kernels that have passed on this device."""
    index = number_of(device)
    if index is None:
        return frozenset()
    return frozenset("/".join(name_parts(k)) for k in TABLE.runs if k[3] == table_index(index))


def restrict(device: torch.device, names: frozenset[str]) -> None:
    """Use no kernels on this device but those of these names: the others did not pass on every process."""
    index = number_of(device)
    if index is None:
        return
    for key in list(TABLE.runs):
        if key[3] == table_index(index) and "/".join(name_parts(key)) not in names:
            reason = "it did not pass on every process of the run"
            put(key, replace(TABLE.verdicts[key], passed=False, reason=reason))
            _warn(key, reason, "runs its next implementation instead")


def name_parts(key: Key) -> tuple[str, str, str]:
    return key[0], key[1], str(key[2]).removeprefix("torch.")


def load(device: torch.device) -> None:
    """Take over what is on disk, without checking anything: `fastrl env`."""
    index = number_of(device)
    if index is None:
        return
    entries = cache.peek(cache.identity(machine().identity(index)))
    for job in job_list((torch.float32, torch.bfloat16, torch.float16)):
        verdict = entries.get(entry_name(job))
        if verdict is not None and key_of(job, index) not in TABLE.verdicts:
            put(key_of(job, index), verdict)


# --- at a call --------------------------------------------------------------------------------------
def verdict_of(key: Key, x: Tensor) -> Mapping[str, Run] | None:
    """The parts of an implementation that has no verdict yet, if it passes its check now.

    Checks everything, at the first eager call on a device.  None where it may not be chosen.
    """
    place = key[3], key[2]
    if place not in TABLE.asked and mode() != "0" and key not in TABLE.verdicts and eager(x):
        TABLE.asked.add(place)
        ensure(x.device, dtypes=(*USUAL, key[2]))
    parts = TABLE.runs.get(key)
    if parts is None and mode() == "strict":
        raise RuntimeError(
            f"{key[0]}: the {key[1]} kernel may not run: {TABLE.reason(key)} ({ASKED_BY}=strict)"
        )
    return parts


def found_variant(key: Key, variant: str, outcome: Outcome) -> None:
    """Record what the first launch of a variant showed."""
    with _lock:
        if not outcome.reason:
            TABLE.add_variant(key, variant)
            return
        TABLE.generation += 1
        if mode() == "strict":
            raise RuntimeError(f"{key[0]}: the {key[1]} kernel failed: {variant}: {outcome.reason}")
        _warn(key, f"{variant}: {outcome.reason}", "runs the reference for such calls")


# --- saying so --------------------------------------------------------------------------------------
def _report(index: int, found: Mapping[runner.Job, Verdict], trouble: str) -> None:
    for job, verdict in found.items():
        if verdict.reason:
            _warn(key_of(job, index), verdict.reason, "runs its next implementation instead")
    if trouble:
        cache.say(f"kernels that could not be checked are not used: {trouble}")


def _warn(key: Key, reason: str, then: str) -> None:
    """One warning of a failure, from the first process of a group."""
    if (key, reason) in _warned or os.environ.get("RANK", "0") != "0":
        return
    _warned.add((key, reason))
    op, backend, dtype, _ = key
    text = f"{op}: the {backend} kernel failed its check ({dtype}, {reason}); {op} {then}"
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _refuse(index: int, dtypes: Iterable[torch.dtype]) -> None:
    for job in job_list(dtypes):
        key = key_of(job, index)
        known = TABLE.verdicts.get(key)
        reason = "" if known is not None and known.void else TABLE.reason(key)
        if reason:
            raise RuntimeError(
                f"{job.op}: the {job.backend} kernel may not run: {reason} ({ASKED_BY}=strict)"
            )
