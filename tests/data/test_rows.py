"""Datasets: what is read, what is refused and how, and which tokens count in the loss."""

from __future__ import annotations

import json

import pytest
from support import data_file
from tokenizers import processors

from fastrl.data.encode import encode, encode_prompt
from fastrl.data.rows import Row, read_rows
from fastrl.errors import UserError
from fastrl.tasks.tokens import char_tokenizer, train_bpe

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' "
    "}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "6"},
]
LETTERS = char_tokenizer("abcdefgh ")
EOS = LETTERS.eos_token_id


def chat_tokenizer(template=CHATML, eos="<|im_end|>"):
    tokenizer = train_bpe(["be brief 2+2? 4 system user assistant"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    return tokenizer


def bos_tokenizer():
    tokenizer = char_tokenizer("abcdefgh ")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def pair(prompt, completion):
    return Row("data.jsonl:7", "prompt-completion", {"prompt": prompt, "completion": completion})


def trained(sample, tokenizer):
    return tokenizer.decode([t for t, live in zip(sample.tokens, sample.mask, strict=True) if live])


def whole(sample, tokenizer):
    return tokenizer.decode(sample.tokens)


# --- tokens and masks --------------------------------------------------------------------------------
def test_loss_on_the_completion_and_its_end():
    """Training on the prompt, or leaving the end-of-sequence token out (the model never stops), changes this
    mask.
    """
    sample = encode(pair("abc", "de"), LETTERS)
    assert sample.tokens == [3, 4, 5, 6, 7, EOS]
    assert sample.mask == [False, False, False, True, True, True]


def test_the_end_is_appended_exactly_once():
    assert encode(pair("abc", "de<eos>"), LETTERS) == encode(pair("abc", "de"), LETTERS)
    assert encode(pair("abc", ""), LETTERS).tokens[3:] == [EOS], "an empty completion teaches to stop"
    with pytest.raises(
        UserError,
        match=r"data.jsonl:7: completion: expected the end-of-sequence token at its end only, "
        r"got it after 2 of 3 tokens",
    ):
        encode(pair("abc", "d<eos>e"), LETTERS)
    with pytest.raises(UserError, match="expected one with an end-of-sequence token"):
        encode(pair("abc", "de"), chat_tokenizer(eos=None))


def test_prompt_and_completion_are_tokenised_apart():
    """Tokenising the joined text merges ` the` + `re` over the boundary, so that the model trains on a prompt
    it never gets.
    """
    tokenizer = train_bpe(["there there there", "the the the"] * 9, 300)
    joined = tokenizer.encode("over there")
    sample = encode(pair("over the", "re"), tokenizer)
    assert sample.tokens[:-1] != joined and tokenizer.decode(sample.tokens[:-1]) == "over there"
    prompt = sample.tokens[: sample.mask.index(True)]
    assert prompt == tokenizer.encode("over the") == encode_prompt("over the", tokenizer)


def test_beginning_of_sequence_once_and_never_trained():
    """A double BOS: from the tokenizer and from the text. Encoding the completion with special tokens puts a
    third in the middle.
    """
    tokenizer = bos_tokenizer()
    bos = tokenizer.bos_token_id
    assert tokenizer.encode("a") == [bos, 3]
    expected = encode(pair("abc", "de"), tokenizer)
    assert expected.tokens == [bos, 3, 4, 5, 6, 7, EOS] and expected.mask == [False] * 4 + [True] * 3
    assert encode(pair("<s>abc", "de"), tokenizer) == expected
    assert encode_prompt("abc", tokenizer) == encode_prompt("<s>abc", tokenizer) == expected.tokens[:4]
    text = encode(Row("x:1", "text", {"text": "abc"}), tokenizer)
    assert text.tokens == [bos, 3, 4, 5, EOS] and text.mask == [False, True, True, True, True]


def test_plain_text_counts_but_for_its_first_token():
    """Nothing predicts a first token; in a packed batch it would be predicted from the sequence before."""
    sample = encode(Row("x:1", "text", {"text": "abc"}), LETTERS)
    assert sample.tokens == [3, 4, 5, EOS] and sample.mask == [False, True, True, True]
    assert encode(Row("x:1", "text", {"text": "abc<eos>"}), LETTERS) == sample


def test_an_assistants_opening_message_is_context():
    """Wrong implementation: it is trained, though no prompt comes before it."""
    tokenizer = chat_tokenizer()
    messages = [{"role": "assistant", "content": "be brief"}, *CHAT[1:3]]
    sample = encode(Row("c:1", "messages", {"messages": messages}), tokenizer)
    told = trained(sample, tokenizer)
    assert "4" in told and "brief" not in told and "be brief" in whole(sample, tokenizer)


def test_conversations_train_the_assistants_turns():
    """Training on all roles, on the template's headers, or on the newline after the last <|im_end|> changes
    these texts.
    """
    tokenizer = chat_tokenizer()
    sample = encode(Row("c:1", "messages", {"messages": CHAT}), tokenizer)
    assert trained(sample, tokenizer) == "4<|im_end|>6<|im_end|>"
    assert whole(sample, tokenizer) + "\n" == tokenizer.apply_chat_template(CHAT, tokenize=False)
    last = encode(Row("c:1", "messages", {"messages": CHAT}), tokenizer, turns="last")
    assert trained(last, tokenizer) == "6<|im_end|>" and last.tokens == sample.tokens
    assert last.tokens[: last.mask.index(True)] == encode_prompt(CHAT[:-1], tokenizer)


def test_prompt_and_completion_as_messages():
    tokenizer = chat_tokenizer()
    split = encode(pair(CHAT[:2], CHAT[2:]), tokenizer)
    assert split == encode(Row("c:1", "messages", {"messages": CHAT}), tokenizer)
    assert trained(encode(pair(CHAT[:4], "6"), tokenizer), tokenizer) == "6<|im_end|>", (
        "the prompt's assistant turn is not trained"
    )
    assert encode(pair("2+2?", [{"role": "assistant", "content": "4"}]), tokenizer) == encode(
        pair([{"role": "user", "content": "2+2?"}], "4"), tokenizer
    )


def test_a_template_that_does_not_end_in_eos_gets_one():
    """Base models whose eos is not the template's end of turn would otherwise never learn to stop."""
    tokenizer = chat_tokenizer(eos="<eos>")
    sample = encode(Row("c:1", "messages", {"messages": CHAT}), tokenizer)
    assert trained(sample, tokenizer) == "4<|im_end|>\n6<|im_end|>\n<eos>"


def test_a_template_that_rewrites_history_is_trained_on_turns_as_they_are_generated():
    """Training on the turns as they stand in the history would teach '...'; on the last turn alone, the
    history is the template's own.
    """
    strips = CHATML.replace(
        "m['content']", "('...' if m['role'] == 'assistant' and not loop.last else m['content'])"
    )
    tokenizer, row = chat_tokenizer(strips), Row("c:1", "messages", {"messages": CHAT})
    sample = encode(row, tokenizer)
    assert trained(sample, tokenizer) == "4<|im_end|>6<|im_end|>"
    assert "..." not in whole(sample, tokenizer)
    last = encode(row, tokenizer, turns="last")
    assert trained(last, tokenizer) == "6<|im_end|>" and "...<|im_end|>" in whole(last, tokenizer)


def test_turns_that_cannot_be_told_apart_are_refused():
    joined = (
        "{% set ns = namespace(text='') %}{% for m in messages %}"
        "{% set ns.text = m['content'] + ns.text %}{% endfor %}{{ ns.text }}"
    )
    with pytest.raises(
        UserError,
        match="c:1: the chat template rewrites the turns before message 4; train on the last turn alone",
    ):
        encode(Row("c:1", "messages", {"messages": CHAT}), chat_tokenizer(joined))
    with pytest.raises(UserError, match=r"writes another prompt before message 4 .*--chat-template FILE"):
        encode(Row("c:1", "messages", {"messages": CHAT}), chat_tokenizer(joined), turns="last")


def test_tools_and_refusals_of_a_template():
    tools = CHATML.replace("{% for", "{% if tools %}tools:{{ tools[0]['name'] }}{% endif %}{% for", 1)
    rows = {"messages": CHAT, "tools": [{"name": "search"}]}
    assert "tools:search" in whole(
        encode(Row("c:1", "messages", rows), chat_tokenizer(tools)), chat_tokenizer(tools)
    )
    refuses = chat_tokenizer("{{ raise_exception('no system message') }}")
    with pytest.raises(
        UserError, match=r"c:1: the chat template refuses roles \['system', 'user'\]: no system message"
    ):
        encode(Row("c:1", "messages", {"messages": CHAT}), refuses)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            Row("f:3", "prompt", {"prompt": "ab"}),
            "f:3: expected a completion to train on, got a prompt alone",
        ),
        (Row("f:3", "messages", {"messages": CHAT[:2]}), "f:3: expected an assistant message to train on"),
        (Row("f:3", "messages", {"messages": CHAT[:3]}), "f:3: the tokenizer has no chat template"),
        (pair("", "ab"), "data.jsonl:7: prompt: expected at least one token"),
        (Row("f:3", "text", {"text": ""}), "f:3: text: expected at least one token"),
        (pair("ab", "xyz"), "data.jsonl:7: the tokenizer has no tokens for part of 'xyz'"),
    ],
)
def test_rows_that_cannot_be_encoded(row, message):
    with pytest.raises(UserError, match=message):
        encode(row, LETTERS)


