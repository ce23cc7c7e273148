"""The prompts that `fastrl generate` is given: lines of text, or rows of a dataset."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from fastrl.data.rows import READERS, check_value, read_table
from fastrl.errors import UserError
from fastrl.files import BYTE_ORDER_MARK, JsonObject, decode


def read_prompt_rows(path: str) -> Iterator[tuple[str, JsonObject]]:
    """(`file:line`, columns) of every prompt of a file, or of standard input where `path` is -.

    A line that is not blank is a prompt.  A file that training reads (.jsonl, .json, .parquet) has them in
    its `prompt` column, text or lists of messages, and beside them what their template is given.  Raises
    UserError naming the line that is wrong.
    """
    if Path(path).suffix.lower() in READERS:
        for where, row in read_table(path):
            if "prompt" not in row:
                raise UserError(f"{where}: expected a prompt column, got {', '.join(row) or 'none'}")
            check_value("prompt", row["prompt"], where)
            yield where, row
        return

    name = "standard input" if path == "-" else path
    if path != "-" and not Path(path).is_file():
        raise UserError(f"--prompts: no file {path} (looked in {Path.cwd()})")
    raw = _standard_input() if path == "-" else Path(path).read_bytes()
    for number, line in enumerate(raw.removeprefix(BYTE_ORDER_MARK).split(b"\n"), 1):
        where = f"{name}:{number}"
        text = decode(line, where)
        if text.strip():
            yield where, {"prompt": text.removesuffix("\r")}


def _standard_input() -> bytes:
    """Its bytes: as text, what is not UTF-8 would have become something else."""
    binary = getattr(sys.stdin, "buffer", None)
    if binary is None:  # a stand-in for it holds text alone
        return sys.stdin.read().encode("utf-8", errors="surrogateescape")
    data: bytes = binary.read()
    return data
