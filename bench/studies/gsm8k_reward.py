"""What a reward model of GSM8K learns from: its training set's solutions, and the graded solutions that were
released beside it.

python -m fastrl.bench.studies.gsm8k_reward FOLDER --output runs/gsm8k     # FOLDER holds train.jsonl and
model_solutions.jsonl

Writes tokenizer/, solutions.jsonl and groups.jsonl, for gsm8k_read.yaml and gsm8k_reward.yaml.
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
    """Read the two files, and write what the recipes read."""
    parser = argparse.ArgumentParser(
        prog="python -m fastrl.bench.studies.gsm8k_reward", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="folder of train.jsonl and model_solutions.jsonl")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gsm8k"), help="folder to write (default: runs/gsm8k)"
    )
    options = parser.parse_args(argv)
    try:
        prepare(options.folder, options.output)
    except UserError as error:
        print(f"gsm8k_reward: error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: tokenizer, solutions.jsonl, groups.jsonl")
    return 0


def prepare(folder: Path, output: Path) -> None:
    """Write the tokenizer and both datasets.  Raises UserError for a missing file, and a line without the
    data set's columns.
    """
    written = [_written(row, where) for where, row in read_json_lines(folder / "train.jsonl")]
    groups = [_group(row, where) for where, row in read_json_lines(folder / "model_solutions.jsonl")]
    train_bpe([t["prompt"] + t["completion"] for t in written], VOCABULARY).save_pretrained(
        output / "tokenizer"
    )
    _write(output / "solutions.jsonl", (t for t in written if len(t["prompt"] + t["completion"]) < LONGEST))
    _write(output / "groups.jsonl", (g for g in groups if _usable(g)))


def _written(row: Mapping[str, Any], where: str) -> dict[str, str]:
    """A problem with its own solution, which ends as the graded ones do."""
    question, answer = (_field(row, name, where) for name in ("question", "answer"))
    return {"prompt": _prompt(question), "completion": answer.replace("\n#### ", "\nA: ")}


def _group(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A problem with the four models' solutions, 1 for right and 0 for wrong."""
    solved = [_field(row, name, where, dict) for name in GRADED]
    texts = [_field(s, "solution", where) for s in solved]
    right = [float(_field(s, "is_correct", where, bool)) for s in solved]
    return {"prompt": _prompt(_field(row, "question", where)), "completions": texts, "scores": right}


def _usable(group: Mapping[str, Any]) -> bool:
    """Whether there is something to compare, and room for it."""
    return (
        len(set(group["scores"])) > 1
        and max(len(group["prompt"] + c) for c in group["completions"]) < 2 * LONGEST
    )


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
