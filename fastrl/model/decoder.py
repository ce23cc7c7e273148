"""The decoder: Llama, Qwen2 and Qwen3, on packed tokens, one definition of the layer for trainer and sampler.

Projections that read the same input are one matrix: qkv (queries, keys, values stacked) and gate_up.  They
are split into Hugging Face's names when a folder is read or written (fastrl.model.weights).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastrl.kernels._layer import LayerWeights, Paged
from fastrl.kernels.decoder_layer import Run, layer_for
from fastrl.kernels.linear import linear_layer
from fastrl.kernels.rope import Store, rope_tables
from fastrl.model import weights
from fastrl.model.carried import OF_MODEL, Files, read_carried, write_carried
from fastrl.model.config import ModelConfig, Settings
from fastrl.model.language import Attend
from fastrl.ops import attention, rms_norm, rope, swiglu

__all__ = ["Attend", "Decoder", "ModelConfig"]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Angles = tuple[Tensor, Tensor, Tensor]  # positions, cos, sin
Slab = tuple[Tensor, Tensor, Tensor]  # k_cache, v_cache, slots: a Store without the values
OUTSIDE_LAYERS = {  # our parameter -> its tensor in a Hugging Face file
    "embed.weight": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}


class Linear(nn.Linear):
    """nn.Linear over `ops.linear`, which exact mode makes batch-invariant."""

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b, (T, N)."""
        return linear_layer(x, self.weight, self.bias)


