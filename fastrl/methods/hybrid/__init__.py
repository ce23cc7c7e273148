"""Hybrids of supervised, preference and reinforcement learning."""
