"""Data of reward models: TRL's columns to sequences and the places of their scores; lines that cannot be
used.
"""

from __future__ import annotations

import json

import pytest
import torch
from judging import token_groups

from fastrl.data.comparisons import Group, encode_statements, read_statements
from fastrl.data.packing import pack
from fastrl.errors import UserError
from fastrl.methods.reward.objective import judged
from fastrl.tasks.tokens import char_tokenizer

TOKENIZER = char_tokenizer("abcdefghijklmnopqrstuvwxyz;: ")
EOS = TOKENIZER.eos_token_id
TOKENIZER.chat_template = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token if m.role == 'assistant' "
    "else ';' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def groups(tmp_path, data, *lines, **options) -> list[Group]:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    margins = options.pop("margins", True)
    return encode_statements(
        read_statements(path, data, options.pop("columns", None), margins=margins), TOKENIZER, **options
    )


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# --- what a line becomes ----------------------------------------------------------------------------
def test_pairs_in_every_spelling(tmp_path):
    """The better answer first, scores at the end-of-sequence token.  Wrong implementations: rejected before
    chosen; the prompt left out, or said twice where the answers hold it; a score at the last token before the
    end; a margin of 1 for none.
    """
    lines = [
        {"prompt": "ab", "chosen": "cd", "rejected": "e"},
        {"chosen": "abcd", "rejected": "abe", "margin": 0.5},
        {"prompt": [user("ab")], "chosen": [assistant("cd")], "rejected": [assistant("e")], "margin": 2},
        {"chosen": [user("ab"), assistant("cd")], "rejected": [user("ab"), assistant("e")]},
        {"prompt": "ab", "chosen": [user("ab"), assistant("cd")], "rejected": [user("ab"), assistant("e")]},
        {"chosen": "f", "rejected": "g"},
    ]
    got = groups(tmp_path, "compared", *lines)
    text = [[*ids("abcd"), EOS], [*ids("abe"), EOS]]
    chat = [[*ids("u:ab;a:cd"), EOS], [*ids("u:ab;a:e"), EOS]]
    assert [g.tokens for g in got] == [text, text, chat, chat, chat, [[*ids("f"), EOS], [*ids("g"), EOS]]]
    assert all(g.at == [[len(t) - 1] for t in g.tokens] and g.target == [1.0, 0.0] for g in got)
    assert [g.margin for g in got] == [0, 0.5, 2, 0, 0, 0]


def test_ranks_are_lower_and_scores_higher_for_the_better(tmp_path):
    said = {"prompt": "ab", "completions": ["c", "d", "e"]}
    ranks, scores = groups(
        tmp_path, "compared", said | {"ranks": [2, 1, 2]}, said | {"scores": [0.5, 3, 0.5]}
    )
    for g in (ranks, scores):
        assert g.target[1] > g.target[0] == g.target[2] and g.tokens == [[*ids(f"ab{c}"), EOS] for c in "cde"]


def test_verdicts(tmp_path):
    """Booleans, as TRL's unpaired preferences have them, and probabilities."""
    right, half = groups(
        tmp_path, "verdict", *({"prompt": "ab", "completion": "c", "label": y} for y in (True, 0.25))
    )
    assert (right.target, half.target) == ([1.0], [0.25])
    assert right.tokens == [[*ids("abc"), EOS]]
    assert right.at == [[3]]


def test_steps_are_judged_at_their_last_token(tmp_path):
    """Wrong implementations: a score at a step's first token, or at the next one's; the separator tokenised
    with the step after it; no end behind the last step, or one behind each; labels shifted by the prompt.
    """
    (g,) = groups(
        tmp_path,
        "steps",
        {"prompt": "ab", "completions": ["cd", "e", "fgh"], "labels": [True, 0.5, False]},
        separator="; ",
    )
    assert g.tokens == [[*ids("abcd; e; fgh"), EOS]]
    assert [g.tokens[0][: p + 1] for p in g.at[0]] == [ids("abcd; "), ids("abcd; e; "), g.tokens[0]]
    assert g.target == [1.0, 0.5, 0.0]


