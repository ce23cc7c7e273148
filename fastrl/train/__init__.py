"""The optimizer step: objective, optimizer, learner, weights of tokens, and where data comes from."""
