"""`fastrl dpo`: preference optimisation, on pairs of completions or on labelled ones."""

from __future__ import annotations

from fastrl.batch.types import Batch
from fastrl.methods.dpo.objective import UnitObjective
from fastrl.methods.dpo.options import choose_preference
from fastrl.methods.dpo.reference import PreferenceContext, preference_source
from fastrl.methods.method import Method, arithmetic, language_model
from fastrl.report.metrics import LOGGED
from fastrl.train.learner import Learner, Trainable
from fastrl.train.source import Source


def learner(context: PreferenceContext) -> Learner[Batch]:
    """The loss of whole units."""
    objective = UnitObjective(context.model, context.algorithm, context.temperature)
    return context.learner(objective, context.weights(context.model))


def source(context: PreferenceContext, learner: Trainable[Batch]) -> tuple[Source[Batch], int]:
    """Pairs or labelled examples, with the reference's log-probs."""
    return preference_source(context, arithmetic)


METHOD = Method(
    choose=choose_preference,
    load=language_model,
    learner=learner,
    source=source,
    metrics=LOGGED["dpo"],
)