def test_packing_finds_every_score():
    """Wrong implementations: places counted from the group's start; groups' sequences interleaved."""
    made = token_groups("process", 5) + token_groups("bradley_terry", 5)
    packed = pack(made)
    flat = [s for g in made for s in g.tokens]
    assert packed.tokens.tolist() == [t for s in flat for t in s]
    assert packed.cu_seqlens.diff().tolist() == [len(s) for s in flat]
    want = [s[p] for g in made for s, at in zip(g.tokens, g.at, strict=True) for p in at]
    assert packed.tokens[packed.at].tolist() == want
    scored = judged(packed, torch.arange(len(want), dtype=torch.float64), 3.0)
    assert list(scored.sizes) == [len(g.target) for g in made]
    assert scored.target.tolist() == [t for g in made for t in g.target]
    assert scored.margin.tolist() == [g.margin for g in made] and scored.total == 3.0


def test_other_names_for_columns(tmp_path):
    line = {"question": "ab", "good": "c", "bad": "d"}
    (g,) = groups(
        tmp_path, "compared", line, columns={"question": "prompt", "good": "chosen", "bad": "rejected"}
    )
    assert g.tokens[0] == [*ids("abc"), EOS]


# --- lines that cannot be used ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("data", "line", "message"),
    [
        (
            "compared",
            {"prompt": "a"},
            r"expected the columns chosen \+ rejected or prompt \+ completions \+ scores or .* got 'prompt'",
        ),
        (
            "verdict",
            {"chosen": "a", "rejected": "b"},
            r"expected the columns prompt \+ completion \+ label; got .* another --algorithm",
        ),
        (
            "compared",
            {"chosen": 3, "rejected": "b"},
            "completions: expected text or a list of messages, got int 3",
        ),
        (
            "compared",
            {"prompt": 1, "chosen": "a", "rejected": "b"},
            "prompt: expected text or a list of messages, got int 1",
        ),
        (
            "compared",
            {"prompt": "a", "completions": ["b"], "scores": [1, 2]},
            r"completions, scores: expected two lists of one length",
        ),
        (
            "compared",
            {"prompt": "a", "completions": [], "ranks": []},
            "completions, ranks: expected two lists of one length, at least 1",
        ),
        (
            "compared",
            {"prompt": "a", "completions": ["b"], "scores": ["x"]},
            "scores: expected a finite number, got 'x'",
        ),
        (
            "compared",
            {"chosen": "a", "rejected": "b", "margin": "1"},
            "margin: expected a finite number, got '1'",
        ),
        (
            "verdict",
            {"prompt": "a", "completion": "b", "label": 2},
            "label: expected true or false, or a number from 0 to 1, got 2",
        ),
        ("verdict", {"prompt": "a", "completion": "b", "label": None}, "label: expected true or false"),
        (
            "steps",
            {"prompt": "a", "completions": [[user("b")]], "labels": [1]},
            "completions: expected the text of a step, got list",
        ),
        (
            "steps",
            {"prompt": "a", "completions": ["B"], "labels": [1]},
            "the tokenizer has no tokens for part of",
        ),
        (
            "steps",
            {"prompt": "a" * 30, "completions": ["b"], "labels": [1]},
            "32 tokens, but a sequence may have 20",
        ),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, data, line, message):
    """Wrong implementations: a KeyError; a label of 2 trained on; a line that is skipped."""
    with pytest.raises(UserError, match=f"data.jsonl:1: .*{message}"):
        groups(tmp_path, data, line, max_tokens=20)


def test_a_margin_that_nothing_would_use_is_refused(tmp_path):
    """Wrong implementation: a loss without one that leaves it out in silence."""
    with pytest.raises(UserError, match=r"data.jsonl:1: margin: expected none, .* use bradley_terry"):
        groups(tmp_path, "compared", {"chosen": "a", "rejected": "b", "margin": 1.0}, margins=False)
