"""Configurations as they are published, made small, and what becomes of each: equal to transformers' logits,
run through transformers (adapted), or refused.
"""

from __future__ import annotations

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
OLD = "original_max_position_embeddings"
ABSENT = object()  # the key is not in the file


def published(family, **keys):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    name = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    common = {"architectures": [name.get(family)], "model_type": family, "hidden_act": "silu"}
    common |= {"initializer_range": 0.2, "torch_dtype": "bfloat16", "transformers_version": "4.43.0"}
    return {
        k: v for k, v in {**common, **sizes, **heads, "rms_norm_eps": 1e-5, **keys}.items() if v is not ABSENT
    }


OF_LLAMA = {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "pretraining_tp": 1}
OF_LLAMA |= {"rope_scaling": None, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2}
OF_QWEN = {
    "attention_dropout": 0.0,
    "max_window_layers": 2,
    "sliding_window": 64,
    "use_sliding_window": False,
}
OF_QWEN |= {"rope_theta": 1e6, "use_cache": True, "bos_token_id": 3, "eos_token_id": 5}
OF_QWEN3 = {**OF_QWEN, "head_dim": 8, "attention_bias": False, "rope_scaling": None, "rms_norm_eps": 1e-6}
SCALED = {**LLAMA3, OLD: 32}
PUBLISHED = {
    "llama-1": (
        published("llama", max_sequence_length=64, pad_token_id=0, num_key_value_heads=ABSENT),
        "equal",
    ),
    "llama-2": (published("llama", **OF_LLAMA, tie_word_embeddings=False), "equal"),
    "llama-2-old-pad": (published("llama", **OF_LLAMA, pad_token_id=-1), "equal"),
    "llama-3": (published("llama", **OF_LLAMA | {"rope_theta": 5e5, "eos_token_id": 9}), "equal"),
    "llama-3.1": (
        published("llama", **OF_LLAMA | {"rope_scaling": SCALED, "eos_token_id": [9, 8, 7]}),
        "equal",
    ),
    "llama-3.2": (
        published(
            "llama",
            **OF_LLAMA | {"rope_scaling": {**SCALED, "factor": 32.0}, "head_dim": 8},
            tie_word_embeddings=True,
        ),
        "equal",
    ),
    "llama-3.3-of-transformers-5": (
        published(
            "llama", rope_parameters={**SCALED, "rope_theta": 5e5}, dtype="bfloat16", head_dim=8, **OF_LLAMA
        ),
        "equal",
    ),
    "llama-linear": (
        published("llama", **OF_LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.5}}),
        "equal",
    ),
    "llama-dynamic": (
        published("llama", **OF_LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        "adapted",
    ),
    "code-llama": (published("llama", **OF_LLAMA, rope_theta=1e6, vocab_size=41), "equal"),
    "yarn-llama": (
        published("llama", **OF_LLAMA | {"rope_scaling": {"type": "yarn", "finetuned": True, **YARN}}),
        "adapted",
    ),
    "tinyllama": (published("llama", **OF_LLAMA, rope_theta=10000.0), "equal"),
    "vicuna": (
        published("llama", _name_or_path="x", max_sequence_length=128, transformers_version="4.31"),
        "equal",
    ),
    "smollm2": (
        published(
            "llama",
            **OF_LLAMA,
            is_llama_config=True,
            rope_interleaved=False,
            tie_word_embeddings=True,
            **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
        ),
        "equal",
    ),
    "unsloth": (
        published("llama", **OF_LLAMA, unsloth_version="2025.1", unsloth_fixed=True, pad_token_id=4),
        "equal",
    ),
    "deepseek-llm": (published("llama", **OF_LLAMA, rope_theta=10000), "equal"),
    "deepseek-coder": (
        published("llama", **OF_LLAMA | {"rope_scaling": {"factor": 4.0, "type": "linear"}}),
        "equal",
    ),
    "deepseek-r1-distill-llama": (published("llama", **OF_LLAMA | {"rope_scaling": SCALED}), "equal"),
    "deepseek-r1-distill-qwen": (
        published("qwen2", **OF_QWEN, use_mrope=False, tie_word_embeddings=False),
        "equal",
    ),
    "qwen1.5": (published("qwen2", **OF_QWEN | {"max_window_layers": 1}), "equal"),
    "qwen2.5": (published("qwen2", **OF_QWEN, tie_word_embeddings=True), "equal"),
    "qwen2.5-yarn-card": (published("qwen2", **OF_QWEN, rope_scaling={"type": "yarn", **YARN}), "adapted"),
    "qwen2.5-saved-by-5-with-yarn-card": (
        published(
            "qwen2",
            **OF_QWEN | {"rope_theta": ABSENT},
            rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
            layer_types=["full_attention"] * 2,
            rope_scaling={**YARN, "rope_theta": 1e6},
        ),
        "adapted",
    ),
    "qwen2.5-window": (published("qwen2", **OF_QWEN | {**WINDOW}), "adapted"),
    "qwen3": (published("qwen3", **OF_QWEN3, tie_word_embeddings=True), "equal"),
    "qwen3-wide-heads": (published("qwen3", **OF_QWEN3 | {"head_dim": 16, "sliding_window": None}), "equal"),
    "qwen3-yarn-card": (published("qwen3", **OF_QWEN3 | {"rope_scaling": YARN}), "adapted"),
    "qwen3-of-transformers-5": (
        published(
            "qwen3",
            **OF_QWEN3,
            layer_types=["full_attention"] * 2,
            dtype="bfloat16",
            rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        ),
        "equal",
    ),
    "llama-3.1-fp8": (published("llama", **OF_LLAMA, quantization_config={"quant_method": "fp8"}), "refused"),
    "llama-awq": (
        published("llama", **OF_LLAMA, quantization_config={"quant_method": "awq", "bits": 4}),
        "refused",
    ),
    "llama-mlx": (published("llama", **OF_LLAMA, quantization={"group_size": 64, "bits": 4}), "refused"),
    "llama-embedder": (published("llama", **OF_LLAMA, is_causal=False), "refused"),
    "mistral": (
        published("mistral", architectures=["MistralForCausalLM"], sliding_window=5, rope_theta=1e4),
        "adapted",
    ),
    "mistral-renamed": (
        published("llama", **OF_LLAMA | {"model_type": "mistral"}, sliding_window=5),
        "adapted",
    ),
    "granite": (
        published(
            "granite",
            architectures=["GraniteForCausalLM"],
            embedding_multiplier=12.0,
            attention_multiplier=0.5,
            residual_multiplier=0.22,
            logits_scaling=1.0,
        ),
        "adapted",
    ),
    "granite-scaled": (
        published("granite", architectures=["GraniteForCausalLM"], logits_scaling=8.0),
        "refused",
    ),
    "cohere": (published("cohere", architectures=["CohereForCausalLM"], logit_scale=0.0625), "refused"),
    "gemma-2": (
        published(
            "gemma2",
            architectures=["Gemma2ForCausalLM"],
            initializer_range=1e-3,
            head_dim=8,
            final_logit_softcapping=30.0,
            attn_logit_softcapping=50.0,
        ),
        "refused",
    ),
    "gemma-2-uncapped": (
        published(
            "gemma2",
            architectures=["Gemma2ForCausalLM"],
            head_dim=8,
            hidden_act=ABSENT,
            final_logit_softcapping=None,
            attn_logit_softcapping=50.0,
        ),
        "adapted",
    ),
}
