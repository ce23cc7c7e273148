"""Any causal language model behind the decoder's interface, and how load_model chooses."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from support import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from fastrl.errors import UserError
from fastrl.model import adapter
from fastrl.model.adapter import Adapter, load_model
from fastrl.model.decoder import Decoder

GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
PHI = {
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "bos_token_id": None,
}
LENGTHS = [5, 1, 0, 9, 20]


def packed():
    return torch.randint(61, (sum(LENGTHS),)), torch.tensor([0, *LENGTHS]).cumsum(0).int()


def theirs(lm, tokens, cu):
    ends = zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)
    return torch.cat([lm(tokens[None, a:b]).logits[0] for a, b in ends if a < b])


@pytest.mark.parametrize("config", [GPT2, PHI], ids=["gpt2-tied", "phi-untied-with-bias"])
@pytest.mark.parametrize("budget", [1, 40, 1 << 14])
def test_logits_and_gradients_are_those_of_single_sequences(config, budget, monkeypatch):
    """Wrong implementations: packed tokens fed as one sequence; rows left in the order of length; a lost head
    bias.
    """
    monkeypatch.setattr(adapter, "PADDED_TOKENS", budget)
    model = load_model(config, seed=1).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    tokens, cu = packed()
    ours = torch.nn.functional.linear(model(tokens, cu), model.head_weight, model.head_bias)
    expected = theirs(model.lm, tokens, cu)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    up = torch.randn_like(ours)
    a, b = (torch.autograd.grad(x, list(model.parameters()), up) for x in (ours, expected))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_agrees_with_the_decoder_on_its_own_families(tmp_path):
    decoder = Decoder.from_config(tiny_config("qwen3"), seed=1)
    decoder.save_pretrained(tmp_path)
    model = Adapter.from_pretrained(tmp_path)
    tokens, cu = packed()
    torch.testing.assert_close(model(tokens, cu), decoder(tokens, cu), atol=1e-5, rtol=0)
    shifted = torch.cat([torch.arange(n) * 2 for n in LENGTHS])
    torch.testing.assert_close(
        model(tokens, cu, positions=shifted), decoder(tokens, cu, positions=shifted), atol=1e-5, rtol=0
    )
    assert torch.equal(model.embed(tokens), decoder.embed(tokens))
    embeds = decoder.embed(tokens).flip(0)
    torch.testing.assert_close(
        model(tokens, cu, embeds=embeds), decoder(tokens, cu, embeds=embeds), atol=1e-5, rtol=0
    )
    assert model.config.tie_word_embeddings and model.config.eos_token_id == (1,)


def test_interface(tmp_path):
    """Wrong implementation: dropout in training mode, so that sampler and trainer disagree about every
    log-prob.
    """
    model = load_model(GPT2, seed=1)
    assert (model.supports_cache, model.gradient_checkpointing, model.head_bias) == (False, False, None)
    assert (model.config.vocab_size, model.config.hidden_size, model.config.max_position_embeddings) == (
        61,
        32,
        64,
    )
    assert model.config.eos_token_id == (1,) and model.dtype == torch.float32
    tokens, cu = packed()
    assert torch.equal(model.train()(tokens, cu), model.eval()(tokens, cu))
    assert model(tokens[:0], torch.tensor([0, 0])).shape == (0, 32)
    assert torch.equal(model(tokens[:5]), model(tokens[:5], torch.tensor([0, 5])))
    model.gradient_checkpointing = False
    with pytest.raises(UserError, match=r"--gradient-checkpointing: GPT2LMHeadModel .* lower --micro-tokens"):
        model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="attend: GPT2LMHeadModel runs through transformers"):
        model(tokens, cu, attend=lambda *x: x[1])
    with pytest.raises(ValueError, match="expected at most 64 tokens each, got 65"):
        model(torch.zeros(65, dtype=torch.int64))


def test_saves_and_loads_again(tmp_path):
    model = load_model(GPT2, seed=1)
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    assert model.dtype == torch.float32
    tokens, cu = packed()
    again = load_model(tmp_path / "a")
    assert torch.equal(again(tokens, cu), model(tokens, cu))
    assert torch.equal(
        theirs(AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval(), tokens, cu),
        theirs(model.lm, tokens, cu),
    )
    assert load_model(tmp_path / "b", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_capped_or_scaled_head_is_refused():
    """Wrong implementation: log-probs of hidden @ head.T for a model that caps its logits: silently another
    policy.
    """
    config = {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "final_logit_softcapping": 0.01,
        "head_dim": 8,
    }
    with pytest.raises(UserError, match=r"final_logit_softcapping: .* its logits are not a plain product"):
        load_model(tiny_config() | config)


# --- load_model -------------------------------------------------------------------------------------
def test_load_model_takes_folders_json_yaml_and_dicts(tmp_path):
    config = tiny_config("llama")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    made = [load_model(s, seed=3) for s in (config, tmp_path / "config.json", str(tmp_path / "tiny.yaml"))]
    made[0].save_pretrained(tmp_path / "folder")
    made.append(load_model(tmp_path / "folder"))
    for model in made:
        assert isinstance(model, Decoder)
        assert torch.equal(model.layers[0].qkv.weight, made[0].layers[0].qkv.weight)
    assert load_model(config, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_load_model_says_when_and_why_it_takes_the_slow_way(monkeypatch):
    said = []
    monkeypatch.setattr(adapter, "notice", said.append)
    model = load_model(GPT2, seed=1)
    assert said[0] == (
        "GPT2LMHeadModel runs through transformers, several times slower than the fast decoder, "
        "which is for LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    )
    assert isinstance(model, Adapter)
    assert torch.equal(model.head_weight, load_model(GPT2, seed=1).head_weight)
    assert isinstance(load_model(tiny_config("llama", attention_bias=True)), Adapter)
    assert said[-1].endswith("which does not take attention_bias: expected false, got True")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("nowhere", None, "expected a Hugging Face folder, a config.json or a .yaml file, got .*nowhere"),
        ("bad.json", "{", "bad.json"),
        ("bad.yaml", "a: [", "bad.yaml: expected JSON or YAML"),
        ("list.yaml", "- 1", "expected a mapping of config.json's keys, got list"),
        ("other.yaml", "model_type: t5", "t5 is no causal language model that transformers can make"),
        ("unknown.yaml", "model_type: made_up", "made_up is no causal language model"),
        ("unsafe.yaml", "!!python/object/apply:os.getcwd []", "unsafe.yaml: expected JSON or YAML"),
    ],
)
def test_sources_that_cannot_be_loaded_are_named(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / name)


def test_weights_that_do_not_fit_are_named(tmp_path):
    load_model(GPT2, seed=1).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.n_layer = 3
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"missing transformer\.h\.2"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file"):
        load_model(tmp_path)
