"""The decoder against transformers on tiny random models of the three families, and packing against single
sequences.
"""

from __future__ import annotations

import contextlib
import copy
import os

import pytest
import torch
from support import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from fastrl import ops
from fastrl.errors import UserError
from fastrl.kernels.decode_attention import decode_attention
from fastrl.model.decoder import Decoder, ModelConfig

LENGTHS = [5, 1, 9, 20]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    ("llama", {"head_dim": 16}),
    ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500.0}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": False, "rope_theta": 1e6}),
]
IDS = [f"{f}-{'-'.join(c) or 'plain'}" for f, c in VARIANTS]


OPS = ("rms_norm", "rope", "swiglu", "attention")  # that the decoder runs on
BACKENDS = ("reference", "cpu", "triton", "flash_attn_4", "flash_attn_2", "varlen_attn", "sdpa")


@contextlib.contextmanager
def every_op_on(name):
    """Each op of the decoder that has such an implementation runs on it; a visible skip where it is not
    there.
    """
    states = {
        op: state
        for op, table in ops.implementations().items()
        if op in OPS and (state := table.get(name)) is not None
    }
    missing = [f"{op}: {state}" for op, state in states.items() if state not in ("ready", "compiled only")]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if missing or (name not in ("reference", "cpu") and not interpreted and not torch.cuda.is_available()):
        pytest.skip(f"{name}: {'; '.join(missing) or 'needs a GPU'}")
    if name not in ("reference", "cpu", "triton"):
        pytest.skip(f"{name}: takes no CPU tensors; tests/gpu/test_model_ops_gpu.py runs it")
    assert states, name
    with ops.use_backend(name, *states):
        yield


def hugging_face(family="qwen2", **changes):
    """A transformers model whose every parameter, norms and biases included, is random."""
    # transformers writes into the mappings it is given
    config = copy.deepcopy(tiny_config(family, **changes))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def packed(lengths=LENGTHS, vocab=61):
    return torch.randint(vocab, (sum(lengths),)), torch.tensor([0, *lengths]).cumsum(0).int()


def theirs(model, tokens, cu):
    """Logits of transformers, one sequence at a time."""
    return torch.cat(
        [model(tokens[None, a:b]).logits[0] for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)]
    )


def logits(model, *arguments, **options):
    return model(*arguments, **options) @ model.head_weight.T


