"""One folder per training command."""
