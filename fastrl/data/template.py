"""A chat template applied to messages: the text, and where in it each message begins.

The text is always the tokenizer's own `apply_chat_template`.  Positions come from a second rendering of the
same template with marks in it: one where a loop over messages turns to the next, one on each side of a
`{% generation %}` block.  Without its marks that rendering must be the first one, letter for letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import NoReturn

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastrl.data.messages import NONE, Extras, Messages, in_parts, with_text_arguments
from fastrl.data.tokenizer import Tokenizer
from fastrl.errors import UserError
from fastrl.files import Json, JsonObject, call_user

# characters of a private plane, which no text of a dataset has
OPEN, CLOSE, END = "\U0010fff0", "\U0010fff1", "\U0010fff2"
MARK = re.compile(f"{OPEN}([^{CLOSE}]*){CLOSE}")
INDEX = "fastrl_index"
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A template's text.

    starts     where the text of each message begins, by the message's number; only of those it shows
    generated  (begin, end) of the `{% generation %}` blocks
    """

    text: str
    starts: dict[int, int] = field(default_factory=dict)
    generated: list[tuple[int, int]] = field(default_factory=list)


def render(
    messages: Messages,
    tokenizer: Tokenizer,
    where: str,
    *,
    extras: Extras = NONE,
    generate: bool = False,
    resume: bool = False,
) -> str:
    """The text of plain `messages` (see `messages.plain`).

    generate  ends in the template's prompt for the assistant's next turn
    resume    the last message stays open: the text ends where its content does

    Raises UserError naming `where` for a missing template and for whatever the template raises.
    """
    if tokenizer.chat_template is None:
        advice = "use text columns, a chat model's tokenizer, or --chat-template FILE"
        raise UserError(f"{where}: the tokenizer has no chat template for messages; {advice}")
    how: JsonObject = {**extras.variables, "tokenize": False, "tools": extras.tools or None}
    if resume:
        how |= {"add_generation_prompt": False, "continue_final_message": True}
    else:
        how |= {"add_generation_prompt": generate}
    if not _reads_text(tokenizer, str(tokenizer.chat_template)):
        messages = in_parts(messages)
    try:
        return _apply(messages, tokenizer, how)
    except UserError as error:
        texts = with_text_arguments(messages)
        if texts != messages and not isinstance(error.__cause__, TemplateError):
            try:  # some templates join arguments to text
                return _apply(texts, tokenizer, how)
            except UserError:
                pass
        _refuse(messages, where, error)


def _apply(messages: Messages, tokenizer: Tokenizer, how: JsonObject) -> str:
    return str(call_user("the chat template", tokenizer.apply_chat_template, messages, **how))


def _refuse(messages: Messages, where: str, error: UserError) -> NoReturn:
    cause = error.__cause__
    roles = [m["role"] for m in messages]
    if isinstance(cause, TemplateError):
        raise UserError(f"{where}: the chat template refuses roles {roles}: {cause}") from cause
    problem = f"{type(cause).__name__}: {cause}"
    advice = "mend the row, or give another template with --chat-template FILE"
    raise UserError(f"{where}: the chat template fails on roles {roles} ({problem}); {advice}") from cause


@lru_cache(maxsize=8)
def _reads_text(tokenizer: Tokenizer, template: str) -> bool:
    """Whether the template shows content that is text; some show lists of parts alone."""
    probe = "a text of letters"
    messages: Messages = [
        {"role": "user", "content": probe},
        {"role": "assistant", "content": "and one more"},
    ]
    shown = []
    for form in (messages[:1], in_parts(messages[:1]), messages, in_parts(messages)):
        try:
            shown.append(probe in _apply(form, tokenizer, {"tokenize": False}))
        except UserError:
            shown.append(False)
    alone, alone_in_parts, answered, answered_in_parts = shown
    return answered or (not answered_in_parts and (alone or not alone_in_parts))


def template_of(tokenizer: Tokenizer, extras: Extras) -> str:
    """The template's source: of several, the one that these tools ask for."""
    return str(tokenizer.get_chat_template(None, extras.tools or None))


def check_template(source: str, where: str) -> None:
    """Raises UserError naming `where` and the line if `source` is no Jinja template."""
    try:
        _environment().parse(source)
    except TemplateSyntaxError as error:
        raise UserError(f"{where}:{error.lineno}: expected a Jinja template, got {error.message}") from error


def has_generation(template: str) -> bool:
    """Whether the template says itself, in `{% generation %}` blocks, what the assistant wrote."""
    return GENERATION.search(template) is not None


