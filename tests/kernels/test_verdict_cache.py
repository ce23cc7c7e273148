"""Verdicts on disk: read by the next process, invalid on another machine or another state of the sources, and
harmless where the file or its folder is broken.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from fake_device import H200, canned, fake_device, forget

from fastrl.kernels._verdicts import cache
from fastrl.kernels._verdicts.case import Widths
from fastrl.kernels._verdicts.first_use import ensure, passing, recheck
from fastrl.kernels._verdicts.table import TABLE, Verdict

CPU, FP32 = torch.device("cpu"), (torch.float32,)
OPS = ("gae", "swiglu")
BOTH = {"gae/triton/float32", "swiglu/triton/float32"}


def children(folder: Path) -> int:
    log = folder / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def settled(folder: Path, widths: Widths | None = None, **changes) -> frozenset[str]:
    """What passes in a new process that checks what it does not know."""
    with fake_device(folder, *OPS, start=canned(folder / "log"), **changes):
        ensure(CPU, widths, FP32)
        return passing(CPU)


def file(folder: Path) -> Path:
    return folder / "fastrl" / "verdicts.json"


def test_the_next_process_reads_what_one_has_found(tmp_path):
    assert settled(tmp_path) == settled(tmp_path) == BOTH
    assert children(tmp_path) == 1
    (machine,) = json.loads(file(tmp_path).read_text()).values()
    assert machine["identity"] | H200 == machine["identity"]
    assert set(machine["identity"]) == {"gpu", "capability", "driver", "torch", "triton", "sources"}
    assert not [p for p in file(tmp_path).parent.iterdir() if p.name.startswith(".verdicts")]


@pytest.mark.parametrize("what", ["gpu", "capability", "driver"])
def test_another_machine_checks_anew(what, tmp_path):
    settled(tmp_path)
    settled(tmp_path, identity=lambda index: {**H200, what: "another"})
    assert children(tmp_path) == 2
    settled(tmp_path)
    assert children(tmp_path) == 2, "the first machine's verdicts are still there"


@pytest.mark.parametrize("name, value", [("sources", lambda: "changed"), ("version", lambda package: "9.9")])
def test_other_sources_or_another_triton_check_anew(name, value, tmp_path, monkeypatch):
    settled(tmp_path)
    monkeypatch.setattr(cache, name, value)
    settled(tmp_path)
    assert children(tmp_path) == 2


def test_the_digest_is_of_kernels_sources_and_module(tmp_path, monkeypatch):
    """Wrong: a digest of names, or of Python files only."""
    root = tmp_path / "fastrl"
    module, kernel, native = root / "_C.so", root / "kernels" / "a.py", tmp_path / "csrc" / "a.cu"
    for path in (module, kernel, native):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("one")
    monkeypatch.setattr(cache.fastrl, "__file__", str(root / "__init__.py"))
    monkeypatch.setattr(cache, "extension", lambda: type("C", (), {"__file__": str(module)}))
    digests = [cache.sources.__wrapped__()]
    for path in (module, kernel, native):
        path.write_text("two")
        digests.append(cache.sources.__wrapped__())
    assert len(set(digests)) == 4


def test_new_widths_are_checked_beside_the_old(tmp_path):
    settled(tmp_path)
    settled(tmp_path, Widths(D=96))
    settled(tmp_path, Widths(D=96))
    settled(tmp_path)
    assert children(tmp_path) == 2


def test_a_failure_is_kept_and_said_in_every_process(tmp_path):
    """Wrong: a kernel that crashed yesterday and is tried again today."""
    settled(tmp_path)
    data = json.loads(file(tmp_path).read_text())
    next(iter(data.values()))["verdicts"]["gae/triton/float32"] |= {"passed": False, "reason": "crashed"}
    file(tmp_path).write_text(json.dumps(data))
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="gae: the triton kernel failed its check .*crashed"):
            assert settled(tmp_path) == {"swiglu/triton/float32"}
    assert children(tmp_path) == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", '{"KEY": 3}', '{"KEY": {"verdicts": {"gae/triton/float32": 1}}}']
)
def test_a_damaged_file_is_one_line_and_is_written_anew(text, tmp_path, capfd):
    settled(tmp_path)
    (key,) = json.loads(file(tmp_path).read_text())
    file(tmp_path).write_text(text.replace("KEY", key))
    capfd.readouterr()
    assert settled(tmp_path) == BOTH
    said = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert len(said) == 1 and said[0].endswith("the kernels are checked anew")
    assert settled(tmp_path) == BOTH and children(tmp_path) == 2


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, capfd):
    """Wrong: a run that dies for want of a cache; a check at every call."""
    (tmp_path / "fastrl").write_text("a file where the folder should be")
    with fake_device(tmp_path, *OPS, start=canned(tmp_path / "log")):
        ensure(CPU, None, FP32)
        ensure(CPU, None, FP32)
        assert passing(CPU) == BOTH
    said = [line for line in capfd.readouterr().err.splitlines() if "cannot be written" in line]
    assert len(said) == 1 and "kernels are checked once in every process" in said[0]
    assert children(tmp_path) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_file_system(tmp_path):
    (tmp_path / "fastrl").mkdir()
    (tmp_path / "fastrl").chmod(0o500)
    assert settled(tmp_path) == BOTH


def test_a_check_now_asks_again(tmp_path):
    settled(tmp_path)
    with fake_device(tmp_path, *OPS, start=canned(tmp_path / "log")):
        assert recheck(CPU, Widths(), FP32) == ""
    assert children(tmp_path) == 2


def test_one_checks_while_another_waits(tmp_path):
    """Wrong: a lock that is taken after reading.  (Two processes: tests/parallel/test_kernels.py.)"""
    identity, seen = cache.identity(H200), []

    def wait_and_read():
        with cache.store(identity) as theirs:
            seen.append(set(theirs.read()))

    with fake_device(tmp_path):
        with cache.store(identity) as mine:
            assert mine.read() == {}
            other = threading.Thread(target=wait_and_read, daemon=True)
            other.start()
            other.join(0.3)
            assert other.is_alive(), "it waits"
            mine.write({"a/b/c": Verdict(True, date="2026-12-01")})
        other.join(30)
    assert seen == [{"a/b/c"}]


def test_old_machines_are_forgotten(tmp_path):
    with fake_device(tmp_path):
        for i in range(cache.KEPT + 3):
            with cache.store({"gpu": str(i)}) as store:
                store.read()
                store.write({"a/b/c": Verdict(True)})
        assert len(json.loads(file(tmp_path).read_text())) == cache.KEPT
        assert cache.peek({"gpu": "0"}) == {} and cache.peek({"gpu": str(cache.KEPT + 2)})
        assert not TABLE.verdicts
    forget()
