"""Every chat template that TRL ships trains here, on TRL's loss tokens but for the differences below."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastrl.data.encode import encode
from fastrl.data.rows import Row
from fastrl.errors import UserError

utils = pytest.importorskip("trl.chat_template_utils", reason="TRL's templates are not ours to copy")
FOLDER = Path(utils.__file__).parent / "chat_templates"
NAMES = sorted(p.stem for p in FOLDER.glob("*.jinja") if not p.stem.endswith("_training"))
SPECIAL = re.compile(
    r"<\|[^|>\n ]+\|>|<｜[^｜>\n]+｜>|</?\w+_of_\w+>|<turn\|>|<\|turn>|<\|tool_response>|\[gMASK\]|\[/?INST\]"
)

# --- the differences --------------------------------------------------------------------------------
# 1. What stands behind a turn's end (a newline) is never generated: not trained behind eos.
# 2. What the generation prompt already holds is never generated: TRL trains these beginnings of turns too.
GIVEN = {
    "deepseek_r1_distill": ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
    "deepseekv3": ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
    "gptoss": ("<|start|>assistant",),
    "muse_glimmer": ("<|start|>assistant",),
    "nemotron_3_5_lightning": ("<think>\n",),
    "nemotron_3_nano": ("<think>\n",),
    "nemotron_3_super": ("<think>\n",),
    "nemotron_3_ultra": ("<think>\n",),
    "qwen2_5": ("\n",),
    "qwen3_5_nothink": ("<think>\n\n</think>\n\n",),
    "qwen3_5_think": ("<think>\n",),
    "qwen3_6": ("<think>\n",),
    "qwen3_8": ("<think>\n",),
}
# 3. A turn without an end of its own ends in the special token behind it: the model has to write it.  TRL
#    does so for GLM, and leaves this one out.
ENDS = {"diffusion_gemma": ("<tool_call|>", "<|tool_response>")}
# 4. TRL has no training form of these; the turns are what the template adds behind the generation prompt.
UNPAIRED = {"llama3_1": "<|eot_id|>", "llama3_2": "<|eot_id|>"} | {
    name: "<turn|>" for name in NAMES if name.startswith("gemma4")
}
# Templates that read lists of parts alone (a processor's).
PARTS = ("idefics3", "llava_next", "smolvlm")
# The token that ends a sequence, where it is not the one that ends a turn.
EOS = {"phi3": "</s>", "phi3_5": "</s>", "glm4moe": "</s>", "llava_next": "</s>"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def asked(x):
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": x}}}
    return [assistant("", tool_calls=[call]), {"role": "tool", "name": "add", "content": f"{x + 1}"}]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "adds",
            "parameters": {"type": "object", "properties": {"x": {"type": "integer", "description": "n"}}},
        },
    }
]
TURNS = [user("Hi there"), assistant("Yo, man"), user("And now?"), assistant("Bye")]
WHY = [{**m, "reasoning_content": f"why {i}"} if i % 2 else m for i, m in enumerate(TURNS)]
CALLS = [user("Add 1"), *asked(1), assistant("It is 2"), user("Again"), *asked(2), assistant("It is 3")]
CASES = {"one turn": TURNS[:2], "turns": TURNS, "reasoning": WHY, "tools": CALLS}


def tokenizer_for(name):
    """Bytes, and the template's special tokens."""
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    specials = list(dict.fromkeys(["<pad>", "<s>", "</s>", *SPECIAL.findall(template)]))
    vocabulary = {t: i for i, t in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=specials[3:],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    return made


def runs(tokenizer, ids, mask):
    """The texts of the trained runs, without space behind them."""
    found = []
    before = False
    for token, live in zip(ids, mask, strict=True):
        if live and not before:
            found.append([])
        if live:
            found[-1].append(token)
        before = live
    return [tokenizer.decode(run).rstrip() for run in found]


def of_trl(tokenizer, twin, messages, tools):
    """TRL's whole text and loss runs, as its SFTTrainer makes them with assistant_only_loss."""
    made = tokenizer.apply_chat_template(
        copy.deepcopy(messages),
        tools=tools,
        chat_template=twin,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = made["input_ids"], made["assistant_masks"]
    return tokenizer.decode(ids).rstrip(), runs(tokenizer, ids, mask)


def of_ours(tokenizer, messages, tools):
    sample = encode(Row("x:1", "messages", {"messages": messages, "tools": tools}), tokenizer)
    return tokenizer.decode(sample.tokens).rstrip(), runs(tokenizer, sample.tokens, sample.mask)


def as_parts(messages):
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def without(name, run):
    """TRL's run as ours has it: the differences 2 and 3."""
    given = next((text for text in GIVEN.get(name, ()) if run.startswith(text)), "")
    last, more = ENDS.get(name, ("no such end", ""))
    return run.removeprefix(given) + (more if run.endswith(last) else "")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNPAIRED])
def test_trls_loss_tokens(name):
    """Wrong: refusing several turns (Qwen3, Phi-3, gpt-oss) or all (DeepSeek, Nemotron); leaving out the stop
    of GLM's turns; training reasoning that the template takes out of the history, or losing it where it
    stays.
    """
    tokenizer = tokenizer_for(name)
    twin = utils.get_training_chat_template(tokenizer)
    if name not in EOS:
        ended = of_ours(tokenizer, TURNS, None)[1][0]
        tokenizer.eos_token = SPECIAL.findall(ended)[-1] if name != "gptoss" else "<|return|>"

    for case, messages in CASES.items():
        tools = TOOLS if case == "tools" else None
        given = as_parts(messages) if name in PARTS else messages
        try:
            text, wanted = of_trl(tokenizer, twin, given, tools)
        except Exception as error:  # some templates know no tools
            assert case == "tools", (name, case, error)
            with pytest.raises(UserError, match="x:1: the chat template"):
                of_ours(tokenizer, messages, tools)
            continue
        whole, trained = of_ours(tokenizer, messages, tools)
        assert trained == [without(name, run) for run in wanted], (name, case)
        assert whole == text, (name, case)


@pytest.mark.parametrize("name", UNPAIRED)
def test_templates_without_a_training_form(name):
    tokenizer = tokenizer_for(name)
    tokenizer.eos_token = UNPAIRED[name]
    text, trained = of_ours(tokenizer, TURNS, None)
    assert trained == [f"Yo, man{UNPAIRED[name]}", f"Bye{UNPAIRED[name]}"]
    assert text == tokenizer.apply_chat_template(TURNS, tokenize=False).rstrip()
    assert len(of_ours(tokenizer, CALLS, TOOLS)[1]) == 4
