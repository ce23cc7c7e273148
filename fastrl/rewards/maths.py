"""`--reward math:COLUMN`: 1 for a completion whose marked answer is that of the column, else 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastrl.errors import UserError
from fastrl.tasks.gsm8k import marked
from fastrl.tasks.maths import check_math_verify, same_answer
from fastrl.tasks.task import whole_text


def math_reward(column: str, **where: object) -> Callable[..., list[float | None]]:
    """The reward function of a column; its values are answers, or solutions that mark one.

    An answer is what follows the last `####`, is in the last box, or follows `answer is` or `answer:`.
    Raises UserError without a column's name, and without math-verify.
    """
    if not column:
        raise UserError("--reward: expected math:COLUMN, the column that holds the right answers, got math:")
    check_math_verify(f"--reward math:{column}")

    def math(completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
        if column not in columns:
            raise UserError(f"expected a column {column!r}, there is only {', '.join(columns)}")
        rewards: list[float | None] = []
        for said, gold in zip(completions, columns[column], strict=True):
            answer = marked(whole_text(said))
            right = gold if gold is None else marked(str(gold)) or str(gold)
            rewards.append(
                None if right is None else float(bool(answer) and same_answer(right, answer or ""))
            )
        return rewards

    return math
