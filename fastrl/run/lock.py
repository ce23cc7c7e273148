"""One writer at a time: the claim of a process on a run folder or an output file.

A lock is a small JSON file that names the process, its host and when it started.  It is made in one move and
removed when the writer ends.  One that a killed process left behind is recognised on its own host (the
process is gone, or its number belongs to a younger one) and replaced; about another host nothing can be
known, so the message names the file to delete.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fastrl.errors import UserError
from fastrl.parallel.world import World

IN_FOLDER = ".fastrl.lock"
OURS = ("__main__.py", "fastrl")  # sys.argv[0] of the command line


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock.

    started    when the process began, in the kernel's ticks since the boot; 0 where that is not known
    boot       of which boot of the machine; empty where that is not known
    namespace  of process numbers: a container has its own
    since      when the lock was taken, in local time
    """

    pid: int
    host: str
    started: int
    boot: str
    namespace: str
    command: str
    since: str

    @staticmethod
    def this_process() -> Holder:
        words = ["fastrl", *sys.argv[1:2]] if Path(sys.argv[0]).name in OURS else sys.argv[:1]
        return Holder(
            pid=os.getpid(),
            host=socket.gethostname(),
            started=_started(os.getpid()) or 0,
            boot=_text(Path("/proc/sys/kernel/random/boot_id")),
            namespace=_namespace(),
            command=" ".join(words),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def is_gone(self) -> bool | None:
        """Whether the process has ended; None where this cannot be seen from here."""
        here = Holder.this_process()
        if self.host != here.host:
            return None
        if self.boot != here.boot:
            return True
        if self.namespace != here.namespace:
            return None
        started = _started(self.pid)
        return started is None or started != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command}, since {self.since})"


@contextlib.contextmanager
def claimed(target: Path, option: str, world: World | None = None, *, folder: bool = False) -> Iterator[None]:
    """Hold the lock of a file, or of a folder, while inside; the folder is made, and removed if it stays
    empty.

    option  what to name in errors
    world   its first process holds the lock; every process enters and leaves together

    Raises UserError, on every process, where another process holds it.
    """
    world = world or World()
    lock = target / IN_FOLDER if folder else target.parent / f".{target.name}.lock"
    mine, new = world.from_main(lambda: _take(lock, target, option))
    try:
        yield
    finally:
        if world.is_main:
            _release(lock, mine)
            for made in reversed(new):
                with contextlib.suppress(OSError):  # it is not empty, or it is gone
                    made.rmdir()


def _take(lock: Path, target: Path, option: str) -> tuple[Holder, list[Path]]:
    """Make the lock; who holds it now, and the folders that were made for it."""
    new = [parent for parent in reversed(lock.parents) if not parent.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"{option}: expected a folder, got {lock.parent}, where a file is in the way"
        ) from None
    except OSError as error:
        raise UserError(f"{option}: {target} cannot be written ({error.strerror})") from error

    mine = Holder.this_process()
    while not _made(lock, mine, f"{option}: {target}"):
        holder = _read(lock)
        gone = None if holder is None else holder.is_gone()
        if holder is None and not lock.exists():
            continue  # it was released just now
        if not gone:
            raise UserError(f"{option}: {target} is in use {_by(holder, gone, lock)}")
        _remove_stale(lock, holder)
        print(f"{target} was left locked by {holder}, which is gone; this run takes over", file=sys.stderr)
    return mine, new


def _by(holder: Holder | None, gone: bool | None, lock: Path) -> str:
    if holder is None:
        return f"according to {lock}, which cannot be read; delete that file if nothing writes there"
    if gone is None:
        return f"by {holder}, which cannot be seen from here; if it has ended, delete {lock}"
    return f"by {holder}; wait for it, stop it, or name another output"


def _made(lock: Path, mine: Holder, what: str) -> bool:
    """Make the lock with its contents in one move, if there is none.  Raises UserError naming `what`, where
    nothing can be written.
    """
    draft = lock.with_name(f"{lock.name}.{mine.pid}")
    try:
        draft.write_text(json.dumps(asdict(mine)), encoding="utf-8")
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UserError(f"{what} cannot be written ({error.strerror})") from error
    try:
        os.link(draft, lock)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: made first, and filled then
        return _made_empty(lock, mine)
    finally:
        draft.unlink()
    return True


def _made_empty(lock: Path, mine: Holder) -> bool:
    try:
        with lock.open("x", encoding="utf-8") as file:
            file.write(json.dumps(asdict(mine)))
    except FileExistsError:
        return False
    return True


def _read(lock: Path) -> Holder | None:
    """Who holds a lock; None for a file that does not say."""
    try:
        contents = json.loads(lock.read_text(encoding="utf-8"))
        return Holder(**{field.name: contents[field.name] for field in fields(Holder)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove_stale(lock: Path, holder: Holder | None) -> None:
    """Remove the lock of a process that is gone, and no other that took its place meanwhile."""
    aside = lock.with_name(f"{lock.name}.stale.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        lock.rename(aside)
        if _read(aside) != holder:
            with contextlib.suppress(FileExistsError):
                os.link(aside, lock)
        aside.unlink()


def _release(lock: Path, mine: Holder) -> None:
    if _read(lock) == mine:
        with contextlib.suppress(OSError):
            lock.unlink()


def _started(pid: int) -> int | None:
    """When a process began, in ticks since the boot (0 where the system does not say); None if it has
    ended.
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return 0
    # after the name in brackets: state, parent, ..., and 20 fields further the start time
    parts = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return int(parts[19]) if parts and parts[0] not in ("Z", "X") else None


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
