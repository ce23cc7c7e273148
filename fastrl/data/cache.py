"""Files that are made once: a folder per key, written beside its place and moved there whole.

    ~/.cache/fastrl/datasets/KEY/data.arrow     or under FASTRL_CACHE
    ~/.cache/fastrl/datasets/KEY/entry.json     the checksum of data.arrow, and what its maker says of it

A key is a digest of everything that the contents depend on, so an entry is never out of date.  Whatever is
not as it was written (a disk error, an interrupted copy) is found by its checksum, and made again.  Nothing
in it is executed: Arrow and JSON alone.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from fastrl.errors import UserError
from fastrl.files import JsonObject

DATA, ENTRY = "data.arrow", "entry.json"
VARIABLE = "FASTRL_CACHE"
UNUSED_DAYS = 30  # after which an entry is removed
Make = Callable[[Path], JsonObject]  # writes the data to a file, and returns what to keep of it
Say = Callable[[str], None]


def cache_folder() -> Path:
    """Where entries are kept."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser() / "datasets"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fastrl" / "datasets"


def digest(*parts: object) -> str:
    """What names an entry: a digest of the parts' JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:40]


def digest_of_file(path: str | Path) -> str:
    """A digest of a file's bytes; 1 GB/s."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find(key: str, folder: Path) -> tuple[Path, JsonObject] | None:
    """The data of a whole entry and what was kept of it; None where there is none."""
    place = folder / key
    try:
        entry = json.loads((place / ENTRY).read_text(encoding="utf-8"))
        whole = entry["checksum"] == _checksum(place / DATA)
        kept: JsonObject = entry["kept"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not whole:
        return None
    with contextlib.suppress(OSError):
        os.utime(place)  # used today
    return place / DATA, kept


def find_or_make(
    key: str, make: Make, say: Say, accept: Callable[[JsonObject], bool]
) -> tuple[Path, JsonObject]:
    """The entry's data and what was kept of it, made by `make` where there is none that `accept` takes.

    Of several processes that want the same entry at once, one makes it and the others wait.

    Raises UserError where the disk is full, and whatever `make` raises.
    """
    folder = _writable(cache_folder(), say)
    with _locked(folder / f"{key}.lock", say):
        found = find(key, folder)
        if found is not None and accept(found[1]):
            return found
        if found is None and (folder / key).exists():
            say(f"{folder / key}: not what was written there; it is made again")
        _make(key, make, folder)
    found = find(key, folder)
    if found is None:
        raise UserError(
            f"{folder / key}: changed while it was written; see that the disk is sound, or set {VARIABLE}"
        )
    return found


def _make(key: str, make: Make, folder: Path) -> None:
    _prune(folder)
    partial = Path(tempfile.mkdtemp(prefix=f".{key[:8]}-", dir=folder))
    try:
        kept = make(partial / DATA)
        entry = {"checksum": _checksum(partial / DATA), "kept": kept}
        (partial / ENTRY).write_text(json.dumps(entry), encoding="utf-8")
        partial.chmod(0o755)
        shutil.rmtree(folder / key, ignore_errors=True)
        os.rename(partial, folder / key)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return  # without locks, another process was faster
        reason = error.strerror or error
        raise UserError(
            f"{folder}: the encoded dataset could not be written ({reason}); "
            f"make room, or set {VARIABLE} to a folder on another disk"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _checksum(path: Path) -> int:
    """CRC-32 of a file, and its size; 3 GB/s."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total = zlib.crc32(block, total)
        return total + (file.tell() << 32)


def _writable(folder: Path, say: Say) -> Path:
    """The folder; one for this run alone where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        own = Path(tempfile.mkdtemp(prefix="fastrl-"))
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        reason = error.strerror or error
        problem = f"{folder} cannot be written ({reason})"
        say(f"{problem}: the encoded dataset is kept for this run alone; set {VARIABLE} to keep it")
        return own


@contextlib.contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """Inside, no other process has the lock; file systems without locks do without."""
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is reading the same dataset: waiting for it")
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def _prune(folder: Path) -> None:
    """Remove entries that were not used for a month, and what killed runs left half done."""
    limits = {"day": time.time() - 86400, "month": time.time() - UNUSED_DAYS * 86400}
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            partial = path.name.startswith(".")
            if path.stat().st_mtime < limits["day" if partial else "month"]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
