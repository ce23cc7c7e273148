"""The prompts that `fastrl generate` is given: rows of datasets, lines of text, standard input."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest

from fastrl.errors import UserError
from fastrl.run.generate import read_prompts
from fastrl.run.listed import read_prompt_rows

CHAT = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
ROWS = [{"prompt": "a"}, {"prompt": CHAT, "tools": [{"name": "f"}]}]


def prompts(path):
    return [prompt for _, prompt in read_prompts(str(path))]


def test_files_that_training_reads(tmp_path):
    """Read as lines of text, a JSON array is a prompt a line: '[', ' {', ..."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    array, lines, columnar = (tmp_path / f"p.{kind}" for kind in ("json", "JSONL", "parquet"))
    array.write_text(json.dumps(ROWS, indent=1))
    lines.write_text("\n".join(map(json.dumps, ROWS)))
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": CHAT, "tools": [{"name": "f"}]}]), columnar)
    assert prompts(array) == prompts(lines) == ["a", CHAT]
    assert [row.get("tools") for _, row in read_prompt_rows(str(array))] == [None, [{"name": "f"}]]
    ((where, row),) = read_prompt_rows(str(columnar))
    assert (where, row) == (f"{columnar}: row 1", ROWS[1])
    for wrong, message in (
        ([{"text": "a"}], "p.json: item 1: expected a prompt column, got text"),
        ([{"prompt": 3}], "p.json: item 1: prompt: expected text or a list of messages"),
        (["a"], "p.json: item 1: expected a JSON object"),
    ):
        array.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=message):
            prompts(array)
    with pytest.raises(UserError, match=r"--prompts: no file .*absent.txt"):
        prompts(tmp_path / "absent.txt")


def test_text_and_standard_input(tmp_path, monkeypatch):
    """A byte order mark in a prompt, or bytes that are not UTF-8, reach the tokenizer."""
    given = "\ufeffa b\r\n\n caf\u00e9\n".encode()
    path = tmp_path / "p.txt"
    path.write_bytes(given)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(given)))
    assert prompts(path) == prompts("-") == ["a b", " caf\u00e9"]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a\n\xff\xfe\n")))
    with pytest.raises(UserError, match=r"standard input:2: expected UTF-8 text, got byte 0xff at column 1"):
        prompts("-")
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(UserError, match=r"p.txt:2: expected UTF-8 text"):
        prompts(path)


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_half_characters_name_their_line(tmp_path, kind):
    """JSON can spell half a surrogate pair; tokenizers raise TypeErrors on it."""
    path = tmp_path / f"p.{kind}"
    path.write_text('{"prompt": "\\ud83d\\ude00 \\\\ud800"}\n', encoding="utf-8")
    assert prompts(path) == ["\U0001f600 \\ud800"]
    path.write_text('{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b\\uD800c"}]}\n')
    with pytest.raises(
        UserError, match=r":2: prompt: content: .* half of a surrogate pair, \\ud800, at character 2"
    ):
        prompts(path)
