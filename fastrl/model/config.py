"""The configurations that the decoder can run: a Hugging Face config.json, typed and checked."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from fastrl.errors import UserError
from fastrl.model.fields import Settings, refuse, rope_settings, strange

__all__ = [
    "CAUSAL",
    "FAMILIES",
    "SCORING",
    "Family",
    "ModelConfig",
    "Settings",
    "architecture",
    "as_token_ids",
    "is_scoring",
    "scoring_body",
    "unsupported",
]

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
    key_heads: int | None = None  # if config.json does not have the key; None: as many as query heads


FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, key_heads=32),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, head_dim=128, key_heads=32),
}
REWRITTEN = ("rope_parameters", "dtype", "transformers_version")  # keys that saving writes anew
DERIVED = {
    "architecture",
    "qkv_bias",
    "qk_norm",
    "extra",
    "generation",
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
    # generation_config.json, kept for saving
    generation: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, config: Settings, generation: Settings | None = None) -> ModelConfig:
        """The typed form of a config.json; `generation` is its generation_config.json.

        Raises:  UserError for a key that is missing, of the wrong type or not supported.
        """
        refuse(config)
        reason = unsupported(config)
        if reason:
            raise UserError(
                f"config.json: {reason}.  fastrl.model.adapter.load_model runs other causal language "
                "models, slower"
            )

        family = FAMILIES[architecture(config)]
        theta, scaling = rope_settings(config)
        eps = _real(config, "rms_norm_eps", 1e-6)
        deviation = _real(config, "initializer_range", 0.02)
        tied = config.get("tie_word_embeddings") or False
        if not isinstance(tied, bool):
            raise UserError(f"config.json: tie_word_embeddings: expected true or false, got {tied!r}")
        kept = {key: value for key, value in config.items() if key not in REWRITTEN}
        ends = as_token_ids(config.get("eos_token_id"))
        kept_generation = dict(generation or {})
        sizes = _sizes(config, family)
        made = cls(
            architecture=architecture(config),
            rms_norm_eps=eps,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=tied,
            initializer_range=deviation,
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            eos_token_id=ends,
            extra=kept,
            generation=kept_generation,
            **sizes,
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
        ends = self.eos_token_id
        fixed = {
            "eos_token_id": (list(ends) if len(ends) > 1 else ends[0]) if ends else None,
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

    # transformers reads model_type and never the class
    of_family, given = FAMILIES[name].model_type, config.get("model_type")
    wrong = strange(config)
    if given not in (None, of_family):
        wrong.insert(0, f"model_type: expected {of_family} for {name}, got {given!r}")
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


def as_token_ids(eos: object) -> tuple[int, ...]:
    """The end-of-sequence tokens of a config.json, which holds one, a list, or none.

    Raises:  UserError for anything else.
    """
    if eos is None:
        return ()
    ids = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UserError(
            f"config.json: eos_token_id: expected a token id, a list of them or null, got {eos!r}"
        )
    return ids


# --- reading keys -----------------------------------------------------------------------------------
def _sizes(config: Settings, family: Family) -> dict[str, int]:
    """The integer fields of `ModelConfig`."""
    width = _integer(config, "hidden_size")
    heads = _integer(config, "num_attention_heads")
    required = ("vocab_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    key_heads = heads
    if "num_key_value_heads" not in config and family.key_heads:
        key_heads = family.key_heads
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        **{name: _integer(config, name) for name in required},
        "num_key_value_heads": _integer(config, "num_key_value_heads", key_heads),
        "head_dim": _integer(config, "head_dim", family.head_dim or width // heads),
    }


def _integer(config: Settings, key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    lowest = 0 if key == "num_hidden_layers" else 1
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise UserError(f"config.json: {key}: expected int, {lowest} or more, got {value!r}")
    return value


def _real(config: Settings, key: str, default: float) -> float:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"config.json: {key}: expected float, got {value!r}")
    return float(value)
