"""vLLM as the rollout engine, behind the interface of `fastrl.sampler.Sampler`: --sampler vllm.

Untested on a GPU: vLLM has not been run with it.  Names, arguments and answers are those of the sources of
vLLM 0.33.0; the tests play them from a transcript.

vLLM works in a process of its own, on a second copy of the weights: weights trained since the last call are
pushed before the next, by vLLM's own weight transfer over CUDA IPC.  It differs from the engine in this
process in what it returns:

    logp, behaviour_logp   its log-prob of each token "after all processors": at the sampling temperature over
                           the full vocabulary while no filter is on, so filters are refused; both fields hold
                           it
    entropy                NaN where a completion token lies, because vLLM returns none
    the same seed          gives the same samples in another batch only as far as vLLM's kernels round alike,
                           and never those of fastrl's own engine
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastrl.batch.types import Rollouts
from fastrl.config import Sampling
from fastrl.data.check import check_room
from fastrl.errors import UserError
from fastrl.model.decoder import Decoder
from fastrl.model.language import LanguageModel, Tokenizer
from fastrl.model.weights import write_config
from fastrl.sampler.params import SamplingParams
from fastrl.sampler.prompts import Prompt, stop_tokens, tokenize
from fastrl.sampler.vllm_engine import (
    LLM,
    Client,
    RequestOutput,
    WeightTransfer,
    import_vllm,
    weight_source,
)

BACKENDS = {"cuda": "ipc"}  # device of the trained model -> how vLLM takes weights from the same device
FINISHED = {"stop": "stop", "length": "length"}  # vLLM's finish reasons -> ours; others are no completion
COLDEST = 0.01  # vLLM raises a lower temperature to this
SPARE = 256  # tokens of cache beyond the budget, for the pages that vLLM itself keeps
T = TypeVar("T")


class Completion(NamedTuple):
    """One sampled completion."""

    tokens: list[int]
    logp: list[float]
    reason: str


class VllmSampler:
    """Generates with vLLM and `model`'s weights, which are pushed to it whenever `weight_version` differs
    from that of the last push.

    max_tokens_in_flight   vLLM's key/value cache, tokens, all of it allocated by the first `generate`

    Memory:  that cache and a second copy of the weights, on the model's GPU.
    Raises:  UserError where vLLM is not installed or too old, or the model is not a Decoder on the first
             visible GPU.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer | None = None, *, max_tokens_in_flight: int = 262144
    ) -> None:
        self._vllm = import_vllm()
        self.model, self.tokenizer = _supported(model), tokenizer
        self.max_tokens_in_flight = max_tokens_in_flight
        self._pushed: int | None = None  # the weight version that vLLM has

    @classmethod
    def configured(cls, model: LanguageModel, tokenizer: Tokenizer | None, sampling: Sampling) -> VllmSampler:
        """A sampler with the budget of --sampling.max-tokens-in-flight; options of fastrl's own cache are
        refused.
        """
        for name, given, default in (
            ("cache-bytes", sampling.cache_bytes, 0),
            ("keep-cache", sampling.keep_cache, True),
            ("max-rows", sampling.max_rows, None),
            ("logits-dtype", sampling.logits_dtype, "float32"),
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
        **engine_only: object,
    ) -> Rollouts:
        """`params.n` completions of every prompt; sequence i answers prompt i // n.

        Arguments as `Sampler.generate`'s; `on_tokens` is called once, at the end.  Other keywords belong to
        fastrl's own engine, and are refused.  Raises UserError for a prompt that is empty, foreign to the
        vocabulary or too long, and for filters.
        """
        _check_options(params, engine_only)
        config = self.model.config
        prompt_tokens = tokenize(prompts, self.tokenizer, config.vocab_size)
        self._check_lengths(prompt_tokens, params.max_new_tokens)
        stops = stop_tokens(params.stop, self.tokenizer, config.eos_token_id)

        rows = [tokens for tokens in prompt_tokens for _ in range(params.n)]
        requests = []
        for i, row in enumerate(rows):
            room = config.max_position_embeddings - len(row)
            requests.append(self._params(params, stops, sequence_offset + i, room))
        completions = self._ask(rows, requests, weight_version) if rows else []
        if on_tokens is not None:
            on_tokens(sum(len(c.tokens) for c in completions))

        index = [i for i in range(len(prompt_tokens)) for _ in range(params.n)]
        text = self._text([c.tokens for c in completions])
        numbers = range(sequence_offset, sequence_offset + len(rows))
        return _rollouts(rows, index, completions, numbers, weight_version, text, self.model.device)

    def _check_lengths(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        """Every prompt leaves room in the context, and fits the cache with its completion."""
        limit, budget = self.model.config.max_position_embeddings, self.max_tokens_in_flight
        for i, tokens in enumerate(prompts):
            check_room(len(tokens), f"prompts[{i}]", limit)
            need = min(len(tokens) + max_new_tokens, limit)
            if need > budget:
                raise UserError(
                    f"max_tokens_in_flight: prompts[{i}] may need {need} tokens of cache, "
                    f"above the budget of {budget}"
                )

    def _text(self, tokens: list[list[int]]) -> list[str] | None:
        """The completions as text; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True) if tokens else []

    def _params(self, params: SamplingParams, stops: list[int], sequence: int, room: int) -> object:
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

    def _ask(self, rows: list[list[int]], requests: list[object], version: int) -> list[Completion]:
        if version != self._pushed:
            self._push()
            self._pushed = version
        prompts = [{"prompt_token_ids": row} for row in rows]
        outputs = self._llm.generate(prompts, requests, use_tqdm=False)
        return [_completion(output) for output in outputs]

    def _push(self) -> None:
        """Send the present weights, and drop the keys and values that older ones left."""
        self._trainer.send_weights()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not reset its prefix cache: "
                "the next completions would mix keys and values of two versions"
            )

    @cached_property
    def _llm(self) -> LLM:
        """vLLM's engine for the model's shape, with weights that are not yet the model's."""
        c, dtype = self.model.config, self.model.dtype
        per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize
        options = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            # the samples of a prompt are requests of their own, for their seeds
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            # without effect beside kv_cache_memory_bytes, but vLLM checks that so much is free
            "gpu_memory_utilization": 0.01,
        }
        transfer = self._vllm.WeightTransferConfig(backend=BACKENDS[self.model.device.type])
        with tempfile.TemporaryDirectory(prefix="fastrl-vllm-") as folder:
            write_config(Path(folder), c.to_dict(), c.eos_token_id, dtype)
            llm: LLM = self._vllm.LLM(
                model=folder,
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=min(c.max_position_embeddings, self.max_tokens_in_flight),
                kv_cache_memory_bytes=per_token * (self.max_tokens_in_flight + SPARE),
                weight_transfer_config=transfer,
                **options,
            )
        return llm

    @cached_property
    def _trainer(self) -> WeightTransfer:
        """vLLM's own trainer side of the transfer."""
        vllm = self._vllm
        transfer: WeightTransfer = vllm.WeightTransferTrainerFactory.trainer_init(
            vllm.IPCTrainerInitInfo(rank=0, packed=True),
            client=Client(self._llm),
            source=weight_source(vllm, self.model),
        )
        return transfer


