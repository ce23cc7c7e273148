"""Any other causal language model of transformers, behind the decoder's interface; and `load_model`, which
chooses.

Sequences are unpacked into padded batches for the model's own forward, so it is slower than the decoder and
has no cache here: the sampler runs the whole sequence again for every token.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastrl.errors import UserError
from fastrl.model.config import architecture, unsupported
from fastrl.model.decoder import Decoder
from fastrl.model.weights import read_config, read_json

PADDED_TOKENS = 1 << 14  # of one forward pass
UNBOUNDED = 2**31 - 1  # the context of a model whose config names none


def load_model(
    source: str | Path | Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int | None = None,
) -> Decoder | Adapter:
    """The model of a Hugging Face folder, or one with random weights from a config.json, a YAML of one, or a
    dict.

    Llama, Qwen2 and Qwen3 become a `Decoder`; every other causal language model, and settings that the
    decoder lacks, an `Adapter`, with a warning that says why.  `seed` fixes the random weights.
    Raises:  UserError for a path that is not there, a config that no model fits, or weights that do not fit
             the config.
    """
    folder = Path(source) if not isinstance(source, Mapping) and Path(source).is_dir() else None
    config = (
        source if isinstance(source, Mapping) else read_config(folder) if folder else _read_file(Path(source))
    )
    reason = unsupported(config)
    kind: type[Decoder | Adapter] = Adapter if reason else Decoder
    if reason:
        warnings.warn(
            f"{architecture(config)} runs through transformers, slowly: "
            f"the fast decoder cannot take {reason}",
            stacklevel=2,
        )
    if folder is not None:
        return kind.from_pretrained(folder, dtype, device)
    return kind.from_config(config, dtype=dtype, device=device, seed=seed)


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            "model: expected a Hugging Face folder, a config.json or a .yaml file, "
            f"got {str(path)!r}, which is not there"
        )
    if path.suffix == ".json":
        return read_json(path)
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected JSON or YAML, got {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping of config.json's keys, got {type(value).__name__}")
    return value


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What samplers and trainers ask of any model's configuration."""

    architecture: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_id: tuple[int, ...]


