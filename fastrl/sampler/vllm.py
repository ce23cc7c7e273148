"""vLLM as the rollout engine, behind the interface of `fastrl.sampler.Sampler`, for those who have it:
--sampler vllm.

Untested on a GPU: vLLM has not been run with it.  Names, arguments and answers are those of the sources of
vLLM 0.33.0, and the tests play them from a transcript.

vLLM works in a process of its own, on a second copy of the weights: what was trained since the last call is
pushed before the next, by vLLM's own weight transfer over CUDA IPC.  It differs from the engine in this
process in what it can give:

    logp, behaviour_logp   its log-prob of each token "after all processors": at the sampling temperature over
                           the full vocabulary while no filter is on, so filters are refused; both fields hold
                           it
    entropy                NaN where a completion token lies, because vLLM returns none
    the same seed          gives the same samples in another batch only as far as vLLM's kernels round alike,
                           and never those of fastrl's own engine
"""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastrl.batch.types import Rollouts
from fastrl.config import Sampling
from fastrl.errors import UserError
from fastrl.model.decoder import Decoder
from fastrl.model.weights import write_config
from fastrl.sampler.params import SamplingParams
from fastrl.sampler.prompts import Prompt, check_room, stop_tokens, tokenize

CHECKED = "0.33.0"  # the version whose sources this was written against
_TRANSFER = "vllm.distributed.weight_transfer"
NAMES = {  # what is used of vLLM, and where it is
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
# device of the trained model -> vLLM's backend for weights that come from the same device
BACKENDS = {"cuda": "ipc"}
# vLLM's finish reasons -> ours; what is not here is no completion
FINISHED = {
    "stop": "stop",
    "length": "length",
}
COLDEST = 0.01  # vLLM raises a lower temperature to this
SPARE = 256  # tokens of cache beyond the budget, for the pages that vLLM itself keeps


class VllmSampler:
    """Generates with vLLM and `model`'s weights, which are pushed to it when `weight_version` is another than
    at the last push.

    max_tokens_in_flight   vLLM's key/value cache, tokens, all of it allocated by the first `generate`

    Memory:  that cache and a second copy of the weights, on the model's GPU.
    Raises:  UserError where vLLM is not installed or too old, or the model is not a Decoder on the first
             visible GPU.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, max_tokens_in_flight: int = 262144) -> None:
        self.model, self.tokenizer, self.max_tokens_in_flight = model, tokenizer, max_tokens_in_flight
        self._vllm: Any = _import()
        _check_model(model)
        self._pushed: int | None = None  # the weight version that vLLM has

    @classmethod
    def configured(cls, model: Any, tokenizer: Any, sampling: Sampling) -> VllmSampler:
        """A sampler with the budget of --sampling.max-tokens-in-flight; the other options of the own cache
        are refused.
        """
        for name, given, default in (
            ("cache-bytes", sampling.cache_bytes, 0),
            ("keep-cache", sampling.keep_cache, True),
            ("max-rows", sampling.max_rows, None),
        ):
            if given != default:
                raise UserError(
                    f"--sampling.{name}: expected {default} with --sampler vllm, got {given}; "
                    "use --sampler fastrl"
                )
        return cls(model, tokenizer, max_tokens_in_flight=sampling.max_tokens_in_flight)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        sequence_offset: int = 0,
        weight_version: int = 0,
        on_tokens: Callable[[int], None] | None = None,
        **engine_only: Any,
    ) -> Rollouts:
        """`params.n` completions of every prompt; sequence i answers prompt i // n.

        Arguments as `Sampler.generate`'s; `on_tokens` is told once, at the end.  Other keywords are of
        fastrl's own engine, and refused.  Raises UserError for a prompt that is empty, foreign to the
        vocabulary or too long, and for filters.
        """
        _check_asked(params, engine_only)
        config = self.model.config
        encoded = tokenize(prompts, self.tokenizer, config.vocab_size)
        limit = config.max_position_embeddings
        for i, p in enumerate(encoded):
            check_room(len(p), f"prompts[{i}]", limit)
            need, budget = min(len(p) + params.max_new_tokens, limit), self.max_tokens_in_flight
            if need > budget:
                raise UserError(
                    f"max_tokens_in_flight: prompts[{i}] may need {need} tokens of cache, "
                    f"above the budget of {budget}"
                )
        stops = stop_tokens(params.stop, self.tokenizer, config.eos_token_id)
        rows = [p for p in encoded for _ in range(params.n)]
        asked = [
            self._params(params, stops, sequence_offset + i, limit - len(row)) for i, row in enumerate(rows)
        ]
        done = self._ask(rows, asked, weight_version) if rows else []
        if on_tokens is not None:
            on_tokens(sum(len(tokens) for tokens, _, _ in done))
        index = [i for i in range(len(encoded)) for _ in range(params.n)]
        return _rollouts(
            rows, index, done, weight_version, sequence_offset, self.tokenizer, self.model.device
        )

    def _params(self, params: SamplingParams, stops: list[int], sequence: int, room: int) -> Any:
        """vLLM's parameters for one sequence."""
        return self._vllm.SamplingParams(
            n=1,
            max_tokens=min(params.max_new_tokens, room),
            temperature=params.temperature,
            seed=seed_of(params.seed, sequence),
            stop_token_ids=stops,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
        )

    def _ask(
        self, rows: list[list[int]], asked: list[Any], version: int
    ) -> list[tuple[list[int], list[float], str]]:
        if version != self._pushed:
            self._push()
            self._pushed = version
        outputs = self._llm.generate([{"prompt_token_ids": row} for row in rows], asked, use_tqdm=False)
        return [_completion(output) for output in outputs]

    def _push(self) -> None:
        """The weights as they are now, and none of the keys and values that older ones left."""
        self._trainer.send_weights()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not reset its prefix cache: "
                "the next completions would mix keys and values of two versions"
            )

    @cached_property
    def _llm(self) -> Any:
        """vLLM's engine for the model's shape, its weights not yet the model's."""
        c, dtype = self.model.config, self.model.dtype
        per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize
        with tempfile.TemporaryDirectory(prefix="fastrl-vllm-") as folder:
            write_config(Path(folder), c.to_dict(), c.eos_token_id, dtype)
            return self._vllm.LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=min(c.max_position_embeddings, self.max_tokens_in_flight),
                kv_cache_memory_bytes=per_token * (self.max_tokens_in_flight + SPARE),
                # of no effect beside the line above, but vLLM checks that so much is free
                gpu_memory_utilization=0.01,
                # the samples of a prompt are requests of their own, for their seeds
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",
                weight_transfer_config=self._vllm.WeightTransferConfig(
                    backend=BACKENDS[self.model.device.type]
                ),
            )

    @cached_property
    def _trainer(self) -> Any:
        """vLLM's own trainer side of the transfer."""
        v = self._vllm
        return v.WeightTransferTrainerFactory.trainer_init(
            v.IPCTrainerInitInfo(rank=0, packed=True), client=Client(self._llm), source=source(v, self.model)
        )


