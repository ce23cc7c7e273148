"""Train a byte-level BPE tokenizer on a dataset's text, for a model that starts from random weights.

python -m fastrl.recipes.tokenizer train.jsonl --columns question answer --output runs/tokenizer
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastrl.errors import UserError
from fastrl.files import read_json_lines
from fastrl.tasks.tokens import train_bpe


def main(argv: Sequence[str] | None = None) -> int:
    """Read the columns of a JSON lines file, train, and save a Hugging Face tokenizer folder."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m fastrl.recipes.tokenizer", description=summary)
    parser.add_argument("dataset", type=Path, help="JSON lines file")
    default = ["prompt", "completion"]
    parser.add_argument(
        "--columns",
        nargs="+",
        default=default,
        help="columns that hold text",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=2048,
        help="tokens, at least 258 (default: 2048)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder to write",
    )
    options = parser.parse_args(argv)
    texts: list[str] = []
    try:
        for where, row in read_json_lines(options.dataset):
            texts += columns(row, options.columns, where)
        train_bpe(texts, options.vocab_size).save_pretrained(options.output)
    except (UserError, ValueError) as error:
        print(f"tokenizer: error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {options.vocab_size} tokens, trained on {len(texts)} texts")
    return 0


def columns(row: dict[str, object], names: Sequence[str], where: str) -> list[str]:
    """The row's text in the named columns.  Raises UserError naming the line."""
    texts = []
    for name in names:
        value = row.get(name)
        if not isinstance(value, str):
            kind = type(value).__name__
            present = ", ".join(row)
            raise UserError(
                f"{where}: expected text in column {name!r}, got {kind}; the columns are {present}"
            )
        texts.append(value)
    return texts


if __name__ == "__main__":
    sys.exit(main())
