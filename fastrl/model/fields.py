"""What every key of a config.json means to the decoder: read, without effect, or not its own.

A key that is none of these sends the model through transformers, whose result it may change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fastrl.errors import UserError
from fastrl.kernels.rope import SCALINGS

Settings = Mapping[str, Any]  # a parsed config.json
Rope = dict[str, Any]

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
OWN = frozenset(  # read by ModelConfig or by FEATURES
    f"""
    {" ".join(SIZES)} architectures model_type rms_norm_eps initializer_range tie_word_embeddings eos_token_id
    rope_theta rope_scaling rope_parameters original_max_position_embeddings
    """.split()
)
# of Llama, Qwen2 and Qwen3 none of these changes a logit; what they say is for tokenizers, generation,
# heads of other tasks, the storage of weights or the bookkeeping of a program
_INERT = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _flash_attn_2_enabled _model_name_or_path _name_or_path attn_implementation auto_map bad_words_ids
    begin_suppress_tokens bos_token bos_token_id cls_token_id custom_pipelines decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label is_decoder is_llama_config keys_to_ignore_at_inference label2id language
    length_penalty license max_length max_new_tokens max_sequence_length min_length model_max_length
    name_or_path neftune_noise_alpha no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_past output_scores pad_token
    pad_token_id prefix pretraining_tp problem_type remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id step_separator suppress_tokens tags task_specific_params temperature
    tf_legacy_loss tokenizer_class tokenizer_name top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version trust_remote_code typical_p unk_token_id unsloth_fixed unsloth_tracked
    unsloth_version use_bfloat16 use_cache use_flash_attention_2 use_flash_attn
"""
INERT = frozenset(_INERT.split())
# a key that would change logits -> its values that do not; null never does, unless `FEATURES` has the key
NEUTRAL: dict[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "attention_multiplier": (),
    "attn_pdrop": (0,),
    "chunk_size_feed_forward": (0,),
    "embd_pdrop": (0,),
    "embedding_multiplier": (1,),
    "hidden_dropout": (0,),
    "hidden_dropout_prob": (0,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "pruned_heads": ({},),
    "resid_pdrop": (0,),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
}
ROPE_KEYS = {  # what rope_parameters may hold, by its type; all but the optional ones are numbers it needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
OPTIONAL_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
QUANTIZED = ("quantization_config", "compression_config", "quantization")  # that of MLX is the last one


def refuse(config: Settings) -> None:
    """UserError for what no model here can be: without a causal mask, or of quantised weights."""
    for where, settings in (("", config), ("text_config.", config.get("text_config"))):
        if not isinstance(settings, Mapping):
            continue
        for key, causal in (("is_causal", True), ("use_bidirectional_attention", False)):
            if bool(settings.get(key, causal)) is not causal:
                raise UserError(
                    f"config.json: {where}{key}: expected {str(causal).lower()}, got "
                    f"{settings[key]!r}: its tokens see later ones, so that it predicts none of them"
                )
        for key in QUANTIZED:
            if settings.get(key):
                raise UserError(_of_quantized(f"{where}{key}", settings[key]))


def _of_quantized(key: str, value: object) -> str:
    method = value.get("quant_method") if isinstance(value, Mapping) else None
    named = f" ({method})" if method else ""
    return (
        f"config.json: {key}: expected none, got quantised weights{named}, which fastrl neither trains nor "
        "samples from; name a folder of float32, bfloat16 or float16 weights: the model that was quantised, "
        "or what transformers' model.dequantize() and save_pretrained write"
    )


def strange(config: Settings) -> list[str]:
    """What the decoder cannot do of a config.json of its families: `key: expected ..., got ...`, one each."""
    wrong = []
    for key, (expected, supports) in FEATURES.items():
        if not supports(config):
            of_rope = key in ("rope_scaling", "partial_rotary_factor")
            got = config.get(key) or (rope_dict(config) if of_rope else config.get(key))
            wrong.append(f"{key}: expected {expected}, got {got!r}")
    for key in sorted(config.keys() - OWN - INERT - FEATURES.keys()):
        value = config[key]
        neutral = NEUTRAL.get(key)
        if value is None or (neutral is not None and any(value == other for other in neutral)):
            continue
        known = " or ".join(map(repr, neutral or ()))
        expected = known or "none, for nothing is known of it (remove it if it changes nothing)"
        wrong.append(f"{key}: expected {expected}, got {value!r}")
    return wrong


# --- features ---------------------------------------------------------------------------------------
def _full_attention(config: Settings) -> bool:
    """Whether layer_types, where given, names full attention for each layer."""
    kinds = config.get("layer_types")
    if kinds is None:
        return True
    return list(kinds) == ["full_attention"] * len(kinds) and len(kinds) == config.get("num_hidden_layers")


def _no_window(config: Settings) -> bool:
    """True unless some layer has a sliding window; layer_types, where given, says so instead.

    A window that is not named has transformers' default size, so that only null is none.
    """
    if config.get("layer_types") or not config.get("use_sliding_window"):
        return True
    if "sliding_window" in config and config["sliding_window"] is None:
        return True
    first, layers = config.get("max_window_layers"), config.get("num_hidden_layers")
    return isinstance(first, int) and isinstance(layers, int) and first >= layers


def _full_rotary(config: Settings) -> bool:
    return all(place.get("partial_rotary_factor") in (None, 1) for place in (config, rope_dict(config)))


def _rope_is_known(config: Settings) -> bool:
    """Whether the rope's type is one of SCALINGS, and all of its keys belong to that type."""
    rope = rope_dict(config)
    kind = rope_type(rope)
    allowed = {*OPTIONAL_ROPE_KEYS, *ROPE_KEYS.get(kind, ())}
    return kind in SCALINGS and all(key in allowed or value is None for key, value in rope.items())


def _off(key: str) -> Callable[[Settings], bool]:
    return lambda config: not config.get(key)


FEATURES: dict[
    str, tuple[str, Callable[[Settings], bool]]
] = {  # key -> the supported value, and a test of it
    "layer_types": ("full_attention for each layer", _full_attention),
    "use_sliding_window": ("false", _no_window),
    # read by the test above; transformers' Llama does not know them
    "sliding_window": ("any", lambda config: True),
    "max_window_layers": ("any", lambda config: True),
    "attention_bias": ("false", _off("attention_bias")),
    "mlp_bias": ("false", _off("mlp_bias")),
    "hidden_act": ("silu", lambda config: config.get("hidden_act", "silu") == "silu"),
    "attention_dropout": ("0", _off("attention_dropout")),
    "partial_rotary_factor": ("1", _full_rotary),
    "is_causal": ("true", lambda config: bool(config.get("is_causal", True))),
    **{key: ("none", _off(key)) for key in QUANTIZED},
    "rope_scaling": (f"rope_type {', '.join(SCALINGS)} with its own numbers", _rope_is_known),
}


# --- rope -------------------------------------------------------------------------------------------
def rope_dict(config: Settings) -> Rope:
    """The mapping that says how positions turn: rope_scaling where it is not empty, else rope_parameters, as
    transformers chooses.

    Raises:  UserError for anything but a mapping.
    """
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value and not isinstance(value, Mapping):
            raise UserError(f"config.json: {key}: expected a mapping or null, got {value!r}")
        if value:
            return dict(value)
    return {}


def rope_type(rope: Rope) -> str:
    """Its rope_type, or type, or "default"."""
    return str(rope.get("rope_type", rope.get("type", "default")))


def rope_settings(config: Settings) -> tuple[float, Rope | None]:
    """rope_theta, and the numbers of a scaling with its rope_type; None for the default.

    As in transformers, a top-level original_max_position_embeddings wins over the mapping's, and the context
    stands in where there is neither.
    Raises:  UserError for a number that is missing or none.
    """
    rope = rope_dict(config)
    kind = rope_type(rope)
    theta = _rope_number(rope.get("rope_theta", config.get("rope_theta", 10000.0)), "rope_theta")
    if kind == "default":
        return theta, None

    original = "original_max_position_embeddings"
    if original in ROPE_KEYS[kind]:
        rope.setdefault(original, config.get("max_position_embeddings"))
        rope[original] = config.get(original, rope[original])
    numbers = {key: _rope_number(rope.get(key), f"rope_scaling: {key}") for key in ROPE_KEYS[kind]}
    if kind == "llama3" and not numbers["low_freq_factor"] < numbers["high_freq_factor"]:
        raise UserError(
            "config.json: rope_scaling: expected low_freq_factor below high_freq_factor, got "
            f"{numbers['low_freq_factor']} and {numbers['high_freq_factor']}"
        )
    return theta, {"rope_type": kind, **{key: rope[key] for key in numbers}}


def _rope_number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"config.json: {key}: expected a positive number, got {value!r}")
    return float(value)
