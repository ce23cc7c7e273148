"""A conversation as one text, in pieces: what the assistant wrote is trained, the rest is context.

Where a template writes a turn the same way whatever follows it, the pieces are the prompt that the sampler
sees before the turn and what the template adds for the turn.  Otherwise one of these is chosen:

marked     the template has `{% generation %}` blocks: they say what is trained
whole      the template's text of the whole conversation, cut at its messages
generated  every turn as the template writes it while it is the last one, with what comes between the turns:
           reasoning that the template takes out of earlier turns is trained, and stays in the context
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from fastrl.data.messages import NONE, Extras, Messages
from fastrl.data.template import (
    Rendered,
    ends_in_special,
    has_generation,
    leading_special,
    locate,
    render,
    special_texts,
    template_of,
)
from fastrl.data.tokenizer import Tokenizer
from fastrl.errors import UserError

Turns = Literal["all", "last"]
# Templates that take reasoning out of earlier turns, and are trained on those turns as they stand there:
# a name that only they use.  Others are trained on turns as they are generated.
TRAINED_AS_HISTORY = ("truncate_history_thinking", "last_user_index", "<|channel|>", "<|channel>")
THINKING = re.compile(r"<think>|</think>")
QUESTION: Messages = [{"role": "user", "content": "q"}]
PLACE = "\U0010fff8{}\U0010fff9"


class Segment(NamedTuple):
    """A piece of a sequence's text that is tokenised by itself.

    closed  the text holds the end of a turn, whatever the tokenizer's own end-of-sequence token is
    """

    text: str
    trained: bool
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation to train on.

    messages  plain (see `messages.plain`)
    trained   numbers of the messages that are trained
    opened    how the first trained message begins: the prompt's part of it, which is not trained
    """

    messages: Messages
    trained: list[int]
    extras: Extras
    where: str
    opened: str = ""


def cut(talk: Talk, tokenizer: Tokenizer) -> list[Segment]:
    """The segments of a conversation.

    Raises UserError naming its place for whatever the template refuses, and for a template whose turns
    cannot be told apart.
    """
    template = None if tokenizer.chat_template is None else template_of(tokenizer, talk.extras)
    if template is not None and has_generation(template):
        return _marked(talk, tokenizer)
    if template is not None and _drops_reasoning(tokenizer, template):
        return _with_reasoning(talk, tokenizer, template)
    return _closed(_unmarked(talk, tokenizer, template or ""), talk, tokenizer, template or "")


def _unmarked(talk: Talk, tokenizer: Tokenizer, template: str) -> list[Segment]:
    return _chain(talk, tokenizer) or _rewritten(talk, tokenizer, template)


# --- templates that only add ------------------------------------------------------------------------
def _chain(talk: Talk, tokenizer: Tokenizer) -> list[Segment] | None:
    """The turns one after another; None if the template does not write them so."""
    segments = []
    done = ""
    for i in talk.trained:
        before = _before(talk, i, tokenizer)
        after = _render(talk, i + 1, tokenizer)
        if not before.startswith(done) or not after.startswith(before):
            return None
        segments.append(Segment(before[len(done) :], False))
        segments.append(Segment(after[len(before) :], True))
        done = after
    return segments


def _render(talk: Talk, count: int, tokenizer: Tokenizer, *, generate: bool = False) -> str:
    """The text of the first `count` messages."""
    messages = talk.messages[:count]
    return render(messages, tokenizer, talk.where, extras=talk.extras, generate=generate)


def _before(talk: Talk, i: int, tokenizer: Tokenizer) -> str:
    """The prompt that turn `i` is generated from."""
    if not talk.opened or i != talk.trained[0]:
        return _render(talk, i, tokenizer, generate=True)
    opened = {**talk.messages[i], "content": talk.opened}
    opened.pop("tool_calls", None)
    messages = [*talk.messages[:i], opened]
    return render(messages, tokenizer, talk.where, extras=talk.extras, resume=True)


# --- templates that write a turn differently later --------------------------------------------------
def _rewritten(talk: Talk, tokenizer: Tokenizer, template: str) -> list[Segment]:
    """The whole text, or the turns as they are generated."""
    whole = _located(talk, talk.trained[-1] + 1, tokenizer)
    alone = {i: _located(talk, i + 1, tokenizer) for i in talk.trained[:-1]}
    alone[talk.trained[-1]] = whole
    if any(i not in text.starts for i, text in alone.items()) or any(i not in whole.starts for i in alone):
        raise _refusal(talk)

    same = all(_said(whole, i, tokenizer) == _said(text, i, tokenizer) for i, text in alone.items())
    if same or any(name in template for name in TRAINED_AS_HISTORY):
        return _whole(talk, whole, tokenizer)
    return _generated(talk, alone, tokenizer)


