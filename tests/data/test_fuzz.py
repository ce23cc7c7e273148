"""Anything at all as a dataset or a chat template: it is read, or refused by a UserError that says where.

No other exception may leave the readers: the command line would call it an internal error.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from copy import copy
from pathlib import Path

import pytest

from fastrl.data.comparisons import encode_statements, read_statements
from fastrl.data.encode import encode_all, encode_prompt
from fastrl.data.pairs import LABELLED, PAIRED, encode_units
from fastrl.data.rows import read_rows
from fastrl.errors import UserError
from fastrl.run.listed import read_prompt_rows
from fastrl.tasks.tokens import train_bpe

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COLUMNS = (
    *("prompt", "completion", "messages", "text", "tools", "chat_template_kwargs", "chosen", "rejected"),
    *("label", "completions", "scores", "ranks", "weight", "steps", "labels", "margin"),
)


@pytest.fixture(scope="module")
def tokenizer():
    made = train_bpe(["the quick brown fox", "<|user|>hello<|end|>"], 280)
    made.chat_template = CHATML
    return made


# --- values -----------------------------------------------------------------------------------------
def text_of(rng: random.Random) -> str:
    return rng.choice(
        [
            "",
            " ",
            "hello",
            "a\nb",
            "é",
            "\x00",
            "\ufeff",
            "\U0001f600",
            "\ud800",
            "<eos>",
            "<|end|>",
            "{{",
            "[1]",
        ]
    )


def message_of(rng: random.Random, depth: int) -> object:
    made: dict[str, object] = {"role": rng.choice(["user", "assistant", "system", "tool", "", 3, None])}
    if rng.random() < 0.9:
        made["content"] = rng.choice([text_of, value_of])(rng) if rng.random() < 0.7 else "hi"
    if rng.random() < 0.3:
        made["tool_calls"] = value_of(rng, depth + 1)
    if rng.random() < 0.1:
        made[rng.choice(["type", "name", "fastrl_index", "thinking", ""])] = value_of(rng, depth + 1)
    return made


def value_of(rng: random.Random, depth: int = 0) -> object:
    """A value of JSON."""
    kind = rng.random()
    if kind < 0.3:
        return text_of(rng)
    if kind < 0.45 or depth > 2:
        return rng.choice([None, True, False, 0, -1, 2**70, 1.5, 1e308, float("nan"), float("inf")])
    if kind < 0.75:
        return [message_of(rng, depth) for _ in range(rng.randrange(4))]
    if kind < 0.88:
        return [value_of(rng, depth + 1) for _ in range(rng.randrange(3))]
    names = ["type", "text", "function", "name", "arguments", "role", "", "a"]
    return {rng.choice(names): value_of(rng, depth + 1) for _ in range(rng.randrange(3))}


def row_of(rng: random.Random) -> dict[str, object]:
    kinds = (["prompt", "completion"], ["messages"], ["text"], ["prompt"], ["prompt", "chosen", "rejected"])
    names = rng.choice([*kinds, ["prompt", "completion", "label"], ["prompt", "completions", "scores"]])
    extra = rng.sample(COLUMNS, rng.randrange(3))
    return {name: value_of(rng) for name in {*names, *extra}}


# --- readers ----------------------------------------------------------------------------------------
def consume(path: Path, tokenizer) -> dict[str, Callable[[], object]]:
    """Every way that a file of rows is read."""
    kinds = {**PAIRED, **LABELLED}
    ways: dict[str, Callable[[], object]] = {
        "sft": lambda: encode_all(read_rows(path), tokenizer),
        "prompts": lambda: [
            encode_prompt(row.fields["prompt"], tokenizer, where=row.where, columns=row.fields)
            for row in read_rows(path, None, {"prompt": ("prompt",)})
        ],
        "pairs": lambda: encode_units(read_rows(path, None, PAIRED), tokenizer, paired=True),
        "labelled": lambda: encode_units(read_rows(path, None, kinds), tokenizer, paired=False),
        "generate": lambda: list(read_prompt_rows(str(path))),
    }
    for data in ("compared", "verdict", "steps"):
        ways[data] = lambda data=data: encode_statements(read_statements(path, data), tokenizer)
    return ways


def attempt(path: Path, tokenizer, refused: dict[str, int], taken: dict[str, int]) -> None:
    for name, way in consume(path, tokenizer).items():
        try:
            way()
            taken[name] = taken.get(name, 0) + 1
        except UserError as error:
            assert str(path) in str(error), (name, str(error))
            refused[name] = refused.get(name, 0) + 1


def dumped(row: object) -> str:
    """JSON as lenient writers make it: NaN, halves of characters, and all."""
    return json.dumps(row, ensure_ascii=True)


def rounds(seed: int, count: int, path: Path, tokenizer, make: Callable[[random.Random], bytes]) -> int:
    """Tries `count` files; how many readings were taken."""
    rng = random.Random(seed)
    refused: dict[str, int] = {}
    taken: dict[str, int] = {}
    for _ in range(count):
        path.write_bytes(make(rng))
        attempt(path, tokenizer, refused, taken)
    assert len(refused) == 8, "every reader has refused something"
    return sum(taken.values())


def lines_of(rng: random.Random) -> bytes:
    return "\n".join(dumped(row_of(rng)) for _ in range(rng.choice([1, 1, 2]))).encode()


def test_any_value_in_any_column(tmp_path, tokenizer):
    """Wrong implementations: an AttributeError for a message that is a list; a tokenizer's TypeError for half
    a character.
    """
    assert rounds(1, 500, tmp_path / "a.jsonl", tokenizer, lines_of) > 100


GOOD = [
    {"prompt": "hello", "completion": "world"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    {"prompt": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}]},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "a", "completions": ["b", "c"], "scores": [1, 0]},
    {"prompt": "a", "completion": "b", "label": True},
]


def noisy(rng: random.Random, clean: bytes) -> bytes:
    """The bytes with some changed, cut out, doubled or cut off."""
    made = bytearray(clean)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(made) + 1)
        match rng.randrange(5):
            case 0:
                made[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                made[at:at] = rng.choice(
                    [b"\xff", b"\x00", b"\n", b"[", b"}", b'"', b"\\ud800", b"\xef\xbb\xbf"]
                )
            case 2:
                del made[at : at + rng.randrange(1, 20)]
            case 3:
                made[at:at] = made[at : at + 30]
            case _:
                del made[at:]
    return bytes(made)


def test_bytes_that_are_not_the_file_that_was_written(tmp_path, tokenizer):
    """Lines, an array and parquet, damaged.  Wrong implementation: UnicodeDecodeError; a RecursionError."""

    def lines(rng):
        return noisy(rng, dumped(rng.choice(GOOD)).encode() + b"\n")

    def array(rng):
        return noisy(rng, dumped(rng.sample(GOOD, 2)).encode())

    rounds(2, 250, tmp_path / "a.jsonl", tokenizer, lines)
    rounds(3, 250, tmp_path / "a.json", tokenizer, array)
    for name, text in (("deep.jsonl", "[" * 100_000), ("digits.jsonl", '{"text": ' + "9" * 5000 + "}")):
        (tmp_path / name).write_text(text)
        attempt(tmp_path / name, tokenizer, {}, {})


def test_parquet_that_was_damaged(tmp_path, tokenizer):
    """Wrong implementation: an error of Arrow that is not ArrowException."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    arrow = pytest.importorskip("pyarrow")
    whole = tmp_path / "whole.parquet"
    parquet.write_table(arrow.Table.from_pylist(GOOD[:1] * 3), whole)
    clean = whole.read_bytes()
    rounds(4, 150, tmp_path / "a.parquet", tokenizer, lambda rng: noisy(rng, clean))


