"""`fastrl sft`: supervised fine-tuning on demonstrations."""

from __future__ import annotations

from fastrl.batch.types import Batch
from fastrl.config import Sft
from fastrl.methods.method import Context, Method, language_model
from fastrl.methods.sft.batches import DemonstrationEncoder, Demonstrations, demonstrations
from fastrl.methods.sft.objective import SupervisedObjective
from fastrl.methods.sft.options import SupervisedAlgorithm, choose_supervised
from fastrl.model.language import LanguageModel
from fastrl.report.metrics import LOGGED
from fastrl.train.learner import Learner, Trainable
from fastrl.train.objective import PolicyObjective
from fastrl.train.source import Source

SftContext = Context[Sft, SupervisedAlgorithm, LanguageModel]


def learner(context: SftContext) -> Learner[Batch]:
    """The plain policy loss, and what the options add to it."""
    model, algorithm = context.model, context.algorithm
    plain = PolicyObjective(model, algorithm.policy, context.temperature)

    adds = algorithm.label_smoothing or algorithm.z_loss or algorithm.neftune_alpha
    objective = SupervisedObjective(plain, algorithm) if adds else plain
    return context.learner(objective, context.weights(model))


def source(context: SftContext, learner: Trainable[Batch]) -> tuple[Source[Batch], int]:
    """Demonstrations of the dataset or the task."""
    config, shape = context.config, context.model.config
    encode = DemonstrationEncoder(config, context.tokenizer, shape.max_position_embeddings, shape.vocab_size)
    items, size = demonstrations(encode, context.task, context.world)
    context.tell(items, size, "demonstrations")

    drawn = Demonstrations(
        items,
        size,
        count=config.prompts,
        algorithm=context.algorithm.policy,
        seed=config.seed,
        device=context.device,
        world=context.world,
        weighted=config.sample_weights,
    )
    return drawn, encode.longest


METHOD = Method(
    choose=choose_supervised,
    load=language_model,
    learner=learner,
    source=source,
    metrics=LOGGED["sft"],
)
