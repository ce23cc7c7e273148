"""The configurations that the decoder can run: a Hugging Face config.json, typed and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fastrl.errors import UserError
from fastrl.kernels.rope import SCALINGS


@dataclass(frozen=True, slots=True)
class Family:
    """What sets an architecture apart: all else is one decoder."""

    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None  # of a config.json that does not say; None: width / heads


FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, head_dim=128),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A config.json this decoder can run; field names are Hugging Face's."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_word_embeddings: bool
    initializer_range: float
    qkv_bias: bool
    qk_norm: bool
    eos_token_id: tuple[int, ...]
    # the rest of config.json, kept for saving
    extra: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """The typed form of a config.json.  Raises UserError for what is missing, of the wrong type or not
        supported.
        """
        reason = unsupported(config)
        if reason:
            raise UserError(
                f"config.json: {reason}.  fastrl.model.adapter.load_model runs other causal language "
                "models, slower"
            )
        family = FAMILIES[architecture(config)]
        theta, scaling = _rope_settings(config)
        width, heads = (_number(config, key, int) for key in ("hidden_size", "num_attention_heads"))
        eos = config.get("eos_token_id")
        made = cls(
            architecture=architecture(config),
            vocab_size=_number(config, "vocab_size", int),
            hidden_size=width,
            intermediate_size=_number(config, "intermediate_size", int),
            num_hidden_layers=_number(config, "num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=_number(config, "num_key_value_heads", int, heads),
            head_dim=_number(config, "head_dim", int, family.head_dim or width // heads),
            max_position_embeddings=_number(config, "max_position_embeddings", int),
            rms_norm_eps=_number(config, "rms_norm_eps", float, 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            initializer_range=_number(config, "initializer_range", float, 0.02),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            eos_token_id=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
            extra={
                k: v
                for k, v in config.items()
                if k not in ("rope_parameters", "dtype", "transformers_version")
            },
        )
        if made.num_attention_heads % made.num_key_value_heads or made.head_dim % 2:
            raise UserError(
                "config.json: expected num_key_value_heads to divide num_attention_heads and an even "
                "head_dim, got "
                f"{made.num_key_value_heads}, {made.num_attention_heads} and {made.head_dim}"
            )
        return made

    def to_dict(self) -> dict[str, Any]:
        """A config.json for transformers 4 and 5: what was read, under this decoder's own numbers."""
        own_names = {f.name for f in fields(self)} - {
            "architecture",
            "qkv_bias",
            "qk_norm",
            "eos_token_id",
            "extra",
        }
        own = {f: getattr(self, f) for f in own_names}
        family = FAMILIES[self.architecture]
        return (
            self.extra
            | own
            | {"architectures": [self.architecture], "model_type": family.model_type, "hidden_act": "silu"}
        )


def architecture(config: Mapping[str, Any]) -> str:
    """The class a config.json asks for: architectures[0], else the one of its model_type, else what it says
    there.
    """
    named = config.get("architectures") or [
        a for a, f in FAMILIES.items() if f.model_type == config.get("model_type")
    ]
    return str(named[0] if named else config.get("model_type", "none"))


def unsupported(config: Mapping[str, Any]) -> str:
    """Why `Decoder` cannot run this config.json, what it can run included; empty when it can."""
    name = architecture(config)
    if name not in FAMILIES:
        return f"architectures: expected {', '.join(FAMILIES)}; got {name}"
    kinds = config.get("layer_types") or []
    layers, window_from = config.get("num_hidden_layers", 0), config.get("max_window_layers", 0)
    windowed = (
        config.get("use_sliding_window") and config.get("sliding_window") is not None and window_from < layers
    )
    rope_type = (_rope_settings(config)[1] or {}).get("rope_type", "default")
    partial_rotary = (config.get("rope_parameters") or config).get("partial_rotary_factor", 1.0)
    features = {  # what it says: what is supported, and whether it is that
        "layer_types": ("full_attention", all(k == "full_attention" for k in kinds)),
        "use_sliding_window": ("false", bool(kinds) or not windowed),
        "attention_bias": ("false", not config.get("attention_bias", False)),
        "mlp_bias": ("false", not config.get("mlp_bias", False)),
        "hidden_act": ("silu", config.get("hidden_act", "silu") == "silu"),
        "attention_dropout": ("0", not config.get("attention_dropout", 0.0)),
        "partial_rotary_factor": ("1", partial_rotary == 1.0),
        "quantization_config": ("none", not config.get("quantization_config")),
        "rope_scaling": (f"rope_type {', '.join(SCALINGS)}", rope_type in SCALINGS),
    }
    wrong = [
        f"{key}: expected {want}, got {config.get(key, rope_type)!r}"
        for key, (want, fine) in features.items()
        if not fine
    ]
    return "; ".join(wrong)


def _rope_settings(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling, from transformers 5's rope_parameters or from the older two keys."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = settings.pop("type", None)
    theta = settings.pop("rope_theta", config.get("rope_theta", 10000.0))
    kind = settings.setdefault("rope_type", kind or "default")
    return float(theta), None if kind == "default" else settings


def _number(config: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = config.get(key)
    value = default if value is None else value
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise UserError(f"config.json: {key}: expected {kind.__name__}, got {value!r}") from None