class Adapter(nn.Module):
    """A transformers causal language model that takes packed tokens and gives hidden states.

    It stays in evaluation mode: dropout would make the log-probs of trainer and sampler differ.
    """

    supports_cache = False

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm.eval()
        config, generation = lm.config.get_text_config(), getattr(lm, "generation_config", None)
        eos = getattr(generation, "eos_token_id", None) or config.eos_token_id
        self.config = AdapterConfig(
            architecture=type(lm).__name__,
            vocab_size=self.head_weight.shape[0],
            hidden_size=self.head_weight.shape[1],
            max_position_embeddings=getattr(config, "max_position_embeddings", None) or UNBOUNDED,
            tie_word_embeddings=self.head_weight is lm.get_input_embeddings().weight,
            eos_token_id=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
        )
        self._takes_positions = "position_ids" in inspect.signature(lm.base_model.forward).parameters
        self._check_head()

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        attend: Callable[..., Tensor] | None = None,
        embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states that head_weight turns into logits, (T, D); arguments as `Decoder.forward`, of which
        `attend` is refused.

        Memory:  a padded batch of up to 16384 tokens at a time.  Reads cu_seqlens on the host.
        """
        if attend is not None:
            raise ValueError(
                f"attend: {self.config.architecture} runs through transformers, "
                "which has no such hook; pass None"
            )
        if positions is not None and not self._takes_positions:
            raise ValueError(f"positions: {self.config.architecture} computes its own; pass None")
        T = tokens.shape[0]
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, T], device=tokens.device)
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        order = [i for i in lengths.argsort(stable=True).tolist() if lengths[i] > 0]
        if order and int(lengths.max()) > self.config.max_position_embeddings:
            raise ValueError(
                f"cu_seqlens: expected at most {self.config.max_position_embeddings} tokens each, "
                f"got {int(lengths.max())}"
            )
        rows, taken = [], []
        while order:
            L = int(lengths[order[-1]])  # longest first: the batch is as wide as its first sequence
            n = max(1, PADDED_TOKENS // L)
            some, order = torch.tensor(order[-n:], device=tokens.device), order[:-n]
            at, last = torch.arange(L, device=tokens.device), lengths[some, None] - 1
            index, real = starts[some, None] + torch.minimum(at, last), at <= last
            inputs = (
                {"input_ids": tokens[index]}
                if embeds is None
                else {"inputs_embeds": embeds[index].to(self.dtype)}
            )
            if positions is not None:
                inputs["position_ids"] = positions[index]
            rows.append(self._hidden(attention_mask=real.long(), **inputs)[real])
            taken.append(index[real])
        if not rows:
            return self.head_weight.new_zeros(0, self.config.hidden_size)
        return torch.cat(rows)[torch.cat(taken).argsort()]

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings (T, D) of tokens (T,)."""
        embeddings: Tensor = self.lm.get_input_embeddings()(tokens)
        return embeddings

    def _hidden(self, **inputs: Tensor) -> Tensor:
        return self.lm.base_model(**inputs, use_cache=False).last_hidden_state

    def _check_head(self) -> None:
        """Refuse a model whose logits are not hidden @ head_weight.T + head_bias: scaled, capped or of
        another module.
        """
        tokens = torch.arange(min(8, self.config.vocab_size), device=self.device)[None]
        with torch.no_grad():
            theirs = self.lm(input_ids=tokens, use_cache=False).logits.float()
            ours = nn.functional.linear(
                self._hidden(input_ids=tokens), self.head_weight, self.head_bias
            ).float()
        tolerance = (1e-4 if self.dtype in (torch.float32, torch.float64) else 3e-2) * float(
            theirs.abs().max()
        )
        if not torch.allclose(ours, theirs, rtol=0, atol=tolerance):
            raise UserError(
                f"{self.config.architecture}: its logits are not a plain product of hidden states "
                "and a head, which every loss here needs"
            )

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        return self.lm.get_output_embeddings().weight

    @property
    def head_bias(self) -> Tensor | None:
        """(V,), or None."""
        return self.lm.get_output_embeddings().bias

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' and the computation's dtype."""
        return self.head_weight.dtype

    @property
    def gradient_checkpointing(self) -> bool:
        """False: only the decoder recomputes its layers."""
        return False

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        if on:
            raise UserError(
                f"--gradient-checkpointing: {self.config.architecture} runs through transformers "
                "without it; lower --micro-tokens"
            )

    def train(self, mode: bool = True) -> Adapter:
        """Sets `training` for those who ask, and leaves the model itself in evaluation mode."""
        super().train(mode)
        self.lm.eval()
        return self

    # --- making, loading, saving ---
    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> Adapter:
        """Random weights as transformers draws them, from `seed` or from torch's global generator."""
        settings = dict(config)
        try:
            typed = AutoConfig.for_model(settings.pop("model_type", ""), **settings)
            with torch.random.fork_rng(devices=[], enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                lm = AutoModelForCausalLM.from_config(typed, dtype=torch.float32)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"config.json: {architecture(config)} is no causal language model that transformers "
                f"can make: {error}"
            ) from error
        return cls(lm.to(device=device, dtype=dtype))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Adapter:
        """The model of a Hugging Face folder, read by transformers.  Raises UserError for weights that are
        missing or do not fit.
        """
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: transformers cannot load it: {error}") from error
        lm, info = loaded
        wrong = [
            f"{kind.removesuffix('_keys')} {name}"
            for kind in ("missing_keys", "mismatched_keys")
            for name in info.get(kind, ())
        ]
        if wrong:
            raise UserError(
                f"{folder}: tensors do not fit config.json: {'; '.join(sorted(map(str, wrong))[:5])}"
            )
        return cls(lm.to(device))

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, *, max_shard_bytes: int = 5 << 30
    ) -> None:
        """Write the folder with transformers' own save_pretrained, in `dtype` or the model's own."""
        lm = self.lm if dtype in (None, self.dtype) else copy.deepcopy(self.lm).to(dtype)
        lm.save_pretrained(folder, max_shard_size=max_shard_bytes)
