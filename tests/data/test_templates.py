"""What a row's messages mean: tools, variables, parts, openings of answers, and templates of all kinds."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastrl.data.comparisons import encode_statements, read_statements
from fastrl.data.encode import continuations, encode, encode_prompt
from fastrl.data.messages import unpadded
from fastrl.data.pairs import LABELLED, PAIRED, encode_units
from fastrl.data.rows import Row, read_rows
from fastrl.errors import UserError
from fastrl.model.tokenizer import read_template
from fastrl.sampler.prompts import for_template, tokenize

CHATML = (
    "{%- if tools %}<|system|># Tools{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}"
    "{%- for m in messages %}<|{{ m['role'] }}|>{{ m['content'] or '' }}"
    "{%- for call in (m['tool_calls'] or []) %}<call>{{ call['function'] | tojson }}</call>{% endfor %}"
    "<|end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% if quiet is defined %}[{{ quiet }}]{% endif %}{% endif %}"
)
ROLES = ("system", "user", "assistant", "tool")
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ASK = [{"role": "user", "content": "hi"}]
SAY = [{"role": "assistant", "content": "yo"}]


def bytes_tokenizer(template=CHATML, eos="<|end|>"):
    """Every text is its bytes; <|end|> and the roles are special."""
    specials = ["<pad>", "<|end|>", "<|other|>", *(f"<|{role}|>" for role in ROLES)]
    names = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token=eos,
        additional_special_tokens=specials[1:],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    return made


BYTES = bytes_tokenizer()


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def row(tokenizer=BYTES, turns="all", **fields):
    """(what is trained, everything) of a row."""
    kind = "messages" if "messages" in fields else "prompt-completion"
    sample = encode(Row("x:1", kind, fields), tokenizer, turns=turns)
    live = [t for t, m in zip(sample.tokens, sample.mask, strict=True) if m]
    return tokenizer.decode(live), tokenizer.decode(sample.tokens)


def prompt(messages, tokenizer=BYTES, **columns):
    return tokenizer.decode(encode_prompt(messages, tokenizer, columns=columns, where="x:1"))


def right(messages, **how):
    return BYTES.apply_chat_template(messages, tokenize=False, **how)


# --- tools and variables ----------------------------------------------------------------------------
def test_tools_and_variables_reach_the_template_everywhere(tmp_path):
    """Dropping them in one command trains, compares or samples from another prompt than in the others."""
    extras = {"tools": TOOLS, "chat_template_kwargs": {"quiet": "sh"}}
    given = right(ASK, tools=TOOLS, add_generation_prompt=True, quiet="sh")
    assert "# Tools" in given and given.endswith("[sh]")
    assert prompt(ASK, **extras) == given
    assert row(prompt=ASK, completion=SAY, **extras) == ("yo<|end|>", given + "yo<|end|>")
    texts = {name: json.dumps(value) for name, value in extras.items()}
    assert prompt(ASK, **texts) == given, "JSON text is what it holds"
    assert prompt(ASK, tools=[json.dumps(TOOLS[0])], chat_template_kwargs={"quiet": "sh"}) == given

    other = [{"role": "assistant", "content": "no"}]
    pair = Row("x:1", "pair", {"prompt": ASK, "chosen": SAY, "rejected": other, **extras})
    label = Row("x:2", "label", {"prompt": ASK, "completion": SAY, "label": True, **extras})
    units = encode_units([pair, label], BYTES, paired=False)
    assert set(LABELLED) >= set(PAIRED) and len(units) == 3
    assert all(BYTES.decode(unit[0].sample.tokens).startswith(given) for unit in units)

    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": ASK, "completions": ["a", "b"], "labels": [True, False], **extras}))
    (group,) = encode_statements(read_statements(path, "steps"), BYTES)
    assert BYTES.decode(group.tokens[0]).startswith(given)

    (tokens,) = tokenize(for_template([ASK], [extras], BYTES), BYTES, len(BYTES))
    assert BYTES.decode(tokens) == given
    assert for_template([ASK, "text"], [{}, extras], BYTES) == [ASK, "text"]


@pytest.mark.parametrize("none", [[], None, "", "[]", "null"])
def test_no_tools_are_none(none):
    asks = bytes_tokenizer(CHATML.replace("if tools ", "if tools is not none "))
    assert "# Tools" not in row(asks, messages=ASK + SAY, tools=none)[1]


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"tools": "[{"}, r"x:1: tools: expected JSON text, got '\[\{'"),
        ({"tools": {"name": "f"}}, "x:1: tools: expected a list of schemas"),
        ({"tools": [3]}, r"x:1: tools\[0\]: expected a JSON schema"),
        ({"chat_template_kwargs": [1]}, "x:1: chat_template_kwargs: expected an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "x:1: chat_template_kwargs: .* got 'tokenize'"),
    ],
)
def test_extras_that_are_none_are_named(extras, message):
    with pytest.raises(UserError, match=message):
        row(messages=ASK + SAY, **extras)
    with pytest.raises(UserError, match=message):
        prompt(ASK, **extras)


def test_arguments_as_text_and_as_objects():
    """OpenAI's text of arguments, put through tojson, is quoted twice; text that is joined cannot be an
    object.
    """
    said = {"role": "assistant", "content": ""}
    for arguments in ({"x": 1}, '{"x": 1}'):
        messages = [*ASK, {**said, "tool_calls": [call("f", arguments)]}]
        assert row(messages=messages)[0] == '<call>{"name": "f", "arguments": {"x": 1}}</call><|end|>'
        joins = CHATML.replace(
            "{{ call['function'] | tojson }}", "{{ 'f:' + call['function']['arguments'] }}"
        )
        assert row(bytes_tokenizer(joins), messages=messages)[0] == '<call>f:{"x": 1}</call><|end|>'
    flat = [*ASK, {**said, "tool_calls": [{"name": "f", "arguments": '{"x": null}'}]}]
    shows = CHATML.replace("call['function']", "call")
    assert '{"x": null}' in row(bytes_tokenizer(shows), messages=flat)[0], "a null in JSON is meant"


def test_whatever_a_template_raises_names_the_line():
    """A TypeError of Jinja's, or a division by zero, is no error of the program."""
    for wrong in (
        "{{ 'a' + m['content'] | length }}",
        "{{ 1 // 0 }}",
        "{{ m.x.y.z }}",
        "{{ none | length }}",
    ):
        tokenizer = bytes_tokenizer(CHATML.replace("{{ m['content'] or '' }}", wrong))
        for fails in (lambda t=tokenizer: row(t, messages=ASK + SAY), lambda t=tokenizer: prompt(ASK, t)):
            with pytest.raises(UserError, match=r"x:1: the chat template (fails on|refuses) roles"):
                fails()


