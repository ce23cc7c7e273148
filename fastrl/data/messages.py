"""Chat columns of a row, checked and brought into the one form that templates are given.

A message is {"role", "content"}; its content is text, or a list of text parts.  Beside messages a row may
have `tools` (schemas) and `chat_template_kwargs` (variables of the template), both also as JSON text, which
is how they survive in columns of a fixed type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastrl.errors import UserError
from fastrl.files import Json, JsonObject, shorten

Messages = list[JsonObject]
CHAT_COLUMNS = (
    "prompt",
    "completion",
    "completions",
    "messages",
    "chosen",
    "rejected",
    "tools",
    "chat_template_kwargs",
)
FORM = "{'role': ..., 'content': ...} with text in both"
# what the renderer itself decides, and a row cannot
RESERVED = (
    "conversation",
    "messages",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "sanitize_control_tokens",
)


def template_columns(columns: Mapping[str, Json]) -> JsonObject:
    """Those of a row's columns that its chat template is given beside messages."""
    return {name: columns[name] for name in ("tools", "chat_template_kwargs") if columns.get(name)}


def as_read(prompt: Json, completion: Json) -> Json:
    """A completion as a reward model reads it behind `prompt`: behind text, messages are the text that they
    were cut from.
    """
    if isinstance(prompt, str) and isinstance(completion, list | tuple):
        return "".join(str(message["content"]) for message in completion)
    return completion


def columns_of_rows(rows: int, **columns: Sequence[Json] | None) -> list[JsonObject]:
    """The named columns of `rows` rows, row by row, without those that are None."""
    given = {name: values for name, values in columns.items() if values is not None}
    return [{name: values[i] for name, values in given.items()} for i in range(rows)]


class Extras(NamedTuple):
    """What a row gives its template beside messages: tool schemas, and variables by name."""

    tools: list[Json]
    variables: JsonObject


NONE = Extras([], {})


def extras_of(fields: Mapping[str, Json], where: str) -> Extras:
    """A row's `tools` and `chat_template_kwargs`.

    Raises UserError naming `where` for JSON text that is not JSON, for other types, and for variables that
    only the program sets.
    """
    tools = _parsed(fields.get("tools"), "tools", where)
    variables = _parsed(fields.get("chat_template_kwargs"), "chat_template_kwargs", where)
    if not tools and not variables:
        return NONE

    if not isinstance(tools or [], list):
        got = shorten(tools, 80)
        raise UserError(f"{where}: tools: expected a list of schemas, or its JSON text, got {got}")
    schemas = [_parsed(tool, f"tools[{i}]", where) for i, tool in enumerate(tools or [])]
    for i, schema in enumerate(schemas):
        if not isinstance(schema, dict):
            got = shorten(schema, 80)
            raise UserError(f"{where}: tools[{i}]: expected a JSON schema (an object), got {got}")

    if not isinstance(variables or {}, dict):
        expected = "an object like {'enable_thinking': false}, or its JSON text"
        got = shorten(variables, 80)
        raise UserError(f"{where}: chat_template_kwargs: expected {expected}, got {got}")
    taken = [name for name in variables or {} if name in RESERVED]
    if taken:
        advice = "it is not the row's to set; use the column of that name, or leave it out"
        raise UserError(
            f"{where}: chat_template_kwargs: expected variables of the template, got {taken[0]!r}; {advice}"
        )
    return Extras(schemas, variables or {})


def _parsed(value: Json, name: str, where: str) -> Json:
    """`value`, or what its JSON text holds."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        got = shorten(value, 80)
        raise UserError(f"{where}: {name}: expected JSON text, got {got} ({error})") from error


# --- messages ---------------------------------------------------------------------------------------
def check_messages(column: str, messages: list[Json], where: str) -> None:
    """Raises UserError naming `where`, `column` and the message that is not one."""
    if not messages:
        raise UserError(f"{where}: {column}: expected at least one message, got an empty list")
    for i, message in enumerate(messages):
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            _check_parts(message["content"], f"{where}: {column}: message {i}")
        if not _is_message(message):
            got = shorten(message, 80)
            raise UserError(f"{where}: {column}: expected message {i} to be {FORM}, got {got}")


def _is_message(message: Json) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if content is None or content == "":
        return content == "" or bool(message.get("tool_calls"))
    return isinstance(content, str | list)


def _check_parts(parts: list[Json], where: str) -> None:
    for part in parts:
        if isinstance(part, str):
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is not None and kind != "text":
            advice = "models here read text alone; leave the row out, or describe the part in words"
            raise UserError(
                f"{where}: expected content parts of type 'text', got one of type {kind!r}; {advice}"
            )
        if kind is None or not isinstance(part.get("text"), str):
            form = "{'type': 'text', 'text': ...}"
            raise UserError(f"{where}: expected content parts like {form}, got {shorten(part, 80)}")


def plain(messages: Messages) -> Messages:
    """Messages with their content as one text, and the arguments of tool calls as objects.

    Parts are joined without anything between them, as processors do.
    """
    return [_plain(message) for message in messages]


def _plain(message: JsonObject) -> JsonObject:
    content = message.get("content")
    calls = message.get("tool_calls")
    if not isinstance(content, list) and not calls:
        return message
    message = dict(message)
    if isinstance(content, list):
        message["content"] = "".join(p if isinstance(p, str) else p["text"] for p in content)
    if calls:
        calls = _loaded(calls, list)
        message["tool_calls"] = [_call(call) for call in calls] if isinstance(calls, list) else calls
    return message


def _call(call: Json) -> Json:
    """A tool call whose arguments are an object; text that is not JSON stays text."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}
    if isinstance(call.get("arguments"), str):
        return {**call, "arguments": _loaded(call["arguments"], dict)}
    return call


def _loaded(value: Json, kind: type) -> Json:
    """What the JSON text `value` holds if that is a `kind`, else `value`."""
    if not isinstance(value, str):
        return value
    try:
        loaded = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return loaded if isinstance(loaded, kind) else value


def with_text_arguments(messages: Messages) -> Messages:
    """Messages with the arguments of tool calls as JSON text, for templates that join them to text."""
    return [_text_arguments(message) for message in messages]


def _text_arguments(value: Json) -> Json:
    if not isinstance(value, dict):
        return value
    value = dict(value)
    if isinstance(value.get("tool_calls"), list):
        value["tool_calls"] = [_text_arguments(call) for call in value["tool_calls"]]
    if isinstance(value.get("function"), dict):
        value["function"] = _text_arguments(value["function"])
    if isinstance(value.get("arguments"), dict):
        value["arguments"] = json.dumps(value["arguments"], ensure_ascii=False)
    return value


def in_parts(messages: Messages) -> Messages:
    """Messages with their content as one text part, for templates that read nothing else."""
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
        for m in messages
    ]


# --- padding ----------------------------------------------------------------------------------------
def unpadded(fields: JsonObject) -> JsonObject:
    """A row of a columnar file, its chat columns without the keys that are null.

    Such files give every object of a column the keys of all of them: a call with {x} comes back as
    {x, y: null}.  Items of lists stay.  A null that is meant survives as JSON text.
    """
    return {name: _dropped(value) if name in CHAT_COLUMNS else value for name, value in fields.items()}


def _dropped(value: Json) -> Json:
    if isinstance(value, dict):
        return {key: _dropped(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_dropped(item) for item in value]
    return value
