"""fastrl: kernel-accelerated post-training for language models.  Importing this does not import torch."""

__version__ = "0.1.0"
