"""As much of vLLM 0.33.0 as the adapter uses, written from its documented names, arguments and results: no
model, a protocol.

Arguments that vLLM does not have are TypeErrors here, and steps in an order that vLLM refuses are errors.
What it is asked to generate, a test's `answer(engine, prompt token ids, SamplingParams)` decides.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

ENGINE_ARGS = {  # of vllm.EngineArgs, which takes LLM's further keywords
    "load_format",
    "max_model_len",
    "enable_prefix_caching",
    "logprobs_mode",
    "max_logprobs",
    "weight_transfer_config",
    "generation_config",
    "enable_sleep_mode",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "disable_log_stats",
}


# --- what goes in and out -------------------------------------------------------------------------------
@dataclass
class SamplingParams:
    """vllm.SamplingParams: the fields a user may give."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: None
    outputs: list[CompletionOutput]
    finished: bool


@dataclass
class WeightTransferConfig:
    backend: str = "nccl"


# --- the engine -----------------------------------------------------------------------------------------
class LLM:
    """vllm.LLM."""

    answer: ClassVar[Callable[..., CompletionOutput]]
    made: ClassVar[list[LLM]]
    resets: ClassVar[bool] = True  # whether the prefix cache can be reset

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        skip_tokenizer_init: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        kv_cache_memory_bytes: int | None = None,
        **kwargs: Any,
    ) -> None:
        if unknown := kwargs.keys() - ENGINE_ARGS:
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument {min(unknown)!r}")
        self.options = {
            "dtype": dtype,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "skip_tokenizer_init": skip_tokenizer_init,
            **kwargs,
        }
        self.config = (Path(model) / "config.json").read_text()
        self.weights: dict[str, Tensor] = {}
        self.calls: list[str] = []
        self.requests: list[tuple[list[int], SamplingParams]] = []
        self.updating = self.stale = False
        LLM.made.append(self)

    def generate(
        self,
        prompts: list[Any],
        sampling_params: Any = None,
        *,
        use_tqdm: Any = True,
        lora_request: Any = None,
        priority: Any = None,
        tokenization_kwargs: Any = None,
        mm_processor_kwargs: Any = None,
    ) -> list[RequestOutput]:
        self.calls.append("generate")
        assert self.weights and not self.updating, (
            "generated with dummy weights, or in the middle of an update"
        )
        assert not self.stale, "the prefix cache holds keys and values of older weights"
        out = []
        for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            assert prompt.keys() == {"prompt_token_ids"}, "without a tokenizer, vLLM takes token ids"
            self.requests.append((prompt["prompt_token_ids"], params))
            answer = LLM.answer(self, prompt["prompt_token_ids"], params)
            out.append(RequestOutput(str(i), None, prompt["prompt_token_ids"], None, [answer], True))
        return out

    def init_weight_transfer_engine(self, request: Any) -> None:
        assert (
            request == {"init_info": {"packed": True}}
            and self.options["weight_transfer_config"].backend == "ipc"
        )
        self.calls.append("init_weight_transfer_engine")

    def start_weight_update(self) -> None:
        if self.updating or "init_weight_transfer_engine" not in self.calls:
            raise RuntimeError(
                "start_weight_update called while a weight update is already active, or without an engine"
            )
        self.updating, self.stale = True, True
        self.calls.append("start_weight_update")

    def update_weights(self, request: dict[str, Any]) -> None:
        if not self.updating:
            raise RuntimeError("start_weight_update must be called before update_weights.")
        info = request["update_info"]
        assert info.keys() == {"names", "dtype_names", "shapes", "ipc_handles", "tensor_sizes"}
        for name, dtype, shape, tensor in zip(
            info["names"], info["dtype_names"], info["shapes"], info["ipc_handles"], strict=True
        ):
            assert (str(tensor.dtype), list(tensor.shape)) == (f"torch.{dtype}", shape)
            self.weights[name] = tensor
        self.calls.append("update_weights")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if not self.updating:
            raise RuntimeError("finish_weight_update called without a matching start_weight_update.")
        self.updating = False
        self.calls.append("finish_weight_update")

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.calls.append("reset_prefix_cache")
        self.stale = self.stale and not LLM.resets
        return LLM.resets


# --- the trainer's side ---------------------------------------------------------------------------------
class ParamMeta:
    def __init__(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.key = (name, dtype, tuple(shape))


class WeightSource:
    """Sources derive from it: `metadata`, and `iter_full()` in that order."""

    metadata: list[ParamMeta]

    def iter_full(self) -> Iterator[tuple[str, Tensor]]:
        raise NotImplementedError


@dataclass
class IPCTrainerInitInfo:
    backend: ClassVar[str] = "ipc"
    packed: bool = False
    packed_buffer_size_bytes: int = 1 << 30
    _: KW_ONLY
    rank: int


@dataclass
class Update:
    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    # the tensors themselves: there is one process here
    ipc_handles: list[Tensor] = field(default_factory=list)
    tensor_sizes: list[int] = field(default_factory=list)


class TrainerEngine:
    """What trainer_init returns: it drives the four steps through the client, a few tensors at a time."""

    def __init__(self, client: Any, source: WeightSource) -> None:
        self.client, self.source = client, source

    def send_weights(self) -> None:
        self.client.start_weight_update()
        sent, items = [], list(self.source.iter_full())
        for first in range(0, len(items), 5):
            update = Update()
            for name, tensor in items[first : first + 5]:
                sent.append((name, tensor.dtype, tuple(tensor.shape)))
                update.names.append(name)
                update.dtype_names.append(str(tensor.dtype).removeprefix("torch."))
                update.shapes.append(list(tensor.shape))
                update.ipc_handles.append(tensor.clone())
                update.tensor_sizes.append(tensor.nbytes)
            self.client.update_weights(asdict(update))
        assert sent == [meta.key for meta in self.source.metadata], "what is sent is what was declared"
        self.client.finish_weight_update()


class WeightTransferTrainerFactory:
    @classmethod
    def trainer_init(cls, init_info: IPCTrainerInitInfo, *, client: Any, source: Any = None) -> TrainerEngine:
        assert isinstance(source, WeightSource) and init_info.rank == 0
        client.init_weight_transfer_engine({"packed": init_info.packed})
        return TrainerEngine(client, source)


MODULES = {
    "vllm": (LLM, SamplingParams),
    "vllm.config": (WeightTransferConfig,),
    "vllm.distributed": (),
    "vllm.distributed.weight_transfer": (ParamMeta, WeightSource, WeightTransferTrainerFactory),
    "vllm.distributed.weight_transfer.ipc_engine": (IPCTrainerInitInfo,),
}


def install(
    monkeypatch: Any, answer: Callable[[LLM, list[int], SamplingParams], CompletionOutput]
) -> list[LLM]:
    """Put it where `import vllm` finds it; the engines that are started from now on."""
    for name, members in MODULES.items():
        module = ModuleType(name)
        module.__dict__.update({member.__name__: member for member in members})
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(LLM, "answer", staticmethod(answer), raising=False)
    monkeypatch.setattr(LLM, "made", [], raising=False)
    return LLM.made