@pytest.mark.parametrize("family, changes", VARIANTS, ids=IDS)
def test_parity_with_transformers_both_ways(family, changes, tmp_path):
    """Wrong implementations: attention that ignores cu_seqlens, heads split in the wrong order, a norm left
    at 1.
    """
    hf = hugging_face(family, **changes)
    hf.save_pretrained(tmp_path / "theirs")
    model = Decoder.from_pretrained(tmp_path / "theirs")
    tokens, cu = packed()
    with torch.no_grad():
        expected = theirs(hf, tokens, cu)
        torch.testing.assert_close(logits(model, tokens, cu), expected, atol=1e-5, rtol=0)
        model.save_pretrained(tmp_path / "ours")
        again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(info.values()), info
        # not its logits: GEMMs round differently over weights that a file maps unaligned
        own = dict(again.named_parameters())
        assert all(torch.equal(own[name], parameter) for name, parameter in hf.named_parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_and_gradients_are_those_of_transformers_on_every_backend(family, backend, tmp_path):
    """Wrong implementation: a residual stream whose gradient bypasses a norm; a tied head trained only
    through one of its uses.
    """
    hf = hugging_face(family)
    hf.save_pretrained(tmp_path)
    model = Decoder.from_pretrained(tmp_path)
    tokens, cu = packed([5, 1, 9] if backend == "triton" else LENGTHS)  # the interpreter takes its time
    with every_op_on(backend):
        for run in (lambda: logits(model, tokens, cu), lambda: theirs(hf, tokens, cu)):
            run().log_softmax(-1)[:-1].gather(1, tokens[1:, None]).mean().neg().backward()
        with torch.no_grad():
            torch.testing.assert_close(logits(model, tokens, cu), theirs(hf, tokens, cu), atol=1e-5, rtol=0)
    own = {n: p for parts in model.layout().items() for n, p in split(model, *parts)}
    for name, parameter in hf.named_parameters():
        torch.testing.assert_close(
            own[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def split(model, ours, parts):
    return zip(parts, model.get_parameter(ours).grad.split(list(parts.values())), strict=True)


def test_packing_is_the_same_as_one_sequence_at_a_time():
    """Wrong implementation: attention across sequences."""
    model = Decoder.from_config(tiny_config(num_hidden_layers=3), seed=1)
    tokens, cu = packed([4, 0, 11, 1])
    alone = torch.cat([model(tokens[a:b]) for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)])
    torch.testing.assert_close(model(tokens, cu), alone, atol=1e-6, rtol=0)
    assert not torch.allclose(model(tokens), alone, atol=1e-3)


def test_positions_restart_with_every_sequence():
    """Wrong implementation: positions that run on, which only distances hide, until the batch outgrows the
    context.
    """
    model = Decoder.from_config(tiny_config(max_position_embeddings=20), seed=1)
    tokens, cu = packed([20, 3, 20])
    torch.testing.assert_close(model(tokens, cu)[23:], model(tokens[23:]), atol=1e-6, rtol=0)


def test_positions_embeds_and_empty_input():
    model = Decoder.from_config(tiny_config(), seed=1)
    tokens, cu = packed([3, 4])
    hidden = model(tokens, cu)
    assert torch.equal(model(tokens, cu, positions=torch.tensor([0, 1, 2, 0, 1, 2, 3])), hidden)
    far = model(tokens, cu, positions=torch.tensor([9, 10, 11, 5, 6, 7, 8]))
    torch.testing.assert_close(far, hidden, atol=1e-5, rtol=0)  # only distances matter
    assert not torch.allclose(
        model(tokens, cu, positions=torch.tensor([0, 2, 4, 0, 1, 2, 3])), hidden, atol=1e-4
    )
    embeds = model.embed(tokens).detach().requires_grad_()
    assert torch.equal(model(tokens, cu, embeds=embeds), hidden)
    assert torch.autograd.grad(model(tokens, cu, embeds=embeds).sum(), embeds)[0].abs().sum() > 0
    assert model(tokens[:0], torch.tensor([0, 0, 0], dtype=torch.int32)).shape == (0, 32)
    with pytest.raises(ValueError, match=r"positions: expected values in \[0, 128\)"):
        model(torch.zeros(129, dtype=torch.int64))


def test_decoding_over_a_paged_cache_gives_the_hidden_states_of_training():
    """Wrong implementation: a second definition of the layer for the sampler, which drifts from the first."""
    model = Decoder.from_config(tiny_config("qwen3", num_hidden_layers=3), seed=1).double()
    B, N, page = 3, 3, 4
    tokens = torch.randint(61, (B, N * page))
    cache = torch.zeros(3, 2, B * N, page, 2, 8, dtype=torch.float64)
    table = torch.randperm(B * N).view(B, N).int()
    for t in range(N * page):
        lengths = torch.full((B,), t + 1, dtype=torch.int32)

        def attend(layer, q, k, v, t=t, lengths=lengths):
            cache[layer, 0, table[:, t // page].long(), t % page] = k
            cache[layer, 1, table[:, t // page].long(), t % page] = v
            return decode_attention(q, *cache[layer], table, lengths)

        with torch.no_grad():
            step = model(tokens[:, t], positions=torch.full((B,), t), attend=attend)
            whole = model(tokens[:, : t + 1].flatten(), torch.arange(B + 1, dtype=torch.int32) * (t + 1))
        torch.testing.assert_close(step, whole.view(B, t + 1, -1)[:, -1], atol=1e-12, rtol=0)


def test_gradient_checkpointing_changes_no_bit():
    model = Decoder.from_config(tiny_config("qwen3"), seed=1)
    tokens, cu = packed()
    grads = []
    for on in (False, True):
        model.gradient_checkpointing = on
        model.zero_grad()
        logits(model, tokens, cu).logsumexp(-1).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bfloat16_stays_close(family):
    """Wrong implementations: statistics of the norms in bfloat16; angles rounded to bfloat16, hopeless past
    position 256.
    """
    model = Decoder.from_config(tiny_config(family, max_position_embeddings=2048), seed=1)
    half = copy.deepcopy(model).to(torch.bfloat16)
    tokens, cu = packed([5, 1030])
    assert half.dtype == torch.bfloat16
    with torch.no_grad():
        ours, exact = logits(half, tokens, cu), logits(model, tokens, cu)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() < 0.03 * exact.abs().max()
    assert half.tables()[0].dtype == torch.float32


def test_random_weights_follow_the_seed_and_nothing_else():
    """Wrong implementations: torch's global generator; residual projections not scaled by depth."""
    config = tiny_config(
        "qwen2", hidden_size=64, intermediate_size=256, num_hidden_layers=8, tie_word_embeddings=False
    )
    state = torch.get_rng_state()
    a, b, c = (Decoder.from_config(config, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    half = Decoder.from_config(config, seed=1, dtype=torch.bfloat16)
    for (name, p), q, r, h in zip(
        a.named_parameters(), b.parameters(), c.parameters(), half.parameters(), strict=True
    ):
        assert torch.equal(p, q) and torch.equal(p.bfloat16(), h), name
        if p.ndim == 1:
            assert torch.equal(p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)), name
        else:
            assert not torch.equal(p, r), name
            expected = 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.1), name
    torch.manual_seed(3)
    d = Decoder.from_config(config)
    torch.manual_seed(3)
    assert torch.equal(d.head_weight, Decoder.from_config(config).head_weight)


def test_a_tied_head_is_the_embedding_itself():
    tied, untied = (Decoder.from_config(tiny_config(tie_word_embeddings=t), seed=1) for t in (True, False))
    assert tied.head_weight is tied.embed.weight
    assert untied.head_weight is not untied.embed.weight
    assert untied.head_bias is None and tied.supports_cache


# --- configuration ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "expected LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM; got GPT2LMHeadModel",
        ),
        ({"hidden_act": "gelu"}, "hidden_act: expected silu, got 'gelu'"),
        ({"attention_bias": True}, "attention_bias: expected false, got True"),
        ({"mlp_bias": True}, "mlp_bias: expected false"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "use_sliding_window: expected false",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: expected full_attention"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_scaling: expected rope_type default, linear, llama3",
        ),
        ({"attention_dropout": 0.1}, "attention_dropout: expected 0, got 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1, got 0.5"),
    ],
)
def test_what_is_not_supported_is_named_with_the_way_out(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig.from_dict(tiny_config("llama", **changes))
    assert "fastrl.model.adapter" in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": None}, "hidden_size: expected int, 1 or more, got None"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps: expected float, got 'tiny'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads to divide num_attention_heads"),
        ({"head_dim": 7}, "an even head_dim"),
    ],
)
def test_wrong_numbers_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict(tiny_config(**changes))


def test_both_spellings_of_the_rope_settings_mean_the_same():
    """Wrong implementation: rope_theta read from the top level only, so that transformers 5's files get
    10000.
    """
    old = tiny_config("llama", rope_theta=5e5, rope_scaling=LLAMA3)
    new = {k: v for k, v in old.items() if not k.startswith("rope_")} | {
        "rope_parameters": {**LLAMA3, "rope_theta": 5e5}
    }
    a, b = (ModelConfig.from_dict(c) for c in (old, new))
    assert (a.rope_theta, a.rope_scaling) == (b.rope_theta, b.rope_scaling) == (5e5, LLAMA3)
    assert (
        ModelConfig.from_dict(
            tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 7.0})
        ).rope_scaling
        is None
    )


