"""What a run is about to do, in a few aligned lines: shown once, before its first step."""

from __future__ import annotations

import torch

from fastrl.config import Run
from fastrl.methods import command_of
from fastrl.methods.method import AnyContext


def banner(context: AnyContext) -> str:
    """The lines, each `name  what`."""
    config = context.config
    lines = {"model": _model(context), "algorithm": _algorithm(config), **_data(context)}
    lines |= {"device": _device(context), "output": f"{config.output_dir}, seed {config.seed}"}
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {what}" for name, what in lines.items())


def _model(context: AnyContext) -> str:
    model = context.model
    named = dict(model.named_parameters())
    count = sum(parameter.numel() for parameter in named.values())
    architecture = getattr(model.config, "architecture", type(model).__name__)
    return f"{context.config.model}: {architecture}, {count:,} parameters"


def _algorithm(config: Run) -> str:
    """The command, and the row of its table where it has several."""
    command = command_of(config)
    row = getattr(getattr(config, "algorithm", None), "name", command)
    return command if row == command else f"{command}, {row}"


def _data(context: AnyContext) -> dict[str, str]:
    """How much there is to train on, and how often --steps goes through it."""
    config = context.config
    lines = {}
    if config.dataset is not None:
        lines["dataset"] = config.dataset
    elif context.task is not None:
        lines["task"] = context.task.name
    for name in lines:
        if context.data:
            amount = context.data[0]
            tokens = "" if amount.tokens is None else f", {amount.tokens:,} tokens"
            lines[name] += f": {amount.items:,} {amount.what}{tokens}"
    what = context.data[0].what if context.data else "prompts"
    steps = f"{config.steps:,} of {config.prompts:,} {what}"
    if context.data and context.data[0].items:
        epochs = config.steps * config.prompts / context.data[0].items
        steps += f", {epochs:.3g} epochs"
    return lines | {"steps": steps}


def _device(context: AnyContext) -> str:
    device, world = context.device, context.world
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    kind = "" if device.type == "cpu" else f"{device}, "
    dtype = str(context.model.dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    text = f"{kind}{name}, {dtype}, {threads} thread{'s' * (threads != 1)}"
    return text if world.size == 1 else f"{text}, {world.size} processes"
