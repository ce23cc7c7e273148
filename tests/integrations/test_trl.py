"""TRL's own trainers, with and without our ops inside: the same losses, the same gradients, and proof of who
computed them.

What trains is skipped where TRL is not installed (docs/drop-in.md says how to install it); the swap itself is
tested everywhere.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny_config, within_budget
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, TrainerCallback

from fastrl import ops
from fastrl.integrations.trl import patch, patched, unpatch
from fastrl.tasks.tokens import char_tokenizer

try:
    import datasets
    import trl
    from trl.trainer import utils

    absent = ""
except ImportError as error:
    absent = f"no TRL (the peers extra): {error}"
needs_trl = pytest.mark.skipif(bool(absent), reason=absent)

NAMES = (
    "selective_log_softmax",
    "entropy_from_logits",
    "selective_log_softmax_and_entropy",
    "_ChunkedLogProbFunction",
)
STEPS = 10
COMMON = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "seed": 7,
}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No hub, and TRL unpatched afterwards."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield
    unpatch()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random two-layer Qwen2 and a tokenizer of characters, as TRL loads them (its reference model needs a
    folder).
    """
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = Qwen2Config(
        **{k: v for k, v in tiny_config(vocab_size=29).items() if k != "architectures"}, pad_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    char_tokenizer("abcdefghijklmnopqrstuvwxyz").save_pretrained(folder)
    return folder


# --- training ---------------------------------------------------------------------------------------
class FirstGradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if not self.kept:
            self.kept = {
                n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.grad is not None
            }


def grpo(folder: Path, output: Path, callback: TrainerCallback) -> Any:
    def vowels(completions: list[str], **columns: Any) -> list[float]:
        return [sum(c in "aeiou" for c in text) / 4 for text in completions]

    config = trl.GRPOConfig(
        output_dir=str(output),
        num_generations=4,
        max_completion_length=6,
        temperature=0.9,
        beta=0.1,
        num_iterations=2,
        entropy_coef=0.05,
        **COMMON,
    )
    data = datasets.Dataset.from_list([{"prompt": p} for p in ("abc", "hello", "xyz", "queue")] * 4)
    return trl.GRPOTrainer(
        str(folder), reward_funcs=vowels, args=config, train_dataset=data, callbacks=[callback]
    )


def dpo(folder: Path, output: Path, callback: TrainerCallback) -> Any:
    rows = [
        {"prompt": p, "chosen": p + "good", "rejected": "bad" + p} for p in ("abc", "hello", "xyz", "queue")
    ] * 4
    config = trl.DPOConfig(output_dir=str(output), beta=0.5, **COMMON)
    return trl.DPOTrainer(
        str(folder), args=config, train_dataset=datasets.Dataset.from_list(rows), callbacks=[callback]
    )


def sft(folder: Path, output: Path, callback: TrainerCallback) -> Any:
    rows = [{"prompt": p, "completion": p[::-1]} for p in ("abc", "hello", "xyz", "queue")] * 4
    config = trl.SFTConfig(output_dir=str(output), max_length=32, **COMMON)
    return trl.SFTTrainer(
        str(folder), args=config, train_dataset=datasets.Dataset.from_list(rows), callbacks=[callback]
    )


def rloo(folder: Path, output: Path, callback: TrainerCallback) -> Any:
    config = trl.RLOOConfig(
        output_dir=str(output),
        num_generations=4,
        max_completion_length=6,
        beta=0.1,
        num_iterations=2,
        **COMMON,
    )
    data = datasets.Dataset.from_list([{"prompt": p} for p in ("abc", "hello", "xyz", "queue")] * 4)

    def length(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text.split("e")[0])) for text in completions]

    return trl.RLOOTrainer(
        str(folder), reward_funcs=length, args=config, train_dataset=data, callbacks=[callback]
    )


def train(make: Callable[..., Any], folder: Path, output: Path) -> SimpleNamespace:
    gradients = FirstGradients()
    trainer = make(folder, output, gradients)
    torch.manual_seed(3)
    trainer.train()
    logs = [h for h in trainer.state.log_history if "loss" in h]
    return SimpleNamespace(loss=torch.tensor([h["loss"] for h in logs]), logs=logs, gradients=gradients.kept)


