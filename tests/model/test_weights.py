"""Reading and writing Hugging Face folders: the same bytes, shards, and one clear error for each way a folder
can be broken.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from fastrl.errors import UserError
from fastrl.model.decoder import Decoder

QUERY = "model.layers.1.self_attn.q_proj.weight"


def saved(tmp_path, name="model", seed=1, **changes):
    """A folder and the model that wrote it."""
    model = Decoder.from_config(tiny_config(changes.pop("family", "qwen2"), **changes), seed=seed)
    model.save_pretrained(tmp_path / name)
    return tmp_path / name, model


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_of_transformers_comes_back_byte_for_byte(family, tied, tmp_path):
    """Wrong implementations: a cast on the way, a lost tensor, rows of q and k swapped."""
    config = tiny_config(family, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config)
    ).save_pretrained(tmp_path / "a")
    Decoder.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    a, b = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert tensors_of(a) == tensors_of(b)
    assert ("lm_head.weight" in tensors_of(b)) is not tied


def tensors_of(data):
    """Name -> (dtype, shape, bytes) of a safetensors file."""
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    assert header.pop("__metadata__") == {"format": "pt"}
    return {k: (e["dtype"], e["shape"], data[8 + n :][slice(*e["data_offsets"])]) for k, e in header.items()}


@pytest.mark.parametrize("limit", [1, 5000, 20000])
def test_shards(limit, tmp_path):
    """Wrong implementations: an index that names a file wrongly; a shard above the limit; a stale single file
    left beside the shards.
    """
    folder, model = saved(tmp_path, tie_word_embeddings=False)
    model.save_pretrained(folder, max_shard_bytes=limit)
    files = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {p.name for p in files} == set(index["weight_map"].values())
    assert not (folder / "model.safetensors").exists()
    for path in files:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    again, hf = Decoder.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert torch.equal(hf.lm_head.weight, model.head_weight)
    model.save_pretrained(folder)
    assert [p.name for p in folder.glob("model*")] == ["model.safetensors"]


def test_saving_and_loading_in_another_dtype(tmp_path):
    _, model = saved(tmp_path)
    model.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert model.dtype == torch.float32
    half = Decoder.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert torch.equal(half.norm, model.norm.bfloat16()) and half.layers[0].qkv.weight.dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert Decoder.from_pretrained(tmp_path / "half").dtype == torch.float32


def test_a_repeated_tied_head_is_ignored_and_a_different_one_refused(tmp_path):
    folder, model = saved(tmp_path)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(Decoder.from_pretrained(folder).head_weight, model.head_weight)
    rewrite(folder, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(
        UserError,
        match=r"lm_head\.weight differs from the embedding, but config\.json says tie_word_embeddings",
    ):
        Decoder.from_pretrained(folder)


def test_old_rotary_buffers_are_ignored(tmp_path):
    folder, _ = saved(tmp_path, family="llama")
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    Decoder.from_pretrained(folder)


def test_config_files(tmp_path):
    """Wrong implementations: settings that the decoder does not use are dropped; only one of two end tokens
    survives.
    """
    folder, _ = saved(
        tmp_path,
        eos_token_id=[1, 2],
        pad_token_id=3,
        unsloth_version="kept",
        rope_parameters={"rope_theta": 77.0, "rope_type": "default"},
    )
    config = json.loads((folder / "config.json").read_text())
    assert (config["unsloth_version"], config["rope_theta"], config["torch_dtype"]) == (
        "kept",
        77.0,
        "float32",
    )
    assert "rope_parameters" not in config  # transformers 4 would not know it, and 5 reads rope_theta
    assert AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"] == 77.0
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.pad_token_id) == ([1, 2], 3)
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert Decoder.from_pretrained(folder).config.eos_token_id == (9,)  # as transformers' generate reads it


# --- broken folders ---------------------------------------------------------------------------------
def drop(t):
    del t[QUERY]


def reshape(t):
    t[QUERY] = t[QUERY][:-1].contiguous()


def add(t):
    t["model.layers.7.mlp.up_proj.weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    "change, message",
    [
        (drop, rf"tensor {re.escape(QUERY)} of shape \(32, 32\) is missing"),
        (
            reshape,
            rf"model\.safetensors: tensor {re.escape(QUERY)}: expected shape \(32, "
            r"32\) by config.json, got \(31, 32\)",
        ),
        (add, r"model\.safetensors: tensor model\.layers\.7\.mlp\.up_proj\.weight is not part of the model"),
    ],
)
def test_missing_extra_and_mismatching_tensors_are_named(change, message, tmp_path):
    folder, _ = saved(tmp_path)
    rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        Decoder.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -5000])
def test_a_truncated_file_is_named_with_the_first_tensor_it_cuts_off(keep, tmp_path):
    folder, _ = saved(tmp_path)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(
        UserError,
        match=r"model\.safetensors: (truncated: tensor model\.\S+ ends at byte|not a whole safetensors file)",
    ) as caught:
        Decoder.from_pretrained(folder)
    assert ("truncated: tensor" in str(caught.value)) == (keep < 0)


def test_garbage_is_no_safetensors_file(tmp_path):
    folder, _ = saved(tmp_path)
    for junk in (b"\xff" * 64, (2).to_bytes(8, "little") + b"[]", (4).to_bytes(8, "little") + b"null"):
        (folder / "model.safetensors").write_bytes(junk)
        with pytest.raises(UserError, match="not a whole safetensors file"):
            Decoder.from_pretrained(folder)


def test_a_header_that_lies_is_caught(tmp_path):
    """Shapes that do not fit their bytes: the header alone looks fine."""
    folder, _ = saved(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(
        path.read_bytes().replace(b'"shape":[32],"data_offsets"', b'"shape":[16],"data_offsets"', 1)
    )
    with pytest.raises(UserError, match="expected shape"):
        Decoder.from_pretrained(folder)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"expected a Hugging Face model folder with a config\.json"):
        Decoder.from_pretrained(tmp_path)
    folder, model = saved(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: weight file is missing"):
        Decoder.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_bytes=20000)
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(
        UserError,
        match=r"model-00002-of-\d+\.safetensors: weight file is missing \(model\.safetensors\.index\.json "
        r"names it\)",
    ):
        Decoder.from_pretrained(folder)


def test_an_index_that_lists_what_is_not_there(tmp_path):
    folder, model = saved(tmp_path)
    model.save_pretrained(folder, max_shard_bytes=20000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["made.up"] = index["weight_map"][QUERY]
    path.write_text(json.dumps(index))
    with pytest.raises(
        UserError, match=r"tensor made\.up is missing, though model\.safetensors\.index\.json lists it"
    ):
        Decoder.from_pretrained(folder)


@pytest.mark.parametrize(
    "text, message", [("{", "expected a JSON object"), ("[1]", "expected a JSON object, got"), ("\xff", "")]
)
def test_a_config_that_cannot_be_read_is_named(text, message, tmp_path):
    folder, _ = saved(tmp_path)
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"config\.json.*{message}"):
        Decoder.from_pretrained(folder)
