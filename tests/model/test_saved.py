"""What a saved folder says to other programs: where to stop, how to sample, and every file they need; through
checkpoints of checkpoints.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from runs import decoder, tokenizer
from safetensors.torch import load_file, save_file
from support import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrl.data.rows import read_rows
from fastrl.errors import UserError
from fastrl.files import hub_advice
from fastrl.model import tokenizer as tokenizers
from fastrl.model.adapter import load_model
from fastrl.model.decoder import Decoder
from fastrl.model.folder import model_folder
from fastrl.model.reward import RewardModel
from fastrl.model.tokenizer import align_ends, load_tokenizer
from fastrl.rewards.functions import load_reward
from fastrl.rewards.models import settled_reward
from fastrl.run import checkpoint
from fastrl.sampler import Sampler, SamplingParams
from fastrl.tasks.tokens import char_tokenizer

GENERATION = {"eos_token_id": [1, 2], "pad_token_id": 0, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
GENERATION |= {"do_sample": True, "repetition_penalty": 1.1}
TRAVEL = {  # a file of the source folder -> what it holds
    "LICENSE": "MIT",
    "NOTICE.txt": "by us",
    "preprocessor_config.json": "{}",
    "processor_config.json": '{"a": 1}',
    "added_tokens.json": '{"<x>": 3}',
    "special_tokens_map.json": '{"eos_token": "<eos>"}',
    "tokenizer.model": "pieces",
    "vocab.json": "{}",
    "additional_chat_templates/rag.jinja": "{{ 2 }}",
}
PHI = {"architectures": ["PhiForCausalLM"], "model_type": "phi", "vocab_size": 61, "hidden_size": 32}
PHI |= {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "eos_token_id": 1}
MODELS = {
    "decoder": lambda: Decoder.from_config(tiny_config("qwen2"), seed=1),
    "adapter": lambda: load_model(PHI, seed=1),
    "reward": lambda: RewardModel.load(tiny_config("llama"), seed=1),
}


def source(folder, kind):
    """A model's folder with a tokenizer, a generation_config and whatever else one may hold."""
    MODELS[kind]().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    for name, text in TRAVEL.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "README.md").write_text("about other weights")
    return folder


def loaded(folder, kind):
    return RewardModel.load(folder) if kind == "reward" else load_model(folder)


@pytest.mark.parametrize("kind", MODELS)
def test_everything_others_need_travels_through_two_generations(kind, tmp_path):
    """Wrong implementations: files copied from a checkpoint that is removed by then; sampling defaults lost;
    only the policy's folder served.
    """
    folder = source(tmp_path / "source", kind)
    for run in ("first", "second"):
        model, words = loaded(folder, kind), load_tokenizer(None, str(folder))
        shutil.rmtree(folder)  # as --save.keep removes the checkpoint that a run was resumed from
        beside = {"judge": (model, words)}
        folder = checkpoint.save(tmp_path / run, 1, model, words, {}, {}, others=beside)
        for place in (folder, folder / "judge"):
            assert {name: (place / name).read_text() for name in TRAVEL} == TRAVEL
            assert not (place / "README.md").exists()
    if kind != "reward":
        saved = json.loads((folder / "generation_config.json").read_text())
        assert {key: saved[key] for key in GENERATION} == GENERATION
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [1, 2]
    assert checkpoint.load(folder)[1]["step"] == 1  # the files that travelled are listed, too


def test_a_replaced_chat_template_is_not_joined_by_the_old_ones(tmp_path):
    folder = source(tmp_path / "source", "decoder")
    words = load_tokenizer(None, str(folder))
    words.chat_template = "{{ 'mine' }}"
    tokenizers.save_tokenizer(words, tmp_path / "out")
    assert not (tmp_path / "out" / "additional_chat_templates").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ 'mine' }}"