class Calls:
    """Counts our op's calls, and what TRL's own function is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours = 0
        self.theirs: list[tuple[str, ...]] = []
        linear_logp, function = ops.linear_logp, utils._ChunkedLogProbFunction
        forward = function.forward

        def counted(*args: Any, **kwargs: Any) -> ops.TokenStats:
            self.ours += 1
            return linear_logp(*args, **kwargs)

        def seen(  # type: ignore[no-untyped-def]
            ctx,
            hidden,
            weight,
            bias,
            targets,
            temperature,
            chunk_size,
            final_logit_softcapping,
            logit_scale,
            outputs,
        ):
            self.theirs.append(outputs)
            return forward(
                ctx,
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                logit_scale,
                outputs,
            )

        monkeypatch.setattr(ops, "linear_logp", counted)
        monkeypatch.setattr(function, "forward", staticmethod(seen))


@needs_trl
@pytest.mark.parametrize("make", [grpo, rloo, dpo, sft], ids=lambda f: f.__name__)
def test_the_trainer_takes_the_same_steps_on_our_ops(make, checkpoint, tmp_path, monkeypatch):
    """Wrong implementations: a patch TRL never calls; a dropped entropy gradient or temperature; log-probs
    shifted by a token.
    """
    plain = train(make, checkpoint, tmp_path / "plain")
    calls = Calls(monkeypatch)
    with patched():
        ours = train(make, checkpoint, tmp_path / "ours")
    assert calls.ours >= STEPS
    assert not any({"log_probs", "entropy"} & set(outputs) for outputs in calls.theirs)
    assert len(plain.loss) == STEPS and plain.loss.abs().max() > 1e-3 and plain.loss.std() > 0
    torch.testing.assert_close(ours.loss, plain.loss, rtol=0, atol=1e-5)
    assert ours.gradients.keys() == plain.gradients.keys() and plain.gradients
    for name, gradient in plain.gradients.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(
            ours.gradients[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    for metric in {"entropy", "mean_token_accuracy", "kl", "rewards/chosen", "logits/chosen"} & plain.logs[
        0
    ].keys():
        assert ours.logs[0][metric] == pytest.approx(plain.logs[0][metric], rel=1e-4, abs=1e-5), metric


# --- the page ---------------------------------------------------------------------------------------
def examples() -> list[str]:
    return re.findall(
        r"```python\n(.*?)```",
        (Path(__file__).parents[2] / "docs" / "drop-in.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=needs_trl), 2])
def test_an_example_of_the_page_runs(number, checkpoint, tmp_path, monkeypatch):
    """Wrong implementation: a page that was right once."""
    monkeypatch.chdir(tmp_path)
    assert len(examples()) == 3
    text = examples()[number].replace("Qwen/Qwen2.5-0.5B", str(checkpoint))
    names: dict[str, Any] = {}
    exec(compile(text, f"drop-in.md, example {number + 1}", "exec"), names)
    loss = names["trainer"].state.log_history[-1]["train_loss"] if number == 1 else names["loss"].item()
    assert math.isfinite(loss)


# --- function by function ---------------------------------------------------------------------------
def both(call: Callable[..., Any], *tensors: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """The results of a call, and the gradients of the tensors under a fixed weighting of every differentiable
    result.
    """
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    result = call(*leaves)
    results = [r for r in (result if isinstance(result, tuple) else (result,)) if r is not None]
    loss = sum(
        (r.float() * torch.linspace(0.5, 1.5, r.numel()).view(r.shape)).sum()
        for r in results
        if r.requires_grad
    )
    return results, list(torch.autograd.grad(loss, leaves, allow_unused=True))


def equal(ours: Any, theirs: Any, **tolerance: float) -> None:
    # checks dtypes too
    torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 1e-5, "atol": 1e-5}))


@needs_trl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 2)], ids=str)
def test_the_functions_of_logits_are_trls(shape, dtype):
    """Wrong implementations: entropy without gradient, or with one where TRL asks for none; float32 returned
    for bf16 logits.
    """
    logits, index = (torch.randn(*shape, 37) * 4).to(dtype), torch.randint(37, shape)
    mask = torch.rand(shape) < 0.7
    calls = [
        lambda x: utils.selective_log_softmax(x, index),
        lambda x: utils.selective_log_softmax(x, index, temperature=0.7, row_mask=mask),
        lambda x: utils.selective_log_softmax(x, torch.stack([index, index.flip(0)], -1)),
        lambda x: utils.entropy_from_logits(x, chunk_size=2),
        lambda x: utils.selective_log_softmax_and_entropy(x, index, temperature=1.3, row_mask=mask),
        lambda x: utils.selective_log_softmax_and_entropy(x, index, entropy_requires_grad=False),
    ]
    for call in calls:
        theirs, their_grads = both(call, logits)
        truth, _ = both(call, logits.double())
        with patched():
            ours, our_grads = both(call, logits)
        assert [r.requires_grad for r in ours] == [r.requires_grad for r in theirs]
        if dtype == torch.bfloat16:
            for o, t, x in zip(ours, theirs, truth, strict=True):
                assert o.dtype == t.dtype
                within_budget(o, t, x)
            equal(our_grads, their_grads, rtol=0.05, atol=0.02)
        else:
            equal((ours, our_grads), (theirs, their_grads))


@needs_trl
@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy", "is_top1"), None], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_function_of_hidden_states_is_trls(outputs, bias):
    """Wrong implementations: logit_scale or temperature inverted; results in the wrong place of the five; a
    bias left out.
    """
    hidden, weight, b, target = (
        torch.randn(23, 16),
        torch.randn(61, 16),
        torch.randn(61),
        torch.randint(61, (23,)),
    )
    rest = () if outputs is None else (outputs,)

    def call(hidden: Tensor, weight: Tensor, *b: Tensor) -> tuple[Tensor | None, ...]:
        result = utils._ChunkedLogProbFunction.apply(
            hidden, weight, b[0] if b else None, target, 0.7, 8, None, 0.3, *rest
        )
        asked.append([x is not None for x in result])
        return result

    asked: list[list[bool]] = []
    leaves = (hidden, weight, b) if bias else (hidden, weight)
    theirs = both(call, *leaves)
    with patched():
        ours = both(call, *leaves)
    equal(ours, theirs)
    assert asked[0] == asked[1]


@needs_trl
def test_under_autocast_the_products_are_in_its_dtype_and_the_logits_are_not():
    """Wrong implementation: bf16 logits, or float32 products that ignore autocast."""
    hidden, weight, target = torch.randn(23, 16), torch.randn(61, 16), torch.randint(61, (23,))
    rounded = ops.linear_logp(hidden.bfloat16(), weight.bfloat16(), target)
    with patched(), torch.autocast("cpu", dtype=torch.bfloat16):
        (logp, *_), grads = both(
            lambda h, w: utils._ChunkedLogProbFunction.apply(
                h, w, None, target, 1.0, 8, None, 1.0, ("log_probs",)
            ),
            hidden,
            weight,
        )
    assert torch.equal(logp, rounded.logp)
    assert [g.dtype for g in grads if g is not None] == [torch.float32] * 2


@needs_trl
@pytest.mark.parametrize(
    "message, change",
    [("softcapping", {5: 30.0}), ("logit_scale", {6: 0.0}), ("ZeRO-3", {})],
    ids=["softcap", "scale", "zero3"],
)
def test_what_our_op_cannot_compute_is_refused(message, change):
    """Wrong implementation: a softcap silently ignored."""
    weight = torch.randn(61, 16)
    arguments: list[Any] = [None, torch.randint(61, (3,)), 1.0, 8, None, 1.0]
    if not change:
        weight.ds_id = 0  # type: ignore[attr-defined]
    for i, value in change.items():
        arguments[i - 1] = value
    with patched(), pytest.raises(NotImplementedError, match=message):
        utils._ChunkedLogProbFunction.apply(torch.randn(3, 16), weight, *arguments)


# --- the swap ---------------------------------------------------------------------------------------
@pytest.fixture
def pretend(monkeypatch) -> ModuleType:
    """A package called trl with the functions where TRL has them, and a trainer that imported one by name."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(  # type: ignore[no-untyped-def]
            ctx,
            last_hidden,
            weight,
            targets,
            temperature,
            chunk_size,
            final_logit_softcapping=None,
            logit_scale=1.0,
        ):
            raise AssertionError("TRL's own was called")

    home, trainer = ModuleType("trl.trainer.utils"), ModuleType("trl.trainer.grpo_trainer")
    for module in (ModuleType("trl"), ModuleType("trl.trainer"), home, trainer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in NAMES:
        setattr(home, name, Function if name == NAMES[-1] else lambda *args: args)
    trainer.renamed = home.selective_log_softmax  # type: ignore[attr-defined]
    return home


def state(home: ModuleType) -> list[Any]:
    return [getattr(home, name) for name in NAMES] + [sys.modules["trl.trainer.grpo_trainer"].renamed]  # type: ignore[attr-defined]


def test_names_imported_into_trainers_are_swapped_and_given_back(pretend):
    """Wrong implementation: only trl.trainer.utils is changed, and the trainers keep what they imported."""
    before = state(pretend)
    patch()
    during = state(pretend)
    assert not any(a is b for a, b in zip(before, during, strict=True)) and during[-1] is during[0]
    late = sys.modules["trl.late"] = ModuleType("trl.late")
    late.selective_log_softmax = pretend.selective_log_softmax  # type: ignore[attr-defined]
    unpatch()
    del sys.modules["trl.late"]
    assert state(pretend) == before and late.selective_log_softmax is before[0]
    unpatch()
    assert state(pretend) == before


def test_patching_twice_is_patching_once(pretend):
    """Wrong implementation: the second patch takes ours for TRL's, and unpatch gives ours back."""
    before = state(pretend)
    patch()
    during = state(pretend)
    patch()
    assert state(pretend) == during
    unpatch()
    assert state(pretend) == before


def test_an_exception_restores_and_an_inner_block_does_not(pretend):
    """Wrong implementations: no finally; an inner block that unpatches the outer one, or what patch() did
    before it.
    """
    before = state(pretend)
    with pytest.raises(KeyError), patched():
        during = state(pretend)
        with patched():
            pass
        assert state(pretend) == during != before
        raise KeyError
    assert state(pretend) == before
    patch()
    during = state(pretend)
    with patched():
        pass
    assert state(pretend) == during != before


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_older_signatures_are_served(pretend, with_bias):
    """TRL 1.5 to 1.12 has seven arguments, 1.13 and 1.14 a bias between; both return log-prob and entropy,
    each with a gradient.
    """
    hidden, weight, bias, target = (
        torch.randn(5, 4, requires_grad=True),
        torch.randn(9, 4),
        torch.randn(9),
        torch.randint(9, (5,)),
    )
    if with_bias:

        def forward(
            ctx,
            last_hidden,
            weight,
            bias,
            targets,
            temperature,
            chunk_size,
            final_logit_softcapping=None,
            logit_scale=1.0,
        ):
            return None

        pretend._ChunkedLogProbFunction.forward = staticmethod(forward)
    with patched():
        arguments = (bias, target) if with_bias else (target,)
        logp, entropy = pretend._ChunkedLogProbFunction.apply(hidden, weight, *arguments, 2.0, 8)
    expected = ops.linear_logp(
        hidden, weight, target, bias=bias if with_bias else None, temperature=2.0, entropy=True
    )
    assert torch.equal(logp, expected.logp)
    assert torch.equal(entropy, expected.entropy)
    assert entropy.requires_grad


def test_a_trl_without_these_functions_is_an_import_error_that_names_them(pretend):
    """Wrong implementation: nothing found, nothing swapped, nothing said."""
    forward = pretend._ChunkedLogProbFunction.forward
    pretend._ChunkedLogProbFunction.forward = staticmethod(lambda ctx, hidden, weight, labels: None)
    with pytest.raises(
        ImportError,
        match=r"_ChunkedLogProbFunction: expected the arguments \(hidden, .* has \(hidden, weight, labels\)",
    ):
        patch()
    pretend._ChunkedLogProbFunction.forward = forward
    del pretend.selective_log_softmax
    with pytest.raises(ImportError, match="expected selective_log_softmax, entropy_from_logits"):
        patch()
    assert pretend._ChunkedLogProbFunction.forward is forward


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    """Wrong implementation: the bare ModuleNotFoundError of an import deep inside."""

    class Nowhere:
        def find_spec(self, name: str, *rest: Any) -> None:
            if name.split(".")[0] == "trl":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [m for m in sys.modules if m.split(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Nowhere(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"TRL is not installed: pip install .fastrl-kernels\[peers\]"):
        patch()
