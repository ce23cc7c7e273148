"""What the gate runs: small calls of every kernel with their float64 truth."""
