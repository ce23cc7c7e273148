"""The reward model: equal scores in transformers, whatever is packed beside a sequence, from a folder, text
and tokens.
"""

from __future__ import annotations

import json

import pytest
import torch
from judging import reward_model
from runs import decoder, tokenizer
from support import tiny_config
from transformers import AutoModelForSequenceClassification

from fastrl.data.packing import pack
from fastrl.errors import UserError
from fastrl.model.reward import RewardModel
from fastrl.tasks.tokens import char_tokenizer

SEQUENCES = [[5, 6, 7, 9, 1], [8, 1], [11, 12, 13, 14, 15, 16, 1], [4, 4, 1]]
PAD = 3


def theirs(folder, sequences):
    """transformers' scores of a padded batch."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    width = max(map(len, sequences))
    tokens = torch.tensor([s + [PAD] * (width - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    with torch.no_grad():
        return model(tokens, attention_mask=mask).logits


# --- Hugging Face -----------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_gives_the_same_scores(tmp_path, family, tied):
    """Wrong implementations: two labels (transformers' default); the head under another name, which is drawn
    anew on loading; a score read before the last token, or at the padding; a head that was saved transposed
    or left out.
    """
    model = reward_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    logits = theirs(tmp_path, SEQUENCES)
    assert logits.shape == (4, 1)
    ours = model.score(SEQUENCES)
    assert (logits[:, 0] - torch.tensor(ours)).abs().max() < 1e-5 < max(ours) - min(ours)
    again = RewardModel.load(tmp_path)
    assert again.score(SEQUENCES) == ours
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied and config["architectures"][0].endswith(
        "ForSequenceClassification"
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_own_checkpoint_is_read(tmp_path, family):
    """One that transformers made and saved, its pad token given as TRL does."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        **{k: v for k, v in tiny_config(family).items() if k != "architectures"},
        num_labels=1,
        pad_token_id=PAD,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    assert (
        theirs(tmp_path, SEQUENCES)[:, 0] - torch.tensor(RewardModel.load(tmp_path).score(SEQUENCES))
    ).abs().max() < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_models_folder_gets_a_fresh_head(tmp_path, tied):
    """Wrong implementations: the language model's head kept (saved, decayed by the optimizer); the decoder
    drawn anew; a head of scale 1; one that is the first row of the embedding, drawn from the same seed.
    """
    lm = decoder(tie_word_embeddings=tied)
    lm.save_pretrained(tmp_path)
    model, other = RewardModel.load(tmp_path, seed=4), RewardModel.load(tmp_path, seed=4)
    assert all(torch.equal(p, dict(lm.named_parameters())[n]) for n, p in model.body.named_parameters())
    assert not any("lm_head" in t for parts in model.layout().values() for t in parts)
    assert torch.equal(model.head, other.head) and not torch.equal(
        model.head, RewardModel.load(tmp_path, seed=5).head
    )
    wide = RewardModel.load(tiny_config(hidden_size=1024, head_dim=8), seed=4)
    assert wide.head.std().item() == pytest.approx(1025**-0.5, rel=0.1)
    first = wide.body.embed.weight[0]
    assert torch.corrcoef(torch.stack([first, wide.head[0]]))[0, 1].abs() < 0.15


def test_a_padding_token_is_never_the_end():
    """transformers reads a batch at the last token that is not the padding: with the end-of-sequence token as
    padding it would read one token early.  Wrong implementation: the language model's pad_token_id copied as
    it is.
    """
    model = reward_model(pad_token_id=1)  # as many a model's config.json has it: the end-of-sequence token
    assert model._padding() is None
    model.tokenizer = tokenizer()
    assert model._padding() == model.tokenizer.pad_token_id == 0


def test_what_cannot_be_loaded(tmp_path):
    reward_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"num_labels": None, "id2label": {"0": "a", "1": "b"}}, "expected a model of one label, .* has 2"),
        ({"num_labels": None, "id2label": None}, "expected a model of one label, .* has 2"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "expected LlamaForCausalLM"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            RewardModel.load(tmp_path)
    gpt2 = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 31,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 1,
    }
    with pytest.raises(UserError, match=r"--model: expected a Llama, Qwen2 or Qwen3 .* got GPT2LMHeadModel"):
        RewardModel.load(gpt2)


# --- scores -----------------------------------------------------------------------------------------
def test_scores_do_not_depend_on_the_batch():
    """In float64.  Wrong implementations: attention across sequences; scores in the order of the packs."""
    model = reward_model(dtype=torch.float64)
    together, alone = model.score(SEQUENCES), [model.score([s])[0] for s in SEQUENCES]
    assert together == pytest.approx(alone, rel=1e-13)
    assert model.score(SEQUENCES, max_tokens=7) == pytest.approx(alone, rel=1e-13)
    assert model.score(SEQUENCES[::-1]) == pytest.approx(alone[::-1], rel=1e-13) and model.score([]) == []


