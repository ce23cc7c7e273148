"""Other libraries running on our ops, without a change in their code."""