def _located(talk: Talk, count: int, tokenizer: Tokenizer, *, generate: bool = False) -> Rendered:
    messages = talk.messages[:count]
    return locate(messages, tokenizer, talk.where, extras=talk.extras, generate=generate)


def _refusal(talk: Talk) -> UserError:
    template = "a template that marks the assistant's turns with {% generation %}: --chat-template FILE"
    if len(talk.trained) > 1:
        problem = f"rewrites the turns before message {talk.trained[-1]}"
        return UserError(
            f"{talk.where}: the chat template {problem}; "
            f'train on the last turn alone (turns="last"), or with {template}'
        )
    problem = f"writes another prompt before message {talk.trained[0]} than it gives to generate it"
    return UserError(
        f"{talk.where}: the chat template {problem}; use prompt and completion as text, or {template}"
    )


def _turn(text: Rendered, i: int) -> tuple[int, int]:
    """Where message `i` begins and ends."""
    later = [start for number, start in text.starts.items() if number > i]
    return text.starts[i], min(later, default=len(text.text))


def _said(text: Rendered, i: int, tokenizer: Tokenizer) -> str:
    """The text of message `i` without what ends it."""
    begin, end = _turn(text, i)
    said = text.text[begin:end].rstrip()
    while ends_in_special(said, tokenizer):
        ending = max((s for s in special_texts(tokenizer) if said.endswith(s)), key=len)
        said = said.removesuffix(ending).rstrip()
    return said


def _whole(talk: Talk, whole: Rendered, tokenizer: Tokenizer) -> list[Segment]:
    segments = []
    done = 0
    for i in talk.trained:
        start, end = _turn(whole, i)
        header, given = _header(talk, i, whole, tokenizer)
        begin = start + header
        segments.append(Segment(whole.text[done:begin] + given, False))
        segments.append(Segment(whole.text[begin:end], True))
        done = end
    return segments


def _generated(talk: Talk, alone: dict[int, Rendered], tokenizer: Tokenizer) -> list[Segment]:
    segments = []
    first = 0
    for i in talk.trained:
        text = alone[i]
        start, end = _turn(text, i)
        header, given = _header(talk, i, text, tokenizer)
        begin = start + header
        between = [place for number, place in text.starts.items() if number >= first]
        done = min(between) if first else 0
        segments.append(Segment(text.text[done:begin] + given, False))
        segments.append(Segment(text.text[begin:end], True))
        first = i + 1
    return segments


def _header(talk: Talk, i: int, text: Rendered, tokenizer: Tokenizer) -> tuple[int, str]:
    """How much of turn `i` in `text` is the prompt's, what the template gives to generate it; and what that
    prompt has beside.

    Where the turn begins otherwise than that prompt, a beginning of whole lines and special tokens counts,
    and no reasoning.  The rest of the prompt is the context's too, as a closed and empty block of reasoning
    is; a block that it leaves open is not, because the turn does not close it.
    """
    start, end = _turn(text, i)
    turn = text.text[start:end]
    prompt = _before(talk, i, tokenizer)
    given = prompt[start:] if prompt[:start] == text.text[:start] else _given(talk, i, text, tokenizer)
    shared = _shared(given, turn)
    if shared == given:
        return len(given), ""
    if talk.opened and i == talk.trained[0]:
        raise _refusal(talk)

    thinking = THINKING.search(given)
    if thinking is not None:
        shared = shared[: thinking.start()]
    ends = [match.end() for match in re.finditer("\n", shared)]
    for special in special_texts(tokenizer):
        ends += [match.end() for match in re.finditer(re.escape(special), shared)]
    header = max(ends, default=0)
    rest = given[header:]
    is_open = rest.rfind("<think>") > rest.rfind("</think>")
    begins_alike = turn[header : header + 1] == rest[:1]
    return header, "" if is_open or begins_alike else rest


def _shared(a: str, b: str) -> str:
    """The common beginning of two texts."""
    n = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]


def _given(talk: Talk, i: int, text: Rendered, tokenizer: Tokenizer) -> str:
    """The prompt for turn `i` behind the message before it, where that prompt has another history."""
    prompt = _located(talk, i, tokenizer, generate=True)
    if i - 1 in prompt.starts and i - 1 in text.starts:
        begin, end = _turn(text, i - 1)
        last = text.text[begin:end]
        given = prompt.text[prompt.starts[i - 1] :]
        if given.startswith(last):
            return given[len(last) :]

    usual = _prompt(tokenizer, template_of(tokenizer, talk.extras))
    if not usual:
        raise _refusal(talk)
    return usual


