"""Loads checkpoints from this machine's disk as transformers' own classes."""