# --- positions --------------------------------------------------------------------------------------
def locate(
    messages: Messages,
    tokenizer: Tokenizer,
    where: str,
    *,
    extras: Extras = NONE,
    generate: bool = False,
) -> Rendered:
    """`render`, with the places of its messages and of its `{% generation %}` blocks.

    There are none where the marked rendering is not the tokenizer's own.
    """
    text = render(messages, tokenizer, where, extras=extras, generate=generate)
    source = template_of(tokenizer, extras)
    numbered = [{**_without_nulls(m), INDEX: i} for i, m in enumerate(messages)]
    if not _reads_text(tokenizer, str(tokenizer.chat_template)):
        numbered = in_parts(numbered)
    names = {**tokenizer.special_tokens_map, **extras.variables}
    for form in (numbered, with_text_arguments(numbered)):
        given = {"messages": form, "tools": extras.tools or None, "documents": None, **names}
        try:
            marked = call_user("", _marked(source).render, add_generation_prompt=generate, **given)
        except UserError:
            continue
        found = _unmark(str(marked))
        if found.text == text:
            return found
    return Rendered(text)


def _without_nulls(message: JsonObject) -> JsonObject:
    """What `apply_chat_template` makes of a message: no nulls, and reasoning under each of its names."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _unmark(marked: str) -> Rendered:
    """The text between the marks, and what they say."""
    text = ""
    loops: dict[str, dict[int, int]] = {}
    begun: list[int] = []
    generated = []
    last = 0
    for mark in MARK.finditer(marked):
        text += marked[last : mark.start()]
        last = mark.end()
        kind, _, number = mark[1].partition(" ")
        if kind == "begin":
            begun.append(len(text))
        elif kind == "end":
            generated.append((begun.pop(), len(text)))
        elif number.isdigit():
            loops.setdefault(kind, {})[int(number)] = len(text)
    # loops that only look through the messages write nothing between them
    starts = max(loops.values(), key=lambda loop: (len(set(loop.values())), max(loop.values())), default={})
    return Rendered(text + marked[last:], starts, generated)


@lru_cache(maxsize=8)
def _marked(source: str) -> Template:
    """The template with marks."""
    environment = _environment()
    tree = environment.parse(source)
    for number, loop in enumerate(tree.find_all(nodes.For)):
        if isinstance(loop.target, nodes.Name) and _asks_role(loop, loop.target.name):
            name = nodes.Name(loop.target.name, "load")
            index = nodes.Getitem(name, nodes.Const(INDEX), "load")
            loop.body.insert(0, _mark(f"loop{number} ", index))
    tree.set_environment(environment)
    return environment.from_string(tree)


def _asks_role(loop: nodes.For, name: str) -> bool:
    """Whether the loop's body reads the role of its items: they are messages."""
    for child in loop.body:
        for node in [child, *child.find_all((nodes.Getattr, nodes.Getitem))]:
            owner = getattr(node, "node", None)
            if not isinstance(owner, nodes.Name) or owner.name != name:
                continue
            if isinstance(node, nodes.Getattr) and node.attr == "role":
                return True
            if isinstance(node, nodes.Getitem) and getattr(node.arg, "value", None) == "role":
                return True
    return False


def _mark(kind: str, *rest: nodes.Expr) -> nodes.Output:
    return nodes.Output([nodes.TemplateData(OPEN + kind), *rest, nodes.TemplateData(CLOSE)])


class Generation(Extension):
    """`{% generation %}` blocks: their text between two marks."""

    tags: set[str] = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements of a block."""
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [_mark("begin"), *body, _mark("end")]


def _environment() -> Environment:
    """Jinja as chat templates know it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Json,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


# --- special tokens ---------------------------------------------------------------------------------
@lru_cache(maxsize=8)
def special_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The texts of the tokenizer's special tokens, without the one that begins a sequence."""
    bos = tokenizer.bos_token_id
    added = tokenizer.added_tokens_decoder
    return tuple(
        str(token) for number, token in added.items() if token.special and number != bos and str(token)
    )


def leading_special(text: str, tokenizer: Tokenizer) -> str:
    """The special token that `text` begins with, else the empty text."""
    found: Sequence[str] = [s for s in special_texts(tokenizer) if text.startswith(s)]
    return max(found, key=len, default="")


def ends_in_special(text: str, tokenizer: Tokenizer) -> bool:
    """Whether a special token ends `text`; space behind it does not count."""
    return text.rstrip().endswith(special_texts(tokenizer))