def test_too_long_is_an_error_with_both_lengths():
    """Truncating silently trains on completions without an end."""
    assert len(encode(pair("abc", "de"), LETTERS, max_tokens=6).tokens) == 6
    with pytest.raises(
        UserError,
        match=r"data.jsonl:7: 6 tokens \(3 of the prompt, 3 of the completion\), but a sequence may have 5",
    ):
        encode(pair("abc", "de"), LETTERS, max_tokens=5)


def test_prompts():
    with pytest.raises(UserError, match="p3: prompt: expected at least one token"):
        encode_prompt("", LETTERS, where="p3")
    with pytest.raises(UserError, match="p3: prompt: expected message 0 to be"):
        encode_prompt([{"role": "user"}], LETTERS, where="p3")


# --- files -------------------------------------------------------------------------------------------
def lines(tmp_path, *values, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(v if isinstance(v, str) else json.dumps(v) for v in values), encoding="utf-8")
    return path


def test_kinds_and_columns(tmp_path):
    for kind, fields in (
        ("prompt-completion", {"prompt": "a", "completion": "b", "answer": 3}),
        ("prompt", {"prompt": "a", "answer": 3}),
        ("messages", {"messages": CHAT}),
        ("text", {"text": "a"}),
        ("prompt-completion", {"prompt": CHAT[:1], "completion": CHAT[2:3]}),
    ):
        path = lines(tmp_path, fields, "", fields)
        assert read_rows(path) == [Row(f"{path}:1", kind, fields), Row(f"{path}:3", kind, fields)], (
            "line numbers count blank lines"
        )


