"""The configurations that the decoder can run: a Hugging Face config.json, typed and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from fastrl.errors import UserError
from fastrl.kernels.rope import SCALINGS

Number = TypeVar("Number", int, float)
Settings = Mapping[str, Any]  # a parsed config.json
CAUSAL = "ForCausalLM"  # how the class of a language model ends in config.json
SCORING = "ForSequenceClassification"  # and the class of a reward model
DEFAULT_LABELS = (0, 1)  # transformers' own, where config.json has neither num_labels nor id2label


@dataclass(frozen=True, slots=True)
class Family:
    """What sets an architecture apart: all else is one decoder."""

    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None  # if config.json has none; None: width / heads


FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, head_dim=128),
}
REWRITTEN = ("rope_parameters", "dtype", "transformers_version")  # keys that saving writes anew
DERIVED = {
    "architecture",
    "qkv_bias",
    "qk_norm",
    "eos_token_id",
    "extra",
}  # fields that are no keys of config.json


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
    def from_dict(cls, config: Settings) -> ModelConfig:
        """The typed form of a config.json.

        Raises:  UserError for a key that is missing, of the wrong type or not supported.
        """
        reason = unsupported(config)
        if reason:
            raise UserError(
                f"config.json: {reason}.  fastrl.model.adapter.load_model runs other causal language "
                "models, slower"
            )

        family = FAMILIES[architecture(config)]
        theta, scaling = _rope_settings(config)
        eps = _number(config, "rms_norm_eps", float, 1e-6)
        deviation = _number(config, "initializer_range", float, 0.02)
        tied = bool(config.get("tie_word_embeddings", False))
        kept = {key: value for key, value in config.items() if key not in REWRITTEN}
        made = cls(
            architecture=architecture(config),
            rms_norm_eps=eps,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=tied,
            initializer_range=deviation,
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            eos_token_id=as_token_ids(config.get("eos_token_id")),
            extra=kept,
            **_sizes(config, family),
        )

        if made.num_attention_heads % made.num_key_value_heads or made.head_dim % 2:
            raise UserError(
                "config.json: expected num_key_value_heads to divide num_attention_heads and an even "
                "head_dim, got "
                f"{made.num_key_value_heads}, {made.num_attention_heads} and {made.head_dim}"
            )
        return made

    def to_dict(self) -> dict[str, Any]:
        """A config.json for transformers 4 and 5: the keys that were read, with this decoder's own values."""
        names = {f.name for f in fields(self)} - DERIVED
        typed = {name: getattr(self, name) for name in names}
        fixed = {
            "architectures": [self.architecture],
            "model_type": FAMILIES[self.architecture].model_type,
            "hidden_act": "silu",
        }
        return self.extra | typed | fixed


def architecture(config: Settings) -> str:
    """The class that a config.json names: architectures[0], else that of its model_type, else model_type."""
    model_type = config.get("model_type")
    named = config.get("architectures")
    named = named or [name for name, family in FAMILIES.items() if family.model_type == model_type]
    return str(named[0] if named else config.get("model_type", "none"))


def unsupported(config: Settings) -> str:
    """Why `Decoder` cannot run this config.json, and what it could run; empty when it can."""
    name = architecture(config)
    if name not in FAMILIES:
        return f"architectures: expected {', '.join(FAMILIES)}; got {name}"

    rope_type = _rope_type(config)
    wrong = []
    for key, (expected, supports) in FEATURES.items():
        if not supports(config):
            wrong.append(f"{key}: expected {expected}, got {config.get(key, rope_type)!r}")
    return "; ".join(wrong)


def is_scoring(config: Settings) -> bool:
    """Whether a config.json is that of a reward model: ...ForSequenceClassification."""
    return architecture(config).endswith(SCORING)


def scoring_body(config: Settings, where: str) -> ModelConfig:
    """The decoder under the head of a reward model's config.json, without a language-model head.

    Raises:  UserError, naming `where`, for more than one label, and for a config.json this decoder cannot
             run.
    """
    labels = config.get("num_labels") or len(config.get("id2label") or DEFAULT_LABELS)
    if labels != 1:
        raise UserError(
            f"{where}: expected a model of one label, which is its score; config.json has {labels}"
        )
    causal = architecture(config).removesuffix(SCORING) + CAUSAL
    return ModelConfig.from_dict({**config, "architectures": [causal], "tie_word_embeddings": True})


def as_token_ids(eos: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
    """The end-of-sequence tokens of a config.json, which holds one, a list, or none."""
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (eos,)


# --- what the decoder supports ----------------------------------------------------------------------
def _full_attention(config: Settings) -> bool:
    return all(kind == "full_attention" for kind in config.get("layer_types") or [])


def _no_window(config: Settings) -> bool:
    """True unless some layer has a sliding window; layer_types, where given, says so instead."""
    if config.get("layer_types") or not config.get("use_sliding_window"):
        return True
    first = config.get("max_window_layers", 0)
    return config.get("sliding_window") is None or first >= config.get("num_hidden_layers", 0)


def _full_rotary(config: Settings) -> bool:
    settings = config.get("rope_parameters") or config
    return bool(settings.get("partial_rotary_factor", 1.0) == 1.0)


def _rope_type(config: Settings) -> str:
    scaling = _rope_settings(config)[1] or {}
    return str(scaling.get("rope_type", "default"))


FEATURES: dict[
    str, tuple[str, Callable[[Settings], bool]]
] = {  # key -> the supported value, and a test of it
    "layer_types": ("full_attention", _full_attention),
    "use_sliding_window": ("false", _no_window),
    "attention_bias": ("false", lambda config: not config.get("attention_bias", False)),
    "mlp_bias": ("false", lambda config: not config.get("mlp_bias", False)),
    "hidden_act": ("silu", lambda config: config.get("hidden_act", "silu") == "silu"),
    "attention_dropout": ("0", lambda config: not config.get("attention_dropout", 0.0)),
    "partial_rotary_factor": ("1", _full_rotary),
    "quantization_config": ("none", lambda config: not config.get("quantization_config")),
    "rope_scaling": (f"rope_type {', '.join(SCALINGS)}", lambda config: _rope_type(config) in SCALINGS),
}


# --- reading keys -----------------------------------------------------------------------------------
def _rope_settings(config: Settings) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling, from transformers 5's rope_parameters or from the older two keys."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = settings.pop("type", None)
    theta = settings.pop("rope_theta", config.get("rope_theta", 10000.0))
    kind = settings.setdefault("rope_type", kind or "default")
    return float(theta), None if kind == "default" else settings


def _sizes(config: Settings, family: Family) -> dict[str, int]:
    """The integer fields of `ModelConfig`."""
    width = _number(config, "hidden_size", int)
    heads = _number(config, "num_attention_heads", int)
    required = ("vocab_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        **{name: _number(config, name, int) for name in required},
        "num_key_value_heads": _number(config, "num_key_value_heads", int, heads),
        "head_dim": _number(config, "head_dim", int, family.head_dim or width // heads),
    }


def _number(config: Settings, key: str, kind: type[Number], default: Number | None = None) -> Number:
    value: Any = config.get(key)
    if value is None:
        value = default
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise UserError(f"config.json: {key}: expected {kind.__name__}, got {value!r}") from None
