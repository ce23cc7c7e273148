"""The command `fastrl generate`: prompts from a file or standard input, completions to a file or the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from fastrl.adapter import load_model
from fastrl.config import Generate
from fastrl.data import encode_prompt
from fastrl.device import place, set_threads
from fastrl.errors import UserError
from fastrl.files import decode, read_json_lines
from fastrl.sampler import Sampler, SamplingParams
from fastrl.sampler.prompts import check_room
from fastrl.tokenizer import load_tokenizer
from fastrl.types import Rollouts

CHUNK = 64  # prompts whose completions are written together: an interrupted run keeps what it has


def run(config: Generate) -> None:
    """Complete every prompt, `n` times each, and write one JSON line (or, on a terminal, one paragraph) per completion."""
    set_threads(config.threads)
    device, dtype = place(config.device, config.dtype)
    model = load_model(config.model, dtype=dtype, device=device)
    tokenizer = load_tokenizer(config.tokenizer, config.model, None)
    s = config.sampling
    sampler = Sampler(model, tokenizer, max_tokens_in_flight=s.max_tokens_in_flight)
    params = SamplingParams(
        n=config.n, max_new_tokens=config.max_new_tokens, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p,
        min_p=s.min_p, seed=config.seed,
    )  # fmt: skip
    prompts = list(read_prompts(config.prompts))
    encoded = [_encode(where, prompt, tokenizer, model.config.max_position_embeddings) for where, prompt in prompts]
    with ExitStack() as stack:
        out = sys.stdout if config.output == "-" else stack.enter_context(Path(config.output).open("w", encoding="utf-8"))
        for first in range(0, len(prompts), CHUNK):
            part = slice(first, first + CHUNK)
            _write(out, [p for _, p in prompts[part]], sampler.generate(encoded[part], params, sequence_offset=first * config.n))
            print(f"{min(first + CHUNK, len(prompts))} of {len(prompts)} prompts", file=sys.stderr)


def read_prompts(path: str) -> Iterator[tuple[str, Any]]:
    """(`file:line`, prompt) of every line that is not blank; of a .jsonl file, its `prompt` column (text, or a list of messages).

    Raises UserError naming the line that is wrong.
    """
    if path.endswith(".jsonl"):
        for where, row in read_json_lines(path):
            if "prompt" not in row:
                raise UserError(f"{where}: expected a prompt column, got {', '.join(row) or 'none'}")
            yield where, row["prompt"]
        return
    name = "standard input" if path == "-" else path
    text = sys.stdin.read() if path == "-" else decode(Path(path).read_bytes(), path)
    yield from ((f"{name}:{number}", line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _encode(where: str, prompt: Any, tokenizer: Any, context: int) -> list[int]:
    tokens = encode_prompt(prompt, tokenizer, where=where)
    check_room(len(tokens), where, context)
    return tokens


def _write(out: TextIO, prompts: list[Any], rollouts: Rollouts) -> None:
    text, index, ends = rollouts.text or [], rollouts.prompt_index.tolist(), rollouts.cu_seqlens.tolist()
    for i, completion in enumerate(text):
        prompt = prompts[index[i]]
        if out.isatty():
            out.write(f"{prompt}\n  {completion}\n")
            continue
        mine = slice(ends[i], ends[i + 1])
        logp = rollouts.logp[mine][rollouts.completion_mask[mine]]
        row = {"prompt": prompt, "completion": completion, "finish_reason": rollouts.finish_reason[i]}
        out.write(json.dumps(row | {"logp": [round(x, 6) for x in logp.tolist()]}) + "\n")
    out.flush()