def test_renamed_columns(tmp_path):
    path = lines(tmp_path, {"question": "a", "answer": "b", "id": 1})
    (row,) = read_rows(path, {"question": "prompt", "answer": "completion"})
    assert row.kind == "prompt-completion" and row.fields == {"prompt": "a", "completion": "b", "id": 1}
    with pytest.raises(UserError, match=r"data.jsonl:1: expected a column 'query'"):
        read_rows(path, {"query": "prompt"})
    with pytest.raises(
        UserError, match="'question' cannot be read as 'answer': the row has a column of that name"
    ):
        read_rows(path, {"question": "answer"})
    with pytest.raises(UserError, match="expected a different new name for each column"):
        read_rows(path, {"question": "prompt", "answer": "prompt"})


def test_json_arrays(tmp_path):
    path = lines(tmp_path, [{"text": "a"}, {"text": "b"}], name="data.json")
    assert [r.where for r in read_rows(path)] == [f"{path}: item 1", f"{path}: item 2"]
    assert len(read_rows(lines(tmp_path, {"text": "a"}, {"text": "b"}, name="data.json"))) == 2
    with pytest.raises(UserError, match=r"data.json: item 2: expected a JSON object"):
        read_rows(lines(tmp_path, [{"text": "a"}, 3], name="data.json"))


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt": "a", ',
            r"data.jsonl:2: expected a JSON object, got '\{\"prompt\": \"a\",' \(.* at column 16\)",
        ),
        ("[1, 2]", r"data.jsonl:2: expected a JSON object like .*, got \[1, 2\]"),
        ("[" * 100_000, "data.jsonl:2: expected a JSON object"),
        (
            {"prompt": "a"},
            r"data.jsonl:2: expected the columns prompt \+ completion like the lines before it; got 'prompt'",
        ),
        (
            {"prompt": "a", "completion": 3},
            "data.jsonl:2: completion: expected text or a list of messages, got int 3",
        ),
        (
            {"prompt": None, "completion": "b"},
            "data.jsonl:2: prompt: expected text or a list of messages, got NoneType None",
        ),
        (
            {"prompt": [], "completion": "b"},
            "data.jsonl:2: prompt: expected at least one message, got an empty list",
        ),
        ({"prompt": [{"role": "user"}], "completion": "b"}, "data.jsonl:2: prompt: expected message 0 to be"),
        (
            {"prompt": ["hi"], "completion": "b"},
            "data.jsonl:2: prompt: expected message 0 to be .*, got 'hi'",
        ),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        read_rows(lines(tmp_path, GOOD, line))


