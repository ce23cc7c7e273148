"""The installed vLLM: its names, what is asked of its engine, and how it reads the model's weights."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Protocol

from torch import Tensor

from fastrl.errors import UserError
from fastrl.model.decoder import Decoder

CHECKED = "0.33.0"  # the version with the sources that this was written against
_TRANSFER = "vllm.distributed.weight_transfer"
NAMES = {  # what is used of vLLM -> its module
    "LLM": "vllm",
    "SamplingParams": "vllm",
    "WeightTransferConfig": "vllm.config",
    "ParamMeta": _TRANSFER,
    "WeightSource": _TRANSFER,
    "WeightTransferTrainerFactory": _TRANSFER,
    "IPCTrainerInitInfo": f"{_TRANSFER}.ipc_engine",
}
ENVIRONMENT = {  # CUDA IPC needs two processes, and its handles are pickled between them
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


# --- what is asked of vLLM --------------------------------------------------------------------------
class Logprob(Protocol):
    """vLLM's log-prob of one token."""

    logprob: float


class CompletionOutput(Protocol):
    """vLLM's completion of a prompt."""

    token_ids: Sequence[int]
    logprobs: Sequence[Mapping[int, Logprob]]
    finish_reason: str | None


class RequestOutput(Protocol):
    """vLLM's answer to a request."""

    request_id: str
    outputs: Sequence[CompletionOutput]


class LLM(Protocol):
    """vLLM's engine."""

    def generate(
        self, prompts: Sequence[Mapping[str, list[int]]], sampling_params: Sequence[object], use_tqdm: bool
    ) -> Sequence[RequestOutput]:
        """One answer per prompt."""

    def init_weight_transfer_engine(self, request: Mapping[str, object]) -> None:
        """Agree on how weights arrive."""

    def start_weight_update(self) -> None:
        """Make ready for new weights."""

    def update_weights(self, request: Mapping[str, object]) -> None:
        """Take some of the weights."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """All weights have arrived."""

    def reset_prefix_cache(self) -> bool:
        """Drop all keys and values; whether that was done."""


class WeightTransfer(Protocol):
    """vLLM's trainer side of the weight transfer."""

    def send_weights(self) -> None:
        """Send all weights as they are now."""


# --- weights ----------------------------------------------------------------------------------------
class Client:
    """The four steps of vLLM's weight update, as its trainer side calls them, on an engine started from this
    process.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: Mapping[str, object]) -> None:
        """Agree on how weights arrive; called once."""
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Make ready for the weights of a new version."""
        self.llm.start_weight_update()

    def update_weights(self, update_info: object) -> None:
        """Hand some of them over; called until all are."""
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """All have arrived."""
        self.llm.finish_weight_update(weight_version)


def tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """The weights under Hugging Face's names: fused ones as views of their rows, without a tied head."""
    parameters = dict(model.named_parameters())
    for name, parts in model.layout().items():
        blocks = parameters[name].detach().split(list(parts.values()))
        yield from zip(parts, blocks, strict=True)


def weight_source(vllm: SimpleNamespace, model: Decoder) -> object:
    """The model as vLLM's trainer side reads it: the weights as they are at each reading."""
    base: Any = vllm.WeightSource

    class Source(base):  # vLLM may not be installed, so its class is known only here
        @cached_property
        def metadata(self) -> list[object]:
            return [vllm.ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in tensors(model)]

        def iter_full(self) -> Iterator[tuple[str, Tensor]]:
            return tensors(model)

    return Source()


# --- the module --------------------------------------------------------------------------------------
def import_vllm() -> SimpleNamespace:
    """The names of NAMES, imported after ENVIRONMENT is set."""
    for name, value in ENVIRONMENT.items():
        if os.environ.setdefault(name, value) != value:
            raise UserError(
                f"--sampler vllm: expected {name}={value}, to hand weights over; "
                f"got {os.environ[name]!r}; unset it"
            )
    try:
        importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        raise UserError(
            f"--sampler vllm: vLLM is not installed ({error}): "
            "pip install vllm (it brings a torch of its own version), "
            "or use --sampler fastrl, which needs nothing more"
        ) from error
    names = {}
    for name, module in NAMES.items():
        try:
            names[name] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"--sampler vllm: this vLLM has no {module}.{name}; "
                f"expected {CHECKED} or one like it ({error})"
            ) from error
    return SimpleNamespace(**names)
