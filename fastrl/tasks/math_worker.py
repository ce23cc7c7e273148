"""A process that compares mathematical answers with math-verify: `[gold, said]` in, `true` or `false` out, a
line of JSON each.  It is a process because sympy can take any time and memory, which only a kill ends.

It is run by its path and imports nothing of fastrl: see maths.py.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys

MEMORY = 4 << 30  # bytes of addresses


def main(path: list[str], seconds: int) -> None:
    """Answer lines of standard input until it ends.  A comparison that takes longer than `seconds` ends the
    process.
    """
    sys.path.extend(path)
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX alone: the library's plain expressions go through an eval
    kinds = [LatexExtractionConfig()]
    print("ready", file=reply, flush=True)
    for line in sys.stdin:
        signal.alarm(seconds)  # whose default action ends the process, whatever it is in
        gold, said = (parse(f"${text}$", kinds, parsing_timeout=None) for text in json.loads(line))
        same = bool(gold and said) and verify(gold, said, timeout_seconds=None)
        signal.alarm(0)
        print(json.dumps(bool(same)), file=reply, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
