"""Configurations worth running, and the demonstration that runs three of them."""
