"""One run from its configuration to its files: session, checkpoints, log, evaluation, generation."""
