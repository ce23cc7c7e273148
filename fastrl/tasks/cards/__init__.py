"""The card game: reach a target with every card, judged by a verifier."""