def test_bfloat16_scores_are_float32_sums():
    """Wrong implementation: the head's product in bfloat16, whose rewards of 10 are apart by 0.06."""
    model = reward_model(dtype=torch.bfloat16)
    packed = pack(model.groups(SEQUENCES))
    hidden = model.body(packed.tokens, packed.cu_seqlens)
    want = (hidden[packed.at].double() * model.head.double()).sum(-1)
    got = model(packed.tokens, packed.cu_seqlens)
    assert got.dtype == torch.float32 and (got.double() - want).abs().max() < 1e-5


def test_text_is_scored_as_it_was_trained_on():
    """Prompt and completion apart, then the end-of-sequence token.  Wrong implementations: no end, a
    beginning twice, a prompt dropped.
    """
    model, tok = reward_model(), char_tokenizer("abcdefgh:>.")
    ids = {c: tok.encode(c, add_special_tokens=False)[0] for c in "abcdefgh:>."}
    eos = tok.eos_token_id
    model.tokenizer = tok
    assert (
        model.score([("ab>", "cd"), "ab>cd", [ids["a"], ids["b"], ids[">"], ids["c"], ids["d"], eos]])
        == [model.score(["ab>cd"])[0]] * 3
    )
    tok.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token if m.role == 'assistant' "
        "}}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    tok2 = char_tokenizer("abcdefgh:>.u")
    tok2.chat_template = tok.chat_template
    said = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    whole = [*tok2.encode("u:aba:cd", add_special_tokens=False), tok2.eos_token_id]
    assert (
        model.score([said, (said[:1], said[1:]), (said[:1], "cd"), whole], tokenizer=tok2)
        == [model.score([whole])[0]] * 4
    )
    tok2.chat_template = "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}" + tok.chat_template
    extras = {"tools": [{"name": "gh"}]}
    groups = model.groups([(said[:1], said[1:], extras), (said[:1], said[1:])], tok2)
    shown = [tok2.decode(group.tokens[0][:4]) for group in groups]
    assert shown == ["ghu:", "u:ab"], "a row's tools are in what is scored"


def test_steps_are_scored_at_their_ends():
    """Wrong implementations: a step's score at its first token or behind its separator; the sum of steps for
    their lowest.
    """
    model, tok = reward_model(), char_tokenizer("abcdefgh;>")
    model.tokenizer, model.steps = tok, ";"
    (steps,) = model.step_scores([("ab>", "cd;e;fg")])
    ids = tok.encode("ab>cd;e;fg", add_special_tokens=False)
    ends = [ids[:6], ids[:8], [*ids, tok.eos_token_id]]
    model.steps = None
    assert steps.tolist() == pytest.approx(model.score(ends), rel=1e-5)
    model.steps, p = ";", steps.double().sigmoid()
    for name, want in (("min", p.min()), ("product", p.prod()), ("last", p[-1])):
        assert model.score([("ab>", "cd;e;fg")], trajectory=name) == pytest.approx([float(want)])


def test_text_that_fills_the_context_is_scored_without_its_end():
    """A completion cut off where the context ends.  Wrong implementations: a run that dies of the token that
    no longer fits; text that is cut as far as it takes; a token list, which was given as it is, that loses
    one.
    """
    model, tok = reward_model(max_position_embeddings=6), char_tokenizer("abcdefgh;>")
    model.tokenizer = tok
    ids = tok.encode("ab>cde", add_special_tokens=False)
    assert model.score([("ab>", "cde")]) == pytest.approx(model.score([ids])) and model.score(
        [("ab>", "cd")]
    ) != model.score([ids[:5]])
    for given in (("ab>", "cdef"), [*ids, tok.eos_token_id]):
        with pytest.raises(UserError, match="the reward model's context has 6"):
            model.score([given])
    model.steps = ";"
    (steps,) = model.step_scores([("ab>", "c;d")])
    model.steps = None
    ids = tok.encode("ab>c;d", add_special_tokens=False)
    assert steps.tolist() == pytest.approx(model.score([ids[:5], ids]))


def test_what_cannot_be_scored(tmp_path):
    model = reward_model()
    for given, message in (
        ("abc", "expected a list of sequences, got the text 'abc' alone"),
        ([[]], r"sequences\[0\]: expected at least one token, got none"),
        (["abc"], r"sequences\[0\]: expected a list of token ids, because the reward model has no tokenizer"),
        ([[4, 1], [99]], r"sequences\[1\]: expected token ids in \[0, 31\), got 99"),
        ([[4] * 129], r"sequences\[0\]: 129 tokens, but the reward model's context has 128"),
    ):
        with pytest.raises(UserError, match=message):
            model.score(given)
    model.steps, model.tokenizer = ";", tokenizer()
    with pytest.raises(
        UserError, match=r"sequences\[0\]: expected a pair \(prompt, completion\) with the steps"
    ):
        model.score([[4, 1]])
    with pytest.raises(UserError, match="trajectory: expected one of min, product, last; got 'mean'"):
        model.score([("4", "4")], trajectory="mean")


def test_what_the_separator_was_is_kept(tmp_path):
    model = reward_model()
    model.steps = ";"
    model.save_pretrained(tmp_path)
    assert RewardModel.load(tmp_path).steps == ";" and theirs(tmp_path, SEQUENCES).shape == (4, 1)