def test_a_cache_is_filled_with_and_without_gradient_checkpointing():
    """Wrong: a checkpointed layer that is not told of the cache, whose keys and values are then silently
    missing.
    """
    config = tiny_config("qwen3")
    model, cu = Decoder.from_config(config, seed=0), torch.tensor([0, 5], dtype=torch.int32)

    class Slabs:
        def __init__(self):
            self.caches = [(torch.zeros(5, 2, 8), torch.zeros(5, 2, 8)) for _ in model.layers]

        def slab(self, layer):
            return *self.caches[layer], torch.arange(5)

        def __call__(self, layer, q, k, v):
            return ops.attention(q, k, v, cu)

    filled = []
    for on in (False, True):
        model.gradient_checkpointing = on
        attend = Slabs()
        model(torch.arange(5), cu, attend=attend)
        filled.append(attend.caches)
    for (k, v), (again_k, again_v) in zip(*filled, strict=True):
        assert k.abs().sum() > 0 and torch.equal(k, again_k) and torch.equal(v, again_v)


def test_a_window_that_no_layer_uses_is_no_obstacle():
    config = tiny_config(use_sliding_window=False, sliding_window=8, max_window_layers=2)
    assert ModelConfig.from_dict(config).num_hidden_layers == 2
    assert ModelConfig.from_dict(config | {"use_sliding_window": True}).num_hidden_layers == 2


def test_defaults_of_a_short_config():
    short = {
        "model_type": "qwen3",
        "vocab_size": 8,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
    }
    config = ModelConfig.from_dict(
        short
        | {"num_attention_heads": 2, "num_key_value_heads": None}
        | {"max_position_embeddings": 9, "eos_token_id": [3, 4]}
    )
    assert (config.architecture, config.head_dim, config.num_key_value_heads, config.qk_norm) == (
        "Qwen3ForCausalLM",
        128,
        2,
        True,
    )
    assert config.eos_token_id == (3, 4)
    assert ModelConfig.from_dict(config.to_dict()) == config