def test_malformed_files(tmp_path):
    for value, message in (
        ({"messages": "hi"}, "data.jsonl:1: messages: expected a list of messages, got str 'hi'"),
        ({"text": ["hi"]}, "data.jsonl:1: text: expected text, got list"),
        (
            {"chosen": "a", "rejected": "b"},
            r"expected the columns prompt \+ completion or messages or text or prompt; rename others",
        ),
        ("", "expected at least one row, the file has none"),
    ):
        with pytest.raises(UserError, match=message):
            read_rows(lines(tmp_path, value))
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"latin.jsonl:2: expected UTF-8 text, got byte 0xe9 at column 14"):
        read_rows(path)
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n')
    assert read_rows(path)[0].fields == {"text": "a"}, "a byte order mark and Windows line ends are no error"
    for name, message in (
        ("absent.jsonl", "no such file"),
        ("org/name", "expected a file ending in .jsonl, .json, .parquet"),
    ):
        with pytest.raises(UserError, match=message):
            read_rows(name)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path = lines(tmp_path, "no parquet", name="data.parquet")
    with pytest.raises(UserError, match=r"data.parquet: expected a parquet file"):
        read_rows(path)
    for kind, fields in (("prompt-completion", GOOD), ("messages", {"messages": CHAT})):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([fields, fields]), path)
        assert read_rows(path) == [Row(f"{path}: row {i}", kind, fields) for i in (1, 2)]


def test_real_questions_and_answers():
    rows = read_rows(data_file("gsm8k", "train.jsonl"), {"question": "prompt", "answer": "completion"})
    assert len(rows) == 7473
    tokenizer = train_bpe((r.fields["prompt"] + r.fields["completion"] for r in rows[:300]), 500)
    for row in rows[:50]:
        sample = encode(row, tokenizer, max_tokens=2000)
        assert trained(sample, tokenizer) == row.fields["completion"] + "<eos>"
        assert whole(sample, tokenizer) == row.fields["prompt"] + row.fields["completion"] + "<eos>"