def seed_of(seed: int, sequence: int) -> int:
    """vLLM's seed for a sequence: 63 bits, a function of the run's seed and the sequence's number alone."""
    digest = hashlib.blake2b(f"{seed} {sequence}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _completion(output: RequestOutput) -> Completion:
    """A request's one completion."""
    (completion,) = output.outputs
    reason = completion.finish_reason
    if reason not in FINISHED:
        raise RuntimeError(f"vLLM ended request {output.request_id} with {reason!r}, not with a completion")
    tokens = list(completion.token_ids)
    logp = [at[token].logprob for token, at in zip(tokens, completion.logprobs, strict=True)]
    return Completion(tokens, logp, FINISHED[reason])


def _rollouts(
    rows: list[list[int]],
    index: list[int],
    completions: list[Completion],
    numbers: range,
    version: int,
    text: list[str] | None,
    device: torch.device,
) -> Rollouts:
    """Prompts and completions end to end."""

    def packed(values: list[list[T]], of_prompt: T, dtype: torch.dtype) -> Tensor:
        """A column of the tokens, `of_prompt` for those of prompts."""
        flat: list[T] = []
        for row, of_completion in zip(rows, values, strict=True):
            flat += [of_prompt] * len(row)
            flat += of_completion
        return torch.tensor(flat, dtype=dtype, device=device)

    tokens: list[int] = []
    ends = [0]
    for row, completion in zip(rows, completions, strict=True):
        tokens += [*row, *completion.tokens]
        ends.append(len(tokens))

    def numbered(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    lengths = [len(c.tokens) for c in completions]
    logp = packed([c.logp for c in completions], 0.0, torch.float32)
    entropy = packed([[torch.nan] * n for n in lengths], 0.0, torch.float32)
    chosen = packed([[True] * n for n in lengths], False, torch.bool)
    versions = packed([[version] * n for n in lengths], -1, torch.int64)
    prompt_lengths = [len(row) for row in rows]
    reasons = [c.reason for c in completions]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    return Rollouts(
        tokens=numbered(tokens),
        cu_seqlens=cu_seqlens,
        completion_mask=chosen,
        prompt_index=numbered(index),
        prompt_lengths=numbered(prompt_lengths),
        logp=logp,
        behaviour_logp=logp.clone(),
        entropy=entropy,
        weight_version=versions,
        finish_reason=reasons,
        sequence=numbered(numbers),
        text=text,
    )


# --- what it cannot do ------------------------------------------------------------------------------
def _check_options(params: SamplingParams, engine_only: Mapping[str, object]) -> None:
    unknown = [name for name, value in engine_only.items() if value is not None]
    if unknown:
        raise UserError(f"{', '.join(unknown)}: only fastrl's own engine has this; use --sampler fastrl")
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


def _supported(model: LanguageModel) -> Decoder:
    """The model, if vLLM can take its weights from here."""
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
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise UserError(
            "--sampler vllm: expected one process, got several; run without torchrun, or use --sampler fastrl"
        )
    return model