# --- templates that say what is trained -------------------------------------------------------------
def _marked(talk: Talk, tokenizer: Tokenizer) -> list[Segment]:
    """The whole text; of the trained messages, what stands in `{% generation %}` blocks counts."""
    whole = _located(talk, talk.trained[-1] + 1, tokenizer)
    opened = 0
    if talk.opened:
        prompt = _before(talk, talk.trained[0], tokenizer)
        if not whole.text.startswith(prompt):
            raise _refusal(talk)
        opened = len(prompt)

    spans = []
    for i in talk.trained:
        start, end = _turn(whole, i) if i in whole.starts else (0, 0)
        inside = [(max(a, opened), b) for a, b in whole.generated if start <= a and b <= end and b > opened]
        if not inside:
            problem = f"the chat template's generation blocks hold nothing of message {i}"
            raise UserError(f"{talk.where}: {problem}; mend the template, or leave the blocks out")
        spans += inside

    segments: list[Segment] = []
    done = 0
    for begin, end in spans:
        if begin > done or not segments:
            segments.append(Segment(whole.text[done:begin], False))
            segments.append(Segment(whole.text[begin:end], True))
        else:
            segments[-1] = Segment(segments[-1].text + whole.text[begin:end], True)
        done = end
    last = segments[-1]
    segments[-1] = last._replace(closed=ends_in_special(last.text, tokenizer))
    return segments


# --- reasoning that a template leaves out -----------------------------------------------------------
@lru_cache(maxsize=8)
def _drops_reasoning(tokenizer: Tokenizer, template: str) -> bool:
    """Whether the template leaves reasoning in content out of the very turn that is trained."""
    if "</think>" not in template:
        return False
    said = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nso"},
    ]
    try:
        text = render(said, tokenizer, "")
    except UserError:
        return False
    return "why" not in text and "so" in text


def _with_reasoning(talk: Talk, tokenizer: Tokenizer, template: str) -> list[Segment]:
    """The segments, with the reasoning of the trained turns where the template drops it."""
    said = {}
    messages = list(talk.messages)
    for i in talk.trained:
        content = messages[i].get("content")
        if isinstance(content, str) and "</think>" in content:
            said[PLACE.format(i)] = content
            messages[i] = {**messages[i], "content": PLACE.format(i)}
    held = replace(talk, messages=messages)
    segments = _closed(_unmarked(held, tokenizer, template), held, tokenizer, template)
    for place, content in said.items():
        segments = [s._replace(text=s.text.replace(place, content)) for s in segments]
    return segments


# --- the ends of turns ------------------------------------------------------------------------------
def _closed(segments: Sequence[Segment], talk: Talk, tokenizer: Tokenizer, template: str) -> list[Segment]:
    """The segments with the prompts of the turns in the context, and their ends trained.

    Some templates give no prompt behind a tool's answer, and then write it in the turn.  A turn without an
    end of its own ends where the next message's special token comes: the model has to write it.
    """
    segments = list(segments)
    prompt = _prompt(tokenizer, template)
    for k in range(1, len(segments), 2):
        if prompt and segments[k].text.startswith(prompt):
            segments[k - 1] = segments[k - 1]._replace(text=segments[k - 1].text + prompt)
            segments[k] = segments[k]._replace(text=segments[k].text.removeprefix(prompt))

    for k in range(1, len(segments) - 1, 2):
        turn, context = segments[k], segments[k + 1]
        if not ends_in_special(turn.text, tokenizer):
            stop = leading_special(context.text, tokenizer)
            if prompt.startswith(stop):  # what begins another answer is no end of this one
                stop = ""
            segments[k] = turn._replace(text=turn.text + stop)
            segments[k + 1] = context._replace(text=context.text[len(stop) :])

    last = segments[-1]
    calls = bool(talk.messages[talk.trained[-1]].get("tool_calls"))
    if not ends_in_special(last.text, tokenizer):
        stop = _stop(tokenizer, template, calls=calls)
        if stop:
            segments[-1] = Segment(last.text + stop, True, closed=True)
    return segments


@lru_cache(maxsize=8)
def _prompt(tokenizer: Tokenizer, template: str) -> str:
    """The template's prompt for an answer to a user; empty where it has none."""
    try:
        asked = render(QUESTION, tokenizer, "")
        prompt = render(QUESTION, tokenizer, "", generate=True)
    except UserError:
        return ""
    return prompt.removeprefix(asked) if prompt.startswith(asked) else ""


@lru_cache(maxsize=16)
def _stop(tokenizer: Tokenizer, template: str, *, calls: bool) -> str:
    """The special token that the template writes behind an assistant's turn that has no end of its own."""
    said: Messages = [*QUESTION, {"role": "assistant", "content": "a"}]
    then = QUESTION[0]
    if calls:
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        said[1] = {"role": "assistant", "content": "", "tool_calls": [call]}
        then = {"role": "tool", "name": "f", "content": "a"}
    try:
        text = locate([*said, then], tokenizer, "", extras=NONE)
    except UserError:
        return ""
    if 1 not in text.starts or 2 not in text.starts:
        return ""
    begin, end = _turn(text, 1)
    return (
        ""
        if ends_in_special(text.text[begin:end], tokenizer)
        else leading_special(text.text[end:], tokenizer)
    )
