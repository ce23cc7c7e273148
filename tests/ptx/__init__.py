"""Runs the sm_90 code of every kernel without a GPU: `launch.py` says how."""