class Client:
    """The four steps of vLLM's weight update, as its trainer side calls them, on an engine started from this
    process.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Once: agree on how the weights will come."""
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Make ready for the weights of a new version."""
        self.llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        """Some of them; called until there are no more."""
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """All have come."""
        self.llm.finish_weight_update(weight_version)


def tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """The weights under Hugging Face's names, those of fused parameters as views of their rows; a tied head
    is left out.
    """
    parameters = dict(model.named_parameters())
    for name, parts in model.layout().items():
        yield from zip(parts, parameters[name].detach().split(list(parts.values())), strict=True)


def source(vllm: Any, model: Decoder) -> Any:
    """The model as vLLM's trainer side reads it: each time it is asked for, the weights of that moment."""

    class Source(vllm.WeightSource):
        @cached_property
        def metadata(self) -> list[Any]:
            return [vllm.ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in tensors(model)]

        def iter_full(self) -> Iterator[tuple[str, Tensor]]:
            return tensors(model)

    return Source()


def seed_of(seed: int, sequence: int) -> int:
    """vLLM's seed for a sequence: 63 bits, a function of the run's seed and the sequence's number alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {sequence}".encode(), digest_size=8).digest(), "big") >> 1


def _completion(output: Any) -> tuple[list[int], list[float], str]:
    """Tokens, log-probs and finish reason of a request's one completion."""
    (completion,) = output.outputs
    if completion.finish_reason not in FINISHED:
        raise RuntimeError(
            f"vLLM ended request {output.request_id} with {completion.finish_reason!r}, not with a completion"
        )
    tokens = list(completion.token_ids)
    logp = [at[token].logprob for token, at in zip(tokens, completion.logprobs, strict=True)]
    return tokens, logp, FINISHED[completion.finish_reason]


