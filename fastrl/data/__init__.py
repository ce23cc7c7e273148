"""Rows of datasets, and what they become: samples, pairs, comparisons."""
