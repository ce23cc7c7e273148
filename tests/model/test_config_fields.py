"""No key of a config.json is ignored: each equals transformers' logits, goes through transformers, or is
refused.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from published import ABSENT, LINEAR, LLAMA3, OLD, PUBLISHED, WINDOW, YARN
from support import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from fastrl.errors import UserError
from fastrl.model import head
from fastrl.model.adapter import Adapter, load_model
from fastrl.model.config import ModelConfig, unsupported
from fastrl.model.decoder import Decoder

TOKENS = torch.arange(40) % 31
CLASSES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}

# values of every field of the three classes, and of keys that transformers reads without a field
VALUES: dict[str, list[object]] = {
    "transformers_version": ["4.1", "5.0"],
    "architectures": [None, ["MistralForCausalLM"]],
    "output_hidden_states": [True],
    "output_attentions": [True],
    "return_dict": [False],
    "dtype": ["bfloat16", "float16"],
    "chunk_size_feed_forward": [2, 3],
    "is_encoder_decoder": [True],
    "id2label": [{0: "a"}, {0: "a", 1: "b", 2: "c"}],
    "label2id": [{"a": 0}, {"a": 0, "b": 1, "c": 2}],
    "problem_type": ["regression"],
    "vocab_size": [31, 67],
    "hidden_size": [16, 48],
    "intermediate_size": [16, 64],
    "num_hidden_layers": [1, 3],
    "num_attention_heads": [2, 8],
    "num_key_value_heads": [1, None, ABSENT],
    "head_dim": [16, None, ABSENT],
    "hidden_act": ["gelu", "relu"],
    "max_position_embeddings": [64, 4096],
    "initializer_range": [0.1, 0.5],
    "rms_norm_eps": [0.1, 10.0, ABSENT],
    "use_cache": [False, True],
    "tie_word_embeddings": [True, False, ABSENT],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 30.0},
        {**LINEAR, "rope_theta": 30.0},
        LINEAR,
        {**YARN, "rope_theta": 30.0},
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 30.0},
        {**LLAMA3, OLD: 16, "rope_theta": 30.0},
        {"rope_theta": 30.0, "partial_rotary_factor": 0.5, **LINEAR},
        {"full_attention": {"rope_type": "default", "rope_theta": 30.0}},
    ],
    "rope_scaling": [
        LINEAR,
        {"type": "linear", "factor": 2.0},
        {"type": "yarn", "rope_type": "linear", "factor": 3.0},
        {**LLAMA3, OLD: 16},
        LLAMA3,
        YARN,
        {**LINEAR, "rope_theta": 50.0},
        {"type": "mrope", "mrope_section": [1, 1, 2]},
        {},
    ],
    "rope_theta": [100.0, 1_000_000, ABSENT],
    "partial_rotary_factor": [0.5, 1.0],
    OLD: [8, 64],
    "use_sliding_window": [True],
    "sliding_window": [5, None, ABSENT],
    "max_window_layers": [0, 1, 9],
    "layer_types": [["full_attention", "sliding_attention"], ["full_attention"] * 2, None],
    "attention_bias": [True, None],
    "attention_dropout": [0.5, 0.1],
    "mlp_bias": [True],
    "pretraining_tp": [2, 4],
    "pad_token_id": [3, None],
    "bos_token_id": [3, None],
    "eos_token_id": [3, [4, 5], None],
    "is_causal": [False, None],
    "is_decoder": [True, False],
    "add_cross_attention": [True],
    "use_bidirectional_attention": [True, False],
    "per_layer_config": [{"0": {"num_key_value_heads": 4}}],
    "attn_implementation": ["eager"],
    "a_key_of_tomorrow": [0, False, "x"],
}
BESIDE: dict[str, list[dict[str, object]]] = {  # settings that a field is tried beside
    "sliding_window": [{}, WINDOW],
    "max_window_layers": [{}, WINDOW],
    "use_sliding_window": [{}, {"sliding_window": 5}, {"sliding_window": 5, "max_window_layers": 1}],
    "layer_types": [{}, {"sliding_window": 5, "use_sliding_window": True}],
    "rope_scaling": [
        {},
        {"rope_theta": ABSENT, "rope_parameters": {"rope_theta": 30.0, "rope_type": "default"}},
    ],
    "rope_theta": [{}, {"rope_scaling": LINEAR}, {"rope_parameters": {**LINEAR, "rope_theta": 30.0}}],
    "partial_rotary_factor": [{}, {"rope_scaling": LINEAR}],
    OLD: [{}, {"rope_scaling": {**LLAMA3, OLD: 16}}, {"rope_scaling": LLAMA3}, {"rope_scaling": YARN}],
}


def changed(base, changes):
    config = {k: v for k, v in {**base, **changes}.items() if v is not ABSENT}
    return copy.deepcopy(config)


def of_transformers(config):
    """transformers' model of this config.json, random; None where it refuses."""
    settings = copy.deepcopy(config)
    try:
        typed = AutoConfig.for_model(settings.pop("model_type"), **settings)
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(typed, dtype=torch.float32).eval()
        with torch.no_grad():
            return model, model(TOKENS[None], return_dict=True, use_cache=False).logits[0]
    except Exception:  # whatever its validation or its forward raises
        return None


