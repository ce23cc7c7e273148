"""Rewards of completions: functions, reward models, implicit rewards, and the scorer that combines them."""
