"""What every training command shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

LATEST = "runs/latest"  # not a folder but a link: a run that names no folder gets one beside it


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    """AdamW and its schedule."""

    lr: float = 1e-5
    """Peak learning rate."""
    warmup: int = 0
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up."""
    floor: float = 0.0
    """Final learning rate, as a fraction of the peak, of the linear and cosine schedules."""
    clip: float = 1.0
    """Largest global L2 norm of the gradient; 0 turns clipping off."""
    beta1: float = 0.9
    """Decay of AdamW's running mean of the gradient."""
    beta2: float = 0.95
    """Decay of AdamW's running mean of the squared gradient."""
    eps: float = 1e-8
    """Epsilon of AdamW, added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled; applied to matrices only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn in training."""

    temperature: float = 1.0
    """Divides the logits, in sampling and in the loss."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 keeps the whole vocabulary."""
    top_p: float = 1.0
    """Sample from the fewest tokens with at least this probability together; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens below this share of the most likely token's probability; 0 keeps all."""
    max_tokens_in_flight: int = 262144
    """Key/value cache budget, in tokens."""
    cache_bytes: int = 0
    """Key/value cache budget in bytes, in place of max_tokens_in_flight; 0 leaves it to that."""
    keep_cache: bool = True
    """Keep the cache while training; otherwise its memory is free for training, and CUDA graphs are captured
    again each step.
    """
    max_rows: int | None = None
    """Sequences decoded together; None is 256 on CPU, 1024 on CUDA."""
    logits_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the logits that tokens are drawn from. bfloat16, for a bfloat16 model, halves their
    traffic; recorded log-probs then differ from the trainer's by that rounding.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Eval:
    """Accuracy on a held-out split while training."""

    every: int = 0
    """Optimizer steps between evaluations; 0 evaluates only before the first and after the last step."""
    prompts: int = 0
    """Held-out prompts per evaluation; 0 turns evaluation off."""
    split: str = "val"
    """The task's split that is evaluated on."""
    samples: int = 1
    """Completions drawn per prompt at temperature 1, in addition to the greedy one."""
    max_new_tokens: int | None = None
    """Longest completion, tokens; defaults to the run's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Checkpoints."""

    every: int = 0
    """Optimizer steps between checkpoints; 0 saves the last step, and what --save.minutes asks for."""
    minutes: float = 15.0
    """Also save when the last checkpoint is this many minutes old; the next checkpoint replaces such a one.
    0 turns this off.
    """
    keep: int = 2
    """Checkpoints kept; an older one is removed after a newer one is complete.  0 keeps all."""
    grace: float = 300.0
    """Seconds that a step may still take after SIGTERM or a closed terminal; then the run ends without it.
    0 waits as long as the step takes.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What every training command shares."""

    model: str
    """Hugging Face folder, the folder of a run (its newest checkpoint), or a config.json (or YAML of one) for
    random initial weights.
    """
    tokenizer: str | None = None
    """Hugging Face tokenizer folder; defaults to the model's, or to the task's own."""
    chat_template: str | None = None
    """A file with a chat template (Jinja), in place of the tokenizer's own; saved with the checkpoint's.
    """
    trust_remote_code: bool = False
    """Run the code that the folders of models and tokenizers bring (auto_map), where transformers does not
    know them.  Read it first.
    """
    task: str | None = None
    """A built-in task (cards, gsm8k or guess), or a class in a file of yours: my_task.py:MyTask."""
    task_options: tuple[str, ...] = ()
    """Options of the task, key=value with values in YAML: k=3 targets=[1,40]."""
    dataset: str | None = None
    """JSON lines, JSON or parquet file with TRL's columns: prompt, completion, messages, text, ..."""
    columns: tuple[str, ...] = ()
    """Names of the dataset's columns, theirs=ours: question=prompt answer=completion."""
    output_dir: str = LATEST
    """Folder for everything the run writes.  Without one, a new run gets runs/COMMAND-N, runs/latest links to
    it, and --resume continues the command's newest.
    """
    steps: int = 100
    """Training steps, of one batch of prompts each (and one optimizer step, unless minibatches or epochs ask
    for more).
    """
    prompts: int = 32
    """Prompts per step (SFT: demonstrations per step)."""
    max_tokens: int | None = None
    """Longest sequence, tokens; longer ones are an error that names the line.  Defaults to the model's
    context.
    """
    micro_tokens: int = 16384
    """Tokens per forward and backward pass: lower it when memory runs out."""
    seed: int = 0
    """Seed of all of the run's randomness, together with the step."""
    threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; auto is float32 on CPU and bfloat16 on CUDA.  Master weights are always float32."""
    exact: bool = False
    """Batch-invariant arithmetic: sampled log-probs equal the trainer's bit for bit; slower."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward, and recompute the rest: less memory, more time."""
    max_seconds: float = 0.0
    """Stop, as Ctrl-C does, after this much training time; 0 is no limit."""
    resume: bool = False
    """Continue from the newest complete checkpoint of output_dir."""
    optim: Optim = field(default_factory=Optim)
    eval: Eval = field(default_factory=Eval)
    save: Save = field(default_factory=Save)