# --- nulls of columnar files ------------------------------------------------------------------------
def test_padding_of_parquet_is_dropped(tmp_path):
    """Arrow gives every object of a column the keys of all: trained on, or counted, they are wrong."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    tools = [
        [
            {
                "type": "function",
                "function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}},
            }
        ],
        [
            {
                "type": "function",
                "function": {"name": "g", "parameters": {"properties": {"y": {"enum": ["a"]}}}},
            }
        ],
    ]
    rows = []
    for i, arguments in enumerate(({"x": 1}, {"y": {"a": [1, None]}})):
        said = {"role": "assistant", "content": "", "tool_calls": [call("f", arguments)]}
        rows.append({"messages": [*ASK, said], "tools": tools[i], "info": {"k": i} if i else {"l": i}})
    rows[0]["chat_template_kwargs"] = {"quiet": "a"}
    rows[1]["chat_template_kwargs"] = {"loud": "b"}
    path, lines = tmp_path / "d.parquet", tmp_path / "d.jsonl"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    lines.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for got, wanted in zip(read_rows(path), read_rows(lines), strict=True):
        assert encode(got, BYTES) == encode(wanted, BYTES)
        assert got.fields["chat_template_kwargs"] == wanted.fields["chat_template_kwargs"]
    assert read_rows(path)[0].fields["info"] == {"k": None, "l": 0}, "other columns are the user's own"
    assert unpadded({"prompt": [{"a": None, "b": [None, {"c": None}]}]}) == {"prompt": [{"b": [None, {}]}]}


# --- parts ------------------------------------------------------------------------------------------
def test_text_parts_are_text():
    parts = [{**ASK[0], "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    assert prompt(parts) == prompt(ASK)
    assert row(messages=parts + SAY) == row(messages=ASK + SAY)
    reads = bytes_tokenizer(
        CHATML.replace("{{ m['content'] or '' }}", "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}")
    )
    assert prompt(ASK, reads) == prompt(parts, reads) == prompt(ASK), "a template that reads parts gets them"
    for kind, part in (("image", {"type": "image", "url": "x"}), ("audio", {"type": "audio"})):
        with pytest.raises(UserError, match=f"x:1: prompt: message 0: expected .* of type '{kind}'"):
            prompt([{"role": "user", "content": [{"type": "text", "text": "a"}, part]}])
    with pytest.raises(UserError, match="x:1: prompt: message 0: expected content parts like"):
        prompt([{"role": "user", "content": [{"text": 3}]}])


# --- the beginning of an answer ---------------------------------------------------------------------
def test_an_answer_that_is_begun_is_continued():
    """Closing it and opening another turn samples and trains after an end that the answer does not have."""
    begun = [*ASK, {"role": "assistant", "content": "It is"}]
    given = right(begun, continue_final_message=True)
    assert given.endswith("<|assistant|>It is") and prompt(begun) == given
    for completion in (" 4", [{"role": "assistant", "content": " 4"}]):
        assert row(prompt=begun, completion=completion) == (" 4<|end|>", given + " 4<|end|>")
    more = [{"role": "assistant", "content": " 4"}, *ASK, *SAY]
    assert row(prompt=begun, completion=more)[0] == " 4<|end|>yo<|end|>"
    assert row(prompt=begun, completion=more, turns="last")[0] == "yo<|end|>"
    pair = Row("x:1", "pair", {"prompt": begun, "chosen": " 4", "rejected": " 5"})
    pair.fields["chosen"], pair.fields["rejected"] = (
        [{"role": "assistant", "content": text}] for text in (" 4", " 5")
    )
    (unit,) = encode_units([pair], BYTES, paired=True)
    assert [BYTES.decode(side.sample.tokens) for side in unit] == [f"{given} {n}<|end|>" for n in (4, 5)]

    marks = bytes_tokenizer(
        CHATML.replace("{{ m['content'] or '' }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    )
    assert row(marks, prompt=begun, completion=" 4")[0].startswith(" 4")
    called = [*ASK, {"role": "assistant", "content": "", "tool_calls": [call("f", {})]}]
    with pytest.raises(
        UserError, match="x:1: prompt: expected its last message to have text to continue, got tool"
    ):
        prompt(called)


# --- templates --------------------------------------------------------------------------------------
def test_generation_blocks_say_what_is_trained():
    marks = bytes_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}>{% generation %}"
        "{{ m.content }}<|end|>{% endgeneration %}\n{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    talk = [*ASK, *SAY, *ASK, {"role": "assistant", "content": "bye"}]
    assert row(marks, messages=talk)[0] == "yo<|end|>bye<|end|>", "without add_generation_prompt at all"
    assert row(marks, messages=talk, turns="last")[0] == "bye<|end|>"
    assert row(marks, prompt=talk[:3], completion="bye")[0] == "bye<|end|>"
    empty = bytes_tokenizer(
        "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}"
    )
    none = bytes_tokenizer(
        "{% if x %}{% generation %}{% endgeneration %}{% endif %}"
        "{% for m in messages %}{{ m.role }}{% endfor %}"
    )
    for tokenizer in (empty, none):
        with pytest.raises(
            UserError, match="x:1: the chat template's generation blocks hold nothing of message 1"
        ):
            row(tokenizer, messages=ASK + SAY)


def test_a_turn_without_an_end_ends_in_the_next_ones_token():
    """GLM's turns end where the user's token comes; without it in the loss the model never stops."""
    open_ended = bytes_tokenizer(CHATML.replace("<|end|>\n", ""), eos="<|other|>")
    talk = [*ASK, *SAY, *ASK, {"role": "assistant", "content": "bye"}]
    assert row(open_ended, messages=talk)[0] == "yo<|user|>bye<|user|>"
    assert (
        row(open_ended, messages=[*ASK, *SAY, *SAY])[1] == "<|user|>hi<|assistant|>yo<|assistant|>yo<|user|>"
    )
    assert row(open_ended, messages=[*ASK, *SAY, *SAY])[0] == "yoyo<|user|>", "a prompt is no end"
    said = {"role": "assistant", "content": "", "tool_calls": [call("f", {})]}
    calls = [*ASK, said, {"role": "tool", "name": "f", "content": "2"}, *SAY]
    assert row(open_ended, messages=calls)[0].split("</call>")[1] == "<|tool|>yo<|user|>"
    assert row(open_ended, messages=calls[:2])[0].endswith("</call><|tool|>")


def test_reasoning_that_leaves_the_history_is_trained_where_it_is_said():
    drops = bytes_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    talk = [*ASK, {"role": "assistant", "content": "<think>a</think>b"}]
    trained, whole = row(drops, messages=talk * 2)
    assert trained == "<think>a</think>b<|end|>" * 2 and whole.count("<think>") == 2
    twice = [*ASK, talk[1], talk[1]]
    assert row(drops, messages=twice)[0] == "<think>a</think>b<|end|>" * 2, "two turns in a row"
    trained, whole = row(drops, messages=talk * 2, turns="last")
    assert trained == "<think>a</think>b<|end|>" and whole.count("<think>") == 1


def test_an_empty_block_of_the_generation_prompt_is_context():
    """Left out, a model is trained on other prompts than it is sampled from."""
    quiet = bytes_tokenizer(CHATML.replace("[{{ quiet }}]", "<think></think>"))
    given = prompt(ASK, quiet, chat_template_kwargs={"quiet": 1})
    assert given.endswith("<|assistant|><think></think>")
    assert row(quiet, messages=ASK + SAY, chat_template_kwargs={"quiet": 1}) == (
        "yo<|end|>",
        f"{given}yo<|end|>",
    )
    left_open = bytes_tokenizer(CHATML.replace("[{{ quiet }}]", "<think>"))
    trained, whole = row(left_open, messages=ASK + SAY, chat_template_kwargs={"quiet": 1})
    assert trained == "yo<|end|>" and "<think>" not in whole, "the turn does not close it"


def test_template_files(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_bytes(b"\xef\xbb\xbf" + CHATML.encode())
    assert read_template(str(path)) == CHATML
    path.write_text("a\n{% for m in messages %}")
    with pytest.raises(UserError, match=r"--chat-template: .*chat.jinja:2: expected a Jinja template"):
        read_template(str(path))
    for wrong, message in ((tmp_path, "got a folder"), (tmp_path / "no", "got no such file")):
        with pytest.raises(UserError, match=message):
            read_template(str(wrong))


# --- tokenizers that put a space before texts -------------------------------------------------------
@pytest.mark.parametrize("scheme", ["first", "always"])
def test_pieces_get_no_space_of_the_tokenizers(scheme):
    """A completion that is tokenised alone begins with a space that is in neither text."""
    letters = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789[]/:+=?!.\n"]
    vocabulary = {c: i for i, c in enumerate([*letters, "\n\n"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\n", "\n")], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}q: {{ m.content }}{% else %}"
        "{{ m.content }}.{% endif %}{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )

    def text(**fields):
        kind = "messages" if "messages" in fields else "prompt-completion"
        return tokenizer.decode(encode(Row("x:1", kind, fields), tokenizer).tokens[:-1])

    assert text(prompt="2+2=", completion="4") == "2+2=4"
    assert text(prompt="2+2=", completion=" 4") == "2+2= 4"
    assert text(prompt="a", completion="\nb") == "a\nb", "the newline that is put before it joins it"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 3
    assert text(messages=talk) == "q: ab." * 3
    assert continuations([("", "x:1"), ("a b", "x:1")], tokenizer) == [
        [],
        tokenizer.convert_tokens_to_ids(["a", "▁", "b"]),
    ]
    assert continuations([("ab", "x")], BYTES) == [BYTES.encode("ab")]
