"""Any other causal language model of transformers, behind the decoder's interface; and `load_model`, which
chooses between the two.

Sequences are unpacked into padded batches for the model's own forward, so it is slower than the decoder.  It
has no cache here: the sampler runs the whole sequence again for every token.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastrl.errors import UserError
from fastrl.model.config import Settings, architecture, as_token_ids, unsupported
from fastrl.model.decoder import Decoder
from fastrl.model.language import Attend
from fastrl.model.weights import read_config, read_json

PADDED_TOKENS = 1 << 14  # of one forward pass
Source = str | Path | Settings  # a folder, a file, or a parsed config.json
UNBOUNDED = 2**31 - 1  # the context where a config names none


def load_model(
    source: Source,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int | None = None,
) -> Decoder | Adapter:
    """The model of a Hugging Face folder, or one with random weights from a config.json, a YAML of one, or a
    dict.

    Llama, Qwen2 and Qwen3 become a `Decoder`; every other causal language model, and settings that the
    decoder lacks, an `Adapter`, with a warning that says why.  `seed` fixes the random weights.
    Raises:  UserError for a path that does not exist, a config that no model fits, or weights that do not fit
             the config.
    """
    folder = Path(source) if not isinstance(source, Mapping) and Path(source).is_dir() else None
    if isinstance(source, Mapping):
        config = source
    else:
        config = read_config(folder) if folder else _read_file(Path(source))

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


def _read_file(path: Path) -> Settings:
    """The config.json, or the YAML of one, at this path."""
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
    """The model's shape, and its end-of-sequence tokens: a `LanguageConfig`."""

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
        self.config = self._shape()
        self._takes_positions = "position_ids" in inspect.signature(lm.base_model.forward).parameters
        self._check_head()

    def _shape(self) -> AdapterConfig:
        config = self.lm.config.get_text_config()
        generation = getattr(self.lm, "generation_config", None)
        eos = getattr(generation, "eos_token_id", None) or config.eos_token_id
        context = getattr(config, "max_position_embeddings", None) or UNBOUNDED
        vocab_size, hidden_size = self.head_weight.shape
        return AdapterConfig(
            architecture=type(self.lm).__name__,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            max_position_embeddings=context,
            tie_word_embeddings=self.head_weight is self.lm.get_input_embeddings().weight,
            eos_token_id=as_token_ids(eos),
        )

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        attend: Attend | None = None,
        embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states that head_weight turns into logits, (T, D); arguments as `Decoder.forward`, except
        that `attend` is refused.

        Memory:  a padded batch of up to 16384 tokens at a time.  Reads cu_seqlens on the host.
        """
        if attend is not None:
            raise ValueError(
                f"attend: {self.config.architecture} runs through transformers, "
                "which has no such hook; pass None"
            )
        if positions is not None and not self._takes_positions:
            raise ValueError(f"positions: {self.config.architecture} computes its own; pass None")
        if cu_seqlens is None:
            cu_seqlens = tokens.new_zeros(2)
            cu_seqlens[1:] = tokens.shape[0]
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()

        hidden, taken = [], []
        for members in self._batches(lengths):
            index, real = _padded(starts[members], lengths[members])
            inputs = {"input_ids": tokens[index]}
            if embeds is not None:
                inputs = {"inputs_embeds": embeds[index].to(self.dtype)}
            if positions is not None:
                inputs["position_ids"] = positions[index]
            hidden.append(self._hidden(attention_mask=real.long(), **inputs)[real])
            taken.append(index[real])

        if not hidden:
            return self.head_weight.new_zeros(0, self.config.hidden_size)
        return torch.cat(hidden)[torch.cat(taken).argsort()]

    def _batches(self, lengths: Tensor) -> Iterator[Tensor]:
        """Sequences to forward together, longest first; a batch is as wide as its longest sequence."""
        context = self.config.max_position_embeddings
        order = [i for i in lengths.argsort(stable=True).tolist() if lengths[i] > 0]
        if order and int(lengths.max()) > context:
            raise ValueError(f"cu_seqlens: expected at most {context} tokens each, got {int(lengths.max())}")
        while order:
            n = max(1, PADDED_TOKENS // int(lengths[order[-1]]))
            yield torch.tensor(order[-n:], device=lengths.device)
            order = order[:-n]

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings (T, D) of tokens (T,)."""
        embeddings: Tensor = self.lm.get_input_embeddings()(tokens)
        return embeddings

    def _hidden(self, **inputs: Tensor) -> Tensor:
        return self.lm.base_model(**inputs, use_cache=False).last_hidden_state

    def _check_head(self) -> None:
        """Refuse a model with logits other than hidden @ head_weight.T + head_bias: scaled, capped or of
        another module.
        """
        tokens = torch.arange(min(8, self.config.vocab_size), device=self.device)[None]
        with torch.no_grad():
            theirs = self.lm(input_ids=tokens, use_cache=False).logits.float()
            hidden = self._hidden(input_ids=tokens)
            ours = nn.functional.linear(hidden, self.head_weight, self.head_bias).float()
        relative = 1e-4 if self.dtype in (torch.float32, torch.float64) else 3e-2
        if not torch.allclose(ours, theirs, rtol=0, atol=relative * float(theirs.abs().max())):
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
        """Set `training`, and leave the model itself in evaluation mode."""
        super().train(mode)
        self.lm.eval()
        return self

    # --- making, loading, saving ---
    @classmethod
    def from_config(
        cls,
        config: Settings,
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
        """The model of a Hugging Face folder, read by transformers.

        Raises:  UserError for weights that are missing or do not fit.
        """
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: transformers cannot load it: {error}") from error

        lm, info = loaded
        wrong = []
        for kind in ("missing_keys", "mismatched_keys"):
            wrong += [f"{kind.removesuffix('_keys')} {name}" for name in info.get(kind, ())]
        if wrong:
            raise UserError(f"{folder}: tensors do not fit config.json: {'; '.join(sorted(wrong)[:5])}")
        return cls(lm.to(device))

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, *, max_shard_bytes: int = 5 << 30
    ) -> None:
        """Write the folder with transformers' own save_pretrained, in `dtype` or the model's own."""
        lm = self.lm if dtype in (None, self.dtype) else copy.deepcopy(self.lm).to(dtype)
        lm.save_pretrained(folder, max_shard_size=max_shard_bytes)


def _padded(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Index (B, L) into the packed tokens of these sequences, which repeats their last token as padding; and
    where it is real, bool.
    """
    last = lengths[:, None] - 1
    position = torch.arange(int(lengths.max()), device=starts.device)
    return starts[:, None] + torch.minimum(position, last), position <= last
