"""Data of a reward model for GSM8K: the training set's solutions, and the graded solutions of its release.

    python -m fastrl.bench.studies.gsm8k_reward FOLDER --output runs/gsm8k

FOLDER holds train.jsonl and model_solutions.jsonl.  Writes tokenizer/, solutions.jsonl and groups.jsonl for
gsm8k_read.yaml and gsm8k_reward.yaml.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrl.errors import UserError
from fastrl.files import read_json_lines
from fastrl.tasks.tokens import train_bpe

GRADED = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
LONGEST = 800  # characters of a problem with a solution: at most 512 tokens
VOCABULARY = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Read both files, and write the recipes' datasets."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m fastrl.bench.studies.gsm8k_reward", description=summary)
    parser.add_argument("folder", type=Path, help="folder of train.jsonl and model_solutions.jsonl")
    output, default = "folder to write (default: runs/gsm8k)", Path("runs/gsm8k")
    parser.add_argument("--output", type=Path, default=default, help=output)
    options = parser.parse_args(argv)
    try:
        prepare(options.folder, options.output)
    except UserError as error:
        print(f"gsm8k_reward: error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: tokenizer, solutions.jsonl, groups.jsonl")
    return 0


def prepare(folder: Path, output: Path) -> None:
    """Write the tokenizer and both datasets.

    Raises UserError for a missing file, and for a line without the data set's columns.
    """
    solutions = [_solution(row, where) for where, row in read_json_lines(folder / "train.jsonl")]
    groups = [_group(row, where) for where, row in read_json_lines(folder / "model_solutions.jsonl")]
    texts = [s["prompt"] + s["completion"] for s in solutions]
    train_bpe(texts, VOCABULARY).save_pretrained(output / "tokenizer")

    short = [s for s, text in zip(solutions, texts, strict=True) if len(text) < LONGEST]
    _write(output / "solutions.jsonl", short)
    _write(output / "groups.jsonl", [group for group in groups if _usable(group)])


def _solution(row: Mapping[str, Any], where: str) -> dict[str, str]:
    """A problem with its own solution, which ends as the graded ones do."""
    question, answer = _field(row, "question", where), _field(row, "answer", where)
    return {"prompt": _prompt(question), "completion": answer.replace("\n#### ", "\nA: ")}


def _group(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A problem with the four models' solutions, 1 for right and 0 for wrong."""
    prompt = _prompt(_field(row, "question", where))
    solved = [_field(row, name, where, dict) for name in GRADED]
    texts = [_field(s, "solution", where) for s in solved]
    correct = [float(_field(s, "is_correct", where, bool)) for s in solved]
    return {"prompt": prompt, "completions": texts, "scores": correct}


def _usable(group: Mapping[str, Any]) -> bool:
    """Whether the scores differ, and the texts are short enough."""
    longest = max(len(group["prompt"] + c) for c in group["completions"])
    return len(set(group["scores"])) > 1 and longest < 2 * LONGEST


def _prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:\n"


def _field(row: Mapping[str, Any], name: str, where: str, kind: type = str) -> Any:
    if not isinstance(row.get(name), kind):
        raise UserError(f"{where}: expected {name}, a {kind.__name__}; the columns are {', '.join(row)}")
    return row[name]


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