@pytest.mark.parametrize("kind", ["decoder", "adapter"])
def test_checkpoints_stop_elsewhere_where_they_stop_here(kind, tmp_path, monkeypatch):
    """Wrong: config.json that keeps a token which nothing was taught, so that other programs never stop."""
    said = []
    monkeypatch.setattr(tokenizers, "notice", said.append)
    words = tokenizer()
    end = words.eos_token_id
    changes = {"eos_token_id": end + 3, "vocab_size": len(words), "tie_word_embeddings": False}
    model = load_model(({**PHI, **changes} if kind == "adapter" else tiny_config("qwen2", **changes)), seed=1)
    align_ends(model, words)
    assert len(said) == 1 and f"sequences end with {end} (" in said[0] and f"with {end + 3} by" in said[0]

    with torch.no_grad():  # whatever comes, the tokenizer's end is next
        model.head_weight.zero_()
        if kind == "adapter":
            model.head_bias.zero_()[end] = 9.0
        else:
            model.norm.fill_(1.0)
            model.embed.weight.fill_(0.0)[:, 0] = 1.0
            model.head_weight[end, 0] = 50.0
    assert Sampler(model, words).generate([[3]], SamplingParams(max_new_tokens=4)).completions() == [[end]]
    folder = checkpoint.save(tmp_path, 1, model, words, {}, {})
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    drawn = theirs.generate(torch.tensor([[3]]), max_new_tokens=4, do_sample=False)
    assert drawn[0].tolist() == [3, end]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == [end, end + 3]
    align_ends(load_model(folder), load_tokenizer(None, str(folder)))
    assert len(said) == 1, "a checkpoint agrees with its tokenizer"


def test_the_token_that_closes_a_turn_ends_a_sequence():
    words = char_tokenizer("abu")
    words.add_special_tokens({"additional_special_tokens": ["<end>"]})
    words.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}{% if m.role == 'user' %}{{ m.content }}<end>{% else %}"
        "{% generation %}{{ m.content }}<end>{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    assert tokenizers.turn_end(words) == words.convert_tokens_to_ids("<end>")
    words.chat_template = "{{ raise_exception('no') }}"
    assert tokenizers.turn_end(words) is None


# --- weights that are no numbers, code that is not ours ------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", MODELS)
def test_codes_of_quantised_weights_are_refused(kind, dtype, tmp_path):
    """Wrong: codes cast to floats as if they were the weights."""
    MODELS[kind]().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n in tensors if n.endswith(("q_proj.weight", "fc1.weight")))
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"tensor {name}: expected float32, .* of quantised weights"):
        loaded(tmp_path, kind)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "mxfp4"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_quantised_folder_is_one_clear_error(kind, method, tmp_path):
    """Wrong: an ImportError of the package that would read it."""
    MODELS[kind]().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": method, "bits": 4}}
    path.write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=rf"quantization_config: expected none, got quantised weights \({method}\)"
    ):
        loaded(tmp_path, kind)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OursConfig(LlamaConfig):
    model_type = "ours"
class Ours(LlamaForCausalLM):
    config_class = OursConfig
