"""Processes that encode chunks of a dataset, started afresh: nothing is forked, so threads of torch and of
tokenizers, and CUDA, may be at work already; and the program's own main module is not run again.

What they import has no torch in it: a worker starts in a second and holds about 150 MB.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from fastrl.errors import UserError

AHEAD = 4  # chunks that may be done before their turn, per worker
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);from fastrl.data.workers import serve; serve()"
)
Task = Callable[[Any], Any]  # what is asked -> the answer, both picklable


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def workers(count: int) -> Iterator[list[Connection]]:
    """Connections to `count` processes, which end with the block."""
    started = [_start() for _ in range(count)]
    try:
        yield [connection for _, connection in started]
    finally:
        for process, connection in started:
            connection.close()
            process.terminate()  # it has nothing that could be lost
        for process, _ in started:
            process.wait()


def _start() -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = Pipe()
    command = [sys.executable, "-c", START, json.dumps(sys.path), str(theirs.fileno())]
    # not its own group: what stops the program stops the worker, by closing the pipe
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=os.environ | ONE_THREAD)
    theirs.close()
    return process, ours


def in_order(connections: Sequence[Connection], work: bytes, tasks: Iterable[object]) -> Iterator[Any]:
    """The result of each task, in order; `work` is a pickled `Task`.

    Raises what a task raises, at its turn, so that the first error of a file is the one that is reported.
    """
    for connection in connections:
        connection.send_bytes(work)
    idle, busy = list(connections), dict[Connection, int]()
    done: dict[int, tuple[object, BaseException | None]] = {}
    waiting, sent, turn = enumerate(tasks), 0, 0
    exhausted = False
    while True:
        while idle and not exhausted and sent - turn < AHEAD * len(connections):
            number, task = next(waiting, (-1, None))
            exhausted = number < 0
            if not exhausted:
                busy[_sent(idle.pop(), task)] = number
                sent += 1
        if turn == sent and exhausted:
            return
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection), "wait() was given nothing else"
            done[busy.pop(ready)] = _received(ready)
            idle.append(ready)
        while turn in done:
            result, error = done.pop(turn)
            if error is not None:
                raise error
            turn += 1
            yield result


def _sent(connection: Connection, task: object) -> Connection:
    try:
        connection.send(task)
    except OSError as error:
        raise _gone() from error
    return connection


def _received(connection: Connection) -> tuple[object, BaseException | None]:
    try:
        result, error = connection.recv()
    except (EOFError, OSError) as error:
        raise _gone() from error
    return result, error


def _gone() -> UserError:
    return UserError(
        "a process that was reading the dataset ended, perhaps for lack of memory; "
        "give the program fewer cores (taskset -c 0) to have fewer of them"
    )


def serve() -> None:
    """The life of a worker: it is sent its work, then tasks, until the pipe is closed."""
    gc.disable()  # a third of the time, for lists of lists that have no cycles
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to the workers as well
    connection = Connection(int(sys.argv[2]))
    try:
        work: Task | BaseException = connection.recv()
    except EOFError:
        return
    except Exception as error:  # whatever unpickling a user's tokenizer raises
        work = error
    while True:
        try:
            task = connection.recv()
            connection.send(_answer(work, task))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _answer(work: Task | BaseException, task: object) -> tuple[object, BaseException | None]:
    try:
        if isinstance(work, BaseException):
            raise work
        return work(task), None
    except UserError as error:
        return None, UserError(str(error))
    except Exception as error:  # a bug, which the first process reports as its own
        return None, RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