def _rollouts(
    rows: list[list[int]],
    index: list[int],
    done: list[tuple[list[int], list[float], str]],
    version: int,
    first: int,
    tokenizer: Any,
    device: torch.device,
) -> Rollouts:
    """Prompts and completions end to end."""

    def spread(values: list[list[Any]], empty: Any, dtype: torch.dtype) -> Tensor:
        flat = [x for row, mine in zip(rows, values, strict=True) for x in [*[empty] * len(row), *mine]]
        return torch.tensor(flat, dtype=dtype, device=device)

    tokens = [t for t, _, _ in done]
    flat = [t for row, mine in zip(rows, tokens, strict=True) for t in [*row, *mine]]
    ends = torch.tensor([0, *(len(row) + len(mine) for row, mine in zip(rows, tokens, strict=True))]).cumsum(
        0
    )
    logp = spread([p for _, p, _ in done], 0.0, torch.float32)
    return Rollouts(
        tokens=torch.tensor(flat, dtype=torch.int64, device=device),
        cu_seqlens=ends.to(device, torch.int32),
        completion_mask=spread([[True] * len(t) for t in tokens], False, torch.bool),
        prompt_index=torch.tensor(index, dtype=torch.int64, device=device),
        prompt_lengths=torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device),
        logp=logp,
        behaviour_logp=logp.clone(),
        entropy=spread([[torch.nan] * len(t) for t in tokens], 0.0, torch.float32),
        weight_version=spread([[version] * len(t) for t in tokens], -1, torch.int64),
        finish_reason=[reason for _, _, reason in done],
        sequence=torch.arange(first, first + len(rows), device=device),
        text=None
        if tokenizer is None
        else tokenizer.batch_decode(tokens, skip_special_tokens=True)
        if tokens
        else [],
    )


# --- what it cannot do ------------------------------------------------------------------------------
def _check_asked(params: SamplingParams, engine_only: Mapping[str, Any]) -> None:
    if asked := [name for name, value in engine_only.items() if value is not None]:
        raise UserError(f"{', '.join(asked)}: only fastrl's own engine has this; use --sampler fastrl")
    filters = {"top_k": (params.top_k, 0), "top_p": (params.top_p, 1.0), "min_p": (params.min_p, 0.0)}
    for name, (value, off) in filters.items():
        if value != off:
            why = "vLLM's log-probs are then those of the tokens that pass, not the policy's"
            raise UserError(
                f"{name}: expected {off} with --sampler vllm, got {value}; {why}: turn it off, "
                "or use --sampler fastrl"
            )
    if 0 < params.temperature < COLDEST:
        raise UserError(
            f"temperature: expected 0 or at least {COLDEST} with --sampler vllm, "
            f"which raises lower ones; got {params.temperature}"
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, Decoder):
        raise UserError(
            f"--sampler vllm: expected a Llama, Qwen2 or Qwen3, got {model.config.architecture}; "
            "use --sampler fastrl"
        )
    if model.device.type not in BACKENDS or model.device.index not in (None, 0):
        mend = "choose a GPU with CUDA_VISIBLE_DEVICES, or use --sampler fastrl"
        raise UserError(
            "--sampler vllm: expected the model on the first visible GPU, where vLLM starts; "
            f"got {model.device}; {mend}"
        )
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise UserError(
            "--sampler vllm: expected one process, got several; run without torchrun, or use --sampler fastrl"
        )


def _import() -> SimpleNamespace:
    """The names that are used of vLLM, imported once its environment is set."""
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
    found = {}
    for name, module in NAMES.items():
        try:
            found[name] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"--sampler vllm: this vLLM has no {module}.{name}; "
                f"expected {CHECKED} or one like it ({error})"
            ) from error
    return SimpleNamespace(**found)