def test_values_of_parquet_that_python_cannot_hold(tmp_path):
    """Wrong implementation: UnicodeDecodeError or OverflowError without a row."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    arrow = pytest.importorskip("pyarrow")
    offsets = arrow.array([0, 3], arrow.int32()).buffers()[1]
    broken = arrow.Array.from_buffers(arrow.string(), 1, [None, offsets, arrow.py_buffer(b"a\xffb")])
    columns = {
        "prompt": broken,
        "when": arrow.array([2**62], arrow.timestamp("us")),
        "zone": arrow.array([1], arrow.timestamp("us", "Mars/Olympus")),
        "span": arrow.array([2**62], arrow.duration("s")),
    }
    path = tmp_path / "a.parquet"
    for name, column in columns.items():
        parquet.write_table(arrow.table({"prompt": ["a"]} | {name: column}), path)
        with pytest.raises(
            UserError, match=rf"a\.parquet: row 1: {name}: expected a value that Python can hold"
        ):
            read_rows(path)


# --- templates --------------------------------------------------------------------------------------
FRAGMENTS = (
    *("{% for m in messages %}", "{% endfor %}", "{{ m.role }}", "{{ m['content'] }}"),
    *("{{ m.content | trim }}", "{{ messages[0].content }}", "{{ messages[9].content }}"),
    *("{{ nothing.of.this }}", "{{ nothing + 1 }}", "{{ m | tojson }}", "{{ tools | tojson }}"),
    *("{% if add_generation_prompt %}", "{% endif %}", "{% else %}", "{{ raise_exception('no') }}"),
    *("{{ 1 / 0 }}", "{{ m.content + 3 }}", "{{ m.content.nope() }}", "<|end|>", "{% generation %}"),
    *("{% endgeneration %}", "{{ strftime_now('%Y') }}", "{% set x = messages | length %}", "{{ x }}"),
    *("{{ m | nofilter }}", "{{ bos_token }}", "{{ eos_token }}", "{%", "}}", "{#", "#}"),
    *("{{ loop.index }}", "{% break %}", "{% macro f(a) %}", "{% endmacro %}", "{{ f(1) }}"),
    *("{{ range(99999999) | list }}", "\n", "text", "{% set ns = namespace(a=1) %}"),
    *("{% set ns.a = m %}", "{{ ns.a }}", "{{ ''.__class__.__mro__ }}", "{% include 'x' %}"),
    *("{{ messages | map(attribute='role') | join(',') }}", "{{ '\\ud800' }}"),
    *("{{ m.content.split('<')[5] }}", "{{ messages[::-1] }}", "{% for m in messages recursive %}"),
    "{{ loop(m) }}",
)
ASKED, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
CALLED = {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}
CHATS = [
    [ASKED, SAID],
    [{"role": "system", "content": "s"}, ASKED, SAID],
    [{"role": "user", "content": ""}, CALLED],
    [ASKED, SAID, ASKED, SAID],
]


def template_of(rng: random.Random) -> str:
    if rng.random() < 0.5:  # a template that works, with one thing too many or too few
        pieces = ["{% for m in messages %}", "<|{{ m.role }}|>", "{{ m.content }}", "<|end|>", "{% endfor %}"]
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(FRAGMENTS))
        if rng.random() < 0.5:
            del pieces[rng.randrange(len(pieces))]
        return "".join(pieces)
    return "".join(rng.choice(FRAGMENTS) for _ in range(rng.randrange(1, 7)))


def test_any_template(tmp_path, tokenizer):
    """Wrong implementations: jinja's own UndefinedError, or a TypeError of an expression in the template."""
    rng = random.Random(5)
    path = tmp_path / "a.jsonl"
    refused = taken = 0
    for _ in range(400):
        chat = rng.choice(CHATS)
        path.write_text(dumped({"messages": chat} if rng.random() < 0.6 else {"prompt": chat[:1]}))
        templated = copy(tokenizer)
        templated.chat_template = template_of(rng)
        for way in ("sft", "prompts"):
            try:
                consume(path, templated)[way]()
                taken += 1
            except UserError as error:
                assert str(path) in str(error), templated.chat_template
                refused += 1
    assert refused > 50 and taken > 50


@pytest.mark.slow
def test_ten_times_as_many(tmp_path, tokenizer):
    """Other seeds of the same."""
    rounds(101, 5000, tmp_path / "a.jsonl", tokenizer, lines_of)
    rounds(
        102,
        2500,
        tmp_path / "a.json",
        tokenizer,
        lambda rng: noisy(rng, dumped(rng.sample(GOOD, 2)).encode()),
    )