def filled(config, state):
    """The decoder with transformers' weights."""
    model = Decoder.empty(ModelConfig.from_dict(config), torch.float32, "cpu")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parts in model.layout().items():
            parameters[name].copy_(torch.cat([state[part] for part in parts]))
    return model


@torch.no_grad()
def verdict(config):
    """ "equal" to transformers' logits, "adapted" or "refused"; an AssertionError for other logits."""
    theirs = of_transformers(config)
    before = copy.deepcopy(config)
    try:
        if unsupported(config):
            ours = load_model(config, seed=1)
            assert isinstance(ours, Adapter) and theirs is not None
            logits = ours(TOKENS) @ ours.head_weight.T
            torch.testing.assert_close(logits, theirs[1], atol=1e-5, rtol=1e-5)
            return "adapted"
        ours = filled(config, theirs[0].state_dict()) if theirs else Decoder.from_config(config, seed=1)
    except UserError:
        return "refused"
    assert config == before, "the caller's mapping was changed"
    if theirs is None:
        return "refused"  # by transformers; the decoder may be more lenient about types
    torch.testing.assert_close(ours(TOKENS) @ ours.head_weight.T, theirs[1], atol=1e-4, rtol=1e-4)
    saved = of_transformers(changed(ours.config.to_dict(), {"torch_dtype": "float32"}))
    saved[0].load_state_dict(theirs[0].state_dict())
    again = saved[0](TOKENS[None], return_dict=True).logits[0]
    torch.testing.assert_close(again, theirs[1], atol=1e-6, rtol=1e-6)
    return "equal"


@pytest.mark.parametrize("family", CLASSES)
def test_every_field_of_the_families_is_as_in_transformers(family):
    """Wrong implementations: is_causal ignored; rope_parameters before rope_scaling; a default of our own for
    a key that is absent; a window without a size taken for none.
    """
    fields = {f.name for f in dataclasses.fields(CLASSES[family])}
    unknown = {name for name in fields if not name.startswith("_")} - VALUES.keys()
    assert not unknown, "transformers has new fields: give them values here and a meaning in model/fields.py"
    base = tiny_config(family, initializer_range=0.2, num_key_value_heads=2, tie_word_embeddings=False)
    base["vocab_size"] = 40
    whole = CLASSES[family](**{k: v for k, v in base.items() if k != "model_type"}).to_dict()
    assert verdict(whole | {"architectures": base["architectures"]}) == "equal", "every field, its default"
    found = {}
    for name, values in VALUES.items():
        for beside in BESIDE.get(name, [{}]):
            for value in values:
                key = f"{name} = {'absent' if value is ABSENT else value} beside {beside}"
                try:
                    found[key] = verdict(changed(base, {**beside, name: value}))
                except AssertionError as error:
                    raise AssertionError(f"{family}: {key}: {error}") from error
    assert {found[f"is_causal = {value} beside {{}}"] for value in (False, None)} == {"refused"}
    assert found[f"rope_scaling = {LINEAR} beside {BESIDE['rope_scaling'][1]}"] == "equal"
    assert found["a_key_of_tomorrow = False beside {}"] == "adapted"
    assert sum(v == "equal" for v in found.values()) > 60, "most settings stay on the fast path"


# --- configurations as they are published, made small ------------------------------------------------
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    """Wrong implementations: YaRN of a model card dropped; a soft cap that does not show in small logits."""
    config, expected = PUBLISHED[name]
    assert verdict(config) == expected


def test_a_scaling_without_its_numbers_is_refused_when_it_is_read():
    """Wrong: a model that loads, and then fails at its first forward with the name of a key."""
    for scaling in (
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "linear"},
        {**LLAMA3, "factor": None},
    ):
        with pytest.raises(
            UserError, match=r"config.json: rope_scaling: \w+: expected a positive number, got None"
        ):
            ModelConfig.from_dict(tiny_config("llama", rope_scaling=scaling))
    with pytest.raises(UserError, match="rope_theta: expected a positive number"):
        ModelConfig.from_dict(tiny_config("llama", rope_theta=None))


def test_a_head_that_caps_only_large_logits_is_found_without_its_field(monkeypatch):
    """Wrong: what lies behind the head measured on the logits of fresh weights alone."""
    monkeypatch.setattr(head, "BEHIND_HEAD", {})
    with pytest.raises(UserError, match="Gemma2ForCausalLM: its logits are not a plain product"):
        load_model(PUBLISHED["gemma-2"][0], seed=1)


def test_what_transformers_cannot_make_is_one_error():
    """Wrong: the exception of its validation, or of a layer, as an internal error."""
    for changes in (
        {"mlp_bias": True, "pad_token_id": 99},
        {"attention_bias": True, "layer_types": ["full_attention"]},
        {"attention_bias": True, "eos_token_id": "x"},
        {"rope_scaling": "yarn"},
        {"rope_scaling": [1]},
        {"eos_token_id": "x"},
        {"hidden_size": 32.5},
    ):
        with pytest.raises(UserError, match=r"config\.json: "):
            load_model(tiny_config("qwen2", **changes))
