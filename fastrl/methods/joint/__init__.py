"""A policy and its reward model, trained side by side."""
