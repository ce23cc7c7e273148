"""Reinforcement learning from verified rewards: the GRPO family."""
