"""PPO: reinforcement learning with a critic."""