"""


def test_code_of_a_model_runs_only_when_it_is_trusted(tmp_path, monkeypatch):
    """Wrong implementations: a question in the middle of a batch job; advice that no option can follow."""
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "ours"
    Decoder.from_config(tiny_config("llama"), seed=1).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "modeling_ours.OursConfig", "AutoModelForCausalLM": "modeling_ours.Ours"}
    (folder / "modeling_ours.py").write_text(CODE)
    own = config | {"model_type": "ours", "architectures": ["Ours"], "auto_map": code}
    (folder / "config.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match=r"auto_map: .*modeling_ours\.Ours.* --trust-remote-code"):
        load_model(folder)
    model = load_model(folder, trust=True)
    assert type(model.lm).__name__ == "Ours"
    model.save_pretrained(tmp_path / "saved")
    assert type(load_model(tmp_path / "saved", trust=True).lm).__name__ == "Ours"

    # transformers knows the class: its own is used, and the folder's code is not run
    (folder / "modeling_ours.py").write_text("raise SystemExit('run')")
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    assert isinstance(load_model(folder), Decoder)


def test_code_of_a_tokenizer_runs_only_when_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    changes = {
        "tokenizer_class": "OurTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_x.Ours", None]},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=r"--tokenizer: .*tokenization_x\.Ours.* --trust-remote-code"):
        load_tokenizer(str(tmp_path), "nowhere")


def test_codes_in_a_pytorch_file_are_refused(tmp_path):
    MODELS["adapter"]().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert load_model(tmp_path).config.vocab_size == 61
    name = next(n for n in tensors if n.endswith("fc1.weight"))
    torch.save(tensors | {name: tensors[name].to(torch.int8)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"tensor {name}: expected float32, .* got int8"):
        load_model(tmp_path)


# --- names ---------------------------------------------------------------------------------------------
def test_the_folder_of_a_run_means_its_newest_whole_checkpoint(tmp_path):
    """Wrong implementations: step_9 before step_10; a truncated checkpoint."""
    for step in (9, 10, 11):
        checkpoint.save(tmp_path, step, decoder(), tokenizer(), {}, {})
    newest = tmp_path / "checkpoints" / "step_11"
    for name in (tmp_path, tmp_path / "checkpoints"):
        assert model_folder(name) == newest
    (newest / "model.safetensors").write_bytes(b"cut")
    assert model_folder(tmp_path) == tmp_path / "checkpoints" / "step_10"
    assert isinstance(load_model(tmp_path), Decoder) and load_tokenizer(str(tmp_path), "nowhere")
    assert model_folder(newest) == newest, "what is named exactly is taken exactly"
    for step in (9, 10):
        (tmp_path / "checkpoints" / f"step_{step}" / "trainer.json").unlink()
    with pytest.raises(UserError, match=r"--model: .* none of its checkpoints is whole"):
        model_folder(tmp_path)


def test_names_of_the_hub_are_answered_with_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"`hf download a/b-1\.5 --local-dir b-1\.5`, then --model b-1\.5"):
        load_model("a/b-1.5")
    with pytest.raises(UserError, match=r"--tokenizer: .* is no folder; names of the Hugging Face Hub"):
        load_tokenizer("a/b-1.5", "nowhere")
    snapshot = tmp_path / "models--a--b-1.5" / "snapshots" / "c0ffee"
    decoder().save_pretrained(snapshot)
    with pytest.raises(UserError, match=rf"it is in its cache: --model {snapshot}"):
        load_model("a/b-1.5")
    assert load_model(snapshot).config.vocab_size == decoder().config.vocab_size
    with pytest.raises(UserError, match=r"--repo-type dataset a/b --local-dir b`, then --dataset b/FILE"):
        read_rows("a/b")
    assert hub_advice("tiny.json", "--model") == hub_advice(str(snapshot), "--model") == ""


def test_rewards_take_the_folder_of_a_run_and_say_what_a_folder_lacks(tmp_path):
    """Wrong implementations: a run that goes on and changes the reward of another; a bare folder taken for a
    file's name.
    """
    judge = RewardModel.load(tiny_config("llama", vocab_size=31), seed=1)
    beside = {"reward_model": (judge, tokenizer())}
    saved = checkpoint.save(tmp_path / "joint", 1, decoder(), tokenizer(), {}, {}, others=beside)
    with pytest.raises(UserError, match=rf"is a folder: model:{tmp_path} scores"):
        load_reward(str(tmp_path))
    with pytest.raises(UserError, match=rf"a policy; its reward model is model:{saved}/reward_model"):
        load_reward(f"model:{tmp_path}/joint")
    run = tmp_path / "reward"
    newest = checkpoint.save(run, 3, judge, tokenizer(), {}, {})
    assert load_reward(f"model:{run}")(["1"], ["2"]) == load_reward(f"model:{newest}")(["1"], ["2"])
    assert settled_reward(f"model:{run}") == f"model:{newest}"
    assert settled_reward(f"implicit:{run}, {newest},0.2") == f"implicit:{newest},{newest},0.2"
    assert settled_reward("my.py:fn") == "my.py:fn"
