"""What is asked of a causal language model of transformers: logits that are hidden states times a head, and
tokens that see earlier ones alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.errors import UserError

BEHIND_HEAD: dict[str, tuple[object, ...]] = {  # what models do to their logits -> the values that do nothing
    "final_logit_softcapping": (None,),
    "logits_soft_cap": (None,),
    "logit_softcap": (None,),
    "output_logit_soft_cap": (None,),
    "softcap": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_multiplier": (None, 1),
    "output_multiplier": (None, 1),
}
PROBES = (1e-2, 1.0, 10.0, 30.0, 100.0, 1e3, 1e4, 1e5)  # largest logits that the head is tried at


def check_language_model(lm: Any, hidden_states: Callable[..., Tensor]) -> None:
    """Refuse a model whose logits are not hidden @ weight.T + bias, or whose tokens see later ones.

    hidden_states(input_ids) are the model's.  What the configuration says comes first, because a cap or a
    factor may not show in small logits.
    Raises:  UserError.
    """
    name, config = type(lm).__name__, lm.config
    plain = "its logits are not a plain product of hidden states and a head, which every loss here needs"
    for settings in (config, config.get_text_config()):
        for key, neutral in BEHIND_HEAD.items():
            value = getattr(settings, key, None)
            if value not in neutral:
                raise UserError(f"{name}: config.json: {key}: expected none, got {value}: {plain}")

    head = lm.get_output_embeddings()
    size = head.weight.shape[0]
    tokens = torch.arange(len(PROBES), device=head.weight.device)[None].repeat(2, 1) % size
    tokens[1, -1] = (tokens[1, -1] + 1) % size
    with torch.no_grad():
        hidden = hidden_states(input_ids=tokens)
        theirs = lm(input_ids=tokens, use_cache=False, return_dict=True).logits
        if not (_close(head(hidden), theirs) and _is_linear(lm, head, hidden)):
            raise UserError(f"{name}: {plain}")
    if not _close(hidden[0, :-1], hidden[1, :-1]):
        raise UserError(f"{name}: expected a causal language model, but its tokens see later ones")


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two results of a model agree, up to rounding in their dtype, in every row."""
    relative = 1e-4 if a.dtype in (torch.float32, torch.float64) else 3e-2
    tolerance = relative * b.float().abs().amax(-1, keepdim=True)
    return bool(((a.float() - b.float()).abs() <= tolerance).all())


def _is_linear(lm: Any, head: nn.Module, hidden: Tensor) -> bool:
    """Whether the logits are the head's product at every size, hidden states put in the place of the model's
    own.
    """
    weight: Any = head.weight
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    states = noise.to(weight.device, torch.float32)
    largest = (states @ weight.float().T).abs().amax(-1, keepdim=True)
    sizes = torch.tensor(PROBES, device=weight.device)[:, None]
    states = (states * sizes / largest.clamp_min(1e-20)).to(weight.dtype)

    def put(module: nn.Module, inputs: object, output: Any) -> Any:
        output.last_hidden_state = states
        return output

    handle = lm.base_model.register_forward_hook(put)
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=weight.device)
    try:
        theirs = lm(input_ids=tokens, use_cache=False, return_dict=True).logits
    finally:
        handle.remove()
    return _close(head(states), theirs)
