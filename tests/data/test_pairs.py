"""Pairs and labelled completions from a user's file: prompts explicit and implicit, text and messages, and
errors that name the line.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import tokenizer

from fastrl.config import Dpo
from fastrl.data.pairs import LABELLED, PAIRED, encode_units, prompt_of
from fastrl.data.rows import read_rows
from fastrl.errors import UserError
from fastrl.methods.dpo.units import UnitEncoder, load_units
from fastrl.tasks import Cards
from fastrl.tasks.tokens import train_bpe

USER, BLUE, GREEN = (
    {"role": r, "content": c}
    for r, c in (("user", "What color?"), ("assistant", "It is blue."), ("assistant", "Green."))
)
ASKED = "[user]What color?[assistant]"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token "
    "}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def words() -> Any:
    made = train_bpe(["What color is the sky? It is blue.", "[user][assistant]"], 300)
    made.chat_template = TEMPLATE
    return made


def rows(tmp_path: Path, *fields: dict[str, Any], kinds: Any = PAIRED) -> Any:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(f) + "\n" for f in fields))
    return read_rows(path, kinds=kinds)


def read(words: Any, unit: Any) -> list[tuple[str, str, bool]]:
    """(what does not count, what counts, good) of each completion."""
    out = []
    for one in unit:
        parts = (
            [t for t, m in zip(one.sample.tokens, one.sample.mask, strict=True) if m == live]
            for live in (False, True)
        )
        out.append((*(words.decode(p) for p in parts), one.good))
    return out


@pytest.mark.parametrize(
    ("fields", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "sky? ", "chosen": "blue", "rejected": "green"}, "sky? ", "blue<eos>", "green<eos>"),
        (
            {"chosen": "sky? It is blue", "rejected": "sky? It is black"},
            "sky? It is",
            " blue<eos>",
            " black<eos>",
        ),
        ({"chosen": "sky blue", "rejected": "sky blue."}, "sky", " blue<eos>", " blue.<eos>"),
        ({"chosen": "7+3", "rejected": "7+4"}, "7+", "3<eos>", "4<eos>"),
        ({"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}, ASKED, "It is blue.<eos>", "Green.<eos>"),
        ({"chosen": [USER, BLUE], "rejected": [USER, GREEN]}, ASKED, "It is blue.<eos>", "Green.<eos>"),
        (
            {"prompt": "What color?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
            ASKED,
            "It is blue.<eos>",
            "Green.<eos>",
        ),
        (
            {"prompt": "What color?", "chosen": [BLUE], "rejected": [GREEN]},
            ASKED,
            "It is blue.<eos>",
            "Green.<eos>",
        ),
        (
            {"prompt": [USER], "chosen": "It is blue.", "rejected": "Green."},
            ASKED,
            "It is blue.<eos>",
            "Green.<eos>",
        ),
    ],
)
def test_pairs_in_every_form(tmp_path, words, fields, prompt, chosen, rejected):
    """Wrong implementations: loss on the prompt; no end-of-sequence token; a word cut in two by an implicit
    prompt; a prompt beside whole conversations put before them a second time; the first turn of a
    conversation trained.
    """
    (unit,) = encode_units(rows(tmp_path, fields), words, paired=True)
    assert read(words, unit) == [(prompt, chosen, True), (prompt, rejected, False)]
    starts = {tuple(one.sample.tokens[: one.sample.mask.index(True)]) for one in unit}
    assert len(starts) == 1, "both sides have the prompt's tokens, whatever follows them"


def test_conversations_of_several_turns(tmp_path, words):
    """Wrong implementation: the prompt ends at the first assistant message."""
    (unit,) = encode_units(
        rows(tmp_path, {"chosen": [USER, BLUE, USER, GREEN], "rejected": [USER, BLUE, USER, BLUE]}),
        words,
        paired=True,
    )
    before = "[user]What color?[assistant]It is blue.<eos>[user]What color?[assistant]"
    assert [r[:2] for r in read(words, unit)] == [(before, "Green.<eos>"), (before, "It is blue.<eos>")]


def test_labelled_completions_and_pairs_taken_apart(tmp_path, words):
    """Wrong implementations: labels of the row before; a pair's order lost."""
    some = rows(
        tmp_path,
        *({"prompt": "sky", "completion": c, "label": b} for c, b in ((" a", False), (" b", True))),
        kinds=LABELLED,
    )
    assert [read(words, u) for u in encode_units(some, words, paired=False)] == [
        [("sky", " a<eos>", False)],
        [("sky", " b<eos>", True)],
    ]
    pairs = rows(tmp_path, {"prompt": "sky", "chosen": " a", "rejected": " b"}, kinds=LABELLED)
    assert [read(words, u) for u in encode_units(pairs, words, paired=False)] == [
        [("sky", " a<eos>", True)],
        [("sky", " b<eos>", False)],
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"prompt": "a", "completion": "b"},
            r":2: expected the columns chosen \+ rejected like the lines .*; got 'prompt', 'completion'",
        ),
        (
            {"chosen": "blue", "rejected": "green"},
            r":2: chosen, rejected: expected them to begin with the same prompt, or a prompt column",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            r":2: chosen, rejected: expected two different completions, got 'b' twice",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": [GREEN]},
            r":2: chosen, rejected: expected both to be text or both lists of messages",
        ),
        (
            {"prompt": 3, "chosen": "b", "rejected": "c"},
            r":2: prompt: expected text or a list of messages, got int 3",
        ),
        (
            {"prompt": "a", "chosen": None, "rejected": "c"},
            r":2: chosen: expected text or a list of messages, got NoneType None",
        ),
        (
            {"prompt": "", "chosen": "b", "rejected": "c"},
            r":2: chosen: prompt: expected at least one token, got none",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c" * 30},
            r":2: rejected: 32 tokens \(1 of the prompt, 31 .*\), but .* may have 20",
        ),
        (
            {"prompt": [USER], "chosen": [BLUE], "rejected": [USER]},
            r":2: rejected: expected an assistant message to train on",
        ),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, words, fields, message):
    with pytest.raises(UserError, match="pairs.jsonl" + message):
        encode_units(
            rows(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, fields),
            words,
            paired=True,
            max_tokens=20,
        )