class Layer(nn.Module):
    """One decoder layer: attention and MLP, each behind a norm, each added to the residual stream by the norm
    after it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, F_, E = config.hidden_size, config.intermediate_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.config = config
        self.input_norm = nn.Parameter(torch.empty(D))
        self.qkv = Linear(D, (H + 2 * K) * E, bias=config.qkv_bias)
        if config.qk_norm:
            self.q_norm = nn.Parameter(torch.empty(E))
            self.k_norm = nn.Parameter(torch.empty(E))
        self.out = Linear(H * E, D, bias=False)
        self.mlp_norm = nn.Parameter(torch.empty(D))
        self.gate_up = Linear(D, 2 * F_, bias=False)
        self.down = Linear(F_, D, bias=False)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        angles: Angles,
        attend: Attention,
        slab: Slab | None = None,
        whole: tuple[Run, Paged] | None = None,
        only_store: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What the layer adds, and the residual stream to add it to; or their sum and None.

        `whole` is what runs the layer in one call, and the pages that it then attends over.

        With `only_store` the layer stops after its keys and values; what it returns is then unspecified.
        """
        config = self.config
        if whole is not None and self._untouched():
            run, paged = whole
            done = run(x, residual, self._weights(), angles, paged, config.rms_norm_eps)
            if done is not None:
                return done

        eps, E = config.rms_norm_eps, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        x, residual = add_norm(x, residual, self.input_norm, eps)
        q, k, v = self.qkv(x).view(-1, H + 2 * K, E).split((H, K, K), 1)
        norms = {"q_norm": self.q_norm, "k_norm": self.k_norm} if config.qk_norm else {}
        q, k = rope(q, k, *angles, eps=eps, store=None if slab is None else Store(v, *slab), **norms)
        if only_store:
            return x, residual

        x = self.out(attend(q, k, v).reshape(-1, H * E))
        x, residual = add_norm(x, residual, self.mlp_norm, eps)
        return self.down(swiglu(self.gate_up(x))), residual

    def _untouched(self) -> bool:
        """True if no projection was replaced or hooked, so that one fused call may run the layer."""
        parts = self._modules.values()  # past Module.__getattr__, which would take longer than the rest
        return all(type(p) is Linear and not p._forward_hooks and not p._forward_pre_hooks for p in parts)

    def _weights(self) -> LayerWeights:
        norms: Any = self._parameters
        projections: Any = self._modules
        qkv, out, gate_up, down = (
            projections[name]._parameters for name in ("qkv", "out", "gate_up", "down")
        )
        return LayerWeights(
            norms["input_norm"],
            qkv["weight"],
            qkv["bias"],
            norms.get("q_norm"),
            norms.get("k_norm"),
            out["weight"],
            norms["mlp_norm"],
            gate_up["weight"],
            down["weight"],
        )


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and that sum; without a residual, the stream is x."""
    if residual is None:
        return rms_norm(x, weight, eps=eps), x
    return rms_norm(x, weight, eps=eps, residual=residual)


class Decoder(nn.Module):
    """A causal language model up to its head: tokens -> hidden states, with `head_weight` to make logits of
    them.

    Build one with `from_config` (random weights) or `from_pretrained`.  Set `gradient_checkpointing` to keep
    only each layer's input for the backward.
    """

    supports_cache = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        if not config.tie_word_embeddings:
            self.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self._tables: tuple[Tensor, Tensor] | None = None
        self.carried: Files = {}

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        attend: Attend | None = None,
        embeds: Tensor | None = None,
        max_seqlen: int | None = None,
        only_store: bool = False,
    ) -> Tensor:
        """Hidden states after the final norm, (T, D): row t predicts token t + 1.

        Shapes:  tokens (T,) int64;  cu_seqlens (S+1,) int32, None for one sequence;  positions (T,) int64,
                 default 0.. within each sequence;  attend(layer, q, k, v) replaces packed causal attention;
                 embeds (T, D) replaces the embedding;  max_seqlen, tokens of the longest sequence, if known,
                 lets flash attention skip empty blocks;  only_store, for an `attend` with a slab: stop after
                 the last layer's keys and values; the return value is then unspecified.
        """
        T, device = tokens.shape[0], tokens.device
        longest = max_seqlen or (T if positions is not None else min(T, self.config.max_position_embeddings))
        if positions is None or attend is None:
            ends = cu_seqlens
            if ends is None:
                ends = torch.zeros(2, dtype=torch.int32, device=device)
                ends[1:] = T
            packed = partial(attention, cu_seqlens=ends, max_seqlen=longest)
            if positions is None:
                starts = torch.repeat_interleave(ends[:-1].long(), ends.diff().long(), output_size=T)
                positions = torch.arange(T, device=device) - starts

        angles = (positions, *self.tables())
        x = self.embed(tokens) if embeds is None else embeds.to(self.dtype)
        residual = None
        slab_of = getattr(attend, "slab", None)
        paged_of = getattr(attend, "paged", None)
        run = None if paged_of is None else layer_for(x)
        keep_inputs_only = self.gradient_checkpointing and torch.is_grad_enabled()

        for i, layer in enumerate(self.layers):
            attention_i: Attention = packed if attend is None else partial(attend, i)
            slab = None if slab_of is None else slab_of(i)
            whole = None if run is None or paged_of is None else (run, paged_of(i))
            inputs = (x, residual, angles, attention_i, slab, whole)
            if only_store and i + 1 == len(self.layers):
                return layer(*inputs, True)[0]  # only_store
            if keep_inputs_only:
                x, residual = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x, residual = layer(*inputs)
        return add_norm(x, residual, self.norm, self.config.rms_norm_eps)[0]

    @property
    def head_weight(self) -> Tensor:
        """(V, D): logits are hidden @ head_weight.T; the embedding itself when the head is tied."""
        return self.embed.weight if self.config.tie_word_embeddings else self.head

    @property
    def head_bias(self) -> None:
        """No family of this decoder has one."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.norm.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' and the computation's dtype."""
        return self.norm.dtype

    def tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin (N, E/2) of every position of the context; fp32 (float64 for a float64 model), kept
        between calls.
        """
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        kept = self._tables
        if kept is None or kept[0].device != self.device or kept[0].dtype != dtype:
            c = self.config
            kept = rope_tables(
                c.head_dim, c.rope_theta, c.rope_scaling, c.max_position_embeddings, dtype, self.device
            )
            self._tables = kept
        return kept

    # --- making, loading, saving ---
    @classmethod
    def from_config(
        cls,
        config: Settings | ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> Decoder:
        """Random weights: normal(0, initializer_range), 1/sqrt(2L) of that for what is added to the residual
        stream, norms 1.

        The numbers depend on `seed` alone, not on dtype or device; without one they follow torch.manual_seed.
        Raises:  UserError for a config.json this decoder cannot run.
        """
        config = config if isinstance(config, ModelConfig) else ModelConfig.from_dict(config)
        model = cls.empty(config, dtype, device)
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        depth_scale = (2 * max(1, config.num_hidden_layers)) ** -0.5
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                    continue
                into_stream = name.endswith(("out.weight", "down.weight"))
                scale = config.initializer_range * (depth_scale if into_stream else 1.0)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        return model

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Decoder:
        """The model of a Hugging Face folder: config.json and *.safetensors, one file or shards with their
        index.

        Raises:  UserError naming the file and the tensor that is missing, unknown, truncated or of the wrong
                 shape.
        """
        folder = Path(folder)
        config = ModelConfig.from_dict(weights.read_config(folder), weights.read_generation(folder))
        model = cls.empty(config, dtype, device)
        model.carried = read_carried(folder, OF_MODEL)
        parameters = dict(model.named_parameters())
        weights.read(folder, parameters, model.layout(), tied=model.config.tie_word_embeddings)
        return model

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, *, max_shard_bytes: int = 5 << 30
    ) -> None:
        """Write config.json, generation_config.json and *.safetensors under Hugging Face's names, in `dtype`
        or the model's own.

        More than `max_shard_bytes` is cut into shards with an index.  A tied head is left out.
        """
        dtype = dtype or self.dtype
        config = self.config
        weights.write_config(Path(folder), config.to_dict(), config.eos_token_id, dtype, config.generation)
        weights.write(Path(folder), dict(self.named_parameters()), self.layout(), dtype, max_shard_bytes)
        write_carried(Path(folder), self.carried)

    def end_with(self, tokens: tuple[int, ...]) -> None:
        """Make these the end-of-sequence tokens, of sampling and of what is saved."""
        self.config = replace(self.config, eos_token_id=tokens)

    def layout(self) -> weights.Layout:
        """Each parameter's tensors in a Hugging Face file: their names, and how many of its rows each has."""
        of_layer = self._layer_layout()
        layout: weights.Layout = {}
        for name, parameter in self.named_parameters():
            if name in OUTSIDE_LAYERS:
                layout[name] = {OUTSIDE_LAYERS[name]: parameter.shape[0]}
                continue
            _, layer, part = name.split(".", 2)
            prefix = f"model.layers.{layer}"
            layout[name] = {f"{prefix}.{stored}": rows for stored, rows in of_layer[part].items()}
        return layout

    def _layer_layout(self) -> weights.Layout:
        """`layout` of one layer, by the names inside it."""
        c = self.config
        D, F_ = c.hidden_size, c.intermediate_size
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        heads = {"q": queries, "k": keys, "v": keys}
        norms = {
            "input_norm": {"input_layernorm.weight": D},
            "mlp_norm": {"post_attention_layernorm.weight": D},
            "q_norm": {"self_attn.q_norm.weight": c.head_dim},
            "k_norm": {"self_attn.k_norm.weight": c.head_dim},
        }
        projections = {
            "out.weight": {"self_attn.o_proj.weight": D},
            "gate_up.weight": {"mlp.gate_proj.weight": F_, "mlp.up_proj.weight": F_},
            "down.weight": {"mlp.down_proj.weight": D},
        }
        for kind in ("weight", "bias"):
            projections[f"qkv.{kind}"] = {f"self_attn.{x}_proj.{kind}": rows for x, rows in heads.items()}
        return norms | projections

    def drop_head(self) -> None:
        """Remove an untied language-model head, which under another head would never be trained."""
        if not self.config.tie_word_embeddings:
            del self.head
            self.config = replace(self.config, tie_word_embeddings=True)

    @classmethod
    def empty(cls, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Decoder:
        """A decoder with uninitialised weights, to be filled."""
        with torch.device("meta"):
            model = cls(config)
        return model.to(dtype).to_empty(device=device)
