"""Any other causal language model of transformers, behind the decoder's interface; and `load_model`, which
chooses between the two.

Sequences are unpacked into padded batches for the model's own forward, so it is slower than the decoder.  It
has no cache here: the sampler runs the whole sequence again for every token.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from fastrl.errors import UserError, notice
from fastrl.files import hub_advice
from fastrl.model.carried import OF_MODEL, Files, read_carried, write_carried
from fastrl.model.config import FAMILIES, Settings, architecture, as_token_ids, unsupported
from fastrl.model.decoder import Decoder
from fastrl.model.fields import refuse
from fastrl.model.folder import model_folder
from fastrl.model.head import check_language_model
from fastrl.model.language import Attend
from fastrl.model.weights import check_dtypes, read_config, read_json

PADDED_TOKENS = 1 << 14  # of one forward pass
Source = str | Path | Settings  # a folder, a file, or a parsed config.json
FAST = ", ".join(FAMILIES)
UNBOUNDED = 2**31 - 1  # the context where a config names none
# what transformers raises for a config or weights that it cannot make a model of
ERRORS = (
    StrictDataclassError,
    AssertionError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    RuntimeError,
    ImportError,
    ZeroDivisionError,
    NotImplementedError,
    SafetensorError,
)


def load_model(
    source: Source,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int | None = None,
    *,
    trust: bool = False,
) -> Decoder | Adapter:
    """The model of a Hugging Face folder, or one with random weights from a config.json, a YAML of one, or a
    dict.

    Llama, Qwen2 and Qwen3 become a `Decoder`; every other causal language model, and settings that the
    decoder lacks, an `Adapter`, with a line that says why.  `seed` fixes the random weights.  `trust` runs
    code that the folder brings (config.json's auto_map); without it, none is run and nothing is asked.
    Raises:  UserError for a path that does not exist, a config that no model fits, quantised weights, weights
             that do not fit the config, and a model of code that is not trusted.
    """
    path = None if isinstance(source, Mapping) else model_folder(source)
    folder = path if path is not None and path.is_dir() else None
    if isinstance(source, Mapping):
        config = source
    else:
        config = read_config(folder) if folder else _read_file(Path(source))

    refuse(config)
    own_code = folder is not None and _runs_own_code(config, trust)
    reason = "" if own_code else unsupported(config)
    if reason or own_code:
        name = architecture(config)
        why = f"which does not take {reason}" if name in FAMILIES else f"which is for {FAST}"
        if own_code:
            why = "because its code is the folder's own"
        notice(f"{name} runs through transformers, several times slower than the fast decoder, {why}")
        if folder is not None:
            return Adapter.from_pretrained(folder, dtype, device, trust=own_code)
        return Adapter.from_config(config, dtype=dtype, device=device, seed=seed)
    if folder is not None:
        return Decoder.from_pretrained(folder, dtype, device)
    return Decoder.from_config(config, dtype=dtype, device=device, seed=seed)


def _runs_own_code(config: Settings, trust: bool) -> bool:
    """Whether the folder's own code makes the model.

    Raises:  UserError where only that could make it, and it is not trusted.
    """
    code = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    if not code or trust:
        return bool(code)
    if config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"config.json: auto_map: the model is made by code of its own ({code}), which is not run without "
            "--trust-remote-code; read the code first"
        )
    notice(
        f"config.json: auto_map: the folder's own code ({code}) is not run, but transformers' "
        f"{architecture(config)}; --trust-remote-code runs it"
    )
    return False


def _read_file(path: Path) -> Settings:
    """The config.json, or the YAML of one, at this path."""
    path = path.expanduser()
    if not path.is_file():
        raise UserError(
            "model: expected a Hugging Face folder, a config.json or a .yaml file, "
            f"got {str(path)!r}, which is not there{hub_advice(str(path), '--model')}"
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
        self.carried: Files = {}
        try:
            self.config = self._shape()
            self._takes_positions = "position_ids" in inspect.signature(lm.base_model.forward).parameters
            check_language_model(self.lm, self._hidden)
        except UserError:
            raise
        except ERRORS as error:
            raise UserError(
                f"{type(lm).__name__}: transformers cannot run it as config.json describes it: {_line(error)}"
            ) from error

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
        return self.lm.base_model(**inputs, use_cache=False, return_dict=True).last_hidden_state

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
        settings = copy.deepcopy(dict(config))  # transformers writes into nested mappings
        try:
            typed = AutoConfig.for_model(settings.pop("model_type", ""), **settings)
            with torch.random.fork_rng(devices=[], enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                lm = AutoModelForCausalLM.from_config(typed, dtype=torch.float32, trust_remote_code=False)
        except ERRORS as error:
            raise UserError(
                f"config.json: {architecture(config)} is no causal language model that transformers "
                f"can make: {_line(error)}"
            ) from error
        return cls(lm.to(device=device, dtype=dtype))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        trust: bool = False,
    ) -> Adapter:
        """The model of a Hugging Face folder, read by transformers; with `trust`, by the folder's own code.

        Raises:  UserError for weights that are missing or do not fit.
        """
        check_dtypes(Path(folder))
        try:
            with _without_bars():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=dtype,
                    local_files_only=True,
                    output_loading_info=True,
                    trust_remote_code=trust,
                )
        except ERRORS as error:
            raise UserError(f"{folder}: transformers cannot load it: {_line(error)}") from error

        lm, info = loaded
        wrong = []
        for kind in ("missing_keys", "mismatched_keys"):
            wrong += [f"{kind.removesuffix('_keys')} {name}" for name in info.get(kind, ())]
        if wrong:
            raise UserError(f"{folder}: tensors do not fit config.json: {'; '.join(sorted(wrong)[:5])}")
        model = cls(lm.to(device))
        model.carried = read_carried(Path(folder), OF_MODEL)
        return model

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, *, max_shard_bytes: int = 5 << 30
    ) -> None:
        """Write the folder with transformers' own save_pretrained, in `dtype` or the model's own."""
        self.end_with(self.config.eos_token_id)  # config.json says the same as generation_config.json
        lm = self.lm if dtype in (None, self.dtype) else copy.deepcopy(self.lm).to(dtype)
        with _without_bars():
            lm.save_pretrained(folder, max_shard_size=max_shard_bytes)
        write_carried(Path(folder), self.carried)

    def end_with(self, tokens: tuple[int, ...]) -> None:
        """Make these the end-of-sequence tokens, of sampling and of what is saved."""
        saved = tokens[0] if len(tokens) == 1 else list(tokens) or None
        self.lm.config.get_text_config().eos_token_id = saved
        if getattr(self.lm, "generation_config", None) is not None:
            self.lm.generation_config.eos_token_id = saved
        self.config = replace(self.config, eos_token_id=tokens)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Without transformers' progress bars, which would end up inside our own lines."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _line(error: Exception) -> str:
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _padded(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Index (B, L) into the packed tokens of these sequences, which repeats their last token as padding; and
    where it is real, bool.
    """
    last = lengths[:, None] - 1
    position = torch.arange(int(lengths.max()), device=starts.device)
    return starts[:, None] + torch.minimum(position, last), position <= last