@pytest.mark.parametrize("label", ["yes", 1, None, []])
def test_a_label_is_true_or_false(tmp_path, label):
    """Wrong implementation: any text is true."""
    with pytest.raises(UserError, match=r"pairs.jsonl:1: label: expected true or false, got"):
        rows(tmp_path, {"prompt": "a", "completion": "b", "label": label}, kinds=LABELLED)


def test_a_dataset_of_the_other_kind(tmp_path):
    """The columns that a loss needs are named, of labelled examples for a loss of pairs."""
    with pytest.raises(
        UserError,
        match=r"pairs.jsonl:1: expected the columns chosen \+ rejected; rename others with columns; "
        r"got 'prompt'",
    ):
        rows(tmp_path, {"prompt": "a", "completion": "b", "label": True})


def preferences(config: Dpo, task: Any, *, paired: bool) -> Any:
    """What the options name to compare, how much of it, and the longest sequence."""
    shape = SimpleNamespace(max_position_embeddings=48, vocab_size=31)
    encode = UnitEncoder(config, paired, tokenizer(), shape)
    return *load_units(encode, task), encode.longest


# --- from a task ------------------------------------------------------------------------------------
def test_the_card_game_gives_pairs_of_a_right_and_a_wrong_answer():
    """Wrong implementations: a wrong answer that is right, or to another example; sides swapped."""
    task, words = Cards(k=2), tokenizer()
    items, size, limit = preferences(Dpo(model="m"), task, paired=True)
    single, twice, _ = preferences(Dpo(model="m", algorithm="kto"), task, paired=False)
    assert (size, limit, twice) == (task.size("train"), 48, 2 * size)
    for i, unit in zip((5, 0, 77), items([5, 0, 77]), strict=True):
        example = task.example("train", i)
        (prompt, right, good), (same, wrong, bad) = read(words, unit)
        assert prompt == same == example.prompt and (good, bad) == (True, False)
        scores = [task.verify(example, text.removesuffix("<eos>")) for text in (right, wrong)]
        assert [s.correct for s in scores] == [True, False]
        assert single([2 * i, 2 * i + 1]) == [(unit[0],), (unit[1],)]
    assert items([]) == single([]) == []
    three = task.mistakes(example, 3, 77)
    assert len(set(three)) == 3 and not any(task.verify(example, text).correct for text in three)


def test_nothing_to_prefer():
    class Silent:
        name = "silent"

    with pytest.raises(
        UserError,
        match="--dataset or --task: expected one of them, to have preferences to train on; got neither",
    ):
        preferences(Dpo(model="m"), None, paired=True)
    with pytest.raises(
        UserError,
        match="--task: silent has no wrong answers to prefer its demonstrations to; give a --dataset",
    ):
        preferences(Dpo(model="m"), Silent(), paired=True)  # type: ignore[arg-type]


def test_a_pair_above_the_budget_names_the_option(tmp_path):
    """Wrong implementation: each side is measured alone, and the step that meets the pair fails."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "7", "chosen": "3" * 8, "rejected": "4" * 8}) + "\n")
    with pytest.raises(
        UserError,
        match=r"pairs.jsonl:1: a pair of up to 20 tokens exceeds a pass; "
        r"raise --micro-tokens \(19\) to at least 20",
    ):
        preferences(Dpo(model="m", dataset=str(path), micro_tokens=19), None, paired=True)


def test_columns_are_renamed(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"q": "7", "yes": "3", "no": "4"}) + "\n")
    config = Dpo(model="m", dataset=str(path), columns=("q=prompt", "yes=chosen", "no=rejected"))
    items, size, _ = preferences(config, None, paired=True)
    assert size == 1 and read(tokenizer(), items([0])[0]) == [("7", "3<eos>", True), ("7", "4<eos>", False)]


def test_an_explicit_prompt_is_kept_whatever_the_sides_share(tmp_path):
    """Wrong implementation: the common beginning is looked for although the prompt is given."""
    (row,) = rows(tmp_path, {"prompt": "a ", "chosen": "It is b", "rejected": "It is c"})
    assert prompt_of(row) == ("a ", "It is b", "It is c")
